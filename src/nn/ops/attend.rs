//! Attention whose heads are computed exactly or in almost linear time, as each allows; and what is seen of
//! queries and keys on the way.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use faer::Mat;

use super::network::Run;
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::attention::{self, Kept, Shape};
use crate::kernels::training::factored::{self, Basis, Group, Monomials, Plan, Reach};
use crate::nn::limits::{self, Choice, Factoring};
use crate::nn::linalg;

/// The inputs of a layer's attention.
pub struct Attended<'a> {
    pub layer: usize,
    pub shape: &'a Shape,
    /// What queries, keys and values are made of, `[rows, hidden]`.
    pub input: &'a Value,
    /// Queries and keys before they are turned to their positions.
    pub unturned: [&'a Value; 2],
    pub q: &'a Value,
    pub k: &'a Value,
    pub v: &'a Value,
}

/// Computes the attention of a network instead of [`Tape::attention`].
pub trait Attend: Send + Sync {
    /// The result `[rows, heads * dim]`, as [`Tape::attention`] gives it or near that.
    fn attend(&self, run: &Run<'_>, attended: &Attended<'_>) -> Result<Value>;
}

/// Attention in training: factored where it is asked for and a head allows it, watched where that is asked
/// for.
#[derive(Debug, Default)]
pub struct Choosing {
    factoring: Option<Factoring>,
    /// Passes between looks at sizes; 0 for none.
    every: u64,
    passes: AtomicU64,
    seen: Mutex<Seen>,
    times: Times,
}

/// What was seen since the numbers were last taken.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// Key heads of sequences with the factored gradient, and with the exact one.
    pub factored: u64,
    pub exact: u64,
    /// Most features that a head took.
    pub features: usize,
    /// Largest normalised entry of queries and keys, where looked at.
    pub gamma: Option<f64>,
    /// Largest share of the threshold that entries reached.
    pub margin: Option<f64>,
}

/// Nanoseconds in attention, forwards and backwards.
#[derive(Debug, Default)]
struct Times {
    forward: AtomicU64,
    backward: AtomicU64,
}

impl Choosing {
    /// `every` passes apart sizes are looked at; 0 for never.
    pub fn new(factoring: Option<Factoring>, every: u64) -> Self {
        Self { factoring, every, ..Self::default() }
    }

    /// What was seen since this was last called.
    pub fn take(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Seconds in attention so far, forwards and backwards.
    pub fn seconds(&self) -> [f64; 2] {
        [&self.times.forward, &self.times.backward]
            .map(|time| time.load(Ordering::Relaxed) as f64 * 1e-9)
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Looks at the sizes of all heads, if it is time to.
    fn watch(&self, shape: &Shape, sequences: &[Range<usize>], layer: usize, q: &[f32], k: &[f32]) {
        let pass = match layer {
            0 => self.passes.fetch_add(1, Ordering::Relaxed),
            _ => self.passes.load(Ordering::Relaxed).saturating_sub(1),
        };
        if self.every == 0 || !pass.is_multiple_of(self.every) {
            return;
        }
        let (mut gamma, mut margin) = (0.0_f64, 0.0_f64);
        for rows in sequences.iter().filter(|rows| rows.len() > 1) {
            let part = |x: &[f32], width: usize| largest(&x[rows.start * width..rows.end * width]);
            let entry = part(q, shape.query_width()).max(part(k, shape.key_width()));
            let own = limits::normalised(f64::from(entry), f64::from(shape.scale), shape.dim);
            gamma = gamma.max(own);
            margin = margin.max(own / limits::threshold(rows.len()));
        }
        self.note_sizes(gamma, margin);
    }

    /// Adds sizes to what was seen.
    pub fn note_sizes(&self, gamma: f64, margin: f64) {
        self.note(|seen| {
            seen.gamma = Some(seen.gamma.unwrap_or(0.0).max(gamma));
            seen.margin = Some(seen.margin.unwrap_or(0.0).max(margin));
        });
    }
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, v| if v.abs() > most { v.abs() } else { most })
}

impl Attend for Arc<Choosing> {
    fn attend(&self, run: &Run<'_>, attended: &Attended<'_>) -> Result<Value> {
        let Attended { layer, shape, q, k, v, .. } = attended;
        let sequences = run.sequences.ranges();
        self.watch(shape, sequences, *layer, &q.read(), &k.read());
        let plans = match &self.factoring {
            None => vec![None; sequences.len() * shape.kv_heads],
            Some(factoring) => plans(factoring, shape, sequences, &q.read(), &k.read())?,
        };
        self.note(|seen| {
            for plan in &plans {
                match plan {
                    Some(plan) => {
                        seen.factored += 1;
                        seen.features = seen.features.max(plan.monomials.count());
                    }
                    None => seen.exact += 1,
                }
            }
        });
        run.tape.planned_attention(self, shape, sequences, plans, [q, k, v])
    }
}

/// A plan for each key head of each sequence that may be factored.
fn plans(
    factoring: &Factoring,
    shape: &Shape,
    sequences: &[Range<usize>],
    q: &[f32],
    k: &[f32],
) -> Result<Vec<Option<Plan>>> {
    let heads = sequences.iter().flat_map(|rows| (0..shape.kv_heads).map(move |head| (rows, head)));
    heads.map(|(rows, head)| Ok(plan(factoring, shape, rows, head, (q, k))?.1)).collect()
}

/// Why a shape cannot be factored, if it cannot.
pub fn unsuitable(shape: &Shape, length: usize) -> Option<&'static str> {
    if shape.softcap.is_some() {
        return Some("scores are capped, so weights are no exponentials of products");
    }
    if shape.window.is_some_and(|window| window < length) {
        return Some("positions see a window only, which costs little as it is");
    }
    (shape.scale.is_nan() || shape.scale <= 0.0)
        .then_some("scores are not scaled by a positive number")
}

