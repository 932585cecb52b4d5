//! Speed and memory of training: steps of low-rank adapters on a frozen model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use serde::Serialize;

use super::stats::Spread;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Result};
use crate::machine;
use crate::models::{AnyModel, decoder, encoder, not_for_text};
use crate::nn::dtype::Dtype;
use crate::nn::ops::Precision;
use crate::nn::tuning::{LowRank, Tuning};
use crate::nn::weight::{Dense, Grouped, GroupedSpec, Weight};
use crate::seed::Stream;
use crate::train::optimizer::{AdamW, Optimizer, Rule};
use crate::train::parameters::{Gradients, Parameter, Parameters};
use crate::train::pass::{CLASSIFIER, InPlace, Options, Pass};

/// Most tokens of a batch.
const MOST_TOKENS: usize = 1 << 20;
const MOST_RANK: usize = 1 << 10;
/// Learning rate of AdamW.
const ADAM_RATE: f64 = 1e-4;
/// Classes of the head that encoders get.
const CLASSES: usize = 2;

/// What the frozen linear layers inside the blocks are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// As the model came.
    #[default]
    Stored,
    /// f32, all other tensors too.
    Dense,
    /// Rounded to groups of 64 inputs with codes of so many bits.
    Grouped(u8),
    /// The numbers that those codes stand for, in f32.
    Decoded(u8),
}

/// What is run, and how often.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    pub base: Base,
    /// All tensors are trained, in the place of adapters.
    pub full: bool,
    /// AdamW in the place of plain descent.
    pub adam: bool,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Of the adapters.
    pub rank: usize,
    /// Parts of names of the linear layers that get one.
    pub targets: Vec<String>,
    /// Products in bf16.
    pub bf16: bool,
    pub checkpoint_activations: bool,
    /// No gradients.
    pub forward_only: bool,
    /// Measured repetitions, after one that warms up.
    pub repetitions: usize,
}

/// What training reaches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Train {
    pub run: Run,
    pub seconds_per_step: Spread,
    pub tokens_per_second: Spread,
    /// Elements that are trained.
    pub trained: usize,
    /// Mean loss of the first step, before anything has changed.
    pub first_loss: f64,
    pub last_loss: f64,
    /// The most memory of the process; where the system does not tell, 0.
    pub peak_bytes: u64,
    /// The most memory of activations and their gradients.
    pub activation_bytes: u64,
}

/// Measures steps on pseudo-random tokens: next tokens for a decoder, classes of texts for an encoder, whose
/// head is trained too. A step takes gradients and moves against them.
///
/// # Errors
/// `INVALID_FIELD` for runs that measure nothing, do not fit the model, or name no linear layer.
pub fn measure(mut model: AnyModel, run: Run) -> Result<Train> {
    check(&run)?;
    match &mut model {
        AnyModel::Decoder(model) => store(&mut model.weights, run.base)?,
        AnyModel::Encoder(model) => store(&mut model.weights, run.base)?,
        model => return Err(not_for_text(model.family())),
    }
    if run.full {
        return measure_full(&model, run);
    }
    let model = &model;
    let precision = if run.bf16 { Precision::Bf16 } else { Precision::F32 };
    let options =
        Options { checkpoint_activations: run.checkpoint_activations, ..Options::default() };
    match model {
        AnyModel::Decoder(model) => {
            let config = model.decoder()?;
            fits(&run, config.max_positions)?;
            let linear = |name: &str| name.contains("_proj.");
            let adapters = Adapters::of(&config.tensors(), (&run.targets, run.rank), linear)?;
            let graph = decoder::graph::Graph::new(model, precision)?;
            let pass = Pass::decoder(graph, &adapters, options);
            steps(&pass, &adapters.parameters, run, config.vocab, &|length, _| {
                Target::Next(vec![true; length])
            })
        }
        AnyModel::Encoder(model) => {
            let config = &model.family;
            fits(&run, config.max_positions)?;
            let linear = |name: &str| name.starts_with("encoder.layer.");
            let mut adapters = Adapters::of(&config.tensors(), (&run.targets, run.rank), linear)?;
            adapters.add_head(config.hidden)?;
            let graph = encoder::graph::Graph::new(model, precision)?;
            let pass = Pass::encoder(graph, &adapters, options);
            steps(&pass, &adapters.parameters, run, config.vocab, &|_, at| {
                Target::Class((at % CLASSES) as u32)
            })
        }
        model => Err(not_for_text(model.family())),
    }
}

