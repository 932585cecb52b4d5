//! The recovery of CFSP: low-rank factors on all linears of a pruned decoder, of a rank that follows the
//! importance of the block, trained to predict the next token and merged.

use std::sync::Arc;

use rand::Rng;
use serde_json::{Value, json};

use super::{coarse_fine, store};
use crate::calibrate::{self, Windows, walk};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::learner::Learner;
use crate::methods::adapt::lora;
use crate::methods::adapt::options::Site;
use crate::methods::adapt::tuned::Tuned;
use crate::methods::{Estimate, StepContext};
use crate::models::decoder::graph::Graph;
use crate::models::{Family, Model, ModelInfo};
use crate::nn::ops::Precision;
use crate::nn::weight::ValueFormat;
use crate::progress::Progress;
use crate::proto::v1;
use crate::train::hooks::Plain;
use crate::train::memory::Transformer;
use crate::train::pass::{self, Pass};
use crate::train::run::{Needs, Run};
use crate::train::settings::Settings;

const RANK_MEAN: u32 = 8;
const RANK_MIN: u32 = 2;
const SCALE: f64 = 2.0;
const RATE: f64 = 2e-4;
const STEPS: u32 = 60;
const BATCH: u32 = 4;
const LENGTH: u32 = 128;
/// Sequences that are cut of the text at most; longer trainings see them again.
const MAX_SEQUENCES: usize = 8192;
/// Products a second that a plan is made with.
const FLOPS: f64 = 6e10;

/// Checked options.
pub struct Recovery {
    rank_mean: usize,
    rank_min: usize,
    scale: f64,
    rate: f64,
    steps: u32,
    batch: u32,
    length: u32,
    equal: bool,
    /// Where the sequences come from.
    data: calibrate::Options,
}

/// What a recovery made.
pub struct Recovered {
    pub model: Model,
    pub record: Value,
    /// Tokens that were learnt from.
    pub tokens: u64,
}

impl Recovery {
    /// Writes defaults out; `dataset` is that of the calibration.
    pub fn resolve(options: &mut v1::Recovery, dataset: &str) {
        options.rank_mean.get_or_insert(RANK_MEAN);
        options.rank_min.get_or_insert(RANK_MIN);
        options.scale.get_or_insert(SCALE);
        options.learning_rate.get_or_insert(RATE);
        options.steps.get_or_insert(STEPS);
        options.batch_size.get_or_insert(BATCH);
        options.sequence_length.get_or_insert(LENGTH);
        if options.dataset.is_empty() {
            dataset.clone_into(&mut options.dataset);
        }
    }

    /// Reads the options; what is empty comes from the calibration.
    pub fn read(options: &v1::Recovery, calibration: &calibrate::Options) -> Result<Self> {
        let whole = |name: &str, value: Option<u32>, usual: u32, low: u32, high: u32| {
            let value = value.unwrap_or(usual);
            match (low..=high).contains(&value) {
                true => Ok(value),
                false => {
                    let problem = format!("{value} is outside {low} to {high}; {usual} is usual");
                    Err(Error::option(name, problem))
                }
            }
        };
        let positive = |name: &str, value: Option<f64>, usual: f64, most: f64| {
            let value = value.unwrap_or(usual);
            match value > 0.0 && value <= most {
                true => Ok(value),
                false => {
                    let problem = format!("{value} is outside (0, {most}]; {usual} is usual");
                    Err(Error::option(name, problem))
                }
            }
        };
        let rank_mean = whole("rank_mean", options.rank_mean, RANK_MEAN, 1, 256)?;
        let rank_min = options.rank_min.unwrap_or(RANK_MIN.min(rank_mean));
        if !(1..=rank_mean).contains(&rank_min) {
            let problem = format!("{rank_min} is outside 1 to rank_mean, {rank_mean}");
            return Err(Error::option("rank_min", problem));
        }
        let dataset = options.dataset.as_str();
        if !dataset.is_empty() && dataset.strip_prefix("datasets/").is_none_or(str::is_empty) {
            let problem =
                format!("'{dataset}' is no resource name of a data set; write datasets/NAME");
            return Err(Error::option("dataset", problem));
        }
        let steps = whole("steps", options.steps, STEPS, 1, 100_000)?;
        let batch = whole("batch_size", options.batch_size, BATCH, 1, 4096)?;
        let length = whole("sequence_length", options.sequence_length, LENGTH, 8, 8192)?;
        let sequences = (steps as usize * batch as usize).min(MAX_SEQUENCES);
        let dataset = match dataset {
            "" => calibration.dataset.clone(),
            name => Some(name.to_owned()),
        };
        Ok(Self {
            rank_mean: rank_mean as usize,
            rank_min: rank_min as usize,
            scale: positive("scale", options.scale, SCALE, 1000.0)?,
            rate: positive("learning_rate", options.learning_rate, RATE, 10.0)?,
            steps,
            batch,
            length,
            equal: options.equal_ranks,
            data: calibrate::Options {
                dataset,
                sequences,
                length: length as usize,
                sampling: calibration.sampling,
            },
        })
    }

