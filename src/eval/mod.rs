//! Measuring models: likelihood, agreement with a base, answers, bytes, counts, speed.
//!
//! [`metrics`] says what can be measured; the other files measure it.

mod choice;
pub mod counts;
pub mod format;
mod likelihood;
pub mod metrics;
pub mod nets;
pub mod norms;
mod products;
mod speed;
pub mod task;
pub mod training;
mod zero_shot;

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

pub use self::likelihood::States;
use self::likelihood::{Protocol, Source};
use crate::calibrate::{encode_prefix, walk};
use crate::data::choices::Item;
use crate::error::{Error, Reason, Result};
use crate::models::decoder::plan::{Cache, CacheFormat};
use crate::models::{AnyFamily, AnyInfo, Family, Model, ModelInfo, encoder, not_a_decoder};
use crate::progress::Progress;
use crate::proto::v1;

/// Inputs of an evaluation.
pub struct Subject<'a> {
    pub model: &'a Model,
    /// What a pass of this model over the text left, where there was one.
    pub states: Option<&'a States>,
    /// What to compare with, when asked for.
    pub base: Option<Base<'a>>,
    /// Text to measure on, documents joined; needed for perplexity and agreement.
    pub text: Option<&'a str>,
    /// The further texts of the options, in their order.
    pub further: &'a [Arc<String>],
    /// Questions to answer, when asked for.
    pub choices: Option<&'a [Item]>,
    /// Bytes of all files of the version.
    pub disk_bytes: u64,
    /// The model whose sizes are told, where the one that is measured is a copy with other layouts.
    pub stored: Option<&'a Model>,
}