/// Stores the weights as `base` says, one after the other.
fn store(weights: &mut BTreeMap<String, Arc<Weight>>, base: Base) -> Result<()> {
    for (name, weight) in weights {
        let inside = name.contains("_proj.") || name.starts_with("encoder.layer.");
        let matrix = weight.shape().len() == 2;
        let bits = match base {
            Base::Stored => return Ok(()),
            Base::Dense => None,
            Base::Grouped(bits) | Base::Decoded(bits) if inside && matrix => Some(bits),
            Base::Grouped(_) | Base::Decoded(_) => continue,
        };
        let mut new = match bits {
            None => (**weight).clone(),
            Some(bits) => grouped(weight, bits)?,
        };
        if !matches!(base, Base::Grouped(_)) {
            let dense = Dense::from_f32(new.shape().to_vec(), &new.to_f32(), Dtype::F32)?;
            new = Weight::Dense(dense);
        }
        *weight = Arc::new(new);
    }
    crate::kernels::memory::give_back_freed();
    Ok(())
}

/// A weight rounded to the nearest codes, a row at a time.
fn grouped(weight: &Weight, bits: u8) -> Result<Weight> {
    let shape = [weight.rows(), weight.cols()];
    let spec = GroupedSpec { bits, group: 64, symmetric: false };
    spec.check(shape[1])?;
    let mut row = vec![0.0; shape[1]];
    let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
    for r in 0..shape[0] {
        weight.read_rows(r, &mut row);
        for values in row.chunks_exact(spec.group) {
            let (scale, zero) = spec.fit(values);
            codes.extend(values.iter().map(|v| spec.code(*v, scale, zero)));
            scales.push(scale);
            zeros.push(zero);
        }
    }
    Ok(Weight::Grouped(Grouped::pack(shape, spec, &codes, &scales, &zeros)?))
}

/// The same steps with every tensor of a decoder trained.
fn measure_full(model: &AnyModel, run: Run) -> Result<Train> {
    let AnyModel::Decoder(model) = model else {
        return Err(Error::field("full", "all tensors of a decoder are trained; name one"));
    };
    let config = model.decoder()?;
    fits(&run, config.max_positions)?;
    let mut parameters = Parameters::new();
    for (name, _) in config.tensors() {
        let weight = model.weight(&name)?;
        let var = Var::from_vec(weight.to_f32(), weight.shape(), &Device::Cpu)?;
        parameters.insert(name, Parameter { var, rate: 1.0, decay: false });
    }
    let options =
        Options { checkpoint_activations: run.checkpoint_activations, ..Options::default() };
    let graph = decoder::graph::Graph::new(model, Precision::F32)?;
    let tuning = InPlace(&parameters);
    let pass = Pass::decoder(graph, &tuning, options);
    steps(&pass, &parameters, run, config.vocab, &|length, _| Target::Next(vec![true; length]))
}

fn check(run: &Run) -> Result<()> {
    if let Base::Grouped(bits) | Base::Decoded(bits) = run.base
        && ![2, 3, 4, 8].contains(&bits)
    {
        return Err(Error::field("base", format!("{bits} bits; take 2, 3, 4 or 8")));
    }
    let tokens = run.batch.checked_mul(run.length);
    if run.repetitions == 0 || tokens.is_none_or(|tokens| tokens == 0 || tokens > MOST_TOKENS) {
        let message = format!("between 1 and {MOST_TOKENS} tokens and one repetition are needed");
        return Err(Error::field("batch", message));
    }
    if run.rank == 0 || run.rank > MOST_RANK {
        return Err(Error::field("rank", format!("take a rank between 1 and {MOST_RANK}")));
    }
    Ok(())
}

fn fits(run: &Run, positions: usize) -> Result<()> {
    match run.length > positions {
        true => Err(Error::field("length", format!("at most {positions} tokens fit the model"))),
        false => Ok(()),
    }
}

