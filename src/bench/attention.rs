//! The gradient of attention, exact and factored: where one overtakes the other as entries grow
//! ([`measure`]), and what that is worth in training ([`train`]).

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use rand::Rng;
use serde::Serialize;
use serde_json::json;

use super::stats::Spread;
use super::train::Adapters;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Result};
use crate::kernels::training::attention::{self, Kept, Shape};
use crate::kernels::training::factored::{
    self, Basis, Group, MAX_DEGREE, Monomials, Plan, count, degree_within,
};
use crate::models::{Model, decoder};
use crate::nn::dtype::Dtype;
use crate::nn::limits::{Factoring, threshold};
use crate::nn::ops::Precision;
use crate::nn::ops::attend::Choosing;
use crate::nn::weight::{Dense, Weight};
use crate::seed::Stream;
use crate::train::optimizer::{AdamW, Optimizer, Rule};
use crate::train::pass::{Options, Pass};

const MAX_LENGTH: usize = 1 << 16;
/// Features that are tried, at most.
const MAX_FEATURES: usize = 1 << 13;

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    pub lengths: Vec<usize>,
    /// Queries and keys are uniform in plus and minus these; the scale is `1 / dim`.
    pub gammas: Vec<f64>,
    pub dim: usize,
    pub heads: usize,
    pub causal: bool,
    /// Largest error of the gradients relative to their norms.
    pub eps: f64,
    pub repetitions: usize,
}

/// A length and a size of entries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub length: usize,
    pub gamma: f64,
    /// `sqrt(ln length)`
    pub threshold: f64,
    /// Of the smallest degree with gradients near enough; absent where none has.
    pub factored: Option<Factored>,
    pub exact_milliseconds: Spread,
}

/// The factored gradient of a row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Factored {
    pub degree: usize,
    pub features: usize,
    /// The largest of the errors of the three gradients, each relative to the gradient's norm.
    pub error: f64,
    pub milliseconds: Spread,
    /// How many times faster it is: repetitions side by side.
    pub speedup: Spread,
    /// The same with the forward pass.
    pub speedup_with_forward: Spread,
}

/// Where factoring is as fast as the exact gradient, for a length.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Crossing {
    pub length: usize,
    pub threshold: f64,
    /// Size of entries where the speed-up falls through 1, on a line between the logarithms of the speed-ups
    /// of two rows; absent where it does not within the rows.
    pub gamma: Option<f64>,
}

/// Measures every length with every size; `done` gets each row.
///
/// # Errors
/// `INVALID_FIELD` for what measures nothing, and what `done` answers.
pub fn measure<E: From<Error>>(
    settings: &Settings,
    mut done: impl FnMut(&Row) -> std::result::Result<(), E>,
) -> std::result::Result<Vec<Row>, E> {
    check(settings)?;
    let mut rows = Vec::new();
    for length in &settings.lengths {
        for gamma in &settings.gammas {
            let row = Case::new(settings, *length, *gamma).row(settings);
            done(&row)?;
            rows.push(row);
        }
    }
    Ok(rows)
}

fn check(settings: &Settings) -> Result<()> {
    let Settings { lengths, gammas, dim, heads, eps, repetitions, .. } = settings;
    if lengths.is_empty() || lengths.iter().any(|n| !(2..=MAX_LENGTH).contains(n)) {
        return Err(Error::field(
            "length",
            format!("between 2 and {MAX_LENGTH} tokens are needed"),
        ));
    }
    if gammas.is_empty() || gammas.iter().any(|g| !(*g > 0.0 && *g <= 100.0)) {
        return Err(Error::field("gamma", "sizes of entries are above 0 and at most 100"));
    }
    if *dim == 0 || *dim > 64 || *heads == 0 || *heads > 256 || *repetitions == 0 {
        let problem = "1 to 64 channels, 1 to 256 heads and one repetition are needed";
        return Err(Error::field("dim", problem));
    }
    match *eps > 0.0 && *eps < 1.0 {
        true => Ok(()),
        false => Err(Error::field("eps", format!("{eps} is outside (0, 1)"))),
    }
}