/// The choice for a key head of a sequence and its query heads, and the plan if it is the factored gradient.
pub fn plan(
    factoring: &Factoring,
    shape: &Shape,
    rows: &Range<usize>,
    head: usize,
    (q, k): (&[f32], &[f32]),
) -> Result<(Choice, Option<Plan>, Reach)> {
    let group = Group::new(shape, rows, head, (q, k));
    let center = group.center();
    let reach = group.reach(&center);
    let exact = |reason: String| (Choice { factored: None, reason }, None, reach);
    if let Some(reason) = unsuitable(shape, rows.len()) {
        return Ok(exact(reason.to_owned()));
    }
    if !reach.is_finite() {
        return Ok(exact("queries or keys are not finite".to_owned()));
    }
    let (length, dim) = (rows.len(), shape.dim);
    let most = match limits::affordable(factoring, length, dim, shape.causal) {
        Ok(most) => most,
        Err(choice) => return Ok((choice, None, reach)),
    };
    let directions = match factoring.project.filter(|p| *p < dim) {
        None => None,
        Some(p) => Some(directions(&group, &center, p)?),
    };
    let basis = Basis { center, directions };
    // Exponentials of scores beyond this leave what f32 can hold beside others.
    let needed = if reach.bound > MOST_SCORE {
        None
    } else {
        group.errors(&basis, most).degree(factoring.eps).map(|(degree, _)| degree.max(1))
    };
    let choice = limits::choose(factoring, length, dim, shape.causal, needed);
    let plan = choice
        .factored
        .map(|(degree, _)| Plan { monomials: Monomials::new(basis.dim(), degree), basis });
    Ok((choice, plan, reach))
}

/// Largest bound of scores that is factored.
const MOST_SCORE: f64 = 40.0;

/// The first `p` principal directions of the queries and keys of a group, `[p, dim]`: both count the same.
fn directions(group: &Group<'_>, center: &[f32], p: usize) -> Result<Vec<f32>> {
    let d = center.len();
    let mut moments = [Mat::<f64>::zeros(d, d), Mat::<f64>::zeros(d, d)];
    let add = |to: &mut Mat<f64>, row: &[f64]| {
        for i in 0..d {
            for j in 0..d {
                to[(i, j)] += row[i] * row[j];
            }
        }
    };
    for t in 0..group.len {
        for h in 0..group.heads() {
            let query: Vec<f64> = group.query(t, h).iter().map(|v| f64::from(*v)).collect();
            add(&mut moments[0], &query);
        }
        let key: Vec<f64> =
            group.key(t).iter().zip(center).map(|(k, c)| f64::from(k - c)).collect();
        add(&mut moments[1], &key);
    }
    let trace = |m: &Mat<f64>| (0..d).map(|i| m[(i, i)]).sum::<f64>().max(1e-30);
    let [a, b] = &moments;
    let (ta, tb) = (trace(a), trace(b));
    let sum = Mat::from_fn(d, d, |i, j| a[(i, j)] / ta + b[(i, j)] / tb);
    let found = linalg::svd(sum.as_ref(), "the second moments of queries and keys")?;
    Ok((0..p)
        .flat_map(|r| (0..d).map(move |c| (r, c)))
        .map(|(r, c)| found.u[(c, r)] as f32)
        .collect())
}

