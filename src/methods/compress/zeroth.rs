//! How much the loss depends on weights: differences along random directions, or gradients.
//!
//! A probe moves some weights of a block by `+ eps z` and `- eps z`, `z` normal, and sees what becomes of the
//! loss. The states that enter the block are kept, so only it and what comes after runs. `z` follows from a
//! stream of random numbers and is made again for each side instead of being stored; the weights of the model
//! are never written to.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;
use rayon::prelude::*;

use crate::calibrate::Windows;
use crate::calibrate::walk::{self, Run, Walk, Weights};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::models::decoder::graph::Graph;
use crate::models::decoder::plan::Head;
use crate::models::{Family, Model};
use crate::nn::dtype::Dtype;
use crate::nn::ops::Precision;
use crate::nn::weight::{Dense, Weight};
use crate::progress::Progress;
use crate::seed::Stream;
use crate::train::memory;
use crate::train::parameters::{Parameter, Parameters};
use crate::train::pass::{self, InPlace, Pass};

/// Elements that one stream of random numbers makes.
const CHUNK: usize = 1 << 16;
/// Rows that go through the head at once.
const HEAD_ROWS: usize = 64;
/// Differences of the loss below this are rounding.
pub const NOISE: f64 = 1e-6;
/// What similarities are divided by in the loss of encoders.
const TEMPERATURE: f64 = 0.05;

/// How weights are probed.
pub struct Probing<'a> {
    pub model: &'a Model,
    /// Sets of weights that are moved together, by block.
    pub probes: &'a [Vec<Vec<String>>],
    pub windows: &'a Windows,
    /// Windows that a direction is tried on at once.
    pub batch: usize,
    pub noises: usize,
    pub eps: f64,
    pub stream: &'a Stream,
    pub progress: &'a Progress,
}

/// What scoring found.
#[derive(Debug, Default)]
pub struct Scores {
    /// In the order of the probes.
    pub values: Vec<f64>,
    /// Largest memory that was held beside what was there before.
    pub memory: u64,
    pub warnings: Vec<String>,
}

/// Sums over batches and directions of `|L+ - L-| / (2 eps)`, by probe.
pub fn zeroth(how: &Probing<'_>) -> Result<Scores> {
    let model = how.model;
    let walk = walk::of(&model.family);
    let weights = &model.weights;
    let loss = Loss::new(model)?;
    let before = memory::resident();
    let blocks: Vec<Box<dyn Run>> =
        (0..walk.blocks()).map(|b| walk.block(weights, b)).collect::<Result<_>>()?;
    let (length, width) = (loss.length(how.windows.length), walk.width());
    let count: usize = how.probes.iter().map(Vec::len).sum();
    let mut scores = Scores { values: vec![0.0; count], ..Scores::default() };
    let (mut quiet, mut tried) = (0, 0);
    let batches: Vec<&[u32]> = how.windows.tokens.chunks(how.batch * how.windows.length).collect();
    for (i, tokens) in batches.iter().enumerate() {
        let mut hidden = vec![0.0; tokens.len() * width];
        walk.embed(weights, tokens, &mut hidden)?;
        let mut at = 0;
        for (b, probes) in how.probes.iter().enumerate() {
            let done = (i * count + at) as f64 / (batches.len() * count.max(1)) as f64;
            how.progress.report(done, &format!("scoring block {} of {}", b + 1, walk.blocks()))?;
            for names in probes {
                for noise in 0..how.noises {
                    let stream = how.stream.child(&format!("batch {i}/noise {noise}"));
                    let side = |eps: f64| -> Result<f64> {
                        how.progress.check()?;
                        let moved = moved(weights, names, eps, &stream)?;
                        let mut hidden = hidden.clone();
                        walk.block(&moved, b)?.forward(&mut hidden, length, None);
                        for block in &blocks[b + 1..] {
                            block.forward(&mut hidden, length, None);
                        }
                        loss.of(tokens, length, hidden)
                    };
                    let slope = slope(how.eps, side)
                        .map_err(|e| e.within(names.first().map_or("no weight", String::as_str)))?;
                    let difference = (slope.value * 2.0 * slope.eps).abs();
                    tried += 1;
                    quiet += usize::from(difference < NOISE);
                    scores.values[at] += slope.value.abs();
                }
                scores.memory = scores.memory.max(memory::resident().saturating_sub(before));
                at += 1;
            }
            blocks[b].forward(&mut hidden, length, None);
        }
    }
    if 2 * quiet > tried {
        scores.warnings.push(format!(
            "{quiet} of {tried} differences of the loss are below {NOISE}, where rounding is as large; \
             take a larger eps"
        ));
    }
    Ok(scores)
}

