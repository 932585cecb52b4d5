//! Attention and its gradient in almost linear time: the weights are made of products of features of the
//! queries and of the keys, the Taylor polynomial of the exponential, so that sums over keys are taken once
//! and not for every query (Alman and Song 2024, and for adapters Hu et al. 2025, arXiv 2406.03136, lemmas
//! 3.1 to 3.7).
//!
//! With `n` the sum of a query's weights, `c` the gradient of its output `o` and `rho = c . o`, the gradient
//! of a score is `p = f (c . v - rho)`. Sums over keys of `features x [v, 1] x k` (and over queries of
//! `features x [c, -rho] x q / n`) hold all that the gradients of queries (keys) need: a head costs
//! `length * features * dim^2`. With causal attention the sums run along, a block of positions at a time, and
//! what is within a block is computed as it is.

mod monomials;
mod reach;

use std::ops::Range;

use super::super::activation::exp;
use super::super::gemm::{View, gemm};
use super::super::multiversion::multiversion;
use super::super::threads::{self, Shared, with_scratch};
use super::attention::{Kept, Shape};
pub use monomials::{Monomials, count, degree_within};
pub use reach::{Errors, Group, MAX_DEGREE, Reach, sure_degree};

/// Positions of a block.
const BLOCK: usize = 128;

/// The vectors that features are made of.
#[derive(Debug, Clone)]
pub struct Basis {
    /// What is taken from the keys of a head.
    pub center: Vec<f32>,
    /// Orthonormal directions `[p, dim]` that queries and keys are projected on.
    pub directions: Option<Vec<f32>>,
}

impl Basis {
    /// Coordinates of a projected vector.
    pub fn dim(&self) -> usize {
        match &self.directions {
            None => self.center.len(),
            Some(directions) => directions.len() / self.center.len(),
        }
    }

    /// Coordinates of rows `[n, dim]` in the directions, `[n, p]`; `None` where there are none.
    fn project(&self, rows: &[f32]) -> Option<Vec<f32>> {
        let directions = self.directions.as_ref()?;
        let (d, p) = (self.center.len(), self.dim());
        let n = rows.len() / d;
        let mut out = vec![0.0; n * p];
        gemm(View::new(rows, n, d), View::new(directions, p, d).t(), &mut out, p, false, false);
        Some(out)
    }
}

/// How a head of a sequence is factored.
#[derive(Debug, Clone)]
pub struct Plan {
    pub basis: Basis,
    pub monomials: Monomials,
}

/// Heads that are factored: one for each key head of each sequence, in this order.
pub type Plans = [Option<Plan>];

/// As [`super::attention::forward`], for the heads that have a plan; the others are left alone. `sums` is for
/// [`backward`] alone. Gives whether each head's weights came out positive and finite; where not, what it
/// wrote is of no use.
///
/// # Panics
/// If sizes do not fit.
pub fn forward(
    shape: &Shape,
    sequences: &[Range<usize>],
    plans: &Plans,
    (q, k, v): (&[f32], &[f32], &[f32]),
    out: &mut [f32],
    sums: &mut [f32],
) -> Vec<bool> {
    check(shape, sequences, plans, [q, out, k, v]);
    assert_eq!(sums.len() * shape.dim, q.len(), "sums");
    let (out, sums) = (Shared::new(out), Shared::new(sums));
    let mut good = vec![1.0_f32; plans.len()];
    let verdicts = Shared::new(&mut good);
    for_heads(shape, sequences, plans, |index, plan, group| {
        let head = Head { group: Group { q, k, ..group }, plan, v };
        let fine = head.forward(|t, h, o, sum| {
            let at = head.place(t, h);
            // SAFETY: this head of this position belongs to this task.
            unsafe {
                out.slice(at * shape.dim..(at + 1) * shape.dim).copy_from_slice(o);
                sums.set(at, sum);
            }
        });
        // SAFETY: one task a head.
        unsafe { verdicts.set(index, if fine { 1.0 } else { 0.0 }) };
    });
    good.into_iter().map(|good| good > 0.5).collect()
}

