//! What adapters change beside products of low rank: gains on the rows of a linear, biases, norms.
//!
//! Each is a difference to the base's. A norm's output is linear in its weight, so the difference of a norm
//! is another norm of the same input that is added to the first.

use std::sync::Arc;

use super::{Adapters, Config, SITES, Site, misfit};
use crate::error::{Error, Reason, Result};
use crate::kernels::norm;
use crate::models::decoder::config::{EMBEDDING, FINAL_NORM};
use crate::nn::adapter::{Changes, Product};

/// A norm of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Norm {
    BeforeAttention,
    AfterAttention,
    BeforeMlp,
    AfterMlp,
    Q,
    K,
}

const NORMS: usize = 6;

type Values = Option<Arc<[f32]>>;

#[derive(Debug, Clone, Default)]
struct Layer {
    /// By how much the rows of a product grow.
    gains: [Values; SITES],
    /// What is added to the output.
    shifts: [Values; SITES],
    norms: [Values; NORMS],
}

/// The parts of one adapter by their places.
#[derive(Debug, Default)]
pub(super) struct Extras {
    layers: Vec<Layer>,
    last: Values,
    /// Of the embedding table.
    table: Option<Product>,
    elements: usize,
}

impl Extras {
    /// Finds the place of every part that is no product.
    ///
    /// # Errors
    /// MODEL_UNSUITABLE for what the decoder does not have, UNSUPPORTED for tensors that do not serve so.
    pub fn new(changes: &Changes, config: &Config) -> Result<Self> {
        let mut extras = Self::default();
        if let Some(table) = changes.products.get(EMBEDDING) {
            if table.shape != [config.vocab, config.hidden] {
                return Err(misfit(format!("the adapter changes a table of {:?}", table.shape)));
            }
            extras.elements = table.a.len() + table.b.len();
            extras.table = Some(table.clone());
        }
        if changes.gains.is_empty() && changes.tensors.is_empty() {
            return Ok(extras);
        }
        extras.layers.resize_with(config.layers.len(), Layer::default);
        let (mut placed, widths) = (0, super::Shape::of(config).sites);
        let mut take = |name: &str, values: &Arc<[f32]>, width: usize| {
            if values.len() != width {
                return Err(misfit(format!(
                    "'{name}' has {width} elements, but the adapter changes {}",
                    values.len()
                )));
            }
            placed += 1;
            extras.elements += width;
            Ok(Some(Arc::clone(values)))
        };
        for (index, layer) in extras.layers.iter_mut().enumerate() {
            for (site, name) in config.linears(index).concat().iter().enumerate() {
                let width = widths[site][0];
                if let Some(values) = changes.gains.get(name) {
                    layer.gains[site] = take(name, values, width)?;
                }
                let bias = format!("{}.bias", name.strip_suffix(".weight").unwrap_or(name));
                if let Some(values) = changes.tensors.get(&bias) {
                    layer.shifts[site] = take(&bias, values, width)?;
                }
            }
            for (norm, name) in norms(config) {
                let name = format!("model.layers.{index}.{name}.weight");
                let Some(values) = changes.tensors.get(&name) else { continue };
                let width = match norm {
                    Norm::Q | Norm::K => config.head_dim,
                    _ => config.hidden,
                };
                layer.norms[norm as usize] = take(&name, values, width)?;
            }
        }
        if let Some(values) = changes.tensors.get(FINAL_NORM) {
            extras.last = take(FINAL_NORM, values, config.hidden)?;
        }
        if placed == changes.gains.len() + changes.tensors.len() {
            return Ok(extras);
        }
        Err(stranger(changes, config))
    }

    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    pub fn bytes(&self) -> u64 {
        (self.elements * size_of::<f32>()) as u64
    }

    fn norm(&self, layer: usize, norm: Norm) -> Option<&[f32]> {
        self.layers.get(layer)?.norms[norm as usize].as_deref()
    }
}

/// The norms that a block of this model has, by their names within it.
fn norms(config: &Config) -> Vec<(Norm, &'static str)> {
    let mut all = vec![(Norm::BeforeAttention, "input_layernorm")];
    if config.post_norms {
        all.extend([
            (Norm::AfterAttention, "post_attention_layernorm"),
            (Norm::BeforeMlp, "pre_feedforward_layernorm"),
            (Norm::AfterMlp, "post_feedforward_layernorm"),
        ]);
    } else {
        all.push((Norm::BeforeMlp, "post_attention_layernorm"));
    }
    if config.qk_norm {
        all.extend([(Norm::Q, "self_attn.q_norm"), (Norm::K, "self_attn.k_norm")]);
    }
    all
}

/// The error of a part without a place.
fn stranger(changes: &Changes, config: &Config) -> Error {
    let known = config.tensors();
    let name = changes.tensors.keys().find(|name| {
        let whole = |(known, shape): &(String, Vec<usize>)| known == *name && shape.len() > 1;
        known.iter().any(whole)
    });
    match name {
        Some(name) => Error::new(
            Reason::Unsupported,
            format!(
                "the adapter has all of '{name}', a matrix, which does not serve beside its base: merge \
                 the adapter into a version (MergeAdapter, `planish adapters merge`) and use that"
            ),
        ),
        None => misfit("the adapter changes tensors that the model does not have"),
    }
}

/// `to += by * values`.
fn add(to: &mut [f32], values: &[f32], by: f32) {
    to.iter_mut().zip(values).for_each(|(to, v)| *to += by * v);
}