/// Where the speed-up of each length falls through 1.
pub fn crossings(rows: &[Row]) -> Vec<Crossing> {
    let mut lengths: Vec<usize> = rows.iter().map(|row| row.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let crossing = |length: usize| {
        let mut points: Vec<(f64, f64)> = rows
            .iter()
            .filter(|row| row.length == length)
            .map(|row| {
                // Where no degree is near enough, there is no speed.
                (row.gamma, row.factored.as_ref().map_or(1e-3, |f| f.speedup.median).ln())
            })
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let pair = points.windows(2).find(|pair| pair[0].1 >= 0.0 && pair[1].1 < 0.0);
        let gamma = pair.map(|pair| {
            let [(a, up), (b, down)] = [pair[0], pair[1]];
            a + (b - a) * up / (up - down)
        });
        Crossing { length, threshold: threshold(length), gamma }
    };
    lengths.into_iter().map(crossing).collect()
}

/// Inputs, and the exact result.
struct Case {
    shape: Shape,
    length: usize,
    gamma: f64,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
}

/// Outputs, sums and gradients of one way.
struct Room {
    out: Vec<f32>,
    sums: Vec<f32>,
    gradients: [Vec<f32>; 3],
}

impl Case {
    fn new(settings: &Settings, length: usize, gamma: f64) -> Self {
        let Settings { dim, heads, causal, .. } = *settings;
        let shape = Shape {
            heads,
            kv_heads: heads,
            dim,
            scale: 1.0 / dim as f32,
            softcap: None,
            causal,
            window: None,
        };
        let draw = |name: &str, size: f64| -> Vec<f32> {
            let mut rng = Stream::root(1).child(&format!("{length}/{gamma}/{name}")).rng();
            let half = size as f32;
            (0..length * heads * dim).map(|_| half * (2.0 * rng.random::<f32>() - 1.0)).collect()
        };
        let (q, k) = (draw("queries", gamma), draw("keys", gamma));
        Self { shape, length, gamma, q, k, v: draw("values", 1.0), g: draw("gradients", 1.0) }
    }

    fn room(&self) -> Room {
        let zeros = || vec![0.0; self.q.len()];
        let sums = vec![0.0; self.length * self.shape.heads];
        Room { out: zeros(), sums, gradients: [zeros(), zeros(), zeros()] }
    }

    fn plans(&self, degree: usize) -> Vec<Option<Plan>> {
        let plan = |head| {
            let group = Group::new(&self.shape, &(0..self.length), head, (&self.q, &self.k));
            let basis = Basis { center: group.center(), directions: None };
            Some(Plan { monomials: Monomials::new(self.shape.dim, degree), basis })
        };
        (0..self.shape.heads).map(plan).collect()
    }

    /// Seconds of the forward pass and of the gradient; the heads with a plan are factored. `None` if the
    /// weights came out of no use.
    fn run(&self, plans: Option<&factored::Plans>, room: &mut Room) -> Option<[f64; 2]> {
        let run = std::slice::from_ref(&(0..self.length)).to_vec();
        let inputs = (&self.q[..], &self.k[..], &self.v[..]);
        let start = Instant::now();
        match plans {
            None => attention::forward(&self.shape, &run, inputs, &mut room.out, &mut room.sums),
            Some(plans) => {
                let (out, sums) = (&mut room.out, &mut room.sums);
                let good = factored::forward(&self.shape, &run, plans, inputs, out, sums);
                if good.iter().any(|good| !good) {
                    return None;
                }
            }
        }
        let forward = start.elapsed().as_secs_f64();
        let (q, k, v) = inputs;
        let kept = Kept { q, k, v, out: &room.out, sums: &room.sums };
        let [dq, dk, dv] = &mut room.gradients;
        let to = (&mut dq[..], &mut dk[..], &mut dv[..]);
        let start = Instant::now();
        match plans {
            None => attention::backward(&self.shape, &run, kept, &self.g, to),
            Some(plans) => factored::backward(&self.shape, &run, plans, kept, &self.g, to),
        }
        black_box(&room.gradients);
        Some([forward, start.elapsed().as_secs_f64()].map(|seconds| seconds.max(1e-9)))
    }

    fn row(&self, settings: &Settings) -> Row {
        let (mut exact, mut near) = (self.room(), self.room());
        self.run(None, &mut exact);
        let found = self.search(settings, &exact, &mut near);
        let (mut exact_ms, mut ms) = (Vec::new(), Vec::new());
        let (mut speedup, mut both) = (Vec::new(), Vec::new());
        let plans = found.map(|(degree, _)| self.plans(degree));
        for _ in 0..settings.repetitions {
            let Some([forward, backward]) = self.run(None, &mut exact) else { continue };
            exact_ms.push(backward * 1e3);
            let Some(plans) = &plans else { continue };
            let Some([own_forward, own]) = self.run(Some(plans), &mut near) else { continue };
            ms.push(own * 1e3);
            speedup.push(backward / own);
            both.push((forward + backward) / (own_forward + own));
        }
        let factored = found.map(|(degree, error)| Factored {
            degree,
            features: count(self.shape.dim, degree).unwrap_or(usize::MAX),
            error,
            milliseconds: Spread::of(ms),
            speedup: Spread::of(speedup),
            speedup_with_forward: Spread::of(both),
        });
        Row {
            length: self.length,
            gamma: self.gamma,
            threshold: threshold(self.length),
            factored,
            exact_milliseconds: Spread::of(exact_ms),
        }
    }

    /// The smallest degree whose gradients are near enough, and their error.
    fn search(&self, settings: &Settings, exact: &Room, near: &mut Room) -> Option<(usize, f64)> {
        let most = degree_within(self.shape.dim, MAX_FEATURES, MAX_DEGREE);
        let group = Group::new(&self.shape, &(0..self.length), 0, (&self.q, &self.k));
        let basis = Basis { center: group.center(), directions: None };
        // Weights of a sample say where to begin.
        let first = group.errors(&basis, most).degree(settings.eps * 4.0)?.0.saturating_sub(1);
        (first.max(1)..=most).find_map(|degree| {
            self.run(Some(&self.plans(degree)), near)?;
            let error = relative_error(&near.gradients, &exact.gradients);
            (error <= settings.eps).then_some((degree, error))
        })
    }
}

/// The largest of the relative errors of gradients.
fn relative_error(near: &[Vec<f32>; 3], exact: &[Vec<f32>; 3]) -> f64 {
    let square = |v: f64| v * v;
    let error = |(near, exact): (&Vec<f32>, &Vec<f32>)| {
        let pairs = near.iter().zip(exact);
        let off: f64 = pairs.map(|(a, b)| square(f64::from(a - b))).sum();
        let norm: f64 = exact.iter().map(|v| square(f64::from(*v))).sum();
        (off / norm.max(f64::MIN_POSITIVE)).sqrt()
    };
    near.iter().zip(exact).map(error).fold(0.0, |a, b| if a >= b { a } else { b })
}

/// A small decoder that is trained both ways.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Training {
    /// Tokens of the sequence of a step.
    pub length: usize,
    pub steps: usize,
    pub dim: usize,
    pub heads: usize,
    pub layers: usize,
    /// Queries and keys have this root mean square.
    pub size: f64,
    pub rank: usize,
    pub rate: f64,
    pub eps: f64,
    /// Seeds, one run each.
    pub seeds: Vec<u64>,
}

