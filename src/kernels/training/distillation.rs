//! The loss of a student that is to answer as a teacher does, and its gradient in the place of the student's
//! logits: `kl KL(teacher || student) + ce CE(target)`, summed over rows.

use super::super::activation::{exp, tanh};
use super::super::multiversion::multiversion;
use super::super::softmax;
use super::super::threads::{self, Shared};

/// The least probability of what is not among the likeliest tokens: its logarithm stays a number.
const LEAST: f64 = 1e-9;

/// What the rows of a batch add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Divergences from the teacher, in nats.
    pub kl: f64,
    /// Cross-entropies of the targets, in nats.
    pub ce: f64,
    /// Rows whose target has the largest logit.
    pub right: u64,
}

/// What the teacher says of each row.
pub enum Answers<'a> {
    /// Nothing: there is cross-entropy only.
    None,
    /// All logits, `[rows, width]`; capped in place.
    Logits(&'a mut [f32]),
    /// The `k` likeliest tokens of each row and the logarithms of their probabilities; what is left is one
    /// outcome.
    Top { k: usize, tokens: &'a [u32], logs: &'a [f32] },
}

/// How much each part counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    pub kl: f64,
    pub ce: f64,
}

/// Sums both losses over rows of `width` logits, which are capped first (`cap * tanh(x / cap)`) where `cap`
/// says so. If `gradient`, the logits become the gradient of the weighted sum with respect to them (before
/// the cap); else they are left in an unspecified state.
///
/// # Panics
/// If there is not one target below `width`, and one answer, for each row.
pub fn distillation(
    logits: &mut [f32],
    width: usize,
    targets: &[u32],
    answers: Answers<'_>,
    cap: Option<f32>,
    weights: Weights,
    gradient: bool,
) -> Sums {
    let rows = targets.len();
    assert_eq!(logits.len(), rows * width, "one target a row");
    assert!(targets.iter().all(|t| (*t as usize) < width), "a target outside the logits");
    let grain = (1 << 13) / width + 1;
    let answers = match answers {
        Answers::Logits(teacher) => {
            assert_eq!(teacher.len(), rows * width, "one answer a row");
            if let Some(cap) = cap {
                threads::for_rows(teacher, width, grain, |_, rows| soft_cap(rows, cap));
            }
            Answers::Logits(teacher)
        }
        Answers::Top { k, tokens, logs } => {
            assert!(tokens.len() == rows * k && logs.len() == rows * k, "one answer a row");
            assert!(tokens.iter().all(|t| (*t as usize) < width), "an answer outside the logits");
            Answers::Top { k, tokens, logs }
        }
        Answers::None => Answers::None,
    };
    let mut each = vec![Sums::default(); rows];
    let shared = Shared::new(&mut each);
    threads::for_rows(logits, width, grain, |first, part| {
        for (i, row) in part.chunks_exact_mut(width).enumerate() {
            let (at, target) = (first + i, targets[first + i] as usize);
            if let Some(cap) = cap {
                soft_cap(row, cap);
            }
            let (sum, own) = (softmax::log_sum_exp(row), row[target]);
            let mut sums = Sums {
                kl: 0.0,
                ce: sum - f64::from(own),
                right: u64::from(own >= softmax::max(row)),
            };
            let slope = |v: f32| cap.map_or(1.0, |cap| 1.0 - (v / cap).powi(2));
            let target_slope = slope(own);
            match &answers {
                Answers::None => {
                    if gradient {
                        spread(row, sum as f32, weights.ce as f32, cap.unwrap_or(0.0));
                    }
                }
                Answers::Logits(teacher) => {
                    let teacher = &teacher[at * width..][..width];
                    let all = softmax::log_sum_exp(teacher);
                    sums.kl = positive(softmax::mean_gap(row, teacher, all as f32) - all + sum);
                    if gradient {
                        let both = (weights.kl + weights.ce) as f32;
                        let kl = weights.kl as f32;
                        let cap = cap.unwrap_or(0.0);
                        mix(row, teacher, sum as f32, all as f32, both, kl, cap);
                    }
                }
                Answers::Top { k, tokens, logs } => {
                    let places = at * k..(at + 1) * k;
                    let top = Top::new(row, sum, &tokens[places.clone()], &logs[places]);
                    sums.kl = positive(top.divergence());
                    if gradient {
                        top.gradient(row, sum, weights, cap.unwrap_or(0.0), &slope);
                    }
                }
            }
            if gradient {
                row[target] -= weights.ce as f32 * target_slope;
            }
            // SAFETY: rows are disjoint.
            unsafe { shared.set(at, sums) };
        }
    });
    each.iter().fold(Sums::default(), |all, one| Sums {
        kl: all.kl + one.kl,
        ce: all.ce + one.ce,
        right: all.right + one.right,
    })
}

/// Rounding may leave a divergence a little below zero; what is no number stays none.
fn positive(kl: f64) -> f64 {
    if kl < 0.0 { 0.0 } else { kl }
}