/// A base to compare with.
#[derive(Clone, Copy)]
pub enum Base<'a> {
    /// It runs beside the model.
    Model(&'a Model),
    /// It ran before, see [`states`].
    States(&'a States),
}

/// Longest window.
const MAX_CONTEXT: u32 = 8192;

/// Further texts of an evaluation.
const MAX_TEXTS: usize = 8;

/// Checks the options of an evaluation against a model.
pub fn check(options: &v1::Evaluation, model: &ModelInfo) -> Result<()> {
    nets::no_images(options)?;
    let config = Settings::read(options, walk::of(&model.family).max_length())?;
    if let Family::Encoder(encoder) = &model.family {
        let asked = [
            ("dataset", config.text),
            ("texts", !options.texts.is_empty()),
            ("compare_with_base", options.compare_with_base),
            ("choice", options.choice.is_some()),
            ("counts", options.counts),
            ("speed", options.speed),
        ];
        if let Some((name, _)) = asked.iter().find(|(_, asked)| *asked) {
            return Err(not_a_decoder(&encoder.architecture).within(name));
        }
    }
    let reads = config.text || options.choice.is_some() || options.task.is_some();
    if reads && !model.has_tokenizer {
        return Err(no_tokenizer());
    }
    Ok(())
}

/// Checks the options of an evaluation of a model that does not continue text: sizes and a task.
pub fn check_encoder(options: &v1::Evaluation) -> Result<()> {
    nets::no_images(options)?;
    let asked = [
        ("dataset", !options.dataset.is_empty()),
        ("texts", !options.texts.is_empty()),
        ("compare_with_base", options.compare_with_base),
        ("speed", options.speed),
        ("choice", options.choice.is_some()),
        ("counts", options.counts),
        ("kernels", options.kernels),
        ("norm_bounds", options.norm_bounds.is_some()),
    ];
    if let Some((field, _)) = asked.into_iter().find(|(_, asked)| *asked) {
        let problem = "is measured of decoders; of an encoder sizes and a task are";
        return Err(Error::at(Reason::ModelUnsuitable, field, problem));
    }
    check_task(options)
}

fn check_task(options: &v1::Evaluation) -> Result<()> {
    let Some(task) = &options.task else { return Ok(()) };
    if task.dataset.strip_prefix("datasets/").is_none_or(str::is_empty) {
        return Err(Error::field(
            "task.dataset",
            format!("'{}' is no resource name of a data set; write datasets/NAME", task.dataset),
        ));
    }
    if task.max_records == Some(0) {
        return Err(Error::field("task.max_records", "0 records; leave it out for all"));
    }
    if task.max_length.is_some_and(|length| length < 2) {
        return Err(Error::field("task.max_length", "a record has 2 tokens or more"));
    }
    Ok(())
}

/// Sizes of an encoder: `disk_bytes`, `weight_bytes`, `parameters`.
pub fn encoder_sizes(model: &encoder::Model, disk_bytes: u64) -> Vec<v1::Measurement> {
    vec![
        metrics::DISK_BYTES.measured(disk_bytes as f64, "all files of the version"),
        metrics::WEIGHT_BYTES.measured(model.bytes() as f64, "all weights as stored"),
        metrics::PARAMETERS.measured(model.parameters() as f64, "all weights"),
    ]
}

/// [`check`] for a model of any family.
pub fn check_any(options: &v1::Evaluation, model: &AnyInfo) -> Result<()> {
    match &model.family {
        AnyFamily::Vision(_) | AnyFamily::Lstm(_) | AnyFamily::TwoTower(_) => {
            nets::check(options, model)
        }
        AnyFamily::Decoder(_) | AnyFamily::Encoder(_) => check(options, &model.walked()?),
    }
}

/// Runs the text of an evaluation through a model once, so that it and others can be measured against
/// it without another pass. The file it leaves lies in `scratch` while the value lives.
pub fn states(
    model: &Model,
    options: &v1::Evaluation,
    text: &str,
    scratch: &Path,
    progress: &Progress,
) -> Result<States> {
    let settings = Settings::read(options, walk::of(&model.family).max_length())?;
    let (tokens, protocol) = tokenise(model, text, &options.dataset, &settings, progress)?;
    States::new(model, tokens, protocol, scratch, progress)
}

/// Measures what `options` asks for. Always: `disk_bytes`, `weight_bytes`, `resident_bytes`,
/// `parameters`, `zero_share` (of the linear weights inside the blocks). `perplexity` when a data set
/// is given, and again of each of the further texts; `kl_divergence` and `top1_agreement` with
/// `compare_with_base`; `accuracy` (and `macro_f1`) with `choice`; `multiply_accumulates` and `bytes_per_token` with `counts`;
/// `products_1_token_ms` and `products_512_tokens_ms` with `kernels`;
/// `prefill_tokens_per_second` and `decode_tokens_per_second` with `speed`. A task is [`task::measure`]'s.
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
    if options.counts {
        out.extend(counts::measure(model)?);
    }
    // Shares of the progress, by what usually takes long.
    let weights = [
        (settings.text, 6.0),
        (!options.texts.is_empty(), 6.0 * options.texts.len() as f64),
        (options.choice.is_some(), 6.0),
        (options.kernels, 1.0),
        (options.speed, 3.0),
    ];
    let total: f64 = weights.iter().filter(|(asked, _)| *asked).map(|(_, weight)| weight).sum();
    let mut done = 0.0;
    let mut part = |index: usize| {
        let from = done / total;
        done += weights[index].1;
        progress.part(from, done / total)
    };
    if settings.text {
        let text = subject.text.ok_or_else(|| unread(&options.dataset))?;
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
        out.extend(on_text(subject, base, text, &options.dataset, &settings, &part(0))?);
    }
    if !options.texts.is_empty() {
        out.extend(on_further_texts(subject, options, &settings, &part(1))?);
    }
    if let Some(asked) = &options.choice {
        let items = subject.choices.ok_or_else(|| unread(&asked.dataset))?;
        out.extend(on_choices(model, items, asked, &settings, &part(2))?);
    }
    if options.kernels {
        out.extend(products::measure(model, &part(3))?);
    }
    if options.speed {
        out.extend(speed::measure(model, &part(4))?);
    }
    progress.report(1.0, "measured")?;
    Ok(out)
}

/// Perplexity of each further text; nothing is kept of the base's passes over them.
fn on_further_texts(
    subject: &Subject<'_>,
    options: &v1::Evaluation,
    settings: &Settings,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let count = options.texts.len() as f64;
    let mut out = Vec::with_capacity(options.texts.len());
    for (i, asked) in options.texts.iter().enumerate() {
        let text = subject.further.get(i).ok_or_else(|| unread(&asked.dataset))?;
        let settings = Settings {
            max_tokens: asked.max_tokens.map_or(settings.max_tokens, whole),
            ..settings.clone()
        };
        let alone = Subject { states: None, ..*subject };
        let progress = progress.part(i as f64 / count, (i as f64 + 1.0) / count);
        out.extend(on_text(&alone, None, text, &asked.dataset, &settings, &progress)?);
    }
    Ok(out)
}

