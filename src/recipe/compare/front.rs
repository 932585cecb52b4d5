//! The Pareto front: which results no other result beats in both directions.

use std::cmp::Ordering;

/// Indices of the points `(x, y)` that no other point beats, ordered by x, then by place in the
/// input.
///
/// A point is beaten by one that is no worse in both coordinates and better in one; equal points
/// therefore stand on the front together. Points with a coordinate that is not finite are never on
/// the front and beat nothing.
pub fn front(
    points: &[(f64, f64)],
    x_higher_is_better: bool,
    y_higher_is_better: bool,
) -> Vec<usize> {
    // From here on lower is better.
    let cost = |i: usize| {
        let (x, y) = points[i];
        (if x_higher_is_better { -x } else { x }, if y_higher_is_better { -y } else { y })
    };
    let mut order: Vec<usize> =
        (0..points.len()).filter(|&i| points[i].0.is_finite() && points[i].1.is_finite()).collect();
    order.sort_by(|&a, &b| compare(cost(a), cost(b)).then(a.cmp(&b)));

    let mut found: Vec<usize> = Vec::new();
    let mut best: Option<(f64, f64)> = None;
    for i in order {
        let point = cost(i);
        // Sorted by x, then y: whatever came before is no worse in x.
        if best.is_none_or(|best| point.1 < best.1 || point == best) {
            best = Some(point);
            found.push(i);
        }
    }
    if x_higher_is_better {
        found.sort_by(|&a, &b| compare(points[a], points[b]).then(a.cmp(&b)));
    }
    found
}

/// Order by x, then y, of finite points, for which -0 and 0 are the same.
fn compare(a: (f64, f64), b: (f64, f64)) -> Ordering {
    a.partial_cmp(&b).unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINTS: [(f64, f64); 6] =
        [(5.0, 1.0), (1.0, 9.0), (3.0, 3.0), (3.0, 4.0), (4.0, 3.0), (2.0, 9.0)];

    #[test]
    fn lower_is_better_in_both() {
        // (3, 4) loses to (3, 3) at equal x, (4, 3) and (2, 9) lose at equal y.
        assert_eq!(front(&POINTS, false, false), [1, 2, 0]);
    }

    #[test]
    fn higher_is_better_in_both() {
        assert_eq!(front(&POINTS, true, true), [5, 3, 4, 0]);
    }

    #[test]
    fn directions_can_differ() {
        // Small and accurate: the first has the lowest x and the highest y of all.
        assert_eq!(front(&POINTS, false, true), [1]);
        // High x and low y: (5, 1) beats every other.
        assert_eq!(front(&POINTS, true, false), [0]);
    }

    #[test]
    fn equal_points_stand_on_the_front_together() {
        let points = [(2.0, 2.0), (1.0, 3.0), (2.0, 2.0), (1.0, 3.0), (2.0, 2.5)];
        assert_eq!(front(&points, false, false), [1, 3, 0, 2]);
        assert_eq!(front(&[(-0.0, 1.0), (0.0, 1.0)], false, false), [0, 1]);
    }

    #[test]
    fn points_that_are_not_finite_are_left_out_and_beat_nothing() {
        let points = [
            (f64::NAN, 0.0),
            (1.0, 1.0),
            (f64::NEG_INFINITY, 0.0),
            (0.0, f64::NAN),
            (f64::INFINITY, f64::NEG_INFINITY),
        ];
        assert_eq!(front(&points, false, false), [1]);
        assert_eq!(front(&points, true, true), [1]);
        assert!(front(&[], false, false).is_empty());
    }

    #[test]
    fn nobody_on_the_front_is_beaten_and_everybody_else_is() {
        // A grid with many ties, against the definition.
        let points: Vec<(f64, f64)> =
            (0..60u32).map(|i| (f64::from(i * 7 % 11), f64::from(i * i * 5 % 13))).collect();
        for (up_x, up_y) in [(false, false), (false, true), (true, false), (true, true)] {
            let found = front(&points, up_x, up_y);
            assert!(found.is_sorted_by(|&a, &b| points[a].0 <= points[b].0));
            let sign = |up: bool, v: f64| if up { -v } else { v };
            for (i, &(x, y)) in points.iter().enumerate() {
                let beaten = points.iter().any(|&(ox, oy)| {
                    (ox, oy) != (x, y)
                        && sign(up_x, ox) <= sign(up_x, x)
                        && sign(up_y, oy) <= sign(up_y, y)
                });
                assert_eq!(found.contains(&i), !beaten, "point {i}: {x}, {y}");
            }
        }
    }
}