/// The likeliest tokens of a teacher and what the student thinks of them.
struct Top<'a> {
    tokens: &'a [u32],
    /// Probabilities by the teacher and by the student.
    teacher: Vec<f64>,
    student: Vec<f64>,
    /// Of all other tokens together.
    rest: [f64; 2],
}

impl<'a> Top<'a> {
    fn new(row: &[f32], sum: f64, tokens: &'a [u32], logs: &[f32]) -> Self {
        let teacher: Vec<f64> = logs.iter().map(|log| f64::from(*log).exp()).collect();
        let student: Vec<f64> =
            tokens.iter().map(|t| (f64::from(row[*t as usize]) - sum).exp()).collect();
        // With all tokens among the likeliest there is no rest.
        let rest = |known: &[f64]| match tokens.len() < row.len() {
            true => (1.0 - known.iter().sum::<f64>()).max(LEAST),
            false => 0.0,
        };
        let rest = [rest(&teacher), rest(&student)];
        Self { tokens, teacher, student, rest }
    }

    fn divergence(&self) -> f64 {
        let part = |p: f64, q: f64| {
            if p == 0.0 { 0.0 } else { p * (p.ln() - q.max(f64::MIN_POSITIVE).ln()) }
        };
        let known: f64 = self.teacher.iter().zip(&self.student).map(|(p, q)| part(*p, *q)).sum();
        known + part(self.rest[0], self.rest[1])
    }

    /// Of a token among the likeliest `q - p`; of another `q - P q / Q`, with the rests `P` and `Q`.
    fn gradient(
        &self,
        row: &mut [f32],
        sum: f64,
        weights: Weights,
        cap: f32,
        slope: &dyn Fn(f32) -> f32,
    ) {
        let [p, q] = self.rest;
        let others = if q > 0.0 { weights.kl * (1.0 - p / q) } else { 0.0 };
        let own: Vec<f32> = self.tokens.iter().map(|t| row[*t as usize]).collect();
        spread(row, sum as f32, (others + weights.ce) as f32, cap);
        let known = self.tokens.iter().zip(own).zip(self.teacher.iter().zip(&self.student));
        for ((token, logit), (p, q)) in known {
            let g = weights.kl * (q - p) + weights.ce * q;
            row[*token as usize] = g as f32 * slope(logit);
        }
    }
}

