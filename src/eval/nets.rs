//! Measuring models that are neither decoders nor encoders: image classifiers on images, LSTM language models on
//! a text, both in sizes.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};

use super::likelihood::Protocol;
use super::{Settings, mark, metrics, no_tokenizer, tokenise, zero_shot};
use crate::data::images::Images;
use crate::error::{Error, Reason, Result};
use crate::kernels::softmax::log_sum_exp;
use crate::models::footprint::footprint;
use crate::models::vision::Layer;
use crate::models::vision::plan::Plan;
use crate::models::{AnyFamily, AnyInfo, AnyModel, lstm, not_for_text, vision};
use crate::nn::ops::{Pool, Tape};
use crate::progress::Progress;
use crate::proto::v1;

/// Images that run at once, at most.
const IMAGES: usize = 128;

/// Bytes between two layers that images which run at once should stay below, and those that one image may take.
const TOGETHER: usize = 256 << 20;
const ONE_IMAGE: usize = 1 << 30;

/// Repetitions of a measurement of speed, after one that warms up, and seconds of each at least.
const REPETITIONS: usize = 30;
const LEAST_SECONDS: f64 = 0.05;

/// Bytes of logits that are made at once.
const LOGITS: usize = 64 << 20;

/// Inputs of an evaluation.
pub struct Subject<'a> {
    pub model: &'a AnyModel,
    /// Documents joined, where a text is asked for.
    pub text: Option<&'a str>,
    pub images: Option<Images>,
    /// Bytes of all files of the version.
    pub disk_bytes: u64,
}

/// Refuses images where the model sees none.
pub fn no_images(options: &v1::Evaluation) -> Result<()> {
    match &options.images {
        None => Ok(()),
        Some(_) => Err(Error::at(
            Reason::ModelUnsuitable,
            "images",
            "the model reads texts and sees no images; leave them out",
        )),
    }
}

/// Checks the options of an evaluation against a model of these families.
pub fn check(options: &v1::Evaluation, model: &AnyInfo) -> Result<()> {
    let refuse = |field: &str| {
        let why = format!("is not measured of models of the family {}", model.family.name());
        Err(Error::at(Reason::ModelUnsuitable, field, why + "; leave it out"))
    };
    let asked = [
        ("choice", options.choice.is_some()),
        ("compare_with_base", options.compare_with_base),
        ("counts", options.counts),
        ("kernels", options.kernels),
        ("rounded_activations", options.rounded_activations),
        ("task", options.task.is_some()),
        ("speed", options.speed && !matches!(model.family, AnyFamily::Vision(_))),
        ("texts", !options.texts.is_empty()),
    ];
    if let Some((field, _)) = asked.into_iter().find(|(_, asked)| *asked) {
        return refuse(field);
    }
    match &model.family {
        AnyFamily::Vision(config) => {
            if !options.dataset.is_empty() {
                return refuse("dataset");
            }
            let runs = [("speed", options.speed), ("images", options.images.is_some())];
            if let Some((field, _)) = runs.into_iter().find(|(_, asked)| *asked) {
                fits(config, field)?;
            }
            check_images(options)
        }
        AnyFamily::TwoTower(config) => {
            if !options.dataset.is_empty() {
                return refuse("dataset");
            }
            if options.images.is_some() {
                if !model.has_tokenizer {
                    return Err(no_tokenizer());
                }
                within(zero_shot::bytes(config), zero_shot::ONE_IMAGE, "images")?;
            }
            check_images(options)
        }
        AnyFamily::Lstm(config) => {
            no_images(options)?;
            let settings = Settings::read(options, config.max_positions)?;
            match settings.text && !model.has_tokenizer {
                true => Err(no_tokenizer()),
                false => Ok(()),
            }
        }
        family => Err(not_for_text(family.name())),
    }
}

