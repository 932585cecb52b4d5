//! Sizes of queries and keys, head by head, against the threshold above which gradients of attention cannot
//! be taken much faster than exactly (arXiv 2406.03136; the rule is [`crate::nn::limits`]).
//!
//! With adapted queries and values, gradients are bounded by the entries of `X W_Q` and `X W_K`; with adapted
//! keys also by those of `X` and `X W_Q W_K^T` (theorem A.1). Entries are measured as the network has them:
//! with biases and norms of queries and keys, and turned to their positions where they are multiplied.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::calibrate::encode_prefix;
use crate::error::{Error, Reason, Result};
use crate::kernels::gemm::{View, gemm};
use crate::models::Model;
use crate::models::decoder::graph::Graph;
use crate::nn::adapter::{Adapter, Weighted};
use crate::nn::limits::{self, Factoring, Verdict};
use crate::nn::ops::attend::{self, Attend, Attended};
use crate::nn::ops::{Attention, Network as _, Pool, Precision, Run, Sequences, Tape, Value};
use crate::nn::tuning::{Frozen, Tuning};
use crate::nn::weight::Weight;
use crate::progress::Progress;
use crate::proto::v1::{self, NormVerdict};
use crate::train::attention::factoring;

/// Tokens of all sequences, at most.
const MAX_TOKENS: usize = 1 << 15;
/// Scores of a head over all sequences, at most.
const MAX_SCORES: usize = 1 << 26;
const SEQUENCES: u32 = 16;
const TOKENS: u32 = 512;

/// An adapter to measure with.
#[derive(Clone, Copy)]
pub struct With<'a> {
    /// Its resource name.
    pub name: &'a str,
    pub adapter: &'a Arc<Adapter>,
}

/// Checked options.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Settings {
    sequences: usize,
    tokens: usize,
    factoring: Factoring,
}

impl Settings {
    fn read(options: &v1::NormBounds, longest: usize) -> Result<Self> {
        let dataset = &options.dataset;
        if dataset.strip_prefix("datasets/").is_none_or(str::is_empty) {
            let problem =
                format!("'{dataset}' is no resource name of a data set; write datasets/NAME");
            return Err(Error::field("dataset", problem));
        }
        let sequences = options.sequences.unwrap_or(SEQUENCES) as usize;
        if sequences == 0 {
            return Err(Error::field("sequences", "0 sequences measure nothing"));
        }
        let tokens = options.tokens.map_or(longest.min(TOKENS as usize), |tokens| tokens as usize);
        if !(2..=longest).contains(&tokens) {
            return Err(Error::field("tokens", format!("{tokens} is outside 2 to {longest}")));
        }
        let all = sequences.saturating_mul(tokens);
        if all > MAX_TOKENS || all.saturating_mul(tokens) > MAX_SCORES {
            let problem = format!(
                "{sequences} sequences of {tokens} tokens are too many: at most {MAX_TOKENS} tokens, and \
                 {MAX_SCORES} scores of a head"
            );
            return Err(Error::field("sequences", problem));
        }
        let given = options.factored.unwrap_or_default();
        let factoring = factoring(&given).map_err(|e| e.within("factored"))?;
        Ok(Self { sequences, tokens, factoring })
    }
}

/// Refuses bad options for a model that sees at most `longest` tokens.
///
/// # Errors
/// `INVALID_FIELD` or `INVALID_OPTION` with a path from the message.
pub fn check(options: &v1::NormBounds, longest: usize) -> Result<()> {
    Settings::read(options, longest).map(|_| ())
}