/// The gradients of [`forward`] for the heads that have a plan, overwritten; the others are left alone.
///
/// # Panics
/// If sizes do not fit.
pub fn backward(
    shape: &Shape,
    sequences: &[Range<usize>],
    plans: &Plans,
    kept: Kept<'_>,
    g: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let Kept { q, k, v, out, sums } = kept;
    check(shape, sequences, plans, [q, out, k, v]);
    assert!(g.len() == q.len() && dq.len() == q.len(), "gradients of queries");
    assert!(dk.len() == k.len() && dv.len() == k.len(), "gradients of keys");
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    for_heads(shape, sequences, plans, |_, plan, group| {
        let head = Head { group: Group { q, k, ..group }, plan, v };
        head.backward(out, sums, g, |side, t, h, values| {
            let (to, at) = match side {
                Side::Query => (dq, head.place(t, h)),
                Side::Key => (dk, head.key_place(t)),
                Side::Value => (dv, head.key_place(t)),
            };
            // SAFETY: this head of this sequence belongs to this task.
            unsafe { to.slice(at * shape.dim..(at + 1) * shape.dim) }.copy_from_slice(values);
        });
    });
}

fn check(shape: &Shape, sequences: &[Range<usize>], plans: &Plans, [q, out, k, v]: [&[f32]; 4]) {
    assert!(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads), "heads");
    assert_eq!(plans.len(), sequences.len() * shape.kv_heads, "one plan a head");
    let rows = sequences.last().map_or(0, |s| s.end);
    assert!(q.len() >= rows * shape.query_width() && out.len() == q.len(), "queries");
    assert!(k.len() >= rows * shape.key_width() && v.len() == k.len(), "keys and values");
    let mut end = 0;
    for rows in sequences {
        assert!(rows.start >= end && rows.start <= rows.end, "sequences overlap");
        end = rows.end;
    }
    for plan in plans.iter().flatten() {
        assert_eq!(plan.basis.center.len(), shape.dim, "dimensions of a plan");
    }
}

/// Calls `work` for each planned head with its place among the plans, its plan, and its group (without
/// queries and keys).
fn for_heads(
    shape: &Shape,
    sequences: &[Range<usize>],
    plans: &Plans,
    work: impl Fn(usize, &Plan, Group<'_>) + Sync,
) {
    let planned: Vec<(usize, &Plan)> =
        plans.iter().enumerate().filter_map(|(i, plan)| Some((i, plan.as_ref()?))).collect();
    threads::for_ranges(planned.len(), 1, |tasks| {
        for (index, plan) in &planned[tasks] {
            let (rows, head) = (&sequences[index / shape.kv_heads], index % shape.kv_heads);
            work(*index, plan, Group::new(shape, rows, head, (&[], &[])));
        }
    });
}

/// What a gradient is of.
#[derive(Clone, Copy)]
enum Side {
    Query,
    Key,
    Value,
}

/// A head at work.
struct Head<'a> {
    group: Group<'a>,
    plan: &'a Plan,
    v: &'a [f32],
}

/// Rows of a block, gathered.
struct Rows<'a> {
    /// `[block, dim]`: keys from their mean, or queries.
    vectors: &'a mut [f32],
    /// `[p, block]`: what features are made of.
    coordinates: &'a mut [f32],
    /// `[features, block]`
    features: &'a mut [f32],
}