multiversion! {
    fn soft_cap(row: &mut [f32], cap: f32) {
        row.iter_mut().for_each(|v| *v = cap * tanh::<FMA>(*v / cap));
    }

    /// Capped logits to `by` times their probabilities, times the slope of the cap (if it is not 0).
    fn spread(row: &mut [f32], sum: f32, by: f32, cap: f32) {
        if cap == 0.0 {
            row.iter_mut().for_each(|v| *v = by * exp::<FMA>(*v - sum));
        } else {
            for v in row {
                let t = *v / cap;
                *v = by * exp::<FMA>(*v - sum) * (1.0 - t * t);
            }
        }
    }

    /// Capped logits to `both` times the student's probabilities less `kl` times the teacher's, times the
    /// slope of the cap (if it is not 0).
    fn mix(student: &mut [f32], teacher: &[f32], own: f32, all: f32, both: f32, kl: f32, cap: f32) {
        for (s, t) in student.iter_mut().zip(teacher) {
            let slope = if cap == 0.0 { 1.0 } else { 1.0 - (*s / cap) * (*s / cap) };
            *s = (both * exp::<FMA>(*s - own) - kl * exp::<FMA>(*t - all)) * slope;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: usize = 3;
    const WIDTH: usize = 21;
    const TARGETS: [u32; ROWS] = [4, 20, 0];

    fn logits(step: usize) -> Vec<f32> {
        (0..ROWS * WIDTH).map(|i| ((i * step) % 23) as f32 * 0.3 - 3.0).collect()
    }

    fn log_softmax(row: &[f64]) -> Vec<f64> {
        let sum = row.iter().map(|v| v.exp()).sum::<f64>().ln();
        row.iter().map(|v| v - sum).collect()
    }

    fn wide(x: &[f32], cap: Option<f32>) -> Vec<f64> {
        let capped = |v: f64| cap.map(f64::from).map_or(v, |cap| cap * (v / cap).tanh());
        x.iter().map(|v| capped(f64::from(*v))).collect()
    }

    /// Divergence and cross-entropy by their definitions; of the `k` likeliest tokens and the rest.
    fn plain(student: &[f64], teacher: &[f64], k: usize) -> [f64; 2] {
        let (mut kl, mut ce) = (0.0, 0.0);
        for ((s, t), target) in student.chunks(WIDTH).zip(teacher.chunks(WIDTH)).zip(TARGETS) {
            let (s, t) = (log_softmax(s), log_softmax(t));
            let mut order: Vec<usize> = (0..WIDTH).collect();
            order.sort_by(|a, b| t[*b].total_cmp(&t[*a]));
            kl += order[..k].iter().map(|i| t[*i].exp() * (t[*i] - s[*i])).sum::<f64>();
            if k < WIDTH {
                let rest = |v: &[f64]| order[k..].iter().map(|i| v[*i].exp()).sum::<f64>();
                kl += rest(&t) * (rest(&t).ln() - rest(&s).ln());
            }
            ce -= s[target as usize];
        }
        [kl, ce]
    }

    /// The likeliest tokens of the teacher's rows.
    fn top(teacher: &[f64], k: usize) -> (Vec<u32>, Vec<f32>) {
        let (mut tokens, mut logs) = (Vec::new(), Vec::new());
        for row in teacher.chunks(WIDTH) {
            let row = log_softmax(row);
            let mut order: Vec<usize> = (0..WIDTH).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            tokens.extend(order[..k].iter().map(|i| *i as u32));
            logs.extend(order[..k].iter().map(|i| row[*i] as f32));
        }
        (tokens, logs)
    }

    #[test]
    fn losses_and_gradients_match_the_definition() {
        let weights = Weights { kl: 0.7, ce: 0.2 };
        for cap in [None, Some(2.0_f32)] {
            for k in [1, 5, WIDTH - 1, WIDTH] {
                let (x, teacher) = (logits(37), logits(31));
                let said = wide(&teacher, cap);
                let (tokens, logs) = top(&said, k);
                let loss = |x: &[f32]| -> f64 {
                    let [kl, ce] = plain(&wide(x, cap), &said, k);
                    weights.kl * kl + weights.ce * ce
                };
                let mut gradient = x.clone();
                let mut all = teacher.clone();
                let answers = match k == WIDTH {
                    true => Answers::Logits(&mut all),
                    false => Answers::Top { k, tokens: &tokens, logs: &logs },
                };
                let sums =
                    distillation(&mut gradient, WIDTH, &TARGETS, answers, cap, weights, true);
                let [kl, ce] = plain(&wide(&x, cap), &said, k);
                assert!((sums.kl - kl).abs() < 1e-5, "{k}: {} is not {kl}", sums.kl);
                assert!((sums.ce - ce).abs() < 1e-5);
                for (i, got) in gradient.iter().enumerate() {
                    let moved = |by: f32| {
                        let mut x = x.clone();
                        x[i] += by;
                        (f64::from(x[i]), loss(&x))
                    };
                    let ((a, up), (b, down)) = (moved(1e-2), moved(-1e-2));
                    let want = (up - down) / (a - b);
                    assert!((f64::from(*got) - want).abs() < 2e-4, "{k} {i}: {got} is not {want}");
                }
            }
        }
    }

    #[test]
    fn a_student_that_says_the_same_diverges_by_nothing_and_fewer_tokens_never_say_more() {
        let weights = Weights { kl: 1.0, ce: 0.0 };
        let x = logits(37);
        let mut same = x.clone();
        let mut gradient = x.clone();
        let sums = distillation(
            &mut gradient,
            WIDTH,
            &TARGETS,
            Answers::Logits(&mut same),
            None,
            weights,
            true,
        );
        assert_eq!(sums.kl, 0.0);
        assert!(gradient.iter().all(|g| *g == 0.0));
        let said = wide(&logits(31), None);
        let mut last = 0.0;
        for k in [1, 2, 5, 10, WIDTH] {
            let (tokens, logs) = top(&said, k);
            let answers = Answers::Top { k, tokens: &tokens, logs: &logs };
            let sums = distillation(&mut x.clone(), WIDTH, &TARGETS, answers, None, weights, false);
            assert!(sums.kl >= last - 1e-6, "{k}: {} after {last}", sums.kl);
            last = sums.kl;
        }
        let full = Answers::Logits(&mut logits(31));
        let full = distillation(&mut x.clone(), WIDTH, &TARGETS, full, None, weights, false);
        assert!((full.kl - last).abs() < 1e-5);
    }

    #[test]
    fn without_a_teacher_it_is_the_cross_entropy() {
        let weights = Weights { kl: 1.0, ce: 1.0 };
        let (mut a, mut b) = (logits(37), logits(37));
        let sums = distillation(&mut a, WIDTH, &TARGETS, Answers::None, Some(3.0), weights, true);
        let want = super::super::entropy::cross_entropy(&mut b, WIDTH, &TARGETS, Some(3.0), true);
        assert_eq!((sums.ce, sums.right, sums.kl), (want.loss, want.right, 0.0));
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 1e-6);
        }
        let mut broken = logits(37);
        broken[0] = f32::NAN;
        let mut teacher = logits(31);
        let answers = Answers::Logits(&mut teacher);
        let sums = distillation(&mut broken, WIDTH, &TARGETS, answers, None, weights, true);
        assert!(sums.kl.is_nan() && sums.ce.is_nan());
    }
}
