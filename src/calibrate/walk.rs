//! The walk through a model: block after block, each seeing what the changed blocks before it give.
//!
//! For every block, the text runs through the block as it is while the inputs of its linears are
//! watched; then the linears are changed; then the text runs through the changed block, and what
//! comes out enters the next. Inside a block, later linears thus see the inputs of the unchanged
//! block. Memory holds the hidden states of all windows, one block in f32, and one chunk's
//! intermediates. A family takes part by implementing [`Walk`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Windows;
use super::inputs::Inputs;
use crate::error::{Error, Reason, Result};
use crate::jobs::progress::Progress;
use crate::models::decoder::{self, plan};
use crate::models::{Family, Model};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};

/// Weights by name.
pub type Weights = BTreeMap<String, Arc<Weight>>;

/// Tokens that run through a block at once: enough for fast products, few enough for the caches.
const CHUNK_TOKENS: usize = 2048;

/// A family whose models are chains of blocks over one stream of hidden states.
pub trait Walk: Sync {
    /// Number of blocks.
    fn blocks(&self) -> usize;
    /// Width of the hidden states.
    fn width(&self) -> usize;
    /// Channels inside a block for each token, all intermediates together; for estimates.
    fn inner_width(&self) -> usize;
    /// Longest sequence.
    fn max_length(&self) -> usize;
    /// Names of a block's linear weights, grouped by the input they share, in running order.
    fn linears(&self, block: usize) -> Vec<Vec<String>>;
    /// Hidden states `[tokens, width]` that enter the first block.
    fn embed(&self, weights: &Weights, tokens: &[u32], out: &mut [f32]) -> Result<()>;
    /// A block ready to run.
    fn block(&self, weights: &Weights, block: usize) -> Result<Box<dyn Run>>;
}

/// A block that runs.
pub trait Run {
    /// Hidden states in, hidden states out, in place; sequences of `length` that see only themselves.
    /// `tap` sees the input rows of each group of linears.
    fn forward(&self, hidden: &mut [f32], length: usize, tap: Option<&mut plan::Tap<'_>>);
}

/// How a family is walked.
pub fn of(family: &Family) -> &dyn Walk {
    match family {
        Family::Decoder(config) => config,
    }
}

impl Walk for decoder::Config {
    fn blocks(&self) -> usize {
        self.layers.len()
    }

    fn width(&self) -> usize {
        self.hidden
    }

    fn inner_width(&self) -> usize {
        2 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_dim + 2 * self.intermediate
    }

    fn max_length(&self) -> usize {
        self.max_positions
    }

    fn linears(&self, block: usize) -> Vec<Vec<String>> {
        decoder::Config::linears(self, block)
    }

    fn embed(&self, weights: &Weights, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        const NAME: &str = "model.embed_tokens.weight";
        let embedding = weights.get(NAME).ok_or_else(|| missing(NAME))?;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.vocab) {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!(
                    "the text holds token {token}, but the model knows {}; its tokenizer belongs to \
                     another model",
                    self.vocab
                ),
            ));
        }
        plan::embed(self, embedding, tokens, out);
        Ok(())
    }

    fn block(&self, weights: &Weights, block: usize) -> Result<Box<dyn Run>> {
        Ok(Box::new(plan::Block::new(self, weights, block)?))
    }
}

impl Run for plan::Block {
    fn forward(&self, hidden: &mut [f32], length: usize, tap: Option<&mut plan::Tap<'_>>) {
        plan::Block::forward(self, hidden, length, tap);
    }
}

/// Linears that share an input, with what was seen of it.
pub struct Site<'a> {
    pub block: usize,
    /// Names in scope, in running order.
    pub names: Vec<&'a str>,
    /// The weights of these names: as the model stores them.
    pub weights: Vec<Arc<Weight>>,
    /// The same as f32, `[out, in]` in row order.
    pub dense: Vec<Vec<f32>>,
    pub inputs: &'a Inputs,
}

/// What the walk is to do.
pub struct Plan<'a> {
    pub windows: &'a Windows,
    /// Names of the weights to change.
    pub names: &'a BTreeSet<String>,
    /// Whether Gram matrices are needed.
    pub gram: bool,
    pub progress: &'a Progress,
}