/// Measures a decoder on the beginning of a text, with an adapter and without where there is one.
///
/// # Errors
/// Bad options; `DATASET_UNSUITABLE` for too short a text; `NON_FINITE` for numbers that are not finite.
pub fn measure(
    model: &Model,
    with: Option<With<'_>>,
    options: &v1::NormBounds,
    text: &str,
    progress: &Progress,
) -> Result<v1::NormReport> {
    let config = model.decoder()?;
    let settings = Settings::read(options, config.max_positions)?;
    let tokenizer = model.tokenizer.as_deref().ok_or_else(super::no_tokenizer)?;
    let mut tokens = encode_prefix(tokenizer, text, settings.sequences * settings.tokens)?;
    let whole = tokens.len() / settings.tokens;
    if whole == 0 {
        let problem = format!(
            "the text has {} tokens, and one sequence takes {}; take a longer text or fewer tokens",
            tokens.len(),
            settings.tokens
        );
        return Err(Error::at(Reason::DatasetUnsuitable, "dataset", problem));
    }
    tokens.truncate(whole * settings.tokens);
    if let Some(start) = tokenizer.bos.filter(|_| tokenizer.add_bos) {
        tokens.iter_mut().step_by(settings.tokens).for_each(|first| *first = start);
    }
    of_tokens(model, with, (&settings.factoring, settings.tokens), &tokens, progress).map(
        |report| v1::NormReport {
            dataset: options.dataset.clone(),
            adapter: with.map(|with| with.name.to_owned()).unwrap_or_default(),
            ..report
        },
    )
}

/// The same of sequences of `length` tokens that stand one after another.
fn of_tokens(
    model: &Model,
    with: Option<With<'_>>,
    (factoring, length): (&Factoring, usize),
    tokens: &[u32],
    progress: &Progress,
) -> Result<v1::NormReport> {
    let count = tokens.len() / length;
    let run = |with: Option<With<'_>>, progress: &Progress| -> Result<Vec<v1::HeadNorms>> {
        let recorder = Arc::new(Recorder::new(model, with, factoring, progress.clone())?);
        let graph =
            Graph::new(model, Precision::F32)?.with_attention(Box::new(Arc::clone(&recorder)));
        let tape = Tape::forgetful(&Pool::default());
        let sequences = Sequences::of(std::iter::repeat_n(length, count));
        let (frozen, weighted) =
            (Frozen, Weighted(with.iter().map(|with| (Arc::clone(with.adapter), 1.0)).collect()));
        let tuning: &dyn Tuning = if with.is_some() { &weighted } else { &frozen };
        let run = Run { tape: &tape, tuning, sequences: &sequences, training: false, read: true };
        graph.through(&run, graph.start(&run, tokens)?)?;
        Ok(recorder.take())
    };
    let mut report = v1::NormReport {
        sequences: count as i64,
        tokens: length as i64,
        threshold: limits::threshold(length),
        ..Default::default()
    };
    match with {
        None => report.heads = run(None, progress)?,
        Some(adapter) => {
            report.base_heads = run(None, &progress.part(0.0, 0.5))?;
            report.heads = run(Some(adapter), &progress.part(0.5, 1.0))?;
            let touched = |which: &str| {
                adapter
                    .adapter
                    .linears
                    .keys()
                    .any(|name| name.ends_with(&format!(".{which}.weight")))
            };
            if !["q_proj", "k_proj", "v_proj"].into_iter().any(touched) {
                report.warnings.push(
                    "the adapter changes no matrix of queries, keys or values: what differs comes from \
                     other layers"
                        .to_owned(),
                );
            }
        }
    }
    let heads = &report.heads;
    let below = heads.iter().filter(|head| head.margin < 1.0).count();
    report.share_below_threshold = below as f64 / heads.len().max(1) as f64;
    report.hint = hint(heads, length);
    Ok(report)
}

fn hint(heads: &[v1::HeadNorms], length: usize) -> String {
    let factored = heads.iter().filter(|head| head.degree.is_some()).count();
    let of = |verdict: NormVerdict| heads.iter().filter(|h| h.verdict() == verdict).count();
    let verdicts = [
        (NormVerdict::Fast, "fast"),
        (NormVerdict::Border, "border"),
        (NormVerdict::Quadratic, "quadratic"),
        (NormVerdict::NotApplicable, "not applicable"),
    ];
    let counts: Vec<String> = verdicts
        .into_iter()
        .filter(|(verdict, _)| of(*verdict) > 0)
        .map(|(verdict, name)| format!("{} {name}", of(verdict)))
        .collect();
    let advice = match factored {
        0 => format!("take exact gradients: factoring pays off for no head at {length} tokens"),
        n if n == heads.len() => {
            format!("take factored gradients: they pay off for every head at {length} tokens")
        }
        n => format!(
            "factored gradients pay off for {n} of {} heads at {length} tokens; the others would be \
             computed exactly",
            heads.len()
        ),
    };
    format!("{advice} (heads: {})", counts.join(", "))
}

