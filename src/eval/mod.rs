//! Measuring models: perplexity, agreement with a base, bytes, speed.

mod likelihood;
mod speed;

use crate::calibrate::{encode_prefix, walk};
use crate::error::{Error, Reason, Result};
use crate::models::decoder::plan::{Cache, CacheFormat};
use crate::models::{Model, ModelInfo};
use crate::progress::Progress;
use crate::proto::v1;

use self::likelihood::Protocol;

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

/// Longest window.
const MAX_CONTEXT: u32 = 8192;

/// Checks the options of an evaluation against a model.
pub fn check(options: &v1::Evaluation, model: &ModelInfo) -> Result<()> {
    let config = Settings::read(options, walk::of(&model.family).max_length())?;
    if config.text && !model.has_tokenizer {
        return Err(no_tokenizer());
    }
    Ok(())
}

/// Measures what `options` asks for. Always: `disk_bytes`, `weight_bytes`, `resident_bytes`,
/// `parameters`, `zero_share` (of the linear weights inside the blocks). `perplexity` when a data set
/// is given; `kl_divergence` and `top1_agreement` with `compare_with_base`;
/// `prefill_tokens_per_second` and `decode_tokens_per_second` with `speed`.
///
/// Text is tokenised once without a start token and cut in windows of `context` tokens, `stride`
/// apart. Where the model asks for a start token, it stands in place of each window's first token.
/// Every prediction of the first window is scored, of later ones those that no earlier window scored.
/// Perplexity is the exponential of the mean over windows of the mean negative log-likelihood.
pub fn evaluate(
    subject: &Subject<'_>,
    options: &v1::Evaluation,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let model = subject.model;
    let settings = Settings::read(options, walk::of(&model.family).max_length())?;
    progress.report(0.0, "measuring sizes")?;
    let mut out = sizes(subject, settings.context)?;
    let texted = if options.speed { 0.7 } else { 1.0 };
    if settings.text {
        let text = subject.text.ok_or_else(|| {
            Error::new(
                Reason::DatasetUnsuitable,
                format!("the text of '{}' was not read", options.dataset),
            )
        })?;
        let base = match (options.compare_with_base, subject.base) {
            (true, Some(base)) => Some(base),
            (true, None) => {
                return Err(Error::field(
                    "compare_with_base",
                    "there is no base version to compare with; name one, or leave this out",
                ));
            }
            (false, _) => None,
        };
        let part = progress.part(0.02, texted);
        out.extend(on_text(model, base, text, &options.dataset, &settings, &part)?);
    }
    if options.speed {
        out.extend(speed::measure(
            model,
            &progress.part(if settings.text { texted } else { 0.02 }, 1.0),
        )?);
    }
    progress.report(1.0, "measured")?;
    Ok(out)
}

struct Settings {
    context: usize,
    stride: usize,
    max_tokens: usize,
    text: bool,
}

impl Settings {
    fn read(options: &v1::Evaluation, longest: usize) -> Result<Self> {
        let most = MAX_CONTEXT.min(u32::try_from(longest).unwrap_or(u32::MAX));
        let context = options.context.unwrap_or(most.min(512));
        if !(2..=most).contains(&context) {
            return Err(Error::field("context", format!("{context} is outside 2 to {most}")));
        }
        let stride = options.stride.unwrap_or(context);
        if !(1..=context).contains(&stride) {
            return Err(Error::field(
                "stride",
                format!("{stride} is outside 1 to the context of {context}"),
            ));
        }
        let max_tokens = options.max_tokens.unwrap_or(20_000);
        if max_tokens != 0 && max_tokens < context {
            return Err(Error::field(
                "max_tokens",
                format!("{max_tokens} tokens hold no window of {context}; 0 means all"),
            ));
        }
        let dataset = &options.dataset;
        if !dataset.is_empty() && dataset.strip_prefix("datasets/").is_none_or(str::is_empty) {
            return Err(Error::field(
                "dataset",
                format!("'{dataset}' is no resource name of a data set; write datasets/NAME"),
            ));
        }
        if options.compare_with_base && dataset.is_empty() {
            return Err(Error::field("compare_with_base", "needs a data set to compare on"));
        }
        Ok(Self {
            context: context as usize,
            stride: stride as usize,
            max_tokens: if max_tokens == 0 { usize::MAX } else { max_tokens as usize },
            text: !dataset.is_empty(),
        })
    }
}