fn steps(
    pass: &Pass<'_>,
    parameters: &Parameters,
    run: Run,
    vocab: usize,
    target: &dyn Fn(usize, usize) -> Target,
) -> Result<Train> {
    let sequences: Vec<Sequence> = (0..run.batch)
        .map(|t| Sequence {
            tokens: (0..run.length)
                .map(|i| ((t * 7919 + i * 104_729 + 13) % vocab) as u32)
                .collect(),
            target: target(run.length, t),
            line: t as u64 + 1,
        })
        .collect();
    let sequences: Vec<&Sequence> = sequences.iter().collect();
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, false);
    let mut step = || -> Result<f64> {
        let sums = if run.forward_only {
            pass.loss(&sequences, parameters)?
        } else {
            let (sums, gradients) = pass.loss_and_gradients(&sequences, parameters)?;
            if run.adam {
                let mut mean = gradients;
                for gradient in mean.values_mut() {
                    *gradient = (&*gradient * (1.0 / sums.count.max(1) as f64))?;
                }
                optimizer.update(parameters, &mean, ADAM_RATE)?;
            } else {
                descend(parameters, &gradients, sums.count)?;
            }
            sums
        };
        Ok(sums.loss / sums.count.max(1) as f64)
    };
    let first_loss = step()?;
    let mut last_loss = first_loss;
    let mut seconds = Vec::with_capacity(run.repetitions);
    for _ in 0..run.repetitions {
        let start = Instant::now();
        last_loss = step()?;
        seconds.push(start.elapsed().as_secs_f64().max(1e-9));
    }
    let seconds = Spread::of(seconds);
    Ok(Train {
        tokens_per_second: seconds.rate((run.batch * run.length) as f64),
        seconds_per_step: seconds,
        trained: parameters.values().map(|p| p.var.elem_count()).sum(),
        first_loss,
        last_loss,
        peak_bytes: machine::peak_bytes().unwrap_or(0),
        activation_bytes: pass.pool().peak_bytes(),
        run,
    })
}

/// A small step against the gradient of the mean.
fn descend(parameters: &Parameters, gradients: &Gradients, count: u64) -> Result<()> {
    const RATE: f64 = 1e-3;
    for (name, gradient) in gradients {
        if let Some(parameter) = parameters.get(name) {
            let moved = (parameter.var.as_tensor() - (gradient * (RATE / count as f64))?)?;
            parameter.var.set(&moved)?;
        }
    }
    Ok(())
}

/// Low-rank adapters as LoRA starts them: what they add is nothing at first.
pub(super) struct Adapters {
    parameters: Parameters,
    factors: BTreeMap<String, LowRank>,
}

impl Adapters {
    /// Of `rank` on the linear layers that are called so.
    pub(super) fn of(
        tensors: &[(String, Vec<usize>)],
        (targets, rank): (&[String], usize),
        linear: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut all = Self { parameters: Parameters::new(), factors: BTreeMap::new() };
        let wanted = |name: &str| targets.iter().any(|target| name.contains(target));
        for (name, shape) in tensors {
            let &[rows, cols] = &shape[..] else { continue };
            if !linear(name) || !wanted(name) {
                continue;
            }
            let mut rng = Stream::root(1).child(name).rng();
            let bound = 1.0 / (cols as f32).sqrt();
            let a: Vec<f32> =
                (0..rank * cols).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect();
            let a = all.add(format!("{name}.a"), &[rank, cols], a)?;
            let b = all.add(format!("{name}.b"), &[rows, rank], vec![0.0; rows * rank])?;
            let change = LowRank { a, b, rows: None, scale: 2.0, dropout: None };
            all.factors.insert(name.clone(), change);
        }
        if all.factors.is_empty() {
            let message = format!("no linear layer of the model is called {targets:?}");
            return Err(Error::field("targets", message));
        }
        Ok(all)
    }

    /// What is trained.
    pub(super) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn add(&mut self, name: String, dims: &[usize], values: Vec<f32>) -> Result<Tensor> {
        let var = Var::from_tensor(&Tensor::from_vec(values, dims, &Device::Cpu)?)?;
        let tensor = var.as_tensor().clone();
        self.parameters.insert(name, Parameter { var, rate: 1.0, decay: false });
        Ok(tensor)
    }