fn unread(dataset: &str) -> Error {
    Error::new(Reason::DatasetUnsuitable, format!("'{dataset}' was not read"))
}

#[derive(Clone)]
struct Settings {
    context: usize,
    stride: usize,
    max_tokens: usize,
    text: bool,
    rounded: bool,
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
        if let Some(choice) = &options.choice {
            let dataset = &choice.dataset;
            if dataset.strip_prefix("datasets/").is_none_or(str::is_empty) {
                return Err(Error::field(
                    "choice.dataset",
                    format!("'{dataset}' is no resource name of a data set; write datasets/NAME"),
                ));
            }
            if choice.max_items == Some(0) {
                return Err(Error::field("choice.max_items", "0 questions; leave it out for all"));
            }
        }
        check_texts(options, context)?;
        check_task(options)?;
        if options.compare_with_base && dataset.is_empty() {
            return Err(Error::field("compare_with_base", "needs a data set to compare on"));
        }
        Ok(Self {
            context: context as usize,
            stride: stride as usize,
            max_tokens: whole(max_tokens),
            text: !dataset.is_empty(),
            rounded: options.rounded_activations,
        })
    }
}

/// A number of tokens, of which 0 means all.
fn whole(tokens: u32) -> usize {
    if tokens == 0 { usize::MAX } else { tokens as usize }
}

fn check_texts(options: &v1::Evaluation, context: u32) -> Result<()> {
    let texts = &options.texts;
    if texts.len() > MAX_TEXTS {
        let problem = format!("{} further texts; {MAX_TEXTS} at most", texts.len());
        return Err(Error::field("texts", problem));
    }
    if !texts.is_empty() && options.dataset.is_empty() {
        return Err(Error::field("texts", "come beside a first one; give `dataset` as well"));
    }
    let mut known = vec![options.dataset.as_str()];
    for (i, text) in texts.iter().enumerate() {
        let at = |field: &str, problem: String| {
            Err(Error::field(format!("texts[{i}].{field}"), problem))
        };
        let name = text.dataset.as_str();
        if name.strip_prefix("datasets/").is_none_or(str::is_empty) {
            let problem =
                format!("'{name:.100}' is no resource name of a data set; write datasets/NAME");
            return at("dataset", problem);
        }
        if known.contains(&name) {
            return at("dataset", format!("'{name}' is measured already; name another text"));
        }
        known.push(name);
        if let Some(tokens @ 1..) = text.max_tokens
            && tokens < context
        {
            let problem = format!("{tokens} tokens hold no window of {context}; 0 means all");
            return at("max_tokens", problem);
        }
    }
    Ok(())
}

/// The tokens of an evaluation and how they are cut.
fn tokenise<F>(
    model: &Model<F>,
    text: &str,
    dataset: &str,
    settings: &Settings,
    progress: &Progress,
) -> Result<(Vec<u32>, Protocol)> {
    let tokenizer = model.tokenizer.as_deref().ok_or_else(no_tokenizer)?;
    progress.report(0.0, "tokenising the text")?;
    let tokens = if settings.max_tokens == usize::MAX {
        tokenizer.encode(text, false, false)?
    } else {
        encode_prefix(tokenizer, text, settings.max_tokens)?
    };
    let start = if tokenizer.add_bos { tokenizer.bos } else { None };
    let protocol = Protocol { context: settings.context, stride: settings.stride, start };
    if protocol.windows(tokens.len()) == 0 {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!(
                "'{dataset}' has {} tokens, a window has {}; take a longer text or a smaller context",
                tokens.len(),
                settings.context,
            ),
        ));
    }
    Ok((tokens, protocol))
}

fn on_text(
    subject: &Subject<'_>,
    base: Option<Base<'_>>,
    text: &str,
    dataset: &str,
    settings: &Settings,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let (tokens, protocol) = tokenise(subject.model, text, dataset, settings, progress)?;
    let model = match (settings.rounded, subject.states) {
        (true, _) => Source::Rounded(subject.model),
        (false, Some(states)) => Source::Known(states),
        (false, None) => Source::Run(subject.model),
    };
    let base = base.map(|base| match base {
        Base::Model(model) => Source::Run(model),
        Base::States(states) => Source::Known(states),
    });
    let found = likelihood::measure(&model, base.as_ref(), &tokens, &protocol, progress)?;
    // Another tokenizer, or another text under the same name, is another protocol.
    let mark = mark(bytemuck::cast_slice(&tokens));
    let protocol = format!(
        "{dataset}, context {}, stride {}, {} tokens ({mark}), {} windows, {} predictions, {} start \
         token, {} threads",
        settings.context,
        settings.stride,
        tokens.len(),
        found.nll.len(),
        found.predictions,
        if protocol.start.is_some() { "with" } else { "no" },
        rayon::current_num_threads(),
    );
    let mut out = vec![metrics::PERPLEXITY.sampled(found.nll, &protocol)];
    if let Some(agreement) = found.agreement {
        out.push(metrics::KL_DIVERGENCE.sampled(agreement.kl, &protocol));
        out.push(metrics::TOP1_AGREEMENT.sampled(agreement.top1, &protocol));
    }
    Ok(out)
}

