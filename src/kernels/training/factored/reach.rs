//! How large the scores of a head are, and which degree they ask for.

use std::ops::Range;

use super::super::super::gemm::{View, gemm};
use super::super::attention::Shape;
use super::Basis;

/// Queries of a head whose scores are looked at: half of them those with the largest norms, half at equal
/// distances.
const SAMPLED: usize = 16;
/// Highest degree that is looked at.
pub const MAX_DEGREE: usize = 40;
/// Scores beyond this are no matter for a polynomial, and their exponentials would leave f32.
const MAX_SCORE: f64 = 40.0;

/// Sizes of the queries and keys of a head of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Reach {
    /// Largest absolute element of the queries.
    pub query: f32,
    /// Largest absolute element of the keys.
    pub key: f32,
    /// No score is larger in size, keys being taken from their mean (which softmax does not see): the scale
    /// times the largest norms.
    pub bound: f64,
}

impl Reach {
    /// Whether all elements are finite.
    pub fn is_finite(&self) -> bool {
        self.query.is_finite() && self.key.is_finite() && self.bound.is_finite()
    }
}

/// The smallest degree whose Taylor polynomial differs from the exponential on `[-bound, bound]` by at most
/// `eps` of the exponential; `None` if none up to `most`.
pub fn sure_degree(bound: f64, eps: f64, most: usize) -> Option<usize> {
    if !(0.0..=MAX_SCORE).contains(&bound) {
        return None;
    }
    let least = eps * (-bound).exp();
    // Terms beyond what follows are too small to count.
    let terms = (bound * 4.0) as usize + 64 + most;
    let mut term = 1.0;
    let all: Vec<f64> = (1..=terms)
        .map(|n| {
            term *= bound / n as f64;
            term
        })
        .collect();
    // The largest terms last, so that small sums keep their digits.
    let mut rest = 0.0;
    let mut degree = None;
    for (n, term) in all.iter().enumerate().rev() {
        if rest > least {
            break;
        }
        degree = Some(n + 1);
        rest += term;
    }
    if rest <= least {
        degree = Some(0);
    }
    degree.filter(|degree| *degree <= most)
}

/// The errors of the weights of rows of scores by degree: of each degree the largest over rows of
/// `sum_i |f~_i - f_i|`, `f~` being normalised Taylor polynomials. A degree with a polynomial that is not
/// positive somewhere has an infinite error.
pub struct Errors(Vec<f64>);

impl Errors {
    /// For degrees from 0 to `most`.
    pub fn new(most: usize) -> Self {
        Self(vec![0.0; most + 1])
    }

    /// Takes a row into account: scores as they go into the features, and as they are.
    pub fn see(&mut self, approximate: &[f32], exact: &[f32]) {
        let top = exact.iter().fold(f64::NEG_INFINITY, |a, s| a.max(f64::from(*s)));
        let weights: Vec<f64> = exact.iter().map(|s| (f64::from(*s) - top).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut terms = vec![1.0_f64; approximate.len()];
        let mut sums = vec![1.0_f64; approximate.len()];
        for (degree, worst) in self.0.iter_mut().enumerate() {
            if degree > 0 {
                for ((term, sum), s) in terms.iter_mut().zip(&mut sums).zip(approximate) {
                    *term *= f64::from(*s) / degree as f64;
                    *sum += *term;
                }
            }
            let norm: f64 = sums.iter().sum();
            let error = match sums.iter().all(|s| *s > 0.0) {
                true => {
                    let pairs = sums.iter().zip(&weights);
                    pairs.map(|(s, w)| (s / norm - w / total).abs()).sum()
                }
                false => f64::INFINITY,
            };
            *worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
    }

    /// The smallest degree with an error of at most `eps`, and that error.
    pub fn degree(&self, eps: f64) -> Option<(usize, f64)> {
        self.0.iter().enumerate().find(|(_, error)| **error <= eps).map(|(d, e)| (d, *e))
    }

    /// The error of the highest degree.
    pub fn last(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::INFINITY)
    }
}

/// A key head of a sequence with its query heads: rows of `q` and `k` as attention has them.
#[derive(Clone, Copy)]
pub struct Group<'a> {
    pub shape: &'a Shape,
    /// Rows of the sequence.
    pub start: usize,
    pub len: usize,
    /// The key head.
    pub head: usize,
    pub q: &'a [f32],
    pub k: &'a [f32],
}

impl<'a> Group<'a> {
    pub fn new(
        shape: &'a Shape,
        rows: &Range<usize>,
        head: usize,
        (q, k): (&'a [f32], &'a [f32]),
    ) -> Self {
        Self { shape, start: rows.start, len: rows.len(), head, q, k }
    }

    /// Query heads of the group.
    pub fn heads(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// The query of head `h` of the group at position `t`.
    pub fn query(&self, t: usize, h: usize) -> &'a [f32] {
        let head = self.head * self.heads() + h;
        &self.q[((self.start + t) * self.shape.heads + head) * self.shape.dim..][..self.shape.dim]
    }

