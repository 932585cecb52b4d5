//! Measuring models: perplexity, agreement with a base, bytes, speed.

use crate::error::Result;
use crate::jobs::progress::Progress;
use crate::models::Model;
use crate::proto::v1;

/// Inputs of an evaluation.
pub struct Subject<'a> {
    pub model: &'a Model,
    /// Model to compare with, when asked for.
    pub base: Option<&'a Model>,
    /// Text to measure on, documents joined; needed for perplexity and agreement.
    pub text: Option<&'a str>,
    /// Bytes of all files of the version.
    pub disk_bytes: u64,
}

/// Measures what `options` asks for. Always: bytes on disk, weight bytes, resident bytes, parameters.
/// Perplexity (metric `perplexity`) when a data set is given; `kl_divergence` and `top1_agreement` with
/// `compare_with_base`; `prefill_tokens_per_second` and `decode_tokens_per_second` with `speed`.
pub fn evaluate(
    _subject: &Subject<'_>,
    _options: &v1::Evaluation,
    _progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    todo!()
}