impl Tape {
    /// Attention whose heads with a plan are factored; its times go to `choosing`.
    fn planned_attention(
        &self,
        choosing: &Arc<Choosing>,
        shape: &Shape,
        sequences: &Arc<[Range<usize>]>,
        mut plans: Vec<Option<Plan>>,
        [q, k, v]: [&Value; 3],
    ) -> Result<Value> {
        let rows = q.rows();
        let mut end = 0;
        let tiled = sequences.iter().all(|s| std::mem::replace(&mut end, s.end) == s.start);
        if !tiled
            || end != rows
            || q.width() != shape.query_width()
            || [k, v].iter().any(|x| x.width() != shape.key_width() || x.rows() != rows)
        {
            return Err(Error::internal("rows of attention do not fit"));
        }
        let start = Instant::now();
        let mut out = self.pool().take(rows * q.width());
        let mut sums = self.pool().take(rows * shape.heads);
        {
            let (q, k, v) = (q.read(), k.read(), v.read());
            let inputs = (&q[..], &k[..], &v[..]);
            let good = factored::forward(shape, sequences, &plans, inputs, &mut out, &mut sums);
            for (plan, good) in plans.iter_mut().zip(good) {
                // The sample missed something.
                if !good {
                    *plan = None;
                }
            }
            let wanted = |i: usize| plans[i].is_none();
            attention::forward_where(shape, sequences, &wanted, inputs, &mut out, &mut sums);
        }
        let took = |start: Instant| u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        choosing.times.forward.fetch_add(took(start), Ordering::Relaxed);
        let inputs = [q.node(), k.node(), v.node()];
        Ok(self.result_of(Arc::new(out), q.width(), &inputs, |out| {
            let (shape, sequences, choosing) =
                (*shape, Arc::clone(sequences), Arc::clone(choosing));
            let (q, k, v, out) = (q.clone(), k.clone(), v.clone(), Arc::clone(out));
            move |g, sink| {
                let start = Instant::now();
                let take = |of: &Value| sink.pool().take(of.rows() * of.width());
                let (mut dq, mut dk, mut dv) = (take(&q), take(&k), take(&v));
                {
                    let (q, k, v) = (q.read(), k.read(), v.read());
                    let kept = Kept { q: &q, k: &k, v: &v, out: &out, sums: &sums };
                    let to = (&mut dq[..], &mut dk[..], &mut dv[..]);
                    let wanted = |i: usize| plans[i].is_none();
                    attention::backward_where(&shape, &sequences, &wanted, kept, &g, to);
                    let to = (&mut dq[..], &mut dk[..], &mut dv[..]);
                    factored::backward(&shape, &sequences, &plans, kept, &g, to);
                }
                for (value, gradient) in [(&q, dq), (&k, dk), (&v, dv)] {
                    if let Some(node) = value.node() {
                        sink.add(node, Arc::new(gradient));
                    }
                }
                choosing.times.backward.fetch_add(took(start), Ordering::Relaxed);
                Ok(())
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pool, Sequences};
    use super::*;
    use crate::nn::tuning::Frozen;
    use candle_core::{Device, Tensor, Var};

    fn values(seed: usize, rows: usize, width: usize, size: f32) -> Var {
        let data: Vec<f32> = (0..rows * width)
            .map(|i| size * (((i * 7919 + seed * 104_729 + 13) % 997) as f32 / 498.5 - 1.0))
            .collect();
        Var::from_tensor(&Tensor::from_vec(data, (rows, width), &Device::Cpu).unwrap()).unwrap()
    }

    const LENGTHS: [usize; 2] = [150, 40];

    /// Output and gradients of queries, keys and values for heads that attend so.
    fn run(choosing: &Arc<Choosing>, shape: &Shape, size: f32) -> [Vec<f32>; 4] {
        let rows = LENGTHS.iter().sum();
        let vars = [
            values(1, rows, shape.query_width(), size),
            values(2, rows, shape.key_width(), size),
            values(3, rows, shape.key_width(), 1.0),
        ];
        let tape = Tape::new(&Pool::default());
        let starts = vars.each_ref().map(|var| tape.start(&tape.leaf(var.as_tensor()).unwrap()));
        let sequences = Sequences::of(LENGTHS);
        let run =
            Run { tape: &tape, tuning: &Frozen, sequences: &sequences, training: true, read: true };
        let [q, k, v] = &starts;
        let attended = Attended { layer: 0, shape, input: q, unturned: [q, k], q, k, v };
        let out = choosing.attend(&run, &attended).unwrap();
        let result = out.read().to_vec();
        let g = tape.copy(
            &values(4, rows, shape.query_width(), 1.0).flatten_all().unwrap().to_vec1().unwrap(),
        );
        let mut taken = tape.backward(&out, Arc::new(g)).unwrap();
        let [dq, dk, dv] = starts.each_ref().map(|start| taken.of(start).unwrap().to_vec());
        [result, dq, dk, dv]
    }

    fn shape() -> Shape {
        Shape {
            heads: 4,
            kv_heads: 2,
            dim: 4,
            scale: 0.5,
            softcap: None,
            causal: true,
            window: None,
        }
    }

    fn forced() -> Factoring {
        Factoring { max_features: Some(400), ..Factoring::default() }
    }

    #[test]
    fn heads_are_factored_where_they_allow_and_exact_elsewhere() {
        let exact = Arc::new(Choosing::new(None, 1));
        let factored = Arc::new(Choosing::new(Some(forced()), 0));
        let (want, got) = (run(&exact, &shape(), 0.6), run(&factored, &shape(), 0.6));
        for (got, want) in got.iter().zip(&want) {
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 5e-3));
            assert_ne!(got, want);
        }
        let seen = factored.take();
        assert_eq!((seen.factored, seen.exact, seen.gamma), (4, 0, None));
        assert!(seen.features > 1 && factored.seconds().iter().all(|s| *s > 0.0));
        assert_eq!(factored.take(), Seen::default());
        let seen = exact.take();
        assert_eq!((seen.factored, seen.exact), (0, 4));
        // 0.6 at most, times sqrt(0.5 * 4).
        let gamma = seen.gamma.unwrap();
        assert!((gamma - 0.6 * 2.0_f64.sqrt()).abs() < 1e-2, "{gamma}");
        assert!((seen.margin.unwrap() - gamma / limits::threshold(40)).abs() < 1e-9);
        // Large scores leave no choice, and then nothing differs.
        let (want, got) = (run(&exact, &shape(), 9.0), run(&factored, &shape(), 9.0));
        assert_eq!(got, want);
        assert_eq!(factored.take().exact, 4);
        // Nor do capped ones, and windows.
        for shape in [Shape { softcap: Some(5.0), ..shape() }, Shape { window: Some(7), ..shape() }]
        {
            assert_eq!(run(&factored, &shape, 0.3), run(&exact, &shape, 0.3));
            assert_eq!(factored.take().factored, 0);
        }
    }

    #[test]
    fn a_window_over_everything_is_none_and_short_sequences_stay_exact() {
        let factored = Arc::new(Choosing::new(Some(forced()), 0));
        run(&factored, &Shape { window: Some(150), ..shape() }, 0.5);
        assert_eq!(factored.take().factored, 4);
        let usual = Arc::new(Choosing::new(Some(Factoring::default()), 0));
        run(&usual, &shape(), 0.5);
        assert_eq!(usual.take().factored, 0, "40 and 150 tokens are too few");
    }

    #[test]
    fn projections_keep_what_queries_and_keys_span() {
        // Queries and keys of 8 channels that lie in 2.
        let flat = Shape { dim: 8, heads: 1, kv_heads: 1, scale: 0.3, ..shape() };
        let n = 60;
        let row = |i: usize, a: f32, b: f32| -> Vec<f32> {
            let (x, y) =
                (((i * 37 % 19) as f32 / 9.5 - 1.0) * a, ((i * 53 % 23) as f32 / 11.5 - 1.0) * b);
            (0..8)
                .map(|c| 0.4 * (x * (c as f32 + 1.0).sin() + y * (c as f32 * 2.0).cos()))
                .collect()
        };
        let q: Vec<f32> = (0..n).flat_map(|i| row(i, 0.7, 0.5)).collect();
        let k: Vec<f32> = (0..n).flat_map(|i| row(i + 5, 0.6, 0.6)).collect();
        let of = |project| {
            let factoring = Factoring { project, max_features: Some(100), ..Factoring::default() };
            plan(&factoring, &flat, &(0..n), 0, (&q, &k)).unwrap()
        };
        let (choice, plan, _) = of(Some(2));
        assert!(choice.factored.is_some(), "{choice:?}");
        let directions = plan.unwrap().basis.directions.unwrap();
        for (i, j) in [(0, 0), (0, 1), (1, 1)] {
            let dot: f32 = (0..8).map(|c| directions[i * 8 + c] * directions[j * 8 + c]).sum();
            assert!((dot - if i == j { 1.0 } else { 0.0 }).abs() < 1e-5);
        }
        let (degree, features) = choice.factored.unwrap();
        assert_eq!(Some(features), factored::count(2, degree));
        let broken = vec![f32::NAN; n * 8];
        let factoring = Factoring { max_features: Some(100), ..Factoring::default() };
        let (choice, plan, _) = super::plan(&factoring, &flat, &(0..n), 0, (&broken, &k)).unwrap();
        assert!(plan.is_none() && choice.reason.contains("finite"));
    }
}