    /// The key at position `t`.
    pub fn key(&self, t: usize) -> &'a [f32] {
        let at = (self.start + t) * self.shape.kv_heads + self.head;
        &self.k[at * self.shape.dim..][..self.shape.dim]
    }

    /// The mean of the keys.
    pub fn center(&self) -> Vec<f32> {
        let mut sums = vec![0.0_f64; self.shape.dim];
        for t in 0..self.len {
            sums.iter_mut().zip(self.key(t)).for_each(|(sum, k)| *sum += f64::from(*k));
        }
        sums.iter().map(|sum| (sum / self.len.max(1) as f64) as f32).collect()
    }

    /// Sizes of the queries and keys, keys being taken from `center` for the bound.
    pub fn reach(&self, center: &[f32]) -> Reach {
        let mut reach = Reach::default();
        let (mut queries, mut keys) = (0.0_f64, 0.0_f64);
        let mut broken = false;
        for t in 0..self.len {
            for h in 0..self.heads() {
                let q = self.query(t, h);
                reach.query = q.iter().fold(reach.query, |most, v| most.max(v.abs()));
                let square: f64 = q.iter().map(|v| f64::from(*v).powi(2)).sum();
                broken |= !square.is_finite();
                queries = queries.max(square);
            }
            let k = self.key(t);
            reach.key = k.iter().fold(reach.key, |most, v| most.max(v.abs()));
            let square: f64 = k.iter().zip(center).map(|(k, c)| f64::from(k - c).powi(2)).sum();
            broken |= !square.is_finite();
            keys = keys.max(square);
        }
        let scale = f64::from(self.shape.scale.abs());
        reach.bound = if broken { f64::INFINITY } else { scale * (queries * keys).sqrt() };
        reach
    }

    /// Positions and heads whose scores stand for all.
    pub fn sample(&self) -> Vec<(usize, usize)> {
        let heads = self.heads();
        let all = self.len * heads;
        let mut chosen: Vec<usize> =
            (0..SAMPLED / 2).map(|i| (i + 1) * all / (SAMPLED / 2) - 1).collect();
        let mut sizes: Vec<(f32, usize)> = (0..all)
            .map(|i| (self.query(i / heads, i % heads).iter().map(|v| v * v).sum(), i))
            .collect();
        let most = (SAMPLED / 2).min(all);
        if most < all {
            sizes.select_nth_unstable_by(most, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        chosen.extend(sizes[..most].iter().map(|(_, i)| *i));
        chosen.sort_unstable();
        chosen.dedup();
        chosen.into_iter().map(|i| (i / heads, i % heads)).collect()
    }

    /// Errors of the weights of the sampled queries for degrees up to `most`, features being made as
    /// `basis` says.
    pub fn errors(&self, basis: &Basis, most: usize) -> Errors {
        let (shape, d) = (self.shape, self.shape.dim);
        let mut errors = Errors::new(most);
        let keys: Vec<f32> = (0..self.len)
            .flat_map(|t| self.key(t).iter().zip(&basis.center).map(|(k, c)| k - c))
            .collect();
        let projected = basis.project(&keys);
        let (mut exact, mut approximate) = (vec![0.0; self.len], vec![0.0; self.len]);
        for (t, h) in self.sample() {
            let seen = if shape.causal { t + 1 } else { self.len };
            let query: Vec<f32> = self.query(t, h).iter().map(|v| v * shape.scale).collect();
            let one = View::new(&query, 1, d);
            let row = &mut exact[..seen];
            gemm(one, View::new(&keys, seen, d).t(), row, seen, false, false);
            match &projected {
                None => errors.see(row, row),
                Some(keys) => {
                    let query = basis.project(&query).unwrap_or_default();
                    let near = &mut approximate[..seen];
                    let p = basis.dim();
                    let keys = View::new(keys, seen, p).t();
                    gemm(View::new(&query, 1, p), keys, near, seen, false, false);
                    errors.see(near, row);
                }
            }
        }
        errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sure_degrees_are_the_smallest_that_hold() {
        assert_eq!(sure_degree(0.0, 1e-3, 9), Some(0));
        for bound in [0.1, 0.5, 1.0, 2.25, 4.0, 9.0] {
            for eps in [1e-1, 1e-3, 1e-6] {
                let degree = sure_degree(bound, eps, 60).expect("a degree");
                // Worst at an end of the interval: the relative error at -bound, against the rest.
                let rest = |from: usize| {
                    let mut term = 1.0;
                    (1..120)
                        .map(|n| {
                            term *= bound / f64::from(n);
                            if n as usize > from { term } else { 0.0 }
                        })
                        .sum::<f64>()
                };
                assert!(rest(degree) <= eps * (-bound).exp() * 1.0001, "{bound} {eps} {degree}");
                assert!(degree == 0 || rest(degree - 1) > eps * (-bound).exp() * 0.9999);
            }
        }
        assert_eq!(sure_degree(9.0, 1e-3, 10), None);
        assert_eq!(sure_degree(f64::NAN, 1e-3, 10), None);
        assert_eq!(sure_degree(1e9, 1e-3, 10), None);
    }

    #[test]
    fn errors_fall_with_the_degree_and_polynomials_below_zero_do_not_count() {
        let row = [0.5_f32, -1.0, 1.5, 0.0];
        let mut errors = Errors::new(12);
        errors.see(&row, &row);
        assert!(errors.0.windows(2).skip(1).all(|pair| pair[1] < pair[0]), "{:?}", errors.0);
        // Degree 0 weighs all keys equally.
        let weights: Vec<f64> = row.iter().map(|s| f64::from(*s).exp()).collect();
        let total: f64 = weights.iter().sum();
        let flat: f64 = weights.iter().map(|w| (w / total - 0.25).abs()).sum();
        assert!((errors.0[0] - flat).abs() < 1e-12);
        assert_eq!(errors.degree(flat * (1.0 + 1e-9)), Some((0, errors.0[0])));
        assert!(errors.last() < 1e-8);
        let mut errors = Errors::new(1);
        errors.see(&[-2.0, 0.0], &[-2.0, 0.0]);
        assert_eq!(errors.last(), f64::INFINITY);
        errors.see(&[f32::NAN], &[f32::NAN]);
        assert_eq!(errors.degree(1.0), None);
    }
}