    fn add_head(&mut self, hidden: usize) -> Result<()> {
        let [weight, bias] = CLASSIFIER.map(str::to_owned);
        let mut rng = Stream::root(1).child(&weight).rng();
        let values = (0..CLASSES * hidden).map(|_| 0.04 * (rng.random::<f32>() - 0.5)).collect();
        self.add(weight, &[CLASSES, hidden], values)?;
        self.add(bias, &[CLASSES], vec![0.0; CLASSES])?;
        Ok(())
    }
}

impl Tuning for Adapters {
    fn low_rank(&self, name: &str) -> Result<Option<LowRank>> {
        Ok(self.factors.get(name).cloned())
    }

    fn linear(&self, _: &str, _: &Tensor, _: &Arc<Weight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, _: &str) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        Run {
            base: Base::Stored,
            full: false,
            adam: false,
            batch: 2,
            length: 9,
            rank: 2,
            targets: vec!["q_proj".to_owned(), "query".to_owned()],
            bf16: false,
            checkpoint_activations: false,
            forward_only: false,
            repetitions: 3,
        }
    }

    #[test]
    fn the_numbers_belong_together() {
        let decoder = decoder::random::model(decoder::random::tiny("llama"), 1).expect("a model");
        let encoder = encoder::random::model(encoder::random::tiny(), 1).expect("a model");
        // Rank 2 on three layers of [64, 32], and of [32, 32] beside a head of two classes.
        let models = [(AnyModel::Decoder(decoder), 3 * 2 * 96), (AnyModel::Encoder(encoder), 450)];
        for (model, trained) in models {
            let found = measure(model.clone(), run()).expect("numbers");
            let rate = 18.0 / found.seconds_per_step.median;
            assert!((found.tokens_per_second.median / rate - 1.0).abs() < 1e-9);
            assert_eq!(found.trained, trained);
            assert!(found.last_loss < found.first_loss && found.activation_bytes > 0);
            for other in [
                Run { checkpoint_activations: true, ..run() },
                Run { forward_only: true, ..run() },
                Run { bf16: true, ..run() },
            ] {
                let other = measure(model.clone(), other).expect("numbers");
                assert!((other.first_loss - found.first_loss).abs() < 0.05);
            }
        }
    }

    #[test]
    fn bases_and_ways_to_train() {
        let mut config = decoder::random::tiny("llama");
        config["hidden_size"] = serde_json::json!(64);
        config["intermediate_size"] = serde_json::json!(128);
        let model: AnyModel = decoder::random::model(config, 1).expect("a model").into();
        let with =
            |base, adam| measure(model.clone(), Run { base, adam, ..run() }).expect("numbers");
        let (stored, dense) = (with(Base::Stored, false), with(Base::Dense, false));
        assert_eq!(stored.first_loss, dense.first_loss);
        let (packed, decoded) = (with(Base::Grouped(2), true), with(Base::Decoded(2), true));
        assert!((packed.first_loss - stored.first_loss).abs() > 1e-4);
        assert!((packed.first_loss - decoded.first_loss).abs() < 1e-5);
        assert!((packed.last_loss - decoded.last_loss).abs() < 1e-4);
        let full =
            measure(model.clone(), Run { full: true, adam: true, ..run() }).expect("numbers");
        assert_eq!(full.trained as u64, model.parameters());
        assert!(full.last_loss < full.first_loss);
        let encoder = encoder::random::model(encoder::random::tiny(), 1).expect("a model");
        assert!(measure(encoder.into(), Run { full: true, ..run() }).is_err());
    }

    #[test]
    fn runs_that_measure_nothing_are_refused() {
        let model = decoder::random::model(decoder::random::tiny("llama"), 1).expect("a model");
        let model = AnyModel::Decoder(model);
        for bad in [
            Run { batch: 0, ..run() },
            Run { length: 1 << 15, ..run() },
            Run { batch: usize::MAX, ..run() },
            Run { rank: 0, ..run() },
            Run { base: Base::Grouped(5), ..run() },
            Run { targets: vec!["nothing".to_owned()], ..run() },
            Run { repetitions: 0, ..run() },
        ] {
            assert!(measure(model.clone(), bad.clone()).is_err(), "{bad:?}");
        }
    }
}
