//! Which text calibrates: windows of a data set, or text that the model samples.

use std::sync::Arc;

use rand::Rng as _;

use super::{sample, walk};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::models::{Family, Model, ModelInfo};
use crate::progress::Progress;
use crate::proto::v1::{self, CalibrationSampling};
use crate::seed::Stream;

/// Bytes of text tokenised for each token wanted from its start; more are taken when they do not do.
const BYTES_PER_TOKEN: usize = 8;

/// Checked calibration options.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Options {
    /// Resource name of a data set; none: the model samples.
    pub dataset: Option<String>,
    pub sequences: usize,
    pub length: usize,
    pub sampling: CalibrationSampling,
}

impl Options {
    /// Fills in what is absent.
    pub fn resolve(options: &mut Option<v1::Calibration>) {
        let options = options.get_or_insert_default();
        options.sequences.get_or_insert(32);
        options.sequence_length.get_or_insert(256);
        if options.sampling == CalibrationSampling::Unspecified as i32 {
            options.sampling = CalibrationSampling::Random as i32;
        }
    }

    /// Reads and checks the options of a message. Errors name `calibration.<option>`.
    pub fn read(options: Option<&v1::Calibration>) -> Result<Self> {
        let mut options = options.cloned();
        Self::resolve(&mut options);
        let options = options.unwrap_or_default();
        let bounded = |name: &str, value: Option<u32>, range: std::ops::RangeInclusive<u32>| {
            let value = value.unwrap_or_default();
            if range.contains(&value) {
                return Ok(value as usize);
            }
            let (low, high) = range.into_inner();
            Err(Error::option(
                format!("calibration.{name}"),
                format!("{value} is outside {low} to {high}"),
            ))
        };
        let sampling = CalibrationSampling::try_from(options.sampling).map_err(|_| {
            Error::option(
                "calibration.sampling",
                format!("{} is no number of CalibrationSampling", options.sampling),
            )
        })?;
        let dataset = options.dataset;
        if !dataset.is_empty() && dataset.strip_prefix("datasets/").is_none_or(str::is_empty) {
            return Err(Error::option(
                "calibration.dataset",
                format!("'{dataset}' is no resource name of a data set; write datasets/NAME"),
            ));
        }
        Ok(Self {
            dataset: (!dataset.is_empty()).then_some(dataset),
            sequences: bounded("sequences", options.sequences, 1..=4096)?,
            length: bounded("sequence_length", options.sequence_length, 8..=8192)?,
            sampling,
        })
    }

    /// Checks the options against a model.
    pub fn check(&self, model: &ModelInfo) -> Result<()> {
        let longest = walk::of(&model.family).max_length();
        if self.length > longest {
            return Err(Error::option(
                "calibration.sequence_length",
                format!("{} is more than the model's {longest} positions", self.length),
            ));
        }
        if self.dataset.is_some() && !model.has_tokenizer {
            return Err(no_tokenizer());
        }
        Ok(())
    }

    /// Whether the windows depend on random numbers.
    pub fn seeded(&self) -> bool {
        self.dataset.is_none() || self.sampling != CalibrationSampling::First
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> u64 {
        self.sequences as u64 * self.length as u64
    }
}

/// Token windows of equal length, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Windows {
    pub tokens: Vec<u32>,
    pub length: usize,
    /// Things worth knowing of the choice.
    pub warnings: Vec<String>,
}

impl Windows {
    pub fn sequences(&self) -> usize {
        self.tokens.len() / self.length
    }
}

/// What a choice of windows rests on.
pub struct Sources<'a> {
    pub model: &'a Model,
    /// Data sets by resource name, documents joined.
    pub texts: &'a dyn Fn(&str) -> Result<Arc<String>>,
    /// Where random places come from.
    pub stream: &'a Stream,
    pub progress: &'a Progress,
}

/// The calibration windows of a step. Too little text is DATASET_UNSUITABLE; a data set without a
/// tokenizer MODEL_UNSUITABLE.
///
/// Where the model wants a start token, it stands in place of each window's first token. `encode` gives
/// the tokens of a whole data set (which are many, and of use again).
pub(super) fn windows(
    options: &Options,
    from: &Sources<'_>,
    encode: &dyn Fn(&str, &Tokenizer, &str) -> Result<Arc<Vec<u32>>>,
) -> Result<Windows> {
    let Sources { model, stream, progress, .. } = from;
    let Some(dataset) = &options.dataset else {
        let tokens = sample::sample(model, options.sequences, options.length, stream, progress)?;
        let warnings = match &model.family {
            Family::Decoder(_) => Vec::new(),
            Family::Encoder(_) => vec![
                "encoders write no text: the calibration tokens were drawn evenly; give a data set"
                    .into(),
            ],
        };
        return Ok(Windows { tokens, length: options.length, warnings });
    };
    let tokenizer = model.tokenizer.as_deref().ok_or_else(no_tokenizer)?;
    let text = (from.texts)(dataset)?;
    progress.report(0.0, "tokenising the calibration text")?;
    let (length, wanted) = (options.length, options.sequences * options.length);
    let first = options.sampling == CalibrationSampling::First;
    let tokens = if first {
        Arc::new(encode_prefix(tokenizer, &text, wanted)?)
    } else {
        encode(dataset, tokenizer, &text)?
    };
    let needed = if first { wanted } else { length };
    if tokens.len() < needed {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!(
                "'{dataset}' has {} tokens, {needed} are needed for {} windows of {length}; take fewer \
                 or shorter windows, or a longer text",
                tokens.len(),
                options.sequences,
            ),
        ));
    }
    let mut warnings = Vec::new();
    if tokens.len() < wanted {
        warnings.push(format!(
            "the calibration text has {} tokens, fewer than the {wanted} drawn from it: windows overlap",
            tokens.len()
        ));
    }
    let mut rng = stream.rng();
    let starts = (0..options.sequences)
        .map(|i| if first { i * length } else { rng.random_range(0..=tokens.len() - length) });
    let mut out = Vec::with_capacity(wanted);
    for start in starts {
        out.extend_from_slice(&tokens[start..start + length]);
        if let (true, Some(bos)) = (tokenizer.add_bos, tokenizer.bos) {
            let at = out.len() - length;
            out[at] = bos;
        }
    }
    Ok(Windows { tokens: out, length, warnings })
}