/// Measures every layer on its way.
struct Recorder {
    /// Matrices of the keys, with the adapter, by layer: `[kv_heads * dim, hidden]`.
    keys: Vec<Arc<Weight>>,
    with: Option<Arc<Adapter>>,
    factoring: Factoring,
    progress: Progress,
    layers: usize,
    heads: Mutex<Vec<v1::HeadNorms>>,
}

/// Names of a layer's matrices.
fn name(layer: usize, which: &str) -> String {
    format!("model.layers.{layer}.self_attn.{which}_proj.weight")
}

impl Recorder {
    fn new(
        model: &Model,
        with: Option<With<'_>>,
        factoring: &Factoring,
        progress: Progress,
    ) -> Result<Self> {
        let layers = model.decoder()?.layers.len();
        let keys = (0..layers)
            .map(|layer| model.weight(&name(layer, "k")).map(Arc::clone))
            .collect::<Result<_>>()?;
        Ok(Self {
            keys,
            with: with.map(|with| Arc::clone(with.adapter)),
            factoring: *factoring,
            progress,
            layers,
            heads: Mutex::default(),
        })
    }

    fn take(&self) -> Vec<v1::HeadNorms> {
        std::mem::take(&mut *self.heads.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the adapter adds to the outputs of a matrix, `[rows, out]`.
    fn added(&self, layer: usize, which: &str, x: &Value) -> Option<Vec<f32>> {
        let factors = self.with.as_ref()?.linears.get(&name(layer, which))?;
        let ([out, inner], rank, rows) = (factors.shape(), factors.rank(), x.rows());
        let wide =
            |values: &[half::bf16]| -> Vec<f32> { values.iter().map(|v| v.to_f32()).collect() };
        let (a, b) = (wide(factors.a()), wide(factors.b()));
        let mut h = vec![0.0; rows * rank];
        gemm(
            View::new(&x.read(), rows, inner),
            View::new(&a, rank, inner).t(),
            &mut h,
            rank,
            false,
            true,
        );
        let mut y = vec![0.0; rows * out];
        gemm(View::new(&h, rows, rank), View::new(&b, rank, out), &mut y, out, false, true);
        y.iter_mut().for_each(|v| *v *= factors.scale());
        Some(y)
    }
}

impl Attend for Arc<Recorder> {
    fn attend(&self, run: &Run<'_>, attended: &Attended<'_>) -> Result<Value> {
        let Attended { layer, shape, input, unturned: [raw_q, raw_k], q, k, v } = *attended;
        self.progress.report(
            layer as f64 / self.layers as f64,
            &format!("measuring layer {} of {}", layer + 1, self.layers),
        )?;
        let mut matrix = self.keys[layer].to_f32();
        let adapted =
            |which: &str| self.with.as_ref().and_then(|with| with.linears.get(&name(layer, which)));
        if let Some(factors) = adapted("k") {
            factors.add_to(1.0, &mut matrix);
        }
        let layer_inputs = Layer {
            index: layer,
            shape,
            sequences: run.sequences.ranges(),
            input: &input.read(),
            hidden: input.width(),
            raw: [&raw_q.read(), &raw_k.read()],
            turned: [&q.read(), &k.read()],
            matrix: &matrix,
            added: [self.added(layer, "q", input), self.added(layer, "k", input)],
            keys_trained: adapted("k").is_some(),
        };
        let found = layer_inputs.heads(&self.factoring)?;
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
        run.tape.attention(shape, run.sequences.ranges(), q, k, v)
    }
}

/// A layer's attention as it was computed.
struct Layer<'a> {
    index: usize,
    shape: &'a Attention,
    sequences: &'a [Range<usize>],
    /// `[rows, hidden]`
    input: &'a [f32],
    hidden: usize,
    /// Queries and keys before they are turned.
    raw: [&'a [f32]; 2],
    turned: [&'a [f32]; 2],
    /// `[kv_heads * dim, hidden]`
    matrix: &'a [f32],
    /// What an adapter added to queries and keys.
    added: [Option<Vec<f32>>; 2],
    keys_trained: bool,
}

impl Layer<'_> {
    fn heads(&self, factoring: &Factoring) -> Result<Vec<v1::HeadNorms>> {
        let all = [self.input].into_iter().chain(self.raw).chain(self.turned);
        if all.flatten().any(|v| !v.is_finite()) {
            let problem = format!(
                "queries, keys or inputs of layer {} are not finite; the model or the adapter is broken",
                self.index
            );
            return Err(Error::new(Reason::NonFinite, problem));
        }
        let input = largest(self.input.iter());
        (0..self.shape.heads)
            .into_par_iter()
            .map(|head| self.head(head, input, factoring))
            .collect()
    }

    /// Rows of one head of `heads`.
    fn column<'b>(
        &self,
        rows: &'b [f32],
        heads: usize,
        head: usize,
    ) -> impl Iterator<Item = &'b f32> {
        let d = self.shape.dim;
        rows.chunks_exact(heads * d).flat_map(move |row| &row[head * d..(head + 1) * d])
    }

