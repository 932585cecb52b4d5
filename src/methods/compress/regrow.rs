//! The exchange of DSnoT: which pruned weight comes back and which kept one goes in its place.
//!
//! With inputs `x` of mean `m` and variance `v`, and `m` summed over [`TOKENS`] tokens, weight `w_j` gives the
//! output `D_j = w_j m_j` on average. The expected error of a row is the sum of `D` over what is pruned: dense
//! output minus sparse output. Each exchange brings a weight back whose `D` has the error's sign and prunes
//! one, which moves the error towards zero.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::mask::Mask;
use crate::calibrate::inputs::Inputs;

/// Tokens of the sequence that an expected error is summed over; statistics are kept by token, so the
/// threshold does not depend on the length of the calibration.
pub const TOKENS: f64 = 2048.0;

/// What ends the exchanges of a row, beside the threshold and the number of cycles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An exchange that does not make the error smaller is not made.
    NoIncrease,
    /// Nothing.
    Threshold,
    /// An exchange that turns the sign of the error is not made.
    Sign,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    pub max_cycles: usize,
    pub threshold: f64,
    pub stop: Stop,
    /// Length of the groups of an n:m pattern: weights are exchanged inside of a group, and the sign is held.
    pub group: Option<usize>,
}

/// What is known of the inputs of a linear.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Mean of each input, times [`TOKENS`].
    sums: Vec<f64>,
    /// Divides the order of growing: the variance to the power that was asked for.
    spread: Vec<f64>,
    norms: Vec<f32>,
    /// Inputs that never varied; they count as the one that varied least.
    pub constant: usize,
}

impl Seen {
    pub fn new(inputs: &Inputs, var_power: f64) -> Self {
        let sums = inputs.mean().iter().map(|m| m * TOKENS).collect();
        Self::of(sums, &inputs.variance(), inputs.norms(), var_power)
    }

    fn of(sums: Vec<f64>, variance: &[f64], norms: Vec<f32>, var_power: f64) -> Self {
        if var_power == 0.0 {
            return Self { spread: vec![1.0; sums.len()], sums, norms, constant: 0 };
        }
        let least = variance.iter().copied().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
        let least = if least.is_finite() { least } else { 1.0 };
        let spread = variance.iter().map(|v| if *v > 0.0 { *v } else { least }.powf(var_power));
        let constant = variance.iter().filter(|v| **v <= 0.0).count();
        Self { spread: spread.collect(), sums, norms, constant }
    }

    /// Whether no input has a mean: then no error is expected of any mask.
    pub fn centred(&self) -> bool {
        self.sums.iter().all(|s| *s == 0.0)
    }
}

/// What became of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Change {
    pub swaps: usize,
    /// Expected error before and after.
    pub before: f64,
    pub after: f64,
}

/// Exchanges weights in every row of `mask`, which keeps its counts by row (by group with a pattern).
/// `score` is that of the initial mask; patterns need it.
pub fn refine(
    weights: &[f32],
    mask: &mut Mask,
    seen: &Seen,
    rules: &Rules,
    score: impl Fn(f32, usize) -> f32 + Sync,
) -> Vec<Change> {
    let cols = seen.sums.len();
    let rows = weights.par_chunks(cols).zip(mask.pruned_mut().par_chunks_mut(cols));
    rows.map(|(row, pruned)| refine_row(row, pruned, seen, rules, &score)).collect()
}

/// Columns in an order, and how many of them are used up.
struct List {
    columns: Vec<usize>,
    next: usize,
}

impl List {
    /// The first `most` columns among those with a key, by rising key, then by column.
    fn new(keys: impl Iterator<Item = Option<f64>>, most: usize) -> Self {
        let mut found: Vec<(f64, usize)> =
            keys.enumerate().filter_map(|(j, key)| key.map(|key| (key, j))).collect();
        let order = |a: &(f64, usize), b: &(f64, usize)| -> Ordering {
            a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
        };
        if found.len() > most && most > 0 {
            found.select_nth_unstable_by(most - 1, order);
        }
        found.truncate(most);
        found.sort_unstable_by(order);
        Self { columns: found.into_iter().map(|(_, j)| j).collect(), next: 0 }
    }