fn on_choices(
    model: &Model,
    items: &[Item],
    asked: &v1::ChoiceEvaluation,
    settings: &Settings,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let most = asked.max_items.map_or(usize::MAX, |most| most as usize);
    let items = &items[..items.len().min(most)];
    let found = choice::measure(model, items, settings.context, progress)?;
    let cut = match found.cut {
        0 => String::new(),
        cut => format!(", {cut} questions cut at the left"),
    };
    let mut text = String::new();
    for item in items {
        text += &format!("{}\0{}\0{}\n", item.question, item.choices.join("\0"), item.answer);
    }
    let protocol = format!(
        "{}, {} questions ({}), likelihood of each answer a byte, no examples, context {}{cut}, {} threads",
        asked.dataset,
        items.len(),
        mark(text.as_bytes()),
        settings.context,
        rayon::current_num_threads(),
    );
    let answers: Vec<usize> = items.iter().map(|item| item.answer).collect();
    let f1 = found.macro_f1(&answers).map(|f1| metrics::MACRO_F1.measured(f1, &protocol));
    let right = found.correct.iter().map(|correct| f64::from(u8::from(*correct))).collect();
    let mut out = vec![metrics::ACCURACY.sampled(right, &protocol)];
    out.extend(f1);
    Ok(out)
}

/// The first digits of a digest: enough to tell two protocols apart.
fn mark(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(4).map(|b| format!("{b:02x}")).collect()
}

fn sizes(subject: &Subject<'_>, context: usize) -> Result<Vec<v1::Measurement>> {
    let model = subject.stored.unwrap_or(subject.model);
    let cache = match &model.family {
        Family::Decoder(config) => Cache::bytes_for(config, context, CacheFormat::default()) as u64,
        Family::Encoder(_) => 0,
    };
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
        metrics::DISK_BYTES.measured(bytes(subject.disk_bytes), "all files of the version"),
        metrics::WEIGHT_BYTES.measured(bytes(model.bytes()), "all weights as stored"),
        metrics::RESIDENT_BYTES.measured(
            bytes(model.bytes() + cache),
            format!("weights, and keys and values of {context} positions"),
        ),
        metrics::PARAMETERS.measured(bytes(model.parameters()), "all weights"),
        metrics::ZERO_SHARE
            .measured(share, "linear weights inside the blocks, as they are multiplied"),
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
        let texts = |names: &[&str], first: &str| v1::Evaluation {
            dataset: first.into(),
            texts: names
                .iter()
                .map(|name| v1::TextEvaluation {
                    dataset: (*name).into(),
                    max_tokens: (*name == "datasets/short").then_some(63),
                })
                .collect(),
            ..Default::default()
        };
        let many = vec!["datasets/b"; MAX_TEXTS + 1];
        for (options, field) in [
            (texts(&["datasets/b"], ""), "texts"),
            (texts(&many, "datasets/a"), "texts"),
            (texts(&["b"], "datasets/a"), "texts[0].dataset"),
            (texts(&["datasets/a"], "datasets/a"), "texts[0].dataset"),
            (texts(&["datasets/b", "datasets/b"], "datasets/a"), "texts[1].dataset"),
            (texts(&["datasets/short"], "datasets/a"), "texts[0].max_tokens"),
        ] {
            let error = Settings::read(&options, 64).map(|_| ()).unwrap_err();
            assert_eq!(error.violations()[0].field, field);
        }
        Settings::read(&texts(&["datasets/b"], "datasets/a"), 64).map(|_| ()).expect("two texts");
        let settings = Settings::read(&v1::Evaluation::default(), 4096).expect("defaults");
        assert_eq!((settings.context, settings.stride, settings.max_tokens), (512, 512, 20_000));
    }
}