impl Adapters {
    /// What the tables of the adapters add to the rows of the step, whose tokens are `token(row)`; `scale` is
    /// what embeddings are multiplied by.
    pub fn embed(&self, token: impl Fn(usize) -> u32, scale: f32, hidden: &mut [f32]) {
        if !self.more {
            return;
        }
        for (group, mix) in self.mixes.iter().enumerate() {
            for (extras, by) in mix.extras() {
                let Some(Product { shape: [_, width], rank, a, b, scale: own }) = &extras.table
                else {
                    continue;
                };
                for &row in self.groups.rows(group) {
                    let factors = &b[token(row as usize) as usize * rank..][..*rank];
                    let hidden = &mut hidden[row as usize * width..][..*width];
                    for (factor, a) in factors.iter().zip(a.chunks_exact(*width)) {
                        add(hidden, a, by * own * scale * factor);
                    }
                }
            }
        }
    }

    /// Gains and biases of a linear: `y += weight * (g y + t)`.
    pub(super) fn shift(&mut self, layer: usize, site: Site, y: &mut [f32]) {
        for (group, mix) in self.mixes.iter().enumerate() {
            let find = |of: fn(&Layer) -> &[Values; SITES]| {
                mix.extras().filter_map(move |(extras, by)| {
                    let values = of(extras.layers.get(layer)?)[site as usize].as_deref()?;
                    Some((values, by))
                })
            };
            let width = match find(|l| &l.gains).chain(find(|l| &l.shifts)).next() {
                Some((values, _)) => values.len(),
                None => continue,
            };
            // The sum of the mix, once for all its rows: gains, then shifts.
            self.scratch.clear();
            self.scratch.resize(2 * width, 0.0);
            let (gains, shifts) = self.scratch.split_at_mut(width);
            find(|l| &l.gains).for_each(|(values, by)| add(gains, values, by));
            find(|l| &l.shifts).for_each(|(values, by)| add(shifts, values, by));
            for &row in self.groups.rows(group) {
                let y = &mut y[row as usize * width..][..width];
                for ((y, gain), shift) in y.iter_mut().zip(&*gains).zip(&*shifts) {
                    *y += *gain * *y + *shift;
                }
            }
        }
    }

    /// What a norm gives more: `to += norm(from, weight * difference)` for every row with its adapters.
    pub fn norm(&mut self, layer: usize, norm: Norm, from: &[f32], to: &mut [f32], eps: f32) {
        if !self.more {
            return;
        }
        for (group, mix) in self.mixes.iter().enumerate() {
            let find = || mix.extras().filter_map(|(e, by)| Some((e.norm(layer, norm)?, by)));
            let Some(width) = find().next().map(|(values, _)| values.len()) else { continue };
            self.scratch.clear();
            self.scratch.resize(2 * width, 0.0);
            let (weight, out) = self.scratch.split_at_mut(width);
            find().for_each(|(values, by)| add(weight, values, by));
            for &row in self.groups.rows(group) {
                let at = row as usize * width..(row as usize + 1) * width;
                norm::rms_norm(&from[at.clone()], weight, eps, out);
                norm::add(&mut to[at], out);
            }
        }
    }

    /// The weights of the norms of queries and of keys, for each row whose adapters change them: `None`
    /// where no row's do.
    pub fn head_norms(&self, layer: usize, base: [Option<&[f32]>; 2]) -> Option<HeadNorms> {
        if !self.more {
            return None;
        }
        let mut found = HeadNorms::default();
        for (group, mix) in self.mixes.iter().enumerate() {
            let weights = [Norm::Q, Norm::K].map(|norm| {
                let mut changed =
                    mix.extras().filter_map(|(e, by)| Some((e.norm(layer, norm)?, by))).peekable();
                changed.peek()?;
                let mut weight = base[usize::from(norm == Norm::K)]?.to_vec();
                changed.for_each(|(values, by)| add(&mut weight, values, by));
                Some(weight)
            });
            if weights.iter().any(Option::is_some) {
                let rows = self.groups.rows(group).iter();
                found.rows.extend(rows.map(|row| (*row, found.weights.len())));
                found.weights.push(weights);
            }
        }
        found.rows.sort_unstable();
        (!found.weights.is_empty()).then_some(found)
    }

    /// What the last norm gives more for the rows of `states` `[rows, hidden]`, which were the rows `of` of
    /// the step; `None` where no adapter changes it.
    pub fn last_norm(&self, of: &[usize], states: &[f32], eps: f32) -> Option<Vec<f32>> {
        let last = |mix: &super::Mix| mix.extras().any(|(extras, _)| extras.last.is_some());
        if !self.more || !self.mixes.iter().any(last) {
            return None;
        }
        let mut more = vec![0.0; states.len()];
        let width = states.len().checked_div(of.len())?;
        for (group, mix) in self.mixes.iter().enumerate() {
            let mut weight = vec![0.0; width];
            for (extras, by) in mix.extras() {
                if let Some(values) = &extras.last {
                    add(&mut weight, values, by);
                }
            }
            let rows = self.groups.rows(group);
            for (i, row) in of.iter().enumerate() {
                if rows.contains(&(*row as u32)) {
                    let at = i * width..(i + 1) * width;
                    norm::rms_norm(&states[at.clone()], &weight, eps, &mut more[at]);
                }
            }
        }
        Some(more)
    }
}

/// Norms of heads that adapters changed.
#[derive(Default)]
pub(in super::super) struct HeadNorms {
    /// Weights of queries and of keys.
    weights: Vec<[Option<Vec<f32>>; 2]>,
    /// Rows in order, and which weights are theirs.
    rows: Vec<(u32, usize)>,
}

impl HeadNorms {
    /// Weights of queries and of keys of a row.
    pub fn of(&self, row: usize) -> [Option<&Vec<f32>>; 2] {
        match self.rows.binary_search_by_key(&(row as u32), |(row, _)| *row) {
            Ok(at) => self.weights[self.rows[at].1].each_ref().map(Option::as_ref),
            Err(_) => [None, None],
        }
    }
}