impl Head<'_> {
    fn dim(&self) -> usize {
        self.group.shape.dim
    }

    /// Which of all query heads of all rows is head `h` of the group at position `t`.
    fn place(&self, t: usize, h: usize) -> usize {
        let heads = self.group.heads();
        (self.group.start + t) * self.group.shape.heads + self.group.head * heads + h
    }

    fn key_place(&self, t: usize) -> usize {
        (self.group.start + t) * self.group.shape.kv_heads + self.group.head
    }

    fn blocks(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let len = self.group.len;
        (0..len.div_ceil(BLOCK)).map(move |i| i * BLOCK..len.min((i + 1) * BLOCK))
    }

    /// Rows of keys (`None`) or of the queries of a head, and their features.
    fn gather(&self, block: &Range<usize>, query: Option<usize>, to: &mut Rows<'_>) {
        let (d, b) = (self.dim(), block.len());
        let (scale, basis) = (self.group.shape.scale, &self.plan.basis);
        let vectors = &mut to.vectors[..b * d];
        for (t, out) in block.clone().zip(vectors.chunks_exact_mut(d)) {
            match query {
                // Features of queries carry the scale.
                Some(h) => out.copy_from_slice(self.group.query(t, h)),
                None => {
                    let pairs = self.group.key(t).iter().zip(&basis.center);
                    out.iter_mut().zip(pairs).for_each(|(out, (k, c))| *out = k - c);
                }
            }
        }
        let p = basis.dim();
        let coordinates = &mut to.coordinates[..p * b];
        match &basis.directions {
            Some(directions) => {
                let vectors = View::new(vectors, b, d).t();
                gemm(View::new(directions, p, d), vectors, coordinates, b, false, false);
            }
            None => {
                for (t, row) in vectors.chunks_exact(d).enumerate() {
                    row.iter().enumerate().for_each(|(c, v)| coordinates[c * b + t] = *v);
                }
            }
        }
        if query.is_some() {
            coordinates.iter_mut().for_each(|v| *v *= scale);
        }
        let features = &mut to.features[..self.plan.monomials.count() * b];
        self.plan.monomials.expand(coordinates, b, features);
    }

    /// Values with a one behind each, `[block, dim + 1]`.
    fn values(&self, block: &Range<usize>, out: &mut [f32]) {
        let d = self.dim();
        for (t, out) in block.clone().zip(out.chunks_exact_mut(d + 1)) {
            let at = self.key_place(t) * d;
            out[..d].copy_from_slice(&self.v[at..at + d]);
            out[d] = 1.0;
        }
    }

    /// Weights of the keys of a block for its own queries, `[block, block]`; 0 for keys that come later.
    fn within(&self, queries: &[f32], keys: &[f32], weights: &mut [f32]) {
        let d = self.dim();
        let b = keys.len() / d;
        let (queries, keys) = (View::new(queries, b, d), View::new(keys, b, d));
        gemm(queries, keys.t(), weights, b, false, false);
        for (t, row) in weights.chunks_exact_mut(b).enumerate() {
            exponentials(&mut row[..=t], self.group.shape.scale);
            row[t + 1..].fill(0.0);
        }
    }

    /// Gives each query's output and the logarithm of the sum of its weights to `write`; `false` if a sum is
    /// not positive and finite.
    fn forward(&self, mut write: impl FnMut(usize, usize, &[f32], f32)) -> bool {
        let (d, m) = (self.dim(), self.plan.monomials.count());
        let (p, causal) = (self.plan.basis.dim(), self.group.shape.causal);
        let wide = d + 1;
        let sizes = [
            BLOCK * d,
            BLOCK * p,
            BLOCK * m,
            BLOCK * d,
            BLOCK * p,
            BLOCK * m,
            BLOCK * wide,
            BLOCK * wide,
            BLOCK * BLOCK,
            m * wide,
        ];
        let mut fine = true;
        with_scratch(sizes.iter().sum(), |scratch| {
            let [kv, kc, kf, qv, qc, qf, values, sums, weights, state] = split(scratch, sizes);
            let mut keys = Rows { vectors: kv, coordinates: kc, features: kf };
            let mut queries = Rows { vectors: qv, coordinates: qc, features: qf };
            state.fill(0.0);
            let add = |block: &Range<usize>, keys: &Rows<'_>, values: &[f32], state: &mut [f32]| {
                let b = block.len();
                let features = View::new(&keys.features[..m * b], m, b);
                gemm(features, View::new(values, b, wide), state, wide, true, false);
            };
            if !causal {
                for block in self.blocks() {
                    let values = &mut values[..block.len() * wide];
                    self.gather(&block, None, &mut keys);
                    self.values(&block, values);
                    add(&block, &keys, values, state);
                }
            }
            for block in self.blocks() {
                let b = block.len();
                let (values, sums) = (&mut values[..b * wide], &mut sums[..b * wide]);
                if causal {
                    self.gather(&block, None, &mut keys);
                    self.values(&block, values);
                }
                for h in 0..self.group.heads() {
                    self.gather(&block, Some(h), &mut queries);
                    let features = View::new(&queries.features[..m * b], m, b).t();
                    gemm(features, View::new(state, m, wide), sums, wide, false, false);
                    if causal {
                        let weights = &mut weights[..b * b];
                        self.within(&queries.vectors[..b * d], &keys.vectors[..b * d], weights);
                        let weights = View::new(weights, b, b);
                        gemm(weights, View::new(values, b, wide), sums, wide, true, false);
                    }
                    for (t, row) in block.clone().zip(sums.chunks_exact_mut(wide)) {
                        let sum = row[d];
                        fine &= sum > 0.0 && sum.is_finite();
                        let by = 1.0 / sum;
                        row[..d].iter_mut().for_each(|v| *v *= by);
                        write(t, h, &row[..d], sum.ln());
                    }
                }
                if causal {
                    add(&block, &keys, values, state);
                }
            }
        });
        fine
    }

    fn backward(
        &self,
        out: &[f32],
        sums: &[f32],
        g: &[f32],
        mut write: impl FnMut(Side, usize, usize, &[f32]),
    ) {
        let (d, m) = (self.dim(), self.plan.monomials.count());
        let (p, causal) = (self.plan.basis.dim(), self.group.shape.causal);
        let wide = d + 1;
        // `[values, 1] x keys`; and `[gradients, -rho] x queries` with the gradients behind.
        let (pairs, all) = (wide * d, wide * d + d);
        let sizes = [
            BLOCK * d,
            BLOCK * p,
            BLOCK * m,
            BLOCK * d,
            BLOCK * p,
            BLOCK * m,
            BLOCK * wide,
            BLOCK * wide,
            BLOCK * all,
            BLOCK * BLOCK,
            BLOCK * BLOCK,
            3 * BLOCK * d,
            m * pairs,
            m * all,
        ];
        with_scratch(sizes.iter().sum(), |scratch| {
            let [
                kv,
                kc,
                kf,
                qv,
                qc,
                qf,
                values,
                slopes,
                products,
                weights,
                ds,
                gradients,
                state,
                back,
            ] = split(scratch, sizes);
            let mut room = Room {
                keys: Rows { vectors: kv, coordinates: kc, features: kf },
                queries: Rows { vectors: qv, coordinates: qc, features: qf },
                values,
                slopes,
                products,
                weights,
                ds,
                gradients,
            };
            state.fill(0.0);
            back.fill(0.0);
            let kept = (out, sums, g);
            if causal {
                for block in self.blocks() {
                    self.load(&block, &mut room);
                    self.queries(&block, kept, state, None, &mut room, &mut write);
                    self.sum_keys(&block, state, &mut room);
                }
                for block in self.blocks().rev() {
                    self.load(&block, &mut room);
                    self.keys(&block, kept, back, &mut room, &mut write);
                }
            } else {
                for block in self.blocks() {
                    self.load(&block, &mut room);
                    self.sum_keys(&block, state, &mut room);
                }
                for block in self.blocks() {
                    self.queries(&block, kept, state, Some(back), &mut room, &mut write);
                }
                for block in self.blocks() {
                    self.load(&block, &mut room);
                    self.keys(&block, kept, back, &mut room, &mut write);
                }
            }
        });
    }

    /// Keys and values of a block.
    fn load(&self, block: &Range<usize>, room: &mut Room<'_>) {
        self.gather(block, None, &mut room.keys);
        self.values(block, &mut room.values[..block.len() * (self.dim() + 1)]);
    }

    /// Adds the keys of a loaded block to `state` `[features, (dim + 1) dim]`.
    fn sum_keys(&self, block: &Range<usize>, state: &mut [f32], room: &mut Room<'_>) {
        let (d, m, b) = (self.dim(), self.plan.monomials.count(), block.len());
        let pairs = (d + 1) * d;
        let products = &mut room.products[..b * pairs];
        let rows = room.values.chunks_exact(d + 1).zip(room.keys.vectors.chunks_exact(d));
        for (out, (v, k)) in products.chunks_exact_mut(pairs).zip(rows) {
            outer(v, k, out);
        }
        let features = View::new(&room.keys.features[..m * b], m, b);
        gemm(features, View::new(products, b, pairs), state, pairs, true, false);
    }

    /// `[c, -rho]` of head `h` for a block, without the sum of weights.
    fn slopes(
        &self,
        block: &Range<usize>,
        h: usize,
        (out, g): (&[f32], &[f32]),
        slopes: &mut [f32],
    ) {
        let d = self.dim();
        for (t, slopes) in block.clone().zip(slopes.chunks_exact_mut(d + 1)) {
            let at = self.place(t, h) * d;
            let (out, g) = (&out[at..at + d], &g[at..at + d]);
            slopes[..d].copy_from_slice(g);
            slopes[d] = -out.iter().zip(g).map(|(a, b)| a * b).sum::<f32>();
        }
    }

    /// Gradients of the queries of a block, from the sums over keys that they see: those of `state`, and with
    /// causal attention those of the loaded block. Adds the queries to `back`, where that is asked for.
    fn queries(
        &self,
        block: &Range<usize>,
        kept @ (out, sums, g): (&[f32], &[f32], &[f32]),
        state: &[f32],
        mut back: Option<&mut [f32]>,
        room: &mut Room<'_>,
        write: &mut impl FnMut(Side, usize, usize, &[f32]),
    ) {
        let (d, m, b) = (self.dim(), self.plan.monomials.count(), block.len());
        let (wide, pairs, scale) = (d + 1, (d + 1) * d, self.group.shape.scale);
        for h in 0..self.group.heads() {
            self.gather(block, Some(h), &mut room.queries);
            self.slopes(block, h, (out, g), &mut room.slopes[..b * wide]);
            let products = &mut room.products[..b * pairs];
            let features = View::new(&room.queries.features[..m * b], m, b).t();
            gemm(features, View::new(state, m, pairs), products, pairs, false, false);
            let gradients = &mut room.gradients[..b * d];
            gradients.fill(0.0);
            let rows = products.chunks_exact(pairs).zip(room.slopes.chunks_exact(wide));
            for (out, (x, c)) in gradients.chunks_exact_mut(d).zip(rows) {
                combine(x, c, out);
            }
            if self.group.shape.causal {
                self.scores(block, room);
                let (gradients, keys) = (&mut room.gradients[..b * d], &room.keys.vectors[..b * d]);
                let ds = View::new(&room.ds[..b * b], b, b);
                gemm(ds, View::new(keys, b, d), gradients, d, true, false);
            }
            for (t, row) in block.clone().zip(room.gradients[..b * d].chunks_exact_mut(d)) {
                let by = scale * (-sums[self.place(t, h)]).exp();
                row.iter_mut().for_each(|v| *v *= by);
                write(Side::Query, t, h, row);
            }
            if let Some(back) = back.as_deref_mut() {
                self.sum_queries(block, h, kept, back, room);
            }
        }
    }

    /// Within a loaded block with the queries and slopes of a head: weights into `room.weights`, and those
    /// times `c . v - rho` into `room.ds`, both without the sums of weights.
    fn scores(&self, block: &Range<usize>, room: &mut Room<'_>) {
        let (d, b) = (self.dim(), block.len());
        let (weights, ds) = (&mut room.weights[..b * b], &mut room.ds[..b * b]);
        self.within(&room.queries.vectors[..b * d], &room.keys.vectors[..b * d], weights);
        let slopes = View::new(&room.slopes[..b * (d + 1)], b, d + 1);
        let values = View::new(&room.values[..b * (d + 1)], b, d + 1);
        gemm(slopes, values.t(), ds, b, false, false);
        multiply(ds, weights);
    }

    /// Adds the queries of head `h` that were gathered, with their slopes, to `back`.
    fn sum_queries(
        &self,
        block: &Range<usize>,
        h: usize,
        (_, sums, _): (&[f32], &[f32], &[f32]),
        back: &mut [f32],
        room: &mut Room<'_>,
    ) {
        let (d, m, b) = (self.dim(), self.plan.monomials.count(), block.len());
        let (wide, pairs, all) = (d + 1, (d + 1) * d, (d + 2) * d);
        let products = &mut room.products[..b * all];
        for (i, out) in products.chunks_exact_mut(all).enumerate() {
            let by = (-sums[self.place(block.start + i, h)]).exp();
            let slopes = &mut room.slopes[i * wide..(i + 1) * wide];
            slopes.iter_mut().for_each(|v| *v *= by);
            outer(slopes, &room.queries.vectors[i * d..(i + 1) * d], &mut out[..pairs]);
            out[pairs..].copy_from_slice(&slopes[..d]);
        }
        let features = View::new(&room.queries.features[..m * b], m, b);
        gemm(features, View::new(products, b, all), back, all, true, false);
    }

    /// Gradients of the keys and values of a loaded block, from the sums over queries that see them: those of
    /// `back`, and with causal attention those of the block, which are added to `back` afterwards.
    fn keys(
        &self,
        block: &Range<usize>,
        kept @ (out, sums, g): (&[f32], &[f32], &[f32]),
        back: &mut [f32],
        room: &mut Room<'_>,
        write: &mut impl FnMut(Side, usize, usize, &[f32]),
    ) {
        let (d, m, b) = (self.dim(), self.plan.monomials.count(), block.len());
        let (wide, pairs, all) = (d + 1, (d + 1) * d, (d + 2) * d);
        let products = &mut room.products[..b * all];
        let features = View::new(&room.keys.features[..m * b], m, b).t();
        gemm(features, View::new(back, m, all), products, all, false, false);
        // Of keys, then of values.
        let (dk, rest) = room.gradients.split_at_mut(BLOCK * d);
        let (dk, dv) = (&mut dk[..b * d], &mut rest[..b * d]);
        dk.fill(0.0);
        let rows = products.chunks_exact(all).zip(room.values.chunks_exact(wide));
        for ((dk, dv), (x, v)) in dk.chunks_exact_mut(d).zip(dv.chunks_exact_mut(d)).zip(rows) {
            combine(&x[..pairs], v, dk);
            dv.copy_from_slice(&x[pairs..]);
        }
        if self.group.shape.causal {
            for h in 0..self.group.heads() {
                self.gather(block, Some(h), &mut room.queries);
                self.slopes(block, h, (out, g), &mut room.slopes[..b * wide]);
                self.scores(block, room);
                // Rows of queries, divided by their sums of weights.
                for (i, t) in block.clone().enumerate() {
                    let by = (-sums[self.place(t, h)]).exp();
                    let row = i * b..(i + 1) * b;
                    room.weights[row.clone()].iter_mut().for_each(|v| *v *= by);
                    room.ds[row].iter_mut().for_each(|v| *v *= by);
                }
                let (dk, rest) = room.gradients.split_at_mut(BLOCK * d);
                let (dk, dv) = (&mut dk[..b * d], &mut rest[..b * d]);
                let queries = View::new(&room.queries.vectors[..b * d], b, d);
                gemm(View::new(&room.ds[..b * b], b, b).t(), queries, dk, d, true, false);
                let c = View::strided(&room.slopes[..b * wide], b, d, wide, 1);
                gemm(View::new(&room.weights[..b * b], b, b).t(), c, dv, d, true, false);
                self.sum_queries(block, h, kept, back, room);
            }
        }
        let scale = self.group.shape.scale;
        let (dk, dv) = room.gradients.split_at_mut(BLOCK * d);
        let rows = dk[..b * d].chunks_exact_mut(d).zip(dv.chunks_exact(d));
        for (t, (dk, dv)) in block.clone().zip(rows) {
            dk.iter_mut().for_each(|v| *v *= scale);
            write(Side::Key, t, 0, dk);
            write(Side::Value, t, 0, dv);
        }
    }
}