fn on_text(
    model: &Model,
    base: Option<&Model>,
    text: &str,
    dataset: &str,
    settings: &Settings,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let tokenizer = model.tokenizer.as_deref().ok_or_else(no_tokenizer)?;
    progress.report(0.0, "tokenising the text")?;
    let tokens = if settings.max_tokens == usize::MAX {
        tokenizer.encode(text, false, false)?
    } else {
        encode_prefix(tokenizer, text, settings.max_tokens)?
    };
    let start = if tokenizer.add_bos { tokenizer.bos } else { None };
    let protocol = Protocol { context: settings.context, stride: settings.stride, start };
    let windows = protocol.windows(tokens.len());
    if windows == 0 {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!(
                "'{dataset}' has {} tokens, a window has {}; take a longer text or a smaller context",
                tokens.len(),
                settings.context,
            ),
        ));
    }
    let found = likelihood::measure(model, base, &tokens, &protocol, progress)?;
    let protocol = format!(
        "{dataset}, context {}, stride {}, {} tokens, {windows} windows, {} predictions, {} start token, \
         {} threads",
        settings.context,
        settings.stride,
        tokens.len(),
        found.predictions,
        if start.is_some() { "with" } else { "no" },
        rayon::current_num_threads(),
    );
    let measurement =
        |metric: &str, value: f64, unit: &str, higher_is_better: bool| v1::Measurement {
            metric: metric.into(),
            value,
            unit: unit.into(),
            higher_is_better,
            protocol: protocol.clone(),
        };
    let mut out = vec![measurement("perplexity", found.mean_nll.exp(), "", false)];
    if let Some(agreement) = found.agreement {
        out.push(measurement("kl_divergence", agreement.kl, "nats", false));
        out.push(measurement("top1_agreement", agreement.top1, "", true));
    }
    Ok(out)
}

fn sizes(subject: &Subject<'_>, context: usize) -> Result<Vec<v1::Measurement>> {
    let model = subject.model;
    let measurement =
        |metric: &str, value: f64, unit: &str, higher: bool, protocol: String| v1::Measurement {
            metric: metric.into(),
            value,
            unit: unit.into(),
            higher_is_better: higher,
            protocol,
        };
    let cache = Cache::bytes_for(model.decoder()?, context, CacheFormat::default()) as u64;
    let walk = walk::of(&model.family);
    let (mut zeros, mut elements) = (0u64, 0u64);
    for name in (0..walk.blocks()).flat_map(|b| walk.linears(b).into_iter().flatten()) {
        let weight = model.weight(&name)?;
        zeros += weight.zeros();
        elements += (weight.rows() * weight.cols()) as u64;
    }
    let share = zeros as f64 / elements.max(1) as f64;
    let bytes = |v: u64| v as f64;
    Ok(vec![
        measurement(
            "disk_bytes",
            bytes(subject.disk_bytes),
            "bytes",
            false,
            "all files of the version".into(),
        ),
        measurement(
            "weight_bytes",
            bytes(model.bytes()),
            "bytes",
            false,
            "all weights as stored".into(),
        ),
        measurement(
            "resident_bytes",
            bytes(model.bytes() + cache),
            "bytes",
            false,
            format!("weights, and keys and values of {context} positions"),
        ),
        measurement("parameters", bytes(model.parameters()), "", false, "all weights".into()),
        measurement(
            "zero_share",
            share,
            "",
            true,
            "linear weights inside the blocks, as they are multiplied".into(),
        ),
    ])
}

fn no_tokenizer() -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        "the model has no tokenizer, so it cannot be measured on a text; leave the data set out",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_are_named() {
        let bad = [
            (v1::Evaluation { context: Some(1), ..Default::default() }, "context"),
            (v1::Evaluation { context: Some(65), ..Default::default() }, "context"),
            (v1::Evaluation { stride: Some(0), ..Default::default() }, "stride"),
            (v1::Evaluation { stride: Some(65), ..Default::default() }, "stride"),
            (v1::Evaluation { max_tokens: Some(63), ..Default::default() }, "max_tokens"),
            (v1::Evaluation { dataset: "wiki".into(), ..Default::default() }, "dataset"),
            (v1::Evaluation { compare_with_base: true, ..Default::default() }, "compare_with_base"),
        ];
        for (options, field) in bad {
            let error = Settings::read(&options, 64).map(|_| ()).unwrap_err();
            assert_eq!(error.violations()[0].field, field);
        }
        let settings = Settings::read(&v1::Evaluation::default(), 4096).expect("defaults");
        assert_eq!((settings.context, settings.stride, settings.max_tokens), (512, 512, 20_000));
    }
}