    fn head(&self, head: usize, input: f64, factoring: &Factoring) -> Result<v1::HeadNorms> {
        let (shape, d) = (self.shape, self.shape.dim);
        let group = shape.heads / shape.kv_heads;
        let key = head / group;
        let query_of = |rows| largest(self.column(rows, shape.heads, head));
        let key_of = |rows| largest(self.column(rows, shape.kv_heads, key));
        let added = |which: usize, heads, head| {
            self.added[which].as_ref().map_or(0.0, |rows| largest(self.column(rows, heads, head)))
        };
        let mut found = v1::HeadNorms {
            layer: self.index as i64,
            head: head as i64,
            input,
            query: query_of(self.raw[0]),
            key: key_of(self.raw[1]),
            turned_query: query_of(self.turned[0]),
            turned_key: key_of(self.turned[1]),
            composed: self.composed(head, key),
            adapter_query: added(0, shape.heads, head),
            adapter_key: added(1, shape.kv_heads, key),
            ..Default::default()
        };
        let normal = |gamma: f64| limits::normalised(gamma, f64::from(shape.scale), d);
        found.partial_gamma = normal(found.turned_query.max(found.turned_key));
        let full = found.partial_gamma.max(normal(input.max(found.composed)));
        found.full_gamma = full.max(normal(found.query.max(found.key)));
        let length = self.sequences.iter().map(ExactSizeIterator::len).min().unwrap_or(0);
        let gamma = if self.keys_trained { found.full_gamma } else { found.partial_gamma };
        found.margin = gamma / limits::threshold(length);

        let scores = Scores::of(self, head, key);
        found.largest_score = scores.largest;
        found.usual_score = scores.usual;
        found.effective_rank = scores.rank;
        if let Some(reason) = attend::unsuitable(shape, length) {
            reason.clone_into(&mut found.reason);
            found.verdict = NormVerdict::NotApplicable.into();
            return Ok(found);
        }
        let mut worst: Option<limits::Choice> = None;
        for rows in self.sequences {
            let (choice, ..) =
                attend::plan(factoring, shape, rows, key, (self.turned[0], self.turned[1]))?;
            let rank =
                |choice: &limits::Choice| choice.factored.map_or(usize::MAX, |(degree, _)| degree);
            if worst.as_ref().is_none_or(|worst| rank(&choice) > rank(worst)) {
                worst = Some(choice);
            }
        }
        let affordable = worst.as_ref().and_then(|choice| choice.factored);
        found.degree = affordable.map(|(degree, _)| degree as u32);
        found.features = affordable.map(|(_, features)| features as u64);
        found.reason = worst.map(|choice| choice.reason).unwrap_or_default();
        found.verdict = match limits::verdict(found.margin, affordable.is_some()) {
            Verdict::Fast => NormVerdict::Fast,
            Verdict::Border => NormVerdict::Border,
            Verdict::Quadratic => NormVerdict::Quadratic,
            Verdict::NotApplicable => NormVerdict::NotApplicable,
        }
        .into();
        Ok(found)
    }