/// Checks what is asked of images.
fn check_images(options: &v1::Evaluation) -> Result<()> {
    match &options.images {
        Some(images) if images.max_items == Some(0) => {
            Err(Error::field("images.max_items", "0 images; leave it out for all"))
        }
        Some(images) if images.dataset.strip_prefix("datasets/").is_none_or(str::is_empty) => {
            Err(Error::field(
                "images.dataset",
                format!(
                    "'{:.100}' is no resource name of a data set; write datasets/NAME",
                    images.dataset
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// Measures what `options` asks for. Always: `disk_bytes`, `weight_bytes`, `parameters`, `zero_share` (of all
/// matrices), `nonzero_parameters`, `bitmap_bytes`, `csr_bytes`. `task_accuracy` and `task_loss` of image
/// classifiers with `images`, `images_per_second` with `speed`; of models of two towers [`zero_shot`]'s with `images`; `perplexity` of language models with a data set, as of
/// decoders.
pub fn evaluate(
    subject: &Subject<'_>,
    options: &v1::Evaluation,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    check(options, &subject.model.info())?;
    progress.report(0.0, "measuring sizes")?;
    let mut out = sizes(subject);
    let images = |asked: &v1::ImageEvaluation| {
        subject.images.as_ref().ok_or_else(|| {
            Error::new(Reason::DatasetUnsuitable, format!("'{}' was not read", asked.dataset))
        })
    };
    match subject.model {
        AnyModel::Vision(model) => {
            if let Some(asked) = &options.images {
                out.extend(on_images(model, images(asked)?, asked, progress)?);
            }
            if options.speed {
                out.push(speed_on_images(model, progress)?);
            }
        }
        AnyModel::TwoTower(model) => {
            if let Some(asked) = &options.images {
                out.extend(zero_shot::measure(model, images(asked)?, asked, progress)?);
            }
        }
        AnyModel::Lstm(model) => {
            if !options.dataset.is_empty() {
                let text = subject.text.ok_or_else(|| {
                    let dataset = &options.dataset;
                    Error::new(Reason::DatasetUnsuitable, format!("'{dataset}' was not read"))
                })?;
                out.push(on_text(model, text, options, progress)?);
            }
        }
        _ => return Err(Error::internal("a family that is measured elsewhere")),
    }
    progress.report(1.0, "measured")?;
    Ok(out)
}

/// Bytes that one image takes in the largest layer: what enters it, what a depthwise convolution leaves in between or
/// what is unfolded, and what comes out.
fn image_bytes(config: &vision::Config) -> usize {
    let layer = |(layer, sides): (&Layer, [usize; 2])| {
        let window = layer.window(sides);
        let between = match layer {
            Layer::Plain { .. } => window.taps() * window.channels,
            Layer::Separable { .. } => window.channels,
        };
        window.image() + window.places() * (between + layer.outputs())
    };
    let floats = config.layers.iter().zip(config.images()).map(layer).max();
    4 * floats.unwrap_or(0).max(config.image())
}

/// Refuses images that would take the server's memory one at a time.
fn fits(config: &vision::Config, field: &str) -> Result<()> {
    within(image_bytes(config), ONE_IMAGE, field)
}

fn within(bytes: usize, most: usize, field: &str) -> Result<()> {
    match bytes {
        bytes if bytes <= most => Ok(()),
        bytes => Err(Error::at(
            Reason::ModelUnsuitable,
            field,
            format!(
                "one image takes {} MiB in the largest layer, and at most {} MiB are measured; leave it out, or \
                 create the model with a smaller image_size or fewer channels",
                bytes >> 20,
                most >> 20
            ),
        )),
    }
}

/// Images that run at once.
fn batch(config: &vision::Config) -> usize {
    (TOGETHER / image_bytes(config).max(1)).clamp(1, IMAGES)
}

fn sizes(subject: &Subject<'_>) -> Vec<v1::Measurement> {
    let model = subject.model;
    let (mut zeros, mut elements) = (0u64, 0u64);
    for weight in model.weights().values().filter(|weight| weight.shape().len() == 2) {
        zeros += weight.zeros();
        elements += weight.shape().iter().product::<usize>() as u64;
    }
    let found = footprint(model.weights());
    let count = |v: u64| v as f64;
    vec![
        metrics::DISK_BYTES.measured(count(subject.disk_bytes), "all files of the version"),
        metrics::WEIGHT_BYTES.measured(count(model.bytes()), "all weights as stored"),
        metrics::PARAMETERS.measured(count(model.parameters()), "all weights"),
        metrics::NONZERO_PARAMETERS.measured(count(found.nonzero), "all weights"),
        metrics::BITMAP_BYTES.measured(count(found.bitmap), "all weights"),
        metrics::CSR_BYTES.measured(count(found.rows), "all weights"),
        metrics::ZERO_SHARE.measured(zeros as f64 / elements.max(1) as f64, "all matrices"),
    ]
}

fn on_images(
    model: &vision::Model,
    images: &Images,
    asked: &v1::ImageEvaluation,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let config = &model.family;
    images.suits(config.sides, config.channels, config.classes)?;
    let count = asked.max_items.map_or(images.len(), |most| images.len().min(most as usize));
    let plan = Plan::new(model)?;
    let (image, mut right, mut losses) = (images.image(), Vec::new(), Vec::new());
    let batch = batch(config);
    for first in (0..count).step_by(batch) {
        progress.report(first as f64 / count as f64, &format!("image {first} of {count}"))?;
        let last = count.min(first + batch);
        let logits = plan.classify(&images.pixels[first * image..last * image])?;
        for (row, class) in logits.chunks_exact(config.classes).zip(&images.classes[first..last]) {
            let (class, top) = (usize::from(*class), row.iter().copied().fold(f32::MIN, f32::max));
            right.push(f64::from(u8::from(row.iter().position(|l| *l == top) == Some(class))));
            losses.push(log_sum_exp(row) - f64::from(row[class]));
        }
    }
    let protocol = format!(
        "{}, {count} images ({}), {} threads",
        asked.dataset,
        mark(&[&images.pixels[..count * image], &images.classes[..count]].concat()),
        rayon::current_num_threads(),
    );
    Ok(vec![
        metrics::TASK_ACCURACY.sampled(right, &protocol),
        metrics::TASK_LOSS.sampled(losses, &protocol),
    ])
}

/// Images a second, of images whose content does not matter.
fn speed_on_images(model: &vision::Model, progress: &Progress) -> Result<v1::Measurement> {
    let plan = Plan::new(model)?;
    let batch = batch(&model.family);
    let bytes: Vec<u8> =
        (0..batch * model.family.image()).map(|i| (i * 7919 % 251) as u8).collect();
    let mut rates = Vec::new();
    for repetition in 0..=REPETITIONS {
        progress.report(repetition as f64 / (REPETITIONS + 1) as f64, "measuring speed")?;
        let (start, mut count) = (Instant::now(), 0);
        // The first warms up.
        while count == 0 || start.elapsed().as_secs_f64() < LEAST_SECONDS {
            plan.classify(&bytes)?;
            count += 1;
        }
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        if repetition > 0 {
            rates.push((count * batch) as f64 / seconds);
        }
    }
    let threads = rayon::current_num_threads();
    let protocol = format!("{batch} images at once, median of {REPETITIONS}, {threads} threads");
    Ok(metrics::IMAGE_RATE.sampled(rates, protocol))
}

fn on_text(
    model: &lstm::Model,
    text: &str,
    options: &v1::Evaluation,
    progress: &Progress,
) -> Result<v1::Measurement> {
    let config = &model.family;
    let settings = Settings::read(options, config.max_positions)?;
    let (tokens, protocol) = tokenise(model, text, &options.dataset, &settings, progress)?;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= config.vocab) {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!("the text holds token {token}, but the model knows {}", config.vocab),
        ));
    }
    let (nll, predictions) = likelihood(model, &tokens, &protocol, progress)?;
    // Words as of decoders, so that the same protocol reads the same.
    let shown = format!(
        "{}, context {}, stride {}, {} tokens ({}), {} windows, {predictions} predictions, {} start token, \
         {} threads",
        options.dataset,
        protocol.context,
        protocol.stride,
        tokens.len(),
        mark(bytemuck::cast_slice(&tokens)),
        nll.len(),
        if protocol.start.is_some() { "with" } else { "no" },
        rayon::current_num_threads(),
    );
    Ok(metrics::PERPLEXITY.sampled(nll, shown))
}

/// Mean negative log-likelihood of each window, and the number of predictions. Windows run side by side.
fn likelihood(
    model: &lstm::Model,
    tokens: &[u32],
    protocol: &Protocol,
    progress: &Progress,
) -> Result<(Vec<f64>, usize)> {
    let (config, context) = (&model.family, protocol.context);
    let mut tensors = std::collections::BTreeMap::new();
    for (name, weight) in &model.weights {
        let tensor = Tensor::from_vec(weight.to_f32(), weight.shape(), &Device::Cpu)?;
        tensors.insert(name.as_str(), tensor);
    }
    let tensor = |name: &str| {
        tensors.get(name).ok_or_else(|| {
            Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
        })
    };
    let windows = protocol.windows(tokens.len());
    let each = (LOGITS / 4 / config.vocab / context).clamp(1, 32);
    let pool = Pool::default();
    let (mut nll, mut predictions) = (Vec::with_capacity(windows), 0);
    for first in (0..windows).step_by(each) {
        progress.report(first as f64 / windows as f64, &format!("window {first} of {windows}"))?;
        let together = first..windows.min(first + each);
        let texts: Vec<Vec<u32>> =
            together.clone().map(|index| protocol.window(tokens, index)).collect();
        let rows = lstm::graph::Rows::new(context, &texts.concat(), |i| i % context == 0);
        let tape = Tape::forgetful(&pool);
        let states = lstm::graph::states(&tape, config, &tensor, &rows)?;
        let (mut at, mut targets) = (Vec::new(), Vec::new());
        for (row, index) in together.clone().enumerate() {
            let scored = texts[row].iter().enumerate().skip(protocol.first_scored(index));
            for (position, target) in scored {
                at.push(rows.row(row * context + position - 1) as u32);
                targets.push(*target);
            }
        }
        let states = tape.rows(&states, &Arc::from(at))?;
        let logits = lstm::graph::logits(&tape, &tensor, &states)?;
        let logits = logits.read();
        let mut scores = logits
            .chunks_exact(config.vocab)
            .zip(&targets)
            .map(|(row, target)| log_sum_exp(row) - f64::from(row[*target as usize]));
        for index in together {
            let count = context - protocol.first_scored(index);
            let sum: f64 = scores.by_ref().take(count).sum();
            nll.push(sum / count as f64);
            predictions += count;
        }
    }
    Ok((nll, predictions))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::random;
    use crate::seed::Stream;

    fn net(side: usize) -> vision::Model {
        let config = json!({
            "model_type": "conv_net", "image_size": side, "channels": [32, 8], "num_labels": 4,
        });
        match random::model(config, &Stream::root(1)).unwrap() {
            AnyModel::Vision(model) => model,
            _ => panic!("another family"),
        }
    }

    #[test]
    fn as_many_images_run_at_once_as_memory_allows() {
        // One channel in, nine taps of it, 32 out, four bytes each, in the first layer; the second halves the sides:
        // 32 in, and for a quarter of the places 9 taps of 32 and 8 out.
        let first = 4 * 28 * 28 * (1 + 9 + 32);
        let second = 4 * (28 * 28 * 32 + 14 * 14 * (9 * 32 + 8));
        assert_eq!(image_bytes(&net(28).family), first.max(second));
        assert_eq!(batch(&net(28).family), IMAGES);
        let some = batch(&net(512).family);
        assert!(1 < some && some < IMAGES, "{some}");
        assert_eq!(batch(&net(4096).family), 1);
    }

    #[test]
    fn images_beyond_memory_are_refused_by_field() {
        let images = v1::ImageEvaluation { dataset: "datasets/some".to_owned(), max_items: None };
        let speed = v1::Evaluation { speed: true, ..Default::default() };
        let images = v1::Evaluation { images: Some(images), ..Default::default() };
        for (options, field) in [(&speed, "speed"), (&images, "images")] {
            let info = AnyModel::Vision(net(4096)).info();
            let error = check(options, &info).unwrap_err();
            assert_eq!(error.reason(), Reason::ModelUnsuitable);
            assert_eq!(error.violations()[0].field, field);
            check(options, &AnyModel::Vision(net(512)).info()).unwrap();
        }
        check(&v1::Evaluation::default(), &AnyModel::Vision(net(4096)).info()).unwrap();
    }
}