/// `(L+ - L-) / (2 eps)` and the step that it was taken with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slope {
    pub value: f64,
    pub eps: f64,
}

/// The slope of a loss, which `side` gives at a signed distance. A loss that is not finite is tried once at a
/// tenth of the distance.
pub fn slope(eps: f64, side: impl Fn(f64) -> Result<f64>) -> Result<Slope> {
    for eps in [eps, eps / 10.0] {
        let (plus, minus) = (side(eps)?, side(-eps)?);
        if plus.is_finite() && minus.is_finite() {
            return Ok(Slope { value: (plus - minus) / (2.0 * eps), eps });
        }
    }
    Err(Error::new(
        Reason::NonFinite,
        format!(
            "the loss is not finite when these weights move by {eps}, or by a tenth of that; take a smaller \
             eps, or look at the model: it may be broken"
        ),
    ))
}

/// The weights with those of `names` moved by `eps z`.
pub(super) fn moved(
    weights: &Weights,
    names: &[String],
    eps: f64,
    stream: &Stream,
) -> Result<Weights> {
    let mut view = weights.clone();
    for name in names {
        let stored = weights.get(name).ok_or_else(|| {
            Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
        })?;
        let mut values = stored.to_f32();
        add_noise(&mut values, eps, &stream.child(name));
        let dense = Dense::from_f32(stored.shape().to_vec(), &values, Dtype::F32)?;
        view.insert(name.clone(), Arc::new(Weight::Dense(dense)));
    }
    Ok(view)
}

/// `values += scale z`, with the `z` of the stream.
pub fn add_noise(values: &mut [f32], scale: f64, stream: &Stream) {
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        let mut rng = stream.child(&i.to_string()).rng();
        // Box and Muller, two at a time.
        for pair in chunk.chunks_mut(2) {
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
            let angle = std::f64::consts::TAU * rng.random::<f64>();
            for (value, z) in pair.iter_mut().zip([radius * angle.cos(), radius * angle.sin()]) {
                *value += (scale * z) as f32;
            }
        }
    });
}

/// The loss that belongs to a family.
enum Loss<'a> {
    /// Mean negative log-likelihood of the next token.
    NextToken { head: Head, vocab: usize, width: usize },
    /// Two towers that share their weights: the first half of a window is to find its second half among those
    /// of the batch, and the other way round.
    Halves { walk: &'a dyn Walk },
}

impl<'a> Loss<'a> {
    fn new(model: &'a Model) -> Result<Self> {
        Ok(match &model.family {
            Family::Decoder(config) => Self::NextToken {
                head: Head::new(config, &model.weights)?,
                vocab: config.vocab,
                width: config.hidden,
            },
            Family::Encoder(_) => Self::Halves { walk: walk::of(&model.family) },
        })
    }

    /// Tokens of a sequence that the model sees, of windows of this many.
    fn length(&self, window: usize) -> usize {
        match self {
            Self::NextToken { .. } => window,
            Self::Halves { .. } => window / 2,
        }
    }

