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
use crate::models::decoder::{self, plan};
use crate::models::{Family, Model, encoder};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::progress::Progress;

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
        Family::Encoder(config) => config,
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
        check_vocabulary(tokens, self.vocab)?;
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

impl Walk for encoder::Config {
    fn blocks(&self) -> usize {
        self.layers
    }

    fn width(&self) -> usize {
        self.hidden
    }

    fn inner_width(&self) -> usize {
        5 * self.hidden + self.intermediate
    }

    fn max_length(&self) -> usize {
        self.max_tokens
    }

    fn linears(&self, block: usize) -> Vec<Vec<String>> {
        encoder::Config::linears(self, block)
    }

    /// Of the words alone: the first block, which knows where sequences begin, adds their places.
    fn embed(&self, weights: &Weights, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        check_vocabulary(tokens, self.vocab)?;
        let words = find(weights, encoder::WORDS)?;
        for (token, row) in tokens.iter().zip(out.chunks_exact_mut(self.hidden)) {
            words.read_rows(*token as usize, row);
        }
        Ok(())
    }

    fn block(&self, weights: &Weights, block: usize) -> Result<Box<dyn Run>> {
        Ok(Box::new(encoder::plan::Block::new(self, weights, block)?))
    }
}

impl Run for encoder::plan::Block {
    fn forward(&self, hidden: &mut [f32], length: usize, tap: Option<&mut plan::Tap<'_>>) {
        encoder::plan::Block::forward(self, hidden, length, tap);
    }
}

/// Refuses tokens that a model has no embedding for.
fn check_vocabulary(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|t| **t as usize >= vocab) {
        None => Ok(()),
        Some(token) => Err(Error::new(
            Reason::DatasetUnsuitable,
            format!(
                "the text holds token {token}, but the model knows {vocab}; its tokenizer belongs to \
                 another model"
            ),
        )),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks `h -> W h` over hidden states of 2, one linear each; counts its runs.
    struct Chain(usize, std::sync::Arc<std::sync::atomic::AtomicUsize>);

    struct Link(Arc<Weight>, std::sync::Arc<std::sync::atomic::AtomicUsize>);

    impl Walk for Chain {
        fn blocks(&self) -> usize {
            self.0
        }
        fn width(&self) -> usize {
            2
        }
        fn inner_width(&self) -> usize {
            2
        }
        fn max_length(&self) -> usize {
            8
        }
        fn linears(&self, block: usize) -> Vec<Vec<String>> {
            vec![vec![format!("{block}.w")]]
        }
        fn embed(&self, _: &Weights, tokens: &[u32], out: &mut [f32]) -> Result<()> {
            for (token, out) in tokens.iter().zip(out.chunks_mut(2)) {
                out.copy_from_slice(&[*token as f32, 1.0]);
            }
            Ok(())
        }
        fn block(&self, weights: &Weights, block: usize) -> Result<Box<dyn Run>> {
            Ok(Box::new(Link(find(weights, &format!("{block}.w"))?.clone(), self.1.clone())))
        }
    }

    impl Run for Link {
        fn forward(&self, hidden: &mut [f32], _: usize, tap: Option<&mut plan::Tap<'_>>) {
            self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if let Some(tap) = tap {
                tap(0, hidden);
            }
            let mut out = vec![0.0; hidden.len()];
            self.0.multiply(hidden, &mut out);
            hidden.copy_from_slice(&out);
        }
    }

    fn matrix(values: [f32; 4]) -> Weight {
        Weight::Dense(Dense::from_f32(vec![2, 2], &values, Dtype::F32).expect("a matrix"))
    }

    fn chain(blocks: usize, values: [f32; 4]) -> (Chain, Weights) {
        let weights = (0..blocks).map(|b| (format!("{b}.w"), Arc::new(matrix(values)))).collect();
        (Chain(blocks, Arc::default()), weights)
    }

    fn windows() -> Windows {
        Windows { tokens: vec![3, 4, 0, 0], length: 2, warnings: Vec::new() }
    }

    #[test]
    fn later_blocks_see_what_changed_blocks_give() {
        let (chain, mut weights) = chain(3, [2.0, 0.0, 0.0, 1.0]);
        let names = (0..3).map(|b| format!("{b}.w")).collect();
        let progress = Progress::silent();
        let windows = windows();
        let plan = Plan { windows: &windows, names: &names, gram: true, progress: &progress };
        let mut seen = Vec::new();
        walk(&chain, &mut weights, &plan, &mut |site| {
            seen.push(site.inputs.squares().to_vec());
            assert_eq!(site.inputs.gram().expect("asked for").at(0, 0), site.inputs.squares()[0]);
            // Block 0 triples the first channel instead of doubling it; block 1 swaps the channels.
            Ok(vec![match site.block {
                0 => matrix([3.0, 0.0, 0.0, 1.0]),
                _ => matrix([0.0, 1.0, 1.0, 0.0]),
            }])
        })
        .expect("walks");
        // First channels 3, 4, 0, 0: squares 25; tripled 225; then swapped with the ones.
        assert_eq!(seen, [vec![25.0, 4.0], vec![225.0, 4.0], vec![4.0, 225.0]]);
        assert_eq!(weights["2.w"].to_f32(), [0.0, 1.0, 1.0, 0.0]);
        // Two runs a block, one in the last.
        assert_eq!(chain.1.load(std::sync::atomic::Ordering::Relaxed), 5);
    }

    #[test]
    fn blocks_out_of_scope_run_once_or_never() {
        let (chain, mut weights) = chain(4, [1.0, 0.0, 0.0, 1.0]);
        let names = BTreeSet::from(["1.w".to_owned()]);
        let progress = Progress::silent();
        let windows = windows();
        let plan = Plan { windows: &windows, names: &names, gram: false, progress: &progress };
        let mut sites = 0;
        walk(&chain, &mut weights, &plan, &mut |site| {
            sites += 1;
            assert_eq!(site.names, ["1.w"]);
            Ok(vec![matrix([0.0; 4])])
        })
        .expect("walks");
        assert_eq!((sites, chain.1.load(std::sync::atomic::Ordering::Relaxed)), (1, 2));
        assert_eq!(weights["1.w"].zeros(), 4);
        assert_eq!(weights["0.w"].zeros(), 2);
    }

    #[test]
    fn numbers_that_are_not_finite_name_the_block() {
        let (chain, mut weights) = chain(3, [1.0, 0.0, 0.0, 1.0]);
        weights.insert("1.w".into(), Arc::new(matrix([f32::MAX; 4])));
        let names = BTreeSet::from(["2.w".to_owned()]);
        let progress = Progress::silent();
        let windows = windows();
        let plan = Plan { windows: &windows, names: &names, gram: false, progress: &progress };
        let error = walk(&chain, &mut weights, &plan, &mut |_| Ok(Vec::new())).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains("block 1"), "{error}");
    }
}