    fn head(&self) -> Option<usize> {
        self.columns.get(self.next).copied()
    }
}

fn refine_row(
    weights: &[f32],
    pruned: &mut [bool],
    seen: &Seen,
    rules: &Rules,
    score: &(impl Fn(f32, usize) -> f32 + Sync),
) -> Change {
    let gives = |j: usize| f64::from(weights[j]) * seen.sums[j];
    let mut error: f64 = (0..weights.len()).filter(|j| pruned[*j]).map(gives).sum();
    let first = error;
    let unchanged = Change { swaps: 0, before: first, after: first };
    if rules.max_cycles == 0 || first.abs() <= rules.threshold {
        return unchanged;
    }
    // The lists are made once, of the initial mask; what changed sides is in no list of the other side.
    let list = |was_pruned: bool, positive: bool| {
        let key = |j: usize| {
            let d = gives(j);
            let wanted = pruned[j] == was_pruned && if positive { d > 0.0 } else { d < 0.0 };
            wanted.then(|| match was_pruned {
                true => -d.abs() / seen.spread[j],
                false => f64::from(weights[j].abs() * seen.norms[j]),
            })
        };
        List::new((0..weights.len()).map(key), rules.max_cycles)
    };
    let mut grow = [list(true, true), list(true, false)];
    let mut shrink = match rules.group {
        // Partners come from the group.
        Some(_) => [List::new(std::iter::empty(), 0), List::new(std::iter::empty(), 0)],
        None => [list(false, false), list(false, true)],
    };
    let hold_sign = rules.stop == Stop::Sign || rules.group.is_some();
    let mut swapped = vec![false; if rules.group.is_some() { weights.len() } else { 0 }];
    let mut swaps = 0;
    for _ in 0..rules.max_cycles {
        if error.abs() <= rules.threshold {
            break;
        }
        let side = usize::from(error < 0.0);
        let Some(back) = grow[side].head() else { break };
        let out = match rules.group {
            None => match shrink[side].head() {
                Some(out) => out,
                None => break,
            },
            Some(m) => {
                let group = back / m * m..back / m * m + m;
                let kept = group.filter(|j| !pruned[*j] && !swapped[*j]);
                let least = kept.min_by(|a, b| {
                    score(weights[*a], *a).total_cmp(&score(weights[*b], *b)).then(a.cmp(b))
                });
                match least {
                    Some(out) => out,
                    // All of the group changed sides; another group may have a partner.
                    None => {
                        grow[side].next += 1;
                        continue;
                    }
                }
            }
        };
        let next = error - gives(back) + gives(out);
        let larger = rules.stop == Stop::NoIncrease && next.abs() >= error.abs();
        let turned = hold_sign && next * first < 0.0;
        if larger || turned {
            break;
        }
        (pruned[back], pruned[out]) = (false, true);
        grow[side].next += 1;
        match rules.group {
            None => shrink[side].next += 1,
            Some(_) => (swapped[back], swapped[out]) = (true, true),
        }
        error = next;
        swaps += 1;
    }
    Change { swaps, before: first, after: error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::compress::sparsity::Amount;
    use crate::methods::compress::testing::weights;
    use crate::methods::compress::{magnitude, wanda};

    fn seen(means: &[f64], variance: &[f64], power: f64) -> Seen {
        let norms = vec![1.0; means.len()];
        Seen::of(means.to_vec(), variance, norms, power)
    }

    fn rules(stop: Stop) -> Rules {
        Rules { max_cycles: 50, threshold: 0.1, stop, group: None }
    }

    fn errors(w: &[f32], mask: &Mask, seen: &Seen) -> Vec<f64> {
        let cols = seen.sums.len();
        let rows = w.chunks(cols).zip(mask.pruned().chunks(cols));
        let sum = |(w, p): (&[f32], &[bool])| {
            let pruned = (0..cols).filter(|j| p[*j]);
            pruned.map(|j| f64::from(w[j]) * seen.sums[j]).sum()
        };
        rows.map(sum).collect()
    }

    #[test]
    fn a_row_by_hand() {
        // Two pruned of [1, -1, 2, 0.1] by Wanda with equal norms: 0.1, and 1 as the first of a tie. The
        // error is 1.1; 1 comes back, -1 goes: -0.9. Nothing negative was pruned before, so it ends there.
        let w = [1.0, -1.0, 2.0, 0.1];
        let seen = seen(&[1.0; 4], &[1.0; 4], 1.0);
        let start = wanda::mask(&w, &[1.0; 4], Amount::Share(0.5));
        assert_eq!(start.pruned(), [true, false, false, true]);
        let run = |rules: Rules| {
            let mut mask = start.clone();
            let change = refine(&w, &mut mask, &seen, &rules, |w, _| w.abs())[0];
            (mask.pruned().to_vec(), change)
        };
        let (mask, change) = run(rules(Stop::NoIncrease));
        assert_eq!(mask, [false, true, false, true]);
        assert_eq!(change.swaps, 1);
        assert!((change.before - 1.1).abs() < 1e-6 && (change.after + 0.9).abs() < 1e-6);
        assert_eq!(run(rules(Stop::Threshold)).0, mask);
        // The sign would turn.
        assert_eq!(
            run(rules(Stop::Sign)),
            (
                start.pruned().to_vec(),
                Change { swaps: 0, before: change.before, after: change.before }
            )
        );
        let none = Rules { max_cycles: 0, ..rules(Stop::Threshold) };
        assert_eq!(run(none).0, start.pruned());
        let content = Rules { threshold: 2.0, ..rules(Stop::Threshold) };
        assert_eq!(run(content).1.swaps, 0);
    }

    #[test]
    fn the_variance_orders_what_comes_back() {
        // Pruned 3 and 2, of inputs that vary by 9 and 1: 3/9 < 2/1, so 2 comes back first.
        let w = [3.0, 2.0, -4.0, 5.0];
        let mut mask = Mask::new(1, 4);
        mask.pruned_mut()[..2].fill(true);
        let one = Rules { max_cycles: 1, ..rules(Stop::Threshold) };
        let run = |power: f64| {
            let mut mask = mask.clone();
            let seen = seen(&[1.0; 4], &[9.0, 1.0, 1.0, 1.0], power);
            refine(&w, &mut mask, &seen, &one, |w, _| w.abs());
            mask.pruned().to_vec()
        };
        assert_eq!(run(1.0), [true, false, true, false]);
        assert_eq!(run(0.0), [false, true, true, false]);
        // An input that never varied counts as the one that varied least.
        let still = seen(&[1.0; 4], &[9.0, 0.0, 4.0, 0.0], 1.0);
        assert_eq!((still.constant, still.spread), (2, vec![9.0, 4.0, 4.0, 4.0]));
        assert!(Seen::of(vec![0.0; 2], &[1.0; 2], vec![1.0; 2], 1.0).centred());
    }

    #[test]
    fn counts_stay_and_errors_do_not_rise() {
        let cols = 96;
        let w = weights(40, cols, 7);
        let means: Vec<f64> = weights(1, cols, 8).iter().map(|m| f64::from(*m) * 10.0).collect();
        let variance: Vec<f64> = (0..cols).map(|j| 0.1 + (j * 13 % 17) as f64).collect();
        let seen = seen(&means, &variance, 1.0);
        for start in [
            wanda::mask(&w, &seen.norms, Amount::Share(0.7)),
            magnitude::mask(&w, cols, Amount::Share(0.6)),
        ] {
            let mut mask = start.clone();
            let changes = refine(&w, &mut mask, &seen, &rules(Stop::NoIncrease), |w, _| w.abs());
            assert_eq!(mask.row_counts(), start.row_counts());
            let (before, after) = (errors(&w, &start, &seen), errors(&w, &mask, &seen));
            for ((change, before), after) in changes.iter().zip(before).zip(after) {
                assert!((change.before - before).abs() < 1e-9);
                assert!((change.after - after).abs() < 1e-4, "{change:?} {after}");
                assert!(change.after.abs() <= change.before.abs());
            }
            let sum = |v: &dyn Fn(&Change) -> f64| changes.iter().map(v).sum::<f64>();
            assert!(sum(&|c| c.after.abs()) < 0.3 * sum(&|c| c.before.abs()));
            // Rows do not see each other.
            let mut turned: Vec<f32> = w.chunks(cols).rev().flatten().copied().collect();
            let mut other = Mask::new(40, cols);
            let reversed = start.pruned().chunks(cols).rev().flatten();
            other.pruned_mut().iter_mut().zip(reversed).for_each(|(o, p)| *o = *p);
            refine(&turned, &mut other, &seen, &rules(Stop::NoIncrease), |w, _| w.abs());
            let back: Vec<bool> = other.pruned().chunks(cols).rev().flatten().copied().collect();
            assert_eq!(back, mask.pruned());
            // What stays is what it was, bit for bit.
            other.apply(&mut turned);
            let mut kept = w.clone();
            mask.apply(&mut kept);
            assert!(kept.iter().zip(&w).all(|(k, w)| *k == 0.0 || k.to_bits() == w.to_bits()));
        }
    }

    #[test]
    fn groups_stay_legal_and_the_sign_holds() {
        let cols = 64;
        let w = weights(32, cols, 9);
        let means: Vec<f64> = weights(1, cols, 10).iter().map(|m| f64::from(*m) * 20.0).collect();
        let seen = seen(&means, &vec![1.0; cols], 1.0);
        let start = wanda::mask(&w, &seen.norms, Amount::NOfM { n: 2, m: 4 });
        for stop in [Stop::NoIncrease, Stop::Threshold, Stop::Sign] {
            let mut mask = start.clone();
            let rules = Rules { group: Some(4), ..rules(stop) };
            let changes = refine(&w, &mut mask, &seen, &rules, |w, _| w.abs());
            assert!(mask.is_n_of_m((2, 4)));
            assert!(changes.iter().any(|c| c.swaps > 0));
            let after = errors(&w, &mask, &seen);
            for (change, after) in changes.iter().zip(after) {
                assert!(change.after * change.before >= 0.0, "{change:?}");
                assert!((change.after - after).abs() < 1e-4);
                if stop == Stop::NoIncrease {
                    assert!(change.after.abs() <= change.before.abs());
                }
            }
        }
        // By hand: the pruned 1 comes back, and of its group the kept weight with the lowest score goes,
        // whatever the sign of what it gives.
        let w = [1.0, 3.0, 2.0, 0.5, 9.0, 9.0, 9.0, 9.0];
        let mut mask = Mask::new(1, 8);
        for j in [0, 3, 4, 5] {
            mask.pruned_mut()[j] = true;
        }
        let means = [8.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        let seen = self::seen(&means, &[1.0; 8], 1.0);
        let rules = Rules { group: Some(4), max_cycles: 1, ..rules(Stop::NoIncrease) };
        let change = refine(&w, &mut mask, &seen, &rules, |w, _| w.abs())[0];
        assert_eq!(mask.pruned(), [false, false, true, true, true, true, false, false]);
        assert_eq!((change.before, change.after), (8.5, 2.5));
    }

    #[test]
    fn three_rows_by_hand() {
        // All means 1, so a weight gives itself. Row 0 has pruned 1, 2 and 0.5: the error is 3.5. Of these 1
        // comes back first (1/1 against 2/4 and 0.5/1), of what is kept and negative -3 goes: 3.5 - 1 - 3 =
        // -0.5, and nothing negative was pruned. Row 1 is its negative. In row 2 nothing kept is negative.
        let w = [
            [1.0, 2.0, -3.0, 4.0, 0.5, -5.0],
            [-1.0, -2.0, 3.0, -4.0, -0.5, 5.0],
            [1.0, -1.0, 2.0, 3.0, 4.0, 5.0],
        ]
        .concat();
        let start = [[0, 1, 4], [0, 1, 4], [0, 1, 2]];
        let mut mask = Mask::new(3, 6);
        for (row, columns) in mask.pruned_mut().chunks_mut(6).zip(start) {
            columns.into_iter().for_each(|j| row[j] = true);
        }
        let seen = seen(&[1.0; 6], &[1.0, 4.0, 1.0, 1.0, 1.0, 1.0], 1.0);
        let changes = refine(&w, &mut mask, &seen, &rules(Stop::NoIncrease), |w, _| w.abs());
        let change = |swaps, before, after| Change { swaps, before, after };
        assert_eq!(changes, [change(1, 3.5, -0.5), change(1, -3.5, 0.5), change(0, 2.0, 2.0)]);
        for (row, want) in mask.pruned().chunks(6).zip([[1, 2, 4], [1, 2, 4], [0, 1, 2]]) {
            let got: Vec<usize> = (0..6).filter(|j| row[*j]).collect();
            assert_eq!(got, want);
        }
    }

    /// The exchange written down once more, without lists: in every cycle the whole row is looked at.
    fn plainly(
        w: &[f32],
        start: &[bool],
        [means, variance, norms]: [&[f64]; 3],
        power: f64,
        rules: &Rules,
    ) -> (Vec<bool>, f64) {
        let d = |j: usize| f64::from(w[j]) * means[j];
        let mut kept: Vec<bool> = start.iter().map(|p| !p).collect();
        let error = |kept: &[bool]| -> f64 { (0..w.len()).filter(|j| !kept[*j]).map(d).sum() };
        let first = error(&kept);
        let wanda = |j: usize| f64::from(w[j].abs()) * norms[j];
        let least = |found: Vec<usize>, of: &dyn Fn(usize) -> f64| {
            found.into_iter().fold(None, |best: Option<usize>, j| match best {
                Some(b) if of(b) <= of(j) => Some(b),
                _ => Some(j),
            })
        };
        let mut passed = vec![false; w.len()];
        for _ in 0..rules.max_cycles {
            let now = error(&kept);
            if now.abs() <= rules.threshold {
                break;
            }
            let untouched = |j: &usize| kept[*j] != start[*j];
            // Towards zero: what comes back has the error's sign.
            let back = (0..w.len()).filter(|j| start[*j] && !passed[*j] && d(*j) * now > 0.0);
            let back = back.filter(untouched);
            let Some(back) = least(back.collect(), &|j| -d(j).abs() / variance[j].powf(power))
            else {
                break;
            };
            let out = (0..w.len()).filter(|j| !start[*j]).filter(untouched);
            let out: Vec<usize> = match rules.group {
                None => out.filter(|j| d(*j) * now < 0.0).collect(),
                Some(m) => out.filter(|j| j / m == back / m).collect(),
            };
            let Some(out) = least(out, &wanda) else {
                match rules.group {
                    None => break,
                    Some(_) => passed[back] = true,
                }
                continue;
            };
            let next = now - d(back) + d(out);
            let holds = rules.stop == Stop::Sign || rules.group.is_some();
            if holds && next * first < 0.0
                || rules.stop == Stop::NoIncrease && next.abs() >= now.abs()
            {
                break;
            }
            (kept[back], kept[out]) = (true, false);
        }
        (kept.iter().map(|k| !k).collect(), error(&kept))
    }

    #[test]
    fn the_plain_loop_makes_the_same_masks() {
        // Quarters, whole means and powers of two: every sum is exact, and ties are many.
        let cols = 48;
        let quarters = |v: &f32| (v * 4.0).round() / 4.0;
        let (mut swaps, mut most) = (0, 0);
        for seed in 0..6 {
            let w: Vec<f32> = weights(20, cols, 100 + seed).iter().map(quarters).collect();
            let means: Vec<f64> =
                weights(1, cols, 200 + seed).iter().map(|m| f64::from((m * 3.0).round())).collect();
            let variance: Vec<f64> = (0..cols).map(|j| 2f64.powi((j * 7 % 5) as i32 - 2)).collect();
            let norms: Vec<f32> = (0..cols).map(|j| 2f32.powi((j * 5 % 3) as i32)).collect();
            let wide: Vec<f64> = norms.iter().map(|n| f64::from(*n)).collect();
            for power in [0.0, 1.0, 2.0] {
                let seen = Seen::of(means.clone(), &variance, norms.clone(), power);
                for stop in [Stop::NoIncrease, Stop::Threshold, Stop::Sign] {
                    for amount in [
                        Amount::Share(0.7),
                        Amount::NOfM { n: 2, m: 4 },
                        Amount::NOfM { n: 3, m: 4 },
                    ] {
                        let group = match amount {
                            Amount::Share(_) => None,
                            Amount::NOfM { m, .. } => Some(m),
                        };
                        let start = wanda::mask(&w, &norms, amount);
                        let rules = Rules { max_cycles: 9, threshold: 0.5, stop, group };
                        let mut mask = start.clone();
                        let score = |w: f32, j: usize| w.abs() * norms[j];
                        let changes = refine(&w, &mut mask, &seen, &rules, score);
                        swaps += changes.iter().map(|c| c.swaps).sum::<usize>();
                        most = changes.iter().map(|c| c.swaps).fold(most, usize::max);
                        let rows = w.chunks(cols).zip(start.pruned().chunks(cols));
                        for (r, (w, start)) in rows.enumerate() {
                            let (want, error) =
                                plainly(w, start, [&means, &variance, &wide], power, &rules);
                            let got = &mask.pruned()[r * cols..][..cols];
                            assert_eq!(got, want, "row {r}, {rules:?}, power {power}");
                            assert_eq!(changes[r].after, error);
                        }
                    }
                }
            }
        }
        assert!(swaps > 1000 && most > 4, "{swaps} {most}");
    }

    #[test]
    fn sums_are_of_one_sequence_however_much_was_seen() {
        let mut once = Inputs::new(2, false);
        once.add(&[1.0, -4.0, 3.0, 2.0]);
        let mut twice = once.clone();
        twice.add(&[1.0, -4.0, 3.0, 2.0]);
        let (once, twice) = (Seen::new(&once, 1.0), Seen::new(&twice, 1.0));
        assert_eq!(once.sums, [2.0 * 2048.0, -2048.0]);
        assert_eq!(once.spread, [1.0, 9.0]);
        assert_eq!((&once.sums, &once.spread), (&twice.sums, &twice.spread));
    }

    #[test]
    fn what_goes_is_chosen_by_norms_whatever_the_start_and_the_variance() {
        // 3 was pruned and comes back. Of what is kept and negative -4 has the norm 1 and -2 the norm 3.
        let w = [3.0, -4.0, -2.0, 5.0];
        let one = Rules { max_cycles: 1, ..rules(Stop::Threshold) };
        for variance in [[1.0, 100.0, 0.01, 1.0], [1.0, 0.01, 100.0, 1.0]] {
            let mut mask = Mask::new(1, 4);
            mask.pruned_mut()[0] = true;
            let seen = Seen::of(vec![1.0; 4], &variance, vec![1.0, 1.0, 3.0, 1.0], 1.0);
            refine(&w, &mut mask, &seen, &one, |w, _| w.abs());
            assert_eq!(mask.pruned(), [false, true, false, false]);
        }
    }
}