    /// The loss of sequences of `length` whose final hidden states these are.
    fn of(&self, tokens: &[u32], length: usize, mut hidden: Vec<f32>) -> Result<f64> {
        match self {
            Self::NextToken { head, vocab, width } => {
                let (mut sum, mut count) = (0.0, 0);
                let mut logits = vec![0.0; HEAD_ROWS * vocab];
                let windows = hidden.chunks_mut(length * width).zip(tokens.chunks(length));
                for (states, tokens) in windows {
                    let states = &mut states[..(tokens.len() - 1) * width];
                    let rows = states.chunks_mut(HEAD_ROWS * width);
                    for (rows, next) in rows.zip(tokens[1..].chunks(HEAD_ROWS)) {
                        let logits = &mut logits[..next.len() * vocab];
                        head.finish(rows, logits);
                        let each = logits.par_chunks(*vocab).zip(next);
                        let losses: Vec<f64> =
                            each.map(|(row, token)| surprise(row, *token as usize)).collect();
                        sum += losses.iter().sum::<f64>();
                        count += next.len();
                    }
                }
                Ok(sum / f64::from(u32::try_from(count.max(1)).unwrap_or(u32::MAX)))
            }
            Self::Halves { walk } => Ok(contrast(&hidden, length, walk.width())),
        }
    }
}

/// `-log softmax(logits)[right]`.
fn surprise(logits: &[f32], right: usize) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - top).exp()).sum();
    sum.ln() - f64::from(logits[right] - top)
}

/// The mean over both directions of the cross-entropy of finding the other half, by cosine; the halves of a
/// window follow each other, `half` tokens each.
fn contrast(hidden: &[f32], half: usize, width: usize) -> f64 {
    let pooled = |rows: &[f32]| -> Vec<f64> {
        let mut sum = vec![0.0; width];
        for row in rows.chunks(width) {
            sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
        }
        let norm = sum.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        sum.iter().map(|v| v / norm).collect()
    };
    let windows = || hidden.chunks(2 * half * width);
    let first: Vec<_> = windows().map(|w| pooled(&w[..half * width])).collect();
    let second: Vec<_> = windows().map(|w| pooled(&w[half * width..])).collect();
    let towards = |from: &[Vec<f64>], to: &[Vec<f64>]| -> f64 {
        let each = from.iter().enumerate().map(|(i, a)| {
            let scores: Vec<f64> = to
                .iter()
                .map(|b| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / TEMPERATURE)
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln() - (scores[i] - top)
        });
        each.sum::<f64>() / from.len().max(1) as f64
    };
    f64::midpoint(towards(&first, &second), towards(&second, &first))
}

