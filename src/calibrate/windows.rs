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
    use serde_json::json;

    use super::*;
    use crate::data::tokenizer::testing;
    use crate::models::decoder::random;

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

    /// Windows of a text whose bytes are tokens.
    fn cut(text: &str, sequences: usize, sampling: CalibrationSampling) -> Result<Windows> {
        let mut config = random::tiny("llama");
        config["vocab_size"] = json!(257);
        let mut model = random::model(config, 1).expect("a model");
        model.tokenizer = Some(Arc::new(testing::bytes()));
        let text = Arc::new(text.to_owned());
        let texts = |_: &str| Ok(text.clone());
        let sources = Sources {
            model: &model,
            texts: &texts,
            stream: &Stream::root(3),
            progress: &Progress::silent(),
        };
        let dataset = Some("datasets/text".to_owned());
        let options = Options { dataset, sequences, length: 8, sampling };
        windows(&options, &sources, &|_, tokenizer, text| {
            tokenizer.encode(text, false, false).map(Arc::new)
        })
    }

    #[test]
    fn text_that_is_shorter_than_a_window_is_refused_and_short_text_is_said() {
        use CalibrationSampling::{First, Random};
        let text = "abcdefghijklmnopqrstuvwxyz";
        for (bytes, sampling, needed) in [(7, Random, "8 are needed"), (23, First, "24 are needed")]
        {
            let error = cut(&text[..bytes], 3, sampling).unwrap_err();
            assert_eq!(error.reason(), Reason::DatasetUnsuitable);
            assert_eq!(error.reason().class(), crate::error::Class::FailedPrecondition);
            let said = error.message();
            assert!(said.contains(&format!("{bytes} tokens")) && said.contains(needed), "{said}");
        }
        let ids = testing::bytes().encode(text, false, false).expect("tokens");
        // One place alone: the same window three times, the start token in the place of the first.
        let found = cut(&text[..8], 3, Random).expect("windows");
        let window = [&[256][..], &ids[1..8]].concat();
        assert_eq!(found.tokens, window.repeat(3));
        assert!(found.warnings[0].contains("windows overlap"), "{:?}", found.warnings);
        // From the start one window follows another.
        let found = cut(&text[..24], 3, First).expect("windows");
        let windows = ids[..24].chunks(8).flat_map(|w| [&[256][..], &w[1..]].concat());
        assert_eq!(found.tokens, windows.collect::<Vec<_>>());
        assert!(found.warnings.is_empty());
    }
}
