//! Second moments of the inputs of linears on a text, a block at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use faer::Mat;

use crate::calibrate::gram::Gram;
use crate::calibrate::{self, Windows, walk};
use crate::error::{Error, Reason, Result};
use crate::models::Model;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::progress::Progress;
use crate::proto::v1::CordaNormalisation;

/// Tokens that run through a block at once.
const CHUNK_TOKENS: usize = 2048;

/// What is collected.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The text.
    pub context: calibrate::Options,
    /// How a sample is scaled.
    pub normalisation: CordaNormalisation,
}

/// Takes the names of linears that share an input, and `1/N sum X^T X` over the `N` samples.
pub type Sink<'a> = dyn FnMut(&[String], &Mat<f64>) -> Result<()> + 'a;

/// Gives the second moments of the inputs of linears.
pub trait SecondMoments {
    /// Calls `sink` for each group of linears that share an input and of which one is in `names`, with
    /// those that are.
    fn each(&mut self, names: &BTreeSet<String>, sink: &mut Sink<'_>) -> Result<()>;
}

/// Collects by walking windows of text through the blocks of a decoder.
pub struct Collector<'a> {
    pub model: &'a Model,
    pub windows: &'a Windows,
    pub normalisation: CordaNormalisation,
    pub progress: &'a Progress,
}

/// Sums over samples of the rows of one linear's input.
#[derive(Debug)]
pub struct Moments {
    gram: Gram,
    samples: usize,
    normalisation: CordaNormalisation,
    scaled: Vec<f32>,
}

impl Moments {
    pub fn new(cols: usize, normalisation: CordaNormalisation) -> Self {
        Self { gram: Gram::new(cols), samples: 0, normalisation, scaled: Vec::new() }
    }

    /// Adds the rows `[tokens, cols]` of one sample.
    ///
    /// # Errors
    /// NON_FINITE for a value that is none.
    pub fn add(&mut self, rows: &[f32]) -> Result<()> {
        if !rows.iter().all(|v| v.is_finite()) {
            return Err(Error::new(
                Reason::NonFinite,
                format!("sample {} of the text gives values that are not finite", self.samples + 1),
            ));
        }
        let top = match self.normalisation {
            CordaNormalisation::None => 1.0,
            CordaNormalisation::SampleMaxSigned => {
                rows.iter().copied().fold(f32::NEG_INFINITY, f32::max).abs()
            }
            CordaNormalisation::Unspecified | CordaNormalisation::SampleMax => {
                rows.iter().fold(0.0, |top: f32, v| top.max(v.abs()))
            }
        };
        self.samples += 1;
        // A sample of zeros adds nothing, however it is scaled.
        if top == 0.0 {
            return Ok(());
        }
        self.scaled.clear();
        self.scaled.extend(rows.iter().map(|v| v / top));
        self.gram.add(&self.scaled);
        Ok(())
    }

    /// The mean over the samples.
    pub fn mean(&self) -> Mat<f64> {
        let (n, cols) = (self.samples.max(1) as f64, self.gram.cols());
        Mat::from_fn(cols, cols, |i, j| self.gram.at(i, j) / n)
    }
}

impl SecondMoments for Collector<'_> {
    fn each(&mut self, names: &BTreeSet<String>, sink: &mut Sink<'_>) -> Result<()> {
        let walk = walk::of(&self.model.family);
        let Windows { tokens, length, .. } = self.windows;
        let width = walk.width();
        let in_scope = |b: usize| walk.linears(b).iter().flatten().any(|n| names.contains(n));
        let Some(last) = (0..walk.blocks()).rev().find(|b| in_scope(*b)) else { return Ok(()) };
        let mut hidden = vec![0.0; tokens.len() * width];
        walk.embed(&self.model.weights, tokens, &mut hidden)?;
        let chunk = (CHUNK_TOKENS / length).max(1) * length * width;
        for b in 0..=last {
            let done = b as f64 / (last + 1) as f64;
            self.progress.report(done, &format!("block {} of {}", b + 1, walk.blocks()))?;
            let view = dense_block(walk, &self.model.weights, b)?;
            let groups = walk.linears(b);
            let mut watched = Vec::with_capacity(groups.len());
            for group in &groups {
                watched.push(match group.iter().find(|n| names.contains(*n)) {
                    Some(name) => {
                        let cols = super::find(&view, name)?.cols();
                        Some(Moments::new(cols, self.normalisation))
                    }
                    None => None,
                });
            }
            let block = walk.block(&view, b)?;
            let mut failed = None;
            for part in hidden.chunks_mut(chunk) {
                self.progress.check()?;
                let mut tap = |group: usize, rows: &[f32]| {
                    let Some(Some(moments)) = watched.get_mut(group) else { return };
                    for sample in rows.chunks(*length * moments.gram.cols()) {
                        if let Err(error) = moments.add(sample) {
                            failed.get_or_insert((group, error));
                            return;
                        }
                    }
                };
                block.forward(part, *length, Some(&mut tap));
            }
            if let Some((group, error)) = failed {
                let name = groups[group].first().map_or("", String::as_str);
                return Err(Error::new(
                    error.reason(),
                    format!("the input of '{name}': {}; the model is broken", error.message()),
                ));
            }
            for (group, moments) in groups.iter().zip(watched) {
                let Some(moments) = moments else { continue };
                self.progress.check()?;
                let chosen: Vec<String> =
                    group.iter().filter(|n| names.contains(*n)).cloned().collect();
                sink(&chosen, &moments.mean())?;
            }
        }
        Ok(())
    }
}