    /// Checks the options against the pruned model, whose linears all become `values`; what it costs.
    pub fn check(&self, model: &mut ModelInfo, values: ValueFormat) -> Result<Estimate> {
        let Family::Decoder(config) = &model.family else {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "recovery learns to predict the next token, which encoders do not do; leave it out",
            ));
        };
        if self.length as usize > config.max_positions {
            let problem = format!(
                "{} is more than the model's {} positions",
                self.length, config.max_positions
            );
            return Err(Error::option("sequence_length", problem));
        }
        if self.data.dataset.is_some() && !model.has_tokenizer {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "the model has no tokenizer, so it cannot read a data set",
            ));
        }
        let walk = walk::of(&model.family);
        let tokens = u64::from(self.steps) * u64::from(self.batch) * u64::from(self.length);
        let mut elements = 0;
        let mut widest = 0;
        let mut trained = 0;
        let names: Vec<String> =
            (0..walk.blocks()).flat_map(|b| walk.linears(b).concat()).collect();
        let activations = network(&model.family)
            .activation_bytes(self.batch as usize * self.length as usize, false);
        for name in names {
            let (tensor, [rows, cols]) = store::matrix(model, &name)?;
            let zeros = store::known_zeros(tensor);
            // Factors fill gaps.
            let new = store::pruned_info([rows, cols], 0, values, None);
            elements += rows * cols;
            widest = widest.max(rows * cols);
            trained += self.rank_mean * (rows + cols);
            if zeros > 0 {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    format!(
                        "'{name}' is sparse, and merging factors would fill its gaps; remove channels \
                         first, then prune"
                    ),
                ));
            }
            model.tensors.insert(name, new);
        }
        Ok(Estimate {
            weight_bytes: model.bytes(),
            memory_bytes: 2 * model.bytes()
                + activations
                + 16 * trained as u64
                + 12 * widest as u64,
            // Forward, and back through the frozen weights.
            seconds: 4.0 * tokens as f64 * elements as f64 / FLOPS,
            calibration_tokens: tokens,
        })
    }

    /// The sequences to learn from, by the model as it was: it may have to write them.
    pub fn texts(&self, cx: &StepContext<'_>, model: &Model) -> Result<Arc<Windows>> {
        let sources = calibrate::Sources {
            model,
            texts: cx.texts,
            stream: &cx.random.child("recovery"),
            progress: cx.progress,
        };
        cx.calibrations.windows(&self.data, cx.digest, &sources)
    }
}

fn network(family: &Family) -> Transformer {
    match family {
        Family::Decoder(config) => Transformer {
            layers: config.layers.len(),
            hidden: config.hidden,
            query: config.query_channels(),
            key_value: config.key_channels(),
            inner: config.intermediate,
            gates: 2,
            head: config.vocab.saturating_mul(256).min(16 << 20),
        },
        Family::Encoder(config) => Transformer {
            layers: config.layers,
            hidden: config.hidden,
            query: config.hidden,
            key_value: config.hidden,
            inner: config.intermediate,
            gates: 1,
            head: 0,
        },
    }
}

