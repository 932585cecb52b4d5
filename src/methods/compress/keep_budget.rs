//! How many weights each group keeps: a floor for all, the rest by score, the total exact.

/// Weights that each group keeps, of groups of `counts` weights of which `share` goes in all and at most
/// `most` of any one; `share <= most < 1`. The sum is exactly `floor((1 - share) sum(counts))`. Scores are not
/// negative; only their proportions count.
pub fn keep(counts: &[u64], scores: &[f64], share: f64, most: f64) -> Vec<u64> {
    let all: u64 = counts.iter().sum();
    // A share that is written as a decimal must not lose a weight to its rounding.
    let budget = ((1.0 - share) * all as f64 + 1e-6).floor() as u64;
    let floor_of = |n: u64| ((1.0 - most) * n as f64 - 1e-6).ceil().max(0.0) as u64;
    let mut floors: Vec<u64> = counts.iter().map(|n| floor_of(*n)).collect();
    // Rounded up they may be more than there is, by less than one a group.
    let mut over = floors.iter().sum::<u64>().saturating_sub(budget);
    for floor in floors.iter_mut().rev() {
        let less = over.min(1).min(*floor);
        (*floor, over) = (*floor - less, over - less);
    }
    let mut keep = floors.clone();
    let mut scores: Vec<f64> =
        scores.iter().map(|s| if s.is_finite() { s.max(0.0) } else { 0.0 }).collect();
    loop {
        let left = budget.saturating_sub(keep.iter().sum());
        if left == 0 {
            break;
        }
        let open = |keep: &[u64]| (0..counts.len()).filter(|g| keep[*g] < counts[*g]).count();
        let total: f64 = scores.iter().sum();
        if total <= 0.0 {
            // Whoever has room is as good as another.
            let room = open(&keep);
            if room == 0 {
                break;
            }
            scores.iter_mut().zip(&keep).zip(counts).for_each(|((score, keep), n)| {
                *score = if keep < n { 1.0 } else { 0.0 };
            });
            continue;
        }
        for g in 0..counts.len() {
            // Rounding up must not add one to what is whole but for rounding.
            let part = (scores[g] / total * left as f64 - 1e-9).ceil().max(0.0) as u64;
            keep[g] = keep[g].saturating_add(part);
            if keep[g] >= counts[g] {
                (keep[g], scores[g]) = (counts[g], 0.0);
            }
        }
    }
    // Parts were rounded up: back from the fullest, of those that are full only where no other has any.
    let mut over = keep.iter().sum::<u64>().saturating_sub(budget);
    while over > 0 {
        let full = |g: usize| keep[g] as f64 / counts[g].max(1) as f64;
        let able = || (0..counts.len()).filter(|g| keep[*g] > floors[*g]);
        let order = |a: &usize, b: &usize| full(*a).total_cmp(&full(*b)).then(b.cmp(a));
        let some_left = able().filter(|g| keep[*g] < counts[*g]).max_by(order);
        let Some(fullest) = some_left.or_else(|| able().max_by(order)) else { break };
        keep[fullest] -= 1;
        over -= 1;
    }
    keep
}

/// Spearman's correlation of two lists of equally many numbers; 0 where one has no spread.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum()
    };
    let whole = (product(&a, &a) * product(&b, &b)).sqrt();
    if whole > 0.0 { product(&a, &b) / whole } else { 0.0 }
}

/// The rank of each number from 0, the mean rank for equal ones.
fn ranks(values: &[f64]) -> Vec<f64> {
    let rank = |value: &f64| {
        let below = values.iter().filter(|v| *v < value).count() as f64;
        let equal = values.iter().filter(|v| *v == value).count() as f64;
        below + (equal - 1.0) / 2.0
    };
    values.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(counts: &[u64], scores: &[f64], share: f64, most: f64) -> Vec<u64> {
        let found = keep(counts, scores, share, most);
        let budget = ((1.0 - share) * counts.iter().sum::<u64>() as f64 + 1e-6).floor() as u64;
        assert_eq!(found.iter().sum::<u64>(), budget, "{found:?}");
        for (keep, n) in found.iter().zip(counts) {
            assert!(keep <= n);
            let zeros = 1.0 - *keep as f64 / *n as f64;
            assert!(zeros <= most + 1.0 / *n as f64, "{zeros} of {n}");
        }
        found
    }

    #[test]
    fn equal_scores_give_equal_shares() {
        assert_eq!(check(&[100; 4], &[2.0; 4], 0.6, 0.7), [40; 4]);
        let found = check(&[101, 101, 101], &[1.0; 3], 0.5, 0.6);
        assert!(found.iter().all(|k| k.abs_diff(50) <= 1), "{found:?}");
        // No score at all is the same.
        assert_eq!(check(&[100; 4], &[0.0; 4], 0.6, 0.7), [40; 4]);
        // The scale of the scores is nothing, a constant is something.
        let scores = [1.0, 2.0, 3.0];
        let thousand = scores.map(|s| s * 1000.0);
        let one = check(&[1000; 3], &scores, 0.6, 0.9);
        assert_eq!(one, check(&[1000; 3], &thousand, 0.6, 0.9));
        assert_ne!(one, check(&[1000; 3], &scores.map(|s| s + 10.0), 0.6, 0.9));
        // Floors 100 each, and 900 by sixths.
        assert_eq!(one, [250, 400, 550]);
    }

    #[test]
    fn a_giant_saturates_and_the_rest_goes_on() {
        // Floors 30 each of 100; 160 kept in all; the giant takes up to its size, the others share.
        assert_eq!(check(&[100; 4], &[1e9, 1.0, 1.0, 1.0], 0.6, 0.9), [100, 20, 20, 20]);
        assert_eq!(check(&[100; 4], &[1e9, 0.0, 0.0, 0.0], 0.5, 0.9), [100, 33, 33, 34]);
        assert_eq!(check(&[10, 1000], &[5.0, 1.0], 0.5, 0.6)[0], 10);
    }

    #[test]
    fn floors_and_caps_hold_for_all_sorts_of_groups() {
        let scores = [0.3, 7.0, 0.0, 1e-9, 2.0];
        for share in [0.05, 0.3, 0.5, 0.61, 0.8, 0.95] {
            for room in [0.0, 0.03, 0.049] {
                check(&[7, 130, 64, 9999, 512], &scores, share, share + room);
            }
        }
        check(&[3, 3, 3], &scores[..3], 0.5, 0.5);
        check(&[100], &[f64::NAN], 0.5, 0.6);
    }

    #[test]
    fn ranks_correlate() {
        assert_eq!(rank_correlation(&[1.0, 2.0, 30.0], &[0.1, 0.5, 0.6]), 1.0);
        assert_eq!(rank_correlation(&[1.0, 2.0, 30.0], &[3.0, 2.0, 1.0]), -1.0);
        assert_eq!(rank_correlation(&[1.0, 1.0], &[3.0, 2.0]), 0.0);
        // By hand: ranks 0 1 2 3 and 1 0 2 3 differ by 1 twice: 1 - 6 * 2 / (4 * 15).
        let found = rank_correlation(&[1.0, 2.0, 3.0, 4.0], &[2.0, 1.0, 3.0, 4.0]);
        assert!((found - 0.8).abs() < 1e-12);
    }
}