/// The weights with the linears of block `b` as f32.
fn dense_block(
    walk: &dyn walk::Walk,
    weights: &walk::Weights,
    b: usize,
) -> Result<BTreeMap<String, Arc<Weight>>> {
    let mut view = weights.clone();
    for name in walk.linears(b).into_iter().flatten() {
        let stored = super::find(weights, &name)?;
        let dense = Dense::from_f32(stored.shape().to_vec(), &stored.to_f32(), Dtype::F32)?;
        view.insert(name, Arc::new(Weight::Dense(dense)));
    }
    Ok(view)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn samples_are_scaled_by_their_largest_entry() {
        let rows = [1.0, -4.0, 2.0, 0.0];
        let at = |normalisation| {
            let mut moments = Moments::new(2, normalisation);
            moments.add(&rows).unwrap();
            moments.add(&[0.0; 2]).unwrap();
            let mean = moments.mean();
            [mean[(0, 0)], mean[(0, 1)], mean[(1, 1)]]
        };
        // X^T X = [[5, -4], [-4, 16]] over two samples.
        assert_eq!(at(CordaNormalisation::None), [2.5, -2.0, 8.0]);
        assert_eq!(at(CordaNormalisation::SampleMax), [2.5 / 16.0, -2.0 / 16.0, 0.5]);
        assert_eq!(at(CordaNormalisation::SampleMaxSigned), [2.5 / 4.0, -0.5, 2.0]);
        let mut moments = Moments::new(2, CordaNormalisation::None);
        assert_eq!(moments.add(&[f32::NAN, 0.0]).unwrap_err().reason(), Reason::NonFinite);
    }

    #[test]
    fn moments_of_a_model_are_those_of_the_walk() {
        let model = random::model(random::tiny("llama"), 4).unwrap();
        let tokens: Vec<u32> = (0..48).map(|i| (i * 31 + 5) % 96).collect();
        let windows = Windows { tokens, length: 12, warnings: Vec::new() };
        let names: BTreeSet<String> = (0..2)
            .flat_map(|l| ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"].map(|n| (l, n)))
            .map(|(l, n)| format!("model.layers.{l}.{n}.weight"))
            .collect();
        let progress = Progress::silent();
        let collect = |windows: &Windows| {
            let mut seen: BTreeMap<String, Mat<f64>> = BTreeMap::new();
            let mut collector = Collector {
                model: &model,
                windows,
                normalisation: CordaNormalisation::None,
                progress: &progress,
            };
            collector
                .each(&names, &mut |group, mean| {
                    seen.extend(group.iter().map(|n| (n.clone(), mean.clone())));
                    Ok(())
                })
                .unwrap();
            seen
        };
        let seen = collect(&windows);
        assert_eq!(seen.len(), names.len());
        assert_eq!(
            seen["model.layers.1.self_attn.q_proj.weight"],
            seen["model.layers.1.self_attn.v_proj.weight"],
            "one input, one matrix"
        );
        // The walk of calibration sums the same rows over all samples.
        let mut copy = model.clone();
        let plan = walk::Plan { windows: &windows, names: &names, gram: true, progress: &progress };
        walk::walk_model(&mut copy, &plan, &mut |site| {
            let gram = site.inputs.gram().unwrap();
            for name in &site.names {
                let mean = &seen[*name];
                for (i, j) in [(0, 0), (1, 3), (7, 2), (5, 5)] {
                    let want = gram.at(i, j) / 4.0;
                    assert!((mean[(i, j)] - want).abs() < 1e-4 * want.abs().max(0.1));
                    assert_eq!(mean[(i, j)], mean[(j, i)]);
                }
            }
            Ok(site.weights.iter().map(|w| (**w).clone()).collect())
        })
        .unwrap();
        // Samples in another order give the same.
        let mut swapped = windows.clone();
        swapped.tokens.rotate_left(24);
        for (name, mean) in collect(&swapped) {
            let error = (&mean - &seen[&name]).norm_l2() / seen[&name].norm_l2();
            assert!(error < 1e-4, "{name}: {error}");
        }
    }

    #[test]
    fn the_order_of_tokens_and_the_cut_into_parts_do_not_matter() {
        let (tokens, cols) = (40, 6);
        let rows: Vec<f32> =
            (0..tokens * cols).map(|i| ((i * 37 + i * i) as f32 * 0.13).sin()).collect();
        let collect = |parts: &[&[f32]]| {
            let mut moments = Moments::new(cols, CordaNormalisation::None);
            parts.iter().for_each(|part| moments.add(part).unwrap());
            // A sum: parts count as samples.
            let (n, mean) = (parts.len() as f64, moments.mean());
            Mat::from_fn(cols, cols, |i, j| n * mean[(i, j)])
        };
        let whole = collect(&[&rows[..]]);
        let turned: Vec<f32> = rows.chunks(cols).rev().flatten().copied().collect();
        let (head, tail) = rows.split_at(7 * cols);
        for other in [collect(&[&turned[..]]), collect(&[head, tail]), collect(&[tail, head])] {
            let error = (&other - &whole).norm_l2() / whole.norm_l2();
            assert!(error < 1e-4, "{error}");
        }
        // Symmetric, and no direction has negative energy: with a little on the diagonal it has an inverse.
        let trace: f64 = (0..cols).map(|i| whole[(i, i)]).sum();
        let lifted = Mat::from_fn(cols, cols, |i, j| {
            assert_eq!(whole[(i, j)], whole[(j, i)]);
            whole[(i, j)] + if i == j { 1e-6 * trace } else { 0.0 }
        });
        assert!(crate::nn::linalg::inverse(lifted.as_ref()).is_some());
    }

    #[test]
    fn chunks_of_windows_change_nothing_and_what_is_broken_is_named() {
        let model = random::model(random::tiny("llama"), 4).unwrap();
        // More tokens than run through a block at once.
        let length = 24;
        let count = 2 * (CHUNK_TOKENS / length / 2 + 8);
        let tokens: Vec<u32> = (0..count * length)
            .map(|i| u32::try_from((i * 31 + i / 7 * 13 + 5) % 96).unwrap())
            .collect();
        let name = "model.layers.1.mlp.up_proj.weight".to_owned();
        let names = BTreeSet::from([name.clone()]);
        let progress = Progress::silent();
        let collect = |model: &Model, tokens: &[u32]| -> Result<Mat<f64>> {
            let windows = Windows { tokens: tokens.to_vec(), length, warnings: Vec::new() };
            let normalisation = CordaNormalisation::SampleMax;
            let mut collector =
                Collector { model, windows: &windows, normalisation, progress: &progress };
            let mut seen = None;
            collector.each(&names, &mut |group, mean| {
                assert_eq!(group, std::slice::from_ref(&name));
                seen = Some(mean.clone());
                Ok(())
            })?;
            Ok(seen.unwrap())
        };
        let whole = collect(&model, &tokens).unwrap();
        let (first, second) = tokens.split_at(tokens.len() / 2);
        let (first, second) = (collect(&model, first).unwrap(), collect(&model, second).unwrap());
        let mean = Mat::from_fn(32, 32, |i, j| f64::midpoint(first[(i, j)], second[(i, j)]));
        let error = (&mean - &whole).norm_l2() / whole.norm_l2();
        assert!(error < 1e-4, "{error}");

        let mut broken = model.clone();
        let norm = "model.layers.1.post_attention_layernorm.weight";
        let values = vec![f32::NAN; 32];
        let dense = Dense::from_f32(vec![32], &values, Dtype::F32).unwrap();
        broken.weights.insert(norm.to_owned(), Arc::new(Weight::Dense(dense)));
        let error = collect(&broken, &tokens[..4 * length]).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        for part in ["layers.1.mlp.", "sample 1"] {
            assert!(error.message().contains(part), "{error} lacks {part}");
        }
    }
}