/// Trains and merges.
pub fn recover(
    cx: &StepContext<'_>,
    mut model: Model,
    importance: &[f64],
    (how, texts): (&Recovery, &Windows),
    values: ValueFormat,
    progress: &Progress,
) -> Result<Recovered> {
    let walk = walk::of(&model.family);
    let ranks = match how.equal {
        true => vec![how.rank_mean; importance.len()],
        false => coarse_fine::ranks(importance, how.rank_mean, how.rank_min),
    };
    let random = cx.random.child("recovery");
    let mut tuned = Tuned::new(0.0, random.path());
    let mut names = Vec::new();
    for (block, rank) in ranks.iter().enumerate() {
        progress.check()?;
        for name in walk.linears(block).concat() {
            let weight = model.weight(&name)?;
            let [rows, cols] = [weight.rows(), weight.cols()];
            let rank = (*rank).min(rows).min(cols);
            let site = Site {
                linear: name.clone(),
                shape: [rows, cols],
                rank,
                alpha: how.scale * rank as f64,
                rslora: false,
            };
            // As LoRA does: uniform, so that outputs have a third of the inputs' variance; B is zero.
            let mut rng = random.child("init").child(&name).rng();
            let bound = 1.0 / (cols as f32).sqrt();
            let a = (0..rank * cols).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect();
            tuned.modules.insert(name.clone(), lora::plain(&site, a, vec![0.0; rows * rank])?);
            names.push(name);
        }
    }
    let training = v1::Training {
        steps: Some(how.steps),
        batch_size: Some(how.batch),
        max_length: Some(how.length),
        learning_rate: Some(how.rate),
        ..Default::default()
    };
    let settings = Settings::read(&training, how.rate)?;
    let sequence = |tokens: &[u32]| Sequence {
        tokens: tokens.to_vec(),
        target: Target::Next((0..tokens.len()).map(|i| i > 0).collect()),
        line: 0,
    };
    let sequences: Vec<Sequence> = texts.tokens.chunks(texts.length).map(sequence).collect();
    let network = network(&model.family);
    let activations = |tokens: usize| network.activation_bytes(tokens, false);
    let training_part = progress.part(0.0, 0.95);
    let folder = cx.scratch.join("recovery");
    let run = Run {
        settings: &settings,
        training: &sequences,
        validation: &[],
        padding: 0,
        masking: None,
        random,
        folder: &folder,
        progress: &training_part,
        needs: Needs { weights: model.bytes(), activations: &activations },
    };
    let mut parameters = tuned.parameters();
    let graph = Graph::new(&model, Precision::F32)?;
    let pass = Pass::decoder(graph, &tuned, pass::Options::default());
    let mut learner = Learner::new(pass, &tuned);
    let report = run.train(&mut learner, &mut parameters, &mut Plain)?;
    drop(learner);
    for (i, name) in names.iter().enumerate() {
        let done = 0.95 + 0.05 * i as f64 / names.len().max(1) as f64;
        progress.report(done, "merging")?;
        let Some(module) = tuned.modules.get(name) else { continue };
        let stored = Arc::clone(model.weight(name)?);
        let merged = module.merged(&stored)?;
        let shape = [stored.rows(), stored.cols()];
        super::check_finite(name, &merged)?;
        let new = store::pruned(name, shape, &merged, values, None)?;
        model.weights.insert(name.clone(), Arc::new(new));
    }
    progress.report(1.0, "recovered")?;
    let tokens = u64::from(how.steps) * u64::from(how.batch) * u64::from(how.length);
    let record = json!({
        "ranks": ranks,
        "updates": report.steps,
        "tokens": tokens,
    });
    Ok(Recovered { model, record, tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;
    use crate::nn::ops::Network as _;
    use crate::nn::ops::{Pool, Sequences, Tape};
    use crate::nn::tuning::{Frozen, Tuning};

    fn logits(model: &Model, tuning: &dyn Tuning, tokens: &[u32]) -> Vec<f32> {
        let tape = Tape::forgetful(&Pool::default());
        let sequences = Sequences::of([tokens.len()]);
        let run = crate::nn::ops::Run {
            tape: &tape,
            tuning,
            sequences: &sequences,
            training: false,
            read: true,
        };
        let graph = Graph::new(model, Precision::F32).expect("a graph");
        let hidden = graph.through(&run, graph.start(&run, tokens).expect("starts")).expect("runs");
        let normed = graph.normed(&run, &hidden).expect("norms");
        graph.logits(&run, &normed).expect("logits").read().to_vec()
    }

    #[test]
    fn what_is_merged_is_what_was_beside_the_weights() {
        let mut model = random::model(random::tiny("llama"), 8).expect("a model");
        let tokens: Vec<u32> = (0..24).map(|i| (i * 13 + 2) % 96).collect();
        let mut tuned = Tuned::new(0.0, "7");
        let names: Vec<String> =
            (0..3).flat_map(|b| walk::of(&model.family).linears(b).concat()).collect();
        for (i, name) in names.iter().enumerate() {
            let weight = model.weight(name).expect("there");
            let (rows, cols, rank) = (weight.rows(), weight.cols(), 2 + i % 3);
            let site = Site {
                linear: name.clone(),
                shape: [rows, cols],
                rank,
                alpha: 2.0 * rank as f64,
                rslora: false,
            };
            let draw = |count: usize, seed: usize| -> Vec<f32> {
                (0..count).map(|k| ((k * 37 + seed * 11) % 19) as f32 / 190.0 - 0.045).collect()
            };
            let module = lora::plain(&site, draw(rank * cols, i), draw(rows * rank, i + 50));
            tuned.modules.insert(name.clone(), module.expect("a module"));
        }
        let beside = logits(&model, &tuned, &tokens);
        for name in &names {
            let stored = Arc::clone(model.weight(name).expect("there"));
            let merged = tuned.modules[name].merged(&stored).expect("merges");
            let shape = [stored.rows(), stored.cols()];
            let new = store::pruned(name, shape, &merged, ValueFormat::F32, None).expect("stored");
            model.weights.insert(name.clone(), Arc::new(new));
        }
        let inside = logits(&model, &Frozen, &tokens);
        for (a, b) in beside.iter().zip(&inside) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
        assert_ne!(
            beside,
            logits(&random::model(random::tiny("llama"), 8).expect("a model"), &Frozen, &tokens)
        );
    }
}