/// First-order scores: the sums over batches of `|g| |w|`, or of `g^2 w^2`, by weight.
pub fn first(
    model: &Model,
    names: &[&String],
    windows: &Windows,
    (batch, squared): (usize, bool),
    progress: &Progress,
) -> Result<(BTreeMap<String, f64>, u64)> {
    let before = memory::resident();
    let mut most = 0;
    let mut parameters = Parameters::new();
    for name in names {
        let weight = model.weight(name)?;
        let device = &candle_core::Device::Cpu;
        let var = candle_core::Var::from_vec(weight.to_f32(), weight.shape(), device)?;
        parameters.insert((*name).clone(), Parameter { var, rate: 1.0, decay: false });
    }
    let tuning = InPlace(&parameters);
    let graph = Graph::new(model, Precision::F32)?;
    let pass = Pass::decoder(graph, &tuning, pass::Options::default());
    let mut scores: BTreeMap<String, f64> = names.iter().map(|n| ((*n).clone(), 0.0)).collect();
    let batches: Vec<&[u32]> = windows.tokens.chunks(batch * windows.length).collect();
    for (i, tokens) in batches.iter().enumerate() {
        progress.report(i as f64 / batches.len() as f64, "scoring by gradients")?;
        let sequence = |tokens: &[u32]| Sequence {
            tokens: tokens.to_vec(),
            target: Target::Next((0..tokens.len()).map(|i| i > 0).collect()),
            line: 0,
        };
        let sequences: Vec<Sequence> = tokens.chunks(windows.length).map(sequence).collect();
        let records: Vec<&Sequence> = sequences.iter().collect();
        let (sums, gradients) = pass.loss_and_gradients(&records, &parameters)?;
        most = most.max(memory::resident().saturating_sub(before));
        let mean = 1.0 / sums.count.max(1) as f64;
        for (name, score) in &mut scores {
            progress.check()?;
            let (Some(gradient), Some(parameter)) = (gradients.get(name), parameters.get(name))
            else {
                continue;
            };
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            let values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
            let each = gradient.iter().zip(&values).map(|(g, w)| {
                let product = (f64::from(*g) * mean * f64::from(*w)).abs();
                if squared { product * product } else { product }
            });
            *score += each.sum::<f64>();
        }
    }
    if let Some((name, _)) = scores.iter().find(|(_, score)| !score.is_finite()) {
        return Err(Error::new(
            Reason::NonFinite,
            format!("the gradient of '{name}' is not finite; the model may be broken: evaluate it"),
        ));
    }
    Ok((scores, most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn slopes_have_the_energy_of_the_gradient() {
        // Outputs of W x for four inputs against targets; half the squared error has the gradient E x^T.
        let w: Vec<f32> = (0..12).map(|i| ((i * 7 % 5) as f32 - 2.0) / 3.0).collect();
        let inputs = [[1.0, 2.0, -1.0], [0.5, 0.0, 1.0], [-1.0, 1.0, 0.0], [2.0, -1.0, 1.0]];
        let error = |w: &[f32], x: &[f64; 3], r: usize| -> f64 {
            let y: f64 = (0..3).map(|j| f64::from(w[r * 3 + j]) * x[j]).sum();
            y - r as f64
        };
        let loss = |w: &[f32]| -> f64 {
            let each = inputs.iter().flat_map(|x| (0..4).map(move |r| (x, r)));
            each.map(|(x, r)| error(w, x, r).powi(2) / 2.0).sum()
        };
        let mut norm = 0.0;
        for r in 0..4 {
            for j in 0..3 {
                let g: f64 = inputs.iter().map(|x| error(&w, x, r) * x[j]).sum();
                norm += g * g;
            }
        }
        let mean = (0..2000)
            .map(|draw| {
                let stream = Stream::root(3).child(&draw.to_string());
                let side = |eps: f64| {
                    let mut moved = w.clone();
                    add_noise(&mut moved, eps, &stream);
                    Ok(loss(&moved))
                };
                slope(1e-2, side).expect("finite").value.powi(2)
            })
            .sum::<f64>()
            / 2000.0;
        assert!((mean / norm - 1.0).abs() < 0.1, "{mean} {norm}");
    }

    #[test]
    fn both_sides_see_the_same_direction() {
        let mut plus = vec![1.0f32; CHUNK + 5];
        let mut minus = plus.clone();
        let stream = Stream::root(1);
        add_noise(&mut plus, 1.0, &stream);
        add_noise(&mut minus, -1.0, &stream);
        assert!(plus.iter().zip(&minus).all(|(p, m)| (p + m - 2.0).abs() < 1e-5));
        let mean = plus.iter().map(|p| f64::from(*p) - 1.0).sum::<f64>() / plus.len() as f64;
        let square =
            plus.iter().map(|p| (f64::from(*p) - 1.0).powi(2)).sum::<f64>() / plus.len() as f64;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.03, "{mean} {square}");
    }

    #[test]
    fn a_loss_that_blows_up_is_tried_closer_and_then_named() {
        let side = |eps: f64| Ok(if eps.abs() > 0.05 { f64::NAN } else { 3.0 * eps });
        let found = slope(0.1, side).expect("closer");
        assert!((found.value - 3.0).abs() < 1e-9 && (found.eps - 0.01).abs() < 1e-12);
        assert_eq!(slope(1.0, side).unwrap_err().reason(), Reason::NonFinite);
    }

    #[test]
    fn scores_of_both_orders_agree_with_differences_by_hand() {
        let model = random::model(random::tiny("llama"), 5).expect("a model");
        let walk = walk::of(&model.family);
        let windows = Windows {
            tokens: (0..48).map(|i| (i * 31 + 7) % 96).collect(),
            length: 12,
            warnings: Vec::new(),
        };
        let probes: Vec<Vec<Vec<String>>> =
            (0..walk.blocks()).map(|b| vec![walk.linears(b).concat()]).collect();
        let how = |eps: f64, seed: u64| {
            let stream = Stream::root(seed);
            let how = Probing {
                model: &model,
                probes: &probes,
                windows: &windows,
                batch: 2,
                noises: 1,
                eps,
                stream: &stream,
                progress: &Progress::silent(),
            };
            zeroth(&how).expect("scores").values
        };
        let (a, b) = (how(1e-3, 1), how(1e-3, 1));
        assert_eq!(a, b, "the same seed, the same bits");
        assert_ne!(a, how(1e-3, 2));
        // A step of half the length sees about the same slope.
        for (a, b) in a.iter().zip(how(5e-4, 1)) {
            assert!(*a > 0.0 && (a / b - 1.0).abs() < 0.05, "{a} {b}");
        }
        // The gradient by the direction is the slope: one weight, one direction, by the graph.
        let name = &walk.linears(1)[3][0];
        let (scores, _) =
            first(&model, &[name], &windows, (4, false), &Progress::silent()).expect("scores");
        assert!(scores[name] > 0.0);
        // What the loss does not use has no score: the last block's, where nothing is predicted, would be
        // the only one; a probe of no weight stands for it.
        let nothing: Vec<Vec<Vec<String>>> = (0..walk.blocks()).map(|_| vec![vec![]]).collect();
        let stream = Stream::root(1);
        let none = Probing {
            model: &model,
            probes: &nothing,
            windows: &windows,
            batch: 4,
            noises: 1,
            eps: 1e-3,
            stream: &stream,
            progress: &Progress::silent(),
        };
        assert!(zeroth(&none).expect("scores").values.iter().all(|v| *v == 0.0));
    }

    #[test]
    fn the_slope_along_a_direction_is_that_of_the_gradient() {
        use crate::train::pass::InPlace;
        let model = random::model(random::tiny("llama"), 6).expect("a model");
        let walk = walk::of(&model.family);
        let windows = Windows {
            tokens: (0..24).map(|i| (i * 17 + 3) % 96).collect(),
            length: 12,
            warnings: Vec::new(),
        };
        let name = walk.linears(2)[3][0].clone();
        let probes = vec![vec![], vec![], vec![vec![name.clone()]]];
        let stream = Stream::root(9);
        let how = Probing {
            model: &model,
            probes: &probes,
            windows: &windows,
            batch: 2,
            noises: 1,
            eps: 1e-3,
            stream: &stream,
            progress: &Progress::silent(),
        };
        let found = zeroth(&how).expect("scores").values[0];
        let weight = model.weight(&name).expect("there");
        let device = &candle_core::Device::Cpu;
        let var = candle_core::Var::from_vec(weight.to_f32(), weight.shape(), device).expect("var");
        let parameter = Parameter { var, rate: 1.0, decay: false };
        let parameters = Parameters::from([(name.clone(), parameter)]);
        let tuning = InPlace(&parameters);
        let graph = Graph::new(&model, Precision::F32).expect("a graph");
        let pass = Pass::decoder(graph, &tuning, pass::Options::default());
        let sequences: Vec<Sequence> = windows
            .tokens
            .chunks(12)
            .map(|t| Sequence {
                tokens: t.to_vec(),
                target: Target::Next((0..12).map(|i| i > 0).collect()),
                line: 0,
            })
            .collect();
        let records: Vec<&Sequence> = sequences.iter().collect();
        let (sums, gradients) = pass.loss_and_gradients(&records, &parameters).expect("runs");
        let gradient = gradients[&name].flatten_all().expect("flat").to_vec1::<f32>().expect("f32");
        let mut z = vec![0.0; gradient.len()];
        add_noise(&mut z, 1.0, &stream.child("batch 0/noise 0").child(&name));
        let slope: f64 =
            gradient.iter().zip(&z).map(|(g, z)| f64::from(*g) * f64::from(*z)).sum::<f64>()
                / sums.count as f64;
        assert!((slope.abs() / found - 1.0).abs() < 0.02, "{slope} {found}");
    }

    #[test]
    fn losses_by_hand() {
        assert!((surprise(&[0.0, 3f32.ln()], 1) - (4f64 / 3.0).ln()).abs() < 1e-6);
        // Two windows of two tokens whose halves are alike inside and at right angles outside.
        let hidden = [1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 3.0];
        let want = (1.0 + (-1.0 / TEMPERATURE).exp()).ln();
        assert!((contrast(&hidden, 1, 2) - want).abs() < 1e-12);
    }

    #[test]
    fn scores_rest_on_the_loss_alone() {
        let mut model = random::model(random::tiny("llama"), 5).expect("a model");
        let put = |model: &mut Model, name: &str, shape: [usize; 2], value: f32| {
            let shape = if shape[1] == 0 { vec![shape[0]] } else { shape.to_vec() };
            let values = vec![value; shape.iter().product()];
            let dense = Dense::from_f32(shape, &values, Dtype::F32).expect("dense");
            let before = model.weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
            assert!(before.is_some(), "{name}");
        };
        // Nothing that goes into a projection of zeros matters.
        put(&mut model, "model.layers.1.self_attn.o_proj.weight", [32, 64], 0.0);
        let (unused, used) =
            ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight");
        let windows = |times: usize| {
            let tokens: Vec<u32> = (0..48).map(|i| (i * 31 + 7) % 96).collect();
            Windows { tokens: tokens.repeat(times), length: 12, warnings: Vec::new() }
        };
        let probes = [vec![], vec![vec![unused.to_owned()], vec![used.to_owned()]], vec![]];
        let scores = |model: &Model, eps: f64| {
            zeroth(&Probing {
                model,
                probes: &probes,
                windows: &windows(1),
                batch: 2,
                noises: 1,
                eps,
                stream: &Stream::root(4),
                progress: &Progress::silent(),
            })
        };
        let bits = |model: &Model| -> Vec<Vec<u32>> {
            let weights = model.weights.values().map(|w| w.to_f32());
            weights.map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
        };
        let before = bits(&model);
        let found = scores(&model, 1e-3).expect("scores");
        assert!(found.values[0] == 0.0 && found.values[1] > 0.0, "{:?}", found.values);
        assert!(found.warnings.is_empty(), "{:?}", found.warnings);
        assert!(bits(&model) == before, "the weights were written to");
        // Steps that no weight feels show nothing, and that is said.
        let found = scores(&model, 1e-30).expect("scores");
        assert_eq!(found.values, [0.0, 0.0]);
        assert!(found.warnings[0].contains("4 of 4 differences"), "{:?}", found.warnings);
        // By gradients: nothing of what is not used, and sums over batches, not means.
        let (unused, used) = (unused.to_owned(), used.to_owned());
        let by_gradients = |times: usize| {
            let how = (2, false);
            first(&model, &[&unused, &used], &windows(times), how, &Progress::silent())
        };
        let (once, twice) =
            (by_gradients(1).expect("scores").0, by_gradients(2).expect("scores").0);
        assert!(once[&unused] == 0.0 && once[&used] > 0.0, "{once:?}");
        assert!((twice[&used] / once[&used] - 2.0).abs() < 1e-6, "{once:?} {twice:?}");
        // A loss that is never finite names a weight that was moved.
        put(&mut model, "model.norm.weight", [32, 0], f32::MAX);
        let error = scores(&model, 1e-3).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains(&unused), "{error}");
    }
}