    /// Largest entry of the head's queries times the transposed matrix of its keys.
    fn composed(&self, head: usize, key: usize) -> f64 {
        /// Rows that are multiplied at once.
        const ROWS: usize = 256;
        let (d, width) = (self.shape.dim, self.shape.heads * self.shape.dim);
        let matrix = View::new(&self.matrix[key * d * self.hidden..], d, self.hidden);
        let mut out = vec![0.0; ROWS * self.hidden];
        let mut most = 0.0_f64;
        for rows in self.raw[0].chunks(ROWS * width) {
            let count = rows.len() / width;
            let queries = View::strided(&rows[head * d..], count, d, width, 1);
            let out = &mut out[..count * self.hidden];
            gemm(queries, matrix, out, self.hidden, false, false);
            most = most.max(largest(out.iter()));
        }
        most
    }
}

fn largest<'a>(values: impl Iterator<Item = &'a f32>) -> f64 {
    f64::from(values.fold(0.0_f32, |most, v| if v.abs() > most { v.abs() } else { most }))
}

/// What the scores of a head are like.
struct Scores {
    largest: f64,
    /// The 99.9th percentile of the absolute scores.
    usual: f64,
    /// Mean effective rank of the weights.
    rank: f64,
}

impl Scores {
    fn of(layer: &Layer<'_>, head: usize, key: usize) -> Self {
        let (shape, d) = (layer.shape, layer.shape.dim);
        let (wq, wk) = (shape.heads * d, shape.kv_heads * d);
        let (mut all, mut ranks) = (Vec::new(), Vec::new());
        for rows in layer.sequences {
            let n = rows.len();
            let queries =
                View::strided(&layer.turned[0][rows.start * wq + head * d..], n, d, wq, 1);
            let keys = View::strided(&layer.turned[1][rows.start * wk + key * d..], n, d, wk, 1);
            let mut scores = vec![0.0; n * n];
            gemm(queries, keys.t(), &mut scores, n, false, false);
            for (t, row) in scores.chunks_exact_mut(n).enumerate() {
                let seen = seen(shape, t, n);
                for score in &mut row[seen.clone()] {
                    *score *= shape.scale;
                    if let Some(cap) = shape.softcap {
                        *score = cap * (*score / cap).tanh();
                    }
                    all.push(score.abs());
                }
                row[..seen.start].fill(f32::NEG_INFINITY);
                row[seen.end..].fill(f32::NEG_INFINITY);
                soften(row);
            }
            ranks.push(effective_rank(&scores, n));
        }
        let largest = largest(all.iter());
        let usual = match all.len() {
            0 => 0.0,
            n => {
                let at = (n * 999).div_ceil(1000).max(1) - 1;
                f64::from(*all.select_nth_unstable_by(at, f32::total_cmp).1)
            }
        };
        Self { largest, usual, rank: ranks.iter().sum::<f64>() / ranks.len().max(1) as f64 }
    }
}

fn seen(shape: &Attention, t: usize, n: usize) -> Range<usize> {
    match shape.causal {
        false => 0..n,
        true => shape.window.map_or(0, |w| (t + 1).saturating_sub(w))..t + 1,
    }
}

fn soften(row: &mut [f32]) {
    let top = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    row.iter_mut().for_each(|v| *v = (*v - top).exp());
    let by = 1.0 / row.iter().sum::<f32>();
    row.iter_mut().for_each(|v| *v *= by);
}

/// `(sum s^2)^2 / sum s^4` over the singular values `s` of weights `[n, n]`: `n` of the identity, 1 of equal
/// rows.
fn effective_rank(weights: &[f32], n: usize) -> f64 {
    let view = View::new(weights, n, n);
    let mut gram = vec![0.0; n * n];
    gemm(view, view.t(), &mut gram, n, false, false);
    let trace: f64 = (0..n).map(|i| f64::from(gram[i * n + i])).sum();
    let squares: f64 = gram.iter().map(|v| f64::from(*v).powi(2)).sum();
    if squares > 0.0 { trace * trace / squares } else { 0.0 }
}

/// Numbers of heads by verdict.
pub fn verdicts(heads: &[v1::HeadNorms]) -> BTreeMap<NormVerdict, usize> {
    let mut counts = BTreeMap::new();
    for head in heads {
        *counts.entry(head.verdict()).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests;
