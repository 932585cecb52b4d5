// Formulas are written by their indices.
#![allow(clippy::needless_range_loop)]

use super::super::attention;
use super::*;

fn noise(len: usize, seed: u32, size: f32) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            size * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        })
        .collect()
}

/// Attention of one head by its definition in f64, with the gradients of the card's formulas: rows of
/// `[len, d]`.
struct Exact {
    f: Vec<Vec<f64>>,
    p: Vec<Vec<f64>>,
    out: Vec<Vec<f64>>,
    rho: Vec<f64>,
    dq: Vec<Vec<f64>>,
    dk: Vec<Vec<f64>>,
    dv: Vec<Vec<f64>>,
}

type Matrix = Vec<Vec<f64>>;

fn matrix(x: &[f32], width: usize) -> Matrix {
    x.chunks_exact(width).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `weight` makes unnormalised weights of scores.
fn exact(
    [q, k, v, c]: [&Matrix; 4],
    beta: f64,
    causal: bool,
    weight: impl Fn(&[f64], &[f64]) -> f64,
) -> Exact {
    let (n, d) = (q.len(), q[0].len());
    let zero = || vec![vec![0.0; d]; n];
    let mut all = Exact {
        f: vec![vec![0.0; n]; n],
        p: vec![vec![0.0; n]; n],
        out: zero(),
        rho: vec![0.0; n],
        dq: zero(),
        dk: zero(),
        dv: zero(),
    };
    for j in 0..n {
        let seen = if causal { j + 1 } else { n };
        for i in 0..seen {
            all.f[j][i] = weight(&q[j], &k[i]);
        }
        let sum: f64 = all.f[j].iter().sum();
        all.f[j].iter_mut().for_each(|f| *f /= sum);
        for i in 0..n {
            for t in 0..d {
                all.out[j][t] += all.f[j][i] * v[i][t];
            }
        }
        all.rho[j] = dot(&all.out[j], &c[j]);
        for i in 0..n {
            all.p[j][i] = all.f[j][i] * (dot(&c[j], &v[i]) - all.rho[j]);
            for t in 0..d {
                all.dq[j][t] += beta * all.p[j][i] * k[i][t];
                all.dk[i][t] += beta * all.p[j][i] * q[j][t];
                all.dv[i][t] += all.f[j][i] * c[j][t];
            }
        }
    }
    all
}

fn taylor(score: f64, degree: usize) -> f64 {
    let (mut term, mut sum) = (1.0, 1.0);
    for n in 1..=degree {
        term *= score / n as f64;
        sum += term;
    }
    sum
}

fn largest(a: &Matrix, b: &Matrix) -> f64 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn the_formulas_are_the_gradient_and_have_the_properties_of_the_card() {
    let (n, d, beta) = (7, 3, 0.6);
    let inputs = [1, 2, 3, 4].map(|seed| matrix(&noise(n * d, seed, 0.9), d));
    let [q, k, v, c] = &inputs;
    let exp = |q: &[f64], k: &[f64]| (beta * dot(q, k)).exp();
    for causal in [false, true] {
        let all = exact([q, k, v, c], beta, causal, exp);
        for j in 0..n {
            // Rows of the scores' gradient sum to 0; f . q = c . o.
            assert!(all.p[j].iter().sum::<f64>().abs() < 1e-14);
            let f_dot_q: f64 = (0..n).map(|i| all.f[j][i] * dot(&c[j], &v[i])).sum();
            assert!((f_dot_q - all.rho[j]).abs() < 1e-14);
        }
        let loss = |inputs: [&Matrix; 3]| {
            let out = exact([inputs[0], inputs[1], inputs[2], c], beta, causal, exp).out;
            out.iter().zip(c).map(|(o, c)| dot(o, c)).sum::<f64>()
        };
        for (which, gradient) in [&all.dq, &all.dk, &all.dv].into_iter().enumerate() {
            for (row, column) in (0..n).flat_map(|r| (0..d).map(move |c| (r, c))) {
                let moved = |by: f64| {
                    let mut own = [q.clone(), k.clone(), v.clone()];
                    own[which][row][column] += by;
                    loss(own.each_ref())
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((gradient[row][column] - want).abs() < 1e-9, "{which} {row} {column}");
            }
        }
        // Polynomials of high degree are the exponential; the error falls with every degree.
        let mut last = f64::INFINITY;
        for degree in 1..14 {
            let near = exact([q, k, v, c], beta, causal, |q, k| taylor(beta * dot(q, k), degree));
            let error = largest(&near.dq, &all.dq).max(largest(&near.dk, &all.dk));
            assert!(error < last, "degree {degree}: {error} after {last}");
            last = error;
        }
        assert!(last < 1e-8, "{last}");
    }
}

struct Case {
    shape: Shape,
    lengths: Vec<usize>,
    size: f32,
}

impl Case {
    fn sequences(&self) -> Vec<Range<usize>> {
        // A row in front belongs to no sequence.
        let mut next = 1;
        let range = |n: &usize| {
            next += n;
            next - n..next
        };
        self.lengths.iter().map(range).collect()
    }

    fn inputs(&self) -> [Vec<f32>; 4] {
        let rows = 1 + self.lengths.iter().sum::<usize>();
        let (wq, wk) = (self.shape.query_width(), self.shape.key_width());
        let mut g = noise(rows * wq, 4, 1.0);
        g[..wq].fill(0.0);
        let mut k = noise(rows * wk, 2, self.size);
        // A mean that softmax does not see.
        k.iter_mut().for_each(|k| *k += 0.7 * self.size);
        [noise(rows * wq, 1, self.size), k, noise(rows * wk, 3, 1.0), g]
    }

    fn plans(&self, degree: usize, directions: Option<&[f32]>) -> Vec<Option<Plan>> {
        let (inputs, sequences) = (self.inputs(), self.sequences());
        let heads = sequences.iter().flat_map(|s| (0..self.shape.kv_heads).map(move |h| (s, h)));
        heads
            .map(|(rows, head)| {
                let group = Group::new(&self.shape, rows, head, (&inputs[0], &inputs[1]));
                let directions = directions.map(<[f32]>::to_vec);
                let basis = Basis { center: group.center(), directions };
                Some(Plan { monomials: Monomials::new(basis.dim(), degree), basis })
            })
            .collect()
    }

    /// Output and gradients: factored, then as they are.
    fn both(&self, plans: &Plans) -> [[Vec<f32>; 4]; 2] {
        let ([q, k, v, g], sequences) = (self.inputs(), self.sequences());
        [true, false].map(|factored| {
            let (mut out, mut sums) = (vec![0.0; q.len()], vec![0.0; q.len() / self.shape.dim]);
            let mut grads = [&q, &k, &v].map(|x| vec![0.0; x.len()]);
            let inputs = (&q[..], &k[..], &v[..]);
            if factored {
                let good = forward(&self.shape, &sequences, plans, inputs, &mut out, &mut sums);
                assert!(good.iter().all(|good| *good));
            } else {
                attention::forward(&self.shape, &sequences, inputs, &mut out, &mut sums);
            }
            let kept = Kept { q: &q, k: &k, v: &v, out: &out, sums: &sums };
            let [dq, dk, dv] = &mut grads;
            if factored {
                backward(&self.shape, &sequences, plans, kept, &g, (dq, dk, dv));
            } else {
                attention::backward(&self.shape, &sequences, kept, &g, (dq, dk, dv));
            }
            let [dq, dk, dv] = grads;
            [out, dq, dk, dv]
        })
    }

    fn error(&self, plans: &Plans) -> f32 {
        let [near, far] = self.both(plans);
        let pairs = near.iter().flatten().zip(far.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }
}

fn shape(heads: usize, kv_heads: usize, dim: usize, causal: bool) -> Shape {
    Shape { heads, kv_heads, dim, scale: 0.5, softcap: None, causal, window: None }
}

/// Lengths on both sides of a block's, several blocks, heads that share keys.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for causal in [false, true] {
        for (heads, kv_heads, dim, lengths) in [
            (1, 1, 4, vec![BLOCK, 1, 5]),
            (4, 2, 3, vec![2 * BLOCK + 9, BLOCK - 1]),
            (2, 2, 2, vec![BLOCK + 1]),
        ] {
            cases.push(Case { shape: shape(heads, kv_heads, dim, causal), lengths, size: 0.8 });
        }
    }
    cases
}

#[test]
fn high_degrees_give_the_exact_outputs_and_gradients() {
    for case in cases() {
        let error = case.error(&case.plans(12, None));
        assert!(error < 2e-5, "{:?} {:?}: {error}", case.shape, case.lengths);
    }
}

#[test]
fn errors_fall_with_the_degree_until_rounding() {
    for case in cases() {
        let mut last = f32::INFINITY;
        for degree in [1, 2, 3, 4, 6] {
            let error = case.error(&case.plans(degree, None));
            assert!(error < last.max(2e-5), "degree {degree}: {error} after {last}");
            last = error;
        }
    }
}

#[test]
fn directions_that_span_all_change_nothing_and_fewer_are_near() {
    // A rotation of the plane, and one direction of keys that hardly leave it.
    let (sin, cos) = 0.6_f32.sin_cos();
    let case = Case { shape: shape(2, 1, 2, true), lengths: vec![BLOCK + 40, 9], size: 0.7 };
    let error = case.error(&case.plans(10, Some(&[cos, sin, -sin, cos])));
    assert!(error < 2e-5, "{error}");
    let flat = case.error(&case.plans(10, Some(&[cos, sin])));
    assert!(flat > 1e-3 && flat < 1.0, "{flat}");
}

#[test]
fn heads_without_a_plan_are_left_alone() {
    let case = Case { shape: shape(2, 2, 3, true), lengths: vec![20, 30], size: 0.5 };
    let mut plans = case.plans(6, None);
    plans[1] = None;
    let ([q, k, v, g], sequences) = (case.inputs(), case.sequences());
    let (mut out, mut sums) = (vec![7.0; q.len()], vec![7.0; q.len() / 3]);
    forward(&case.shape, &sequences, &plans, (&q, &k, &v), &mut out, &mut sums);
    // Head 1 of the first sequence, rows 1 to 20.
    let of = |row: usize, head: usize| (row * 2 + head) * 3;
    assert!(out[of(5, 1)..of(5, 1) + 3].iter().all(|v| *v == 7.0));
    assert!(out[of(5, 0)..of(5, 0) + 3].iter().all(|v| *v != 7.0));
    assert!(out[of(25, 1)..of(25, 1) + 3].iter().all(|v| *v != 7.0));
    // The other kernel fills them in, and both together give all gradients.
    let wanted = |i: usize| plans[i].is_none();
    attention::forward_where(&case.shape, &sequences, &wanted, (&q, &k, &v), &mut out, &mut sums);
    let kept = Kept { q: &q, k: &k, v: &v, out: &out, sums: &sums };
    let mut grads = [&q, &k, &v].map(|x| vec![9.0; x.len()]);
    let [dq, dk, dv] = &mut grads;
    attention::backward_where(&case.shape, &sequences, &wanted, kept, &g, (dq, dk, dv));
    backward(&case.shape, &sequences, &plans, kept, &g, (dq, dk, dv));
    let [_, want] = case.both(&case.plans(6, None));
    for (got, want) in grads.iter().zip(&want[1..]) {
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

#[test]
fn sums_that_are_not_positive_are_told() {
    // One direction with scores of -3 and degree 1: 1 - 3 is negative.
    let shape = Shape { scale: 1.0, ..shape(1, 1, 1, false) };
    let plan = |degree| {
        let basis = Basis { center: vec![0.0], directions: None };
        [Some(Plan { basis, monomials: Monomials::new(1, degree) })]
    };
    let (q, k, v) = ([1.0, 1.0], [-3.0, -3.0], [1.0, 2.0]);
    let (mut out, mut sums) = ([0.0; 2], [0.0; 2]);
    let run = std::slice::from_ref(&(0..2));
    assert_eq!(forward(&shape, run, &plan(1), (&q, &k, &v), &mut out, &mut sums), [false]);
    assert_eq!(forward(&shape, run, &plan(12), (&q, &k, &v), &mut out, &mut sums), [true]);
    assert!((out[0] - 1.5).abs() < 1e-4 && (sums[0] + 3.0 - 2.0_f32.ln()).abs() < 1e-2);
}

#[test]
fn reach_scales_with_the_inputs_and_bounds_the_scores() {
    let case = Case { shape: shape(2, 1, 4, false), lengths: vec![40], size: 0.9 };
    let ([q, k, ..], sequences) = (case.inputs(), case.sequences());
    let group = Group::new(&case.shape, &sequences[0], 0, (&q, &k));
    let center = group.center();
    let reach = group.reach(&center);
    let double = |x: &[f32]| -> Vec<f32> { x.iter().map(|v| 2.0 * v).collect() };
    let (q2, k2) = (double(&q), double(&k));
    let wide = Group::new(&case.shape, &sequences[0], 0, (&q2, &k2));
    let twice = wide.reach(&wide.center());
    assert_eq!((twice.query, twice.key), (2.0 * reach.query, 2.0 * reach.key));
    assert!((twice.bound / reach.bound - 4.0).abs() < 1e-6);
    for (t, h) in group.sample() {
        for i in 0..40 {
            let keys = group.key(i).iter().zip(&center).map(|(k, c)| k - c);
            let score: f32 = group.query(t, h).iter().zip(keys).map(|(q, k)| q * k).sum();
            assert!(f64::from(score.abs() * 0.5) <= reach.bound * 1.0001);
        }
    }
    let mut broken = q.clone();
    broken[30] = f32::NAN;
    let group = Group::new(&case.shape, &sequences[0], 0, (&broken, &k));
    assert!(!group.reach(&center).is_finite());
}

#[test]
fn sampled_errors_are_those_of_the_features() {
    for causal in [false, true] {
        let case = Case { shape: shape(2, 2, 3, causal), lengths: vec![2 * BLOCK + 6], size: 0.9 };
        let ([q, k, ..], sequences) = (case.inputs(), case.sequences());
        let group = Group::new(&case.shape, &sequences[0], 1, (&q, &k));
        let basis = Basis { center: group.center(), directions: None };
        let errors = group.errors(&basis, 12);
        let (degree, error) = errors.degree(1e-3).expect("a degree");
        assert!((2..10).contains(&degree) && error <= 1e-3);
        let found = case.error(&case.plans(degree, None));
        assert!(found < 1e-2, "{found}");
        let coarse = case.error(&case.plans(1, None));
        assert!(coarse > found, "degree {degree}: {found}, degree 1: {coarse}");
    }
}