/// Memory of a gradient.
struct Room<'a> {
    keys: Rows<'a>,
    queries: Rows<'a>,
    values: &'a mut [f32],
    slopes: &'a mut [f32],
    products: &'a mut [f32],
    weights: &'a mut [f32],
    ds: &'a mut [f32],
    gradients: &'a mut [f32],
}

/// Parts of these sizes.
fn split<const N: usize>(scratch: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    let mut rest = scratch;
    sizes.map(|size| {
        let (part, more) = std::mem::take(&mut rest).split_at_mut(size);
        rest = more;
        part
    })
}

multiversion! {
    fn exponentials(x: &mut [f32], scale: f32) {
        for v in x {
            *v = exp::<FMA>(*v * scale);
        }
    }

    fn multiply(x: &mut [f32], by: &[f32]) {
        for (x, by) in x.iter_mut().zip(by) {
            *x *= *by;
        }
    }

    /// `out[a, b] = x[a] y[b]`.
    fn outer(x: &[f32], y: &[f32], out: &mut [f32]) {
        for (x, out) in x.iter().zip(out.chunks_exact_mut(y.len())) {
            for (out, y) in out.iter_mut().zip(y) {
                *out = x * y;
            }
        }
    }

    /// `out[b] += sum_a c[a] x[a, b]`.
    fn combine(x: &[f32], c: &[f32], out: &mut [f32]) {
        for (c, x) in c.iter().zip(x.chunks_exact(out.len())) {
            for (out, x) in out.iter_mut().zip(x) {
                *out += c * x;
            }
        }
    }
}

#[cfg(test)]
mod tests;