/// Walks, and puts what `change` makes of each site's weights (in the order of its names) in their
/// places. Blocks after the last one in scope are not run. Activations that are not finite end the
/// walk with NON_FINITE and the block's index.
pub fn walk(
    walk: &dyn Walk,
    weights: &mut Weights,
    plan: &Plan<'_>,
    change: &mut dyn FnMut(Site<'_>) -> Result<Vec<Weight>>,
) -> Result<()> {
    let Windows { tokens, length, .. } = plan.windows;
    let width = walk.width();
    let in_scope = |b: usize| walk.linears(b).iter().flatten().any(|n| plan.names.contains(n));
    let Some(last) = (0..walk.blocks()).rev().find(|b| in_scope(*b)) else {
        return Ok(());
    };
    let mut hidden = vec![0.0; tokens.len() * width];
    walk.embed(weights, tokens, &mut hidden)?;
    let chunk = (CHUNK_TOKENS / length).max(1) * length * width;
    for b in 0..=last {
        let done = b as f64 / (last + 1) as f64;
        let message = format!("block {} of {}", b + 1, walk.blocks());
        plan.progress.report(done, &message)?;
        let share = 1.0 / (last + 1) as f64;
        let mut view = dense_block(walk, weights, b)?;
        if in_scope(b) {
            let watched = watch(walk, &view, plan, &hidden, chunk, b)?;
            plan.progress.report(done + 0.45 * share, &message)?;
            for (group, inputs) in walk.linears(b).iter().zip(&watched) {
                let Some(inputs) = inputs else { continue };
                plan.progress.check()?;
                let names: Vec<&str> =
                    group.iter().map(String::as_str).filter(|n| plan.names.contains(*n)).collect();
                let stored =
                    names.iter().map(|n| find(weights, n).cloned()).collect::<Result<_>>()?;
                let dense = names
                    .iter()
                    .map(|n| find(&view, n).map(|w| w.to_f32()))
                    .collect::<Result<_>>()?;
                let site = Site { block: b, names: names.clone(), weights: stored, dense, inputs };
                for (name, new) in names.iter().zip(change(site)?) {
                    view.insert((*name).to_owned(), Arc::new(as_f32(&new)?));
                    weights.insert((*name).to_owned(), Arc::new(new));
                }
            }
            plan.progress.report(done + 0.55 * share, &message)?;
        }
        if b < last {
            let block = walk.block(&view, b)?;
            for part in hidden.chunks_mut(chunk) {
                plan.progress.check()?;
                block.forward(part, *length, None);
            }
            if !hidden.iter().all(|v| v.is_finite()) {
                return Err(not_finite(b, "comes out of"));
            }
        }
    }
    plan.progress.report(1.0, "all blocks done")
}

/// The weights with the linears of block `b` as f32: the walk's products are those of the stored
/// numbers, whatever shortcuts a layout's own product takes.
fn dense_block(walk: &dyn Walk, weights: &Weights, b: usize) -> Result<Weights> {
    let mut view = weights.clone();
    for name in walk.linears(b).into_iter().flatten() {
        let dense = as_f32(find(weights, &name)?)?;
        view.insert(name, Arc::new(dense));
    }
    Ok(view)
}

fn as_f32(weight: &Weight) -> Result<Weight> {
    let shape = weight.shape().to_vec();
    Ok(Weight::Dense(Dense::from_f32(shape, &weight.to_f32(), Dtype::F32)?))
}

/// Runs the text through block `b` without keeping what comes out; statistics by group, for the
/// groups in scope.
fn watch(
    walk: &dyn Walk,
    weights: &Weights,
    plan: &Plan<'_>,
    hidden: &[f32],
    chunk: usize,
    b: usize,
) -> Result<Vec<Option<Inputs>>> {
    let mut watched = Vec::new();
    for group in walk.linears(b) {
        watched.push(match group.iter().find(|n| plan.names.contains(*n)) {
            Some(name) => Some(Inputs::new(find(weights, name)?.cols(), plan.gram)),
            None => None,
        });
    }
    let block = walk.block(weights, b)?;
    let mut copy = Vec::new();
    for part in hidden.chunks(chunk) {
        plan.progress.check()?;
        copy.clear();
        copy.extend_from_slice(part);
        let mut tap = |group: usize, rows: &[f32]| {
            if let Some(Some(inputs)) = watched.get_mut(group) {
                inputs.add(rows);
            }
        };
        block.forward(&mut copy, plan.windows.length, Some(&mut tap));
    }
    if watched.iter().flatten().any(|inputs| !inputs.finite()) {
        return Err(not_finite(b, "runs inside"));
    }
    Ok(watched)
}

fn find<'a>(weights: &'a Weights, name: &str) -> Result<&'a Arc<Weight>> {
    weights.get(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Error {
    Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
}

fn not_finite(block: usize, how: &str) -> Error {
    Error::new(
        Reason::NonFinite,
        format!(
            "a number that is not finite {how} block {block} on the calibration text; the model is \
             broken, or an earlier step damaged it: evaluate the version this step starts from"
        ),
    )
}

/// Runs a model's walk over its own weights.
pub fn walk_model(
    model: &mut Model,
    plan: &Plan<'_>,
    change: &mut dyn FnMut(Site<'_>) -> Result<Vec<Weight>>,
) -> Result<()> {
    let family = model.family.clone();
    walk(of(&family), &mut model.weights, plan, change)
}
