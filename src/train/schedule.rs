//! The learning rate of each update.
//!
//! With `T` updates, `W` of them warm-up, peak `p` and floor `f` (a share of the peak), update `t` (from 0)
//! has the rate
//!
//! - in warm-up, `t < W`: `p (t + 1) / W`, so that the first update moves something and update `W - 1` has
//!   the peak;
//! - afterwards, with `q = (t - W) / (T - W)`: constant `p`; linear `p (1 - (1 - f) q)`; cosine
//!   `p (f + (1 - f) (1 + cos(pi q)) / 2)`. The floor would be reached by update `T`, which is not made: the
//!   last update is not wasted on a rate of zero.
//! - one-cycle: half a cosine from `p / 25` at update 0 up to `p` at update `W - 1`, and half a cosine down
//!   to `f p` at update `T - 1`.

use std::f64::consts::PI;

/// One-cycle begins at the peak divided by this.
const ONE_CYCLE_START: f64 = 25.0;

/// What the rate does after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Constant,
    Linear,
    Cosine,
    OneCycle,
}

/// Learning rates of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    pub peak: f64,
    /// Rate at the end, as a share of the peak.
    pub floor: f64,
    /// Updates of warm-up.
    pub warmup: u64,
    /// Updates in all.
    pub total: u64,
}

impl Schedule {
    /// The rate of update `t`, from 0.
    pub fn rate(&self, t: u64) -> f64 {
        let share = match self.shape {
            Shape::OneCycle => self.one_cycle(t),
            _ if t < self.warmup => (t as f64 + 1.0) / self.warmup as f64,
            shape => {
                let span = self.total.saturating_sub(self.warmup).max(1);
                let q = ((t - self.warmup) as f64 / span as f64).min(1.0);
                match shape {
                    Shape::Linear => 1.0 - (1.0 - self.floor) * q,
                    Shape::Cosine => half_cosine(1.0, self.floor, q),
                    _ => 1.0,
                }
            }
        };
        self.peak * share
    }

    fn one_cycle(&self, t: u64) -> f64 {
        let (top, last) = (self.warmup.saturating_sub(1), self.total.saturating_sub(1));
        if t < top {
            half_cosine(ONE_CYCLE_START.recip(), 1.0, t as f64 / top as f64)
        } else if t >= last {
            if last > top { self.floor } else { 1.0 }
        } else {
            half_cosine(1.0, self.floor, (t - top) as f64 / (last - top) as f64)
        }
    }
}

/// From `from` at 0 to `to` at 1, level at both.
fn half_cosine(from: f64, to: f64, q: f64) -> f64 {
    to + (from - to) * (1.0 + (PI * q).cos()) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape, warmup: u64, total: u64, floor: f64) -> Schedule {
        Schedule { shape, peak: 2.0, floor, warmup, total }
    }

    fn rates(schedule: &Schedule, updates: &[u64]) -> Vec<f64> {
        updates.iter().map(|t| (schedule.rate(*t) * 1e9).round() / 1e9).collect()
    }

    #[test]
    fn warm_up_ends_at_the_peak_and_never_starts_at_zero() {
        for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
            let s = schedule(shape, 4, 12, 0.0);
            assert_eq!(rates(&s, &[0, 1, 2, 3, 4]), [0.5, 1.0, 1.5, 2.0, 2.0], "{shape:?}");
            assert_eq!(schedule(shape, 0, 12, 0.0).rate(0), 2.0, "{shape:?}");
            assert_eq!(schedule(shape, 1, 12, 0.0).rate(0), 2.0, "{shape:?}");
        }
    }

    #[test]
    fn linear_falls_evenly() {
        let s = schedule(Shape::Linear, 2, 10, 0.0);
        assert_eq!(rates(&s, &[2, 4, 6, 9, 10, 99]), [2.0, 1.5, 1.0, 0.25, 0.0, 0.0]);
        assert_eq!(rates(&schedule(Shape::Linear, 2, 10, 0.5), &[6, 10]), [1.5, 1.0]);
        assert_eq!(rates(&schedule(Shape::Constant, 2, 10, 0.0), &[2, 9]), [2.0, 2.0]);
    }

    #[test]
    fn cosine_is_half_way_in_the_middle() {
        let s = schedule(Shape::Cosine, 2, 10, 0.0);
        assert_eq!(rates(&s, &[2, 6, 10]), [2.0, 1.0, 0.0]);
        // (1 + cos(pi / 4)) / 2 = 0.853553...
        assert_eq!(rates(&s, &[4]), [1.707_106_781]);
        assert_eq!(rates(&schedule(Shape::Cosine, 2, 10, 0.1), &[6, 10]), [1.1, 0.2]);
    }

    #[test]
    fn one_cycle_rises_and_falls() {
        let s = schedule(Shape::OneCycle, 5, 13, 0.01);
        assert_eq!(rates(&s, &[0, 2, 4, 8, 12]), [0.08, 1.04, 2.0, 1.01, 0.02]);
        assert!((5..12).all(|t| s.rate(t) > s.rate(t + 1)));
        assert!((0..4).all(|t| s.rate(t) < s.rate(t + 1)));
    }

    #[test]
    fn the_shortest_runs_have_rates() {
        for shape in [Shape::Constant, Shape::Linear, Shape::Cosine, Shape::OneCycle] {
            for (warmup, total) in [(0, 1), (1, 1), (1, 2), (2, 2), (0, 2)] {
                let s = schedule(shape, warmup, total, 0.0);
                let rates: Vec<f64> = (0..total).map(|t| s.rate(t)).collect();
                assert!(rates.iter().all(|r| (0.0..=2.0).contains(r)), "{s:?}: {rates:?}");
                assert!(rates.iter().any(|r| *r > 0.0), "{s:?}: {rates:?}");
            }
        }
    }
}