/// A run with one way of taking gradients.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arm {
    pub first_loss: f64,
    /// Mean of the last quarter of the steps.
    pub last_loss: f64,
    /// Loss of every step.
    pub losses: Vec<f64>,
    pub seconds_per_step: f64,
    /// Seconds a step in attention, forwards and backwards.
    pub attention_forward: f64,
    pub attention_backward: f64,
    /// Share of the heads that were factored.
    pub factored_share: f64,
    pub features: usize,
}

/// Both ways with one seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    pub seed: u64,
    pub exact: Arm,
    pub factored: Arm,
    /// `|factored - exact| / exact` of the last losses.
    pub loss_difference: f64,
    pub backward_speedup: f64,
    pub step_speedup: f64,
}

/// What training reaches both ways.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trained {
    pub training: Training,
    pub pairs: Vec<Pair>,
    pub loss_difference: Spread,
    pub backward_speedup: Spread,
    pub step_speedup: Spread,
}

const VOCAB: usize = 64;

/// Trains low-rank adapters of a small random decoder on long sequences whose second half repeats the first,
/// with exact attention and with factored attention from the same start on the same data.
///
/// # Errors
/// `INVALID_FIELD` for what trains nothing.
pub fn train(training: Training) -> Result<Trained> {
    let Training { length, steps, dim, heads, layers, size, rank, rate, eps, .. } = training;
    let bounds = [
        ("length", length, 8, MAX_LENGTH),
        ("steps", steps, 1, 1 << 16),
        ("dim", dim, 2, 64),
        ("heads", heads, 1, 64),
        ("layers", layers, 1, 32),
        ("rank", rank, 1, 256),
    ];
    for (name, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            return Err(Error::field(name, format!("{value} is outside {least} to {most}")));
        }
    }
    if dim % 2 == 1 {
        return Err(Error::field("dim", "positions turn pairs of channels; take an even number"));
    }
    for (name, value) in [("size", size), ("rate", rate)] {
        if !(value > 0.0 && value <= 100.0) {
            return Err(Error::field(name, format!("{value} is outside (0, 100]")));
        }
    }
    if !(eps > 0.0 && eps < 1.0) {
        return Err(Error::field("eps", format!("{eps} is outside (0, 1)")));
    }
    if training.seeds.is_empty() {
        return Err(Error::field("seeds", "one seed is needed"));
    }
    let mut pairs = Vec::with_capacity(training.seeds.len());
    for seed in &training.seeds {
        let exact = arm(&training, *seed, None)?;
        let factoring = Factoring { eps, ..Factoring::default() };
        let factored = arm(&training, *seed, Some(factoring))?;
        pairs.push(Pair {
            seed: *seed,
            loss_difference: (factored.last_loss - exact.last_loss).abs() / exact.last_loss,
            backward_speedup: exact.attention_backward / factored.attention_backward.max(1e-9),
            step_speedup: exact.seconds_per_step / factored.seconds_per_step.max(1e-9),
            exact,
            factored,
        });
    }
    let spread = |of: fn(&Pair) -> f64| Spread::of(pairs.iter().map(of).collect());
    Ok(Trained {
        training,
        loss_difference: spread(|pair| pair.loss_difference),
        backward_speedup: spread(|pair| pair.backward_speedup),
        step_speedup: spread(|pair| pair.step_speedup),
        pairs,
    })
}