/// The first `wanted` tokens of `text` (fewer if it has no more), without tokenising all of a long
/// text: a part is cut at a line's end, where tokens of the whole end too.
pub fn encode_prefix(tokenizer: &Tokenizer, text: &str, wanted: usize) -> Result<Vec<u32>> {
    let mut bytes = wanted.saturating_mul(BYTES_PER_TOKEN);
    loop {
        let part = prefix(text, bytes);
        let mut tokens = tokenizer.encode(part, false, false)?;
        // The last tokens before a cut may differ from those of the whole text.
        if tokens.len() > wanted + 16 || part.len() == text.len() {
            tokens.truncate(wanted);
            return Ok(tokens);
        }
        bytes = bytes.saturating_mul(2).max(1024);
    }
}

/// At most the first `bytes` of `text`, up to the end of a line where there is one.
fn prefix(text: &str, bytes: usize) -> &str {
    if bytes >= text.len() {
        return text;
    }
    let mut end = bytes;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let part = &text[..end];
    part.rfind('\n').map_or(part, |line| &part[..=line])
}

fn no_tokenizer() -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        "the model has no tokenizer, so it cannot read a data set; leave calibration.dataset empty to \
         calibrate on text that the model samples",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_at_lines_and_characters() {
        assert_eq!(prefix("ab\ncd\nef", 5), "ab\n");
        assert_eq!(prefix("ab\ncd\nef", 6), "ab\ncd\n");
        assert_eq!(prefix("ab", 9), "ab");
        assert_eq!(prefix("äöü", 3), "ä");
    }

    #[test]
    fn bad_options_are_named() {
        let bad = [
            (v1::Calibration { sequences: Some(0), ..Default::default() }, "calibration.sequences"),
            (
                v1::Calibration { sequences: Some(4097), ..Default::default() },
                "calibration.sequences",
            ),
            (
                v1::Calibration { sequence_length: Some(7), ..Default::default() },
                "calibration.sequence_length",
            ),
            (v1::Calibration { sampling: 9, ..Default::default() }, "calibration.sampling"),
            (
                v1::Calibration { dataset: "wiki".into(), ..Default::default() },
                "calibration.dataset",
            ),
        ];
        for (message, field) in bad {
            let error = Options::read(Some(&message)).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidOption);
            assert_eq!(error.violations()[0].field, field);
        }
        let options = Options::read(None).expect("defaults");
        assert_eq!((options.sequences, options.length), (32, 256));
        assert_eq!(options.sampling, CalibrationSampling::Random);
    }

    #[test]
    fn texts_that_are_too_short_are_refused_and_short_ones_overlap() {
        let mut config = crate::models::decoder::random::tiny("llama");
        config["vocab_size"] = serde_json::json!(256);
        let mut model = crate::models::decoder::random::model(config, 1).unwrap();
        model.tokenizer = Some(Arc::new(Tokenizer::bytes().unwrap()));
        let choose = |model: &Model, text: &'static str, sampling: CalibrationSampling| {
            let texts = move |_: &str| Ok(Arc::new(text.to_owned()));
            let progress = Progress::silent();
            let stream = Stream::root(1);
            let from = Sources { model, texts: &texts, stream: &stream, progress: &progress };
            let dataset = Some("datasets/t".to_owned());
            let options = Options { dataset, sequences: 2, length: 8, sampling };
            windows(&options, &from, &|_, tokenizer, text| {
                tokenizer.encode(text, false, false).map(Arc::new)
            })
        };
        let (first, random) = (CalibrationSampling::First, CalibrationSampling::Random);
        // A token a byte. Windows from the beginning need all of theirs, others one.
        for (text, sampling) in
            [("", random), ("seven b", random), ("", first), ("fifteen bytes..", first)]
        {
            let error = choose(&model, text, sampling).unwrap_err();
            assert_eq!(error.reason(), Reason::DatasetUnsuitable, "{text}");
            assert!(error.message().contains("datasets/t"), "{error}");
        }
        let short = choose(&model, "nine byte", random).unwrap();
        assert_eq!((short.sequences(), short.warnings.len()), (2, 1));
        let enough = choose(&model, "sixteen bytes it", first).unwrap();
        assert!(enough.warnings.is_empty());
        let bytes: Vec<u32> = "sixteen bytes it".bytes().map(u32::from).collect();
        assert_eq!(enough.tokens, bytes);
        model.tokenizer = None;
        let error = choose(&model, "sixteen bytes it", first).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
    }
}