/// A decoder whose queries and keys are normed to a size.
fn small(training: &Training, seed: u64) -> Result<Model> {
    let hidden = (training.heads * training.dim).max(32);
    let config = json!({
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": training.layers,
        "num_attention_heads": training.heads,
        "num_key_value_heads": training.heads,
        "head_dim": training.dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": training.length,
        "tie_word_embeddings": false,
    });
    let mut model = decoder::random::model(config, seed)?;
    let norms: Vec<String> = model
        .weights
        .keys()
        .filter(|name| name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight"))
        .cloned()
        .collect();
    for name in norms {
        let values = vec![training.size as f32; training.dim];
        let weight = Dense::from_f32(vec![training.dim], &values, Dtype::F32)?;
        model.weights.insert(name, Arc::new(Weight::Dense(weight)));
    }
    Ok(model)
}

/// Tokens that repeat after half of the length.
fn repeating(length: usize, stream: &Stream) -> Sequence {
    let mut rng = stream.rng();
    let half = length / 2;
    let first: Vec<u32> = (0..length - half)
        // Few tokens are frequent, so that there is something to learn at once.
        .map(|_| (VOCAB as f64 * rng.random::<f64>().powi(3)) as u32)
        .collect();
    let tokens: Vec<u32> = first.iter().chain(&first).take(length).copied().collect();
    Sequence { target: Target::Next(vec![true; length]), tokens, line: 1 }
}

fn arm(training: &Training, seed: u64, factoring: Option<Factoring>) -> Result<Arm> {
    let model = small(training, seed)?;
    let targets = ["proj".to_owned()];
    let config = model.decoder()?;
    let adapters =
        Adapters::of(&config.tensors(), (&targets, training.rank), |name| name.contains("_proj."))?;
    let choosing = Arc::new(Choosing::new(factoring, 0));
    let graph = decoder::graph::Graph::new(&model, Precision::F32)?
        .with_attention(Box::new(Arc::clone(&choosing)));
    let pass = Pass::decoder(graph, &adapters, Options::default());
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, false);
    let data = Stream::root(seed).child("data");
    let mut losses = Vec::with_capacity(training.steps);
    let start = Instant::now();
    for step in 0..training.steps {
        let sequence = repeating(training.length, &data.child(&step.to_string()));
        let (sums, mut gradients) = pass.loss_and_gradients(&[&sequence], adapters.parameters())?;
        for gradient in gradients.values_mut() {
            *gradient = (&*gradient / sums.count.max(1) as f64)?;
        }
        optimizer.update(adapters.parameters(), &gradients, training.rate)?;
        losses.push(sums.loss / sums.count.max(1) as f64);
    }
    let steps = training.steps as f64;
    let seconds_per_step = start.elapsed().as_secs_f64() / steps;
    let [forward, backward] = choosing.seconds();
    let seen = choosing.take();
    let last = &losses[losses.len() - losses.len().div_ceil(4)..];
    Ok(Arm {
        first_loss: losses[0],
        last_loss: last.iter().sum::<f64>() / last.len() as f64,
        seconds_per_step,
        attention_forward: forward / steps,
        attention_backward: backward / steps,
        factored_share: seen.factored as f64 / (seen.factored + seen.exact).max(1) as f64,
        features: seen.features,
        losses,
    })
}

#[cfg(test)]
mod tests;
