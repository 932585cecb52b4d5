//! Rotary angles: frequencies by scaling kind, and tables of cosines and sines that grow on demand.

use std::f64::consts::PI;
use std::sync::{Arc, PoisonError, RwLock};

use super::config::{Rope, RopeScaling};

/// Cosines and sines of the positions from 0 on, `dim / 2` each a position.
#[derive(Debug)]
pub(super) struct Table {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    /// The angles of `position`.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    fn positions(&self) -> usize {
        self.cos.len() / self.half
    }
}

/// The tables of one rotary setting. Shared by all layers that use it.
#[derive(Debug)]
pub(super) struct Rotary {
    rope: Rope,
    dim: usize,
    table: RwLock<Arc<Table>>,
}

impl Rotary {
    /// Angles for heads of `dim` channels (even).
    pub fn new(rope: &Rope, dim: usize) -> Self {
        let table = Table { half: dim / 2, cos: Vec::new(), sin: Vec::new() };
        Self { rope: rope.clone(), dim, table: RwLock::new(Arc::new(table)) }
    }

    /// A table of at least `positions` positions.
    pub fn upto(&self, positions: usize) -> Arc<Table> {
        {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            if table.positions() >= positions {
                return Arc::clone(&table);
            }
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.positions() < positions {
            // Doubling keeps the work of a growing sequence linear.
            let wanted = positions.max(2 * table.positions()).max(256);
            *table = Arc::new(self.extend(&table, wanted));
        }
        Arc::clone(&table)
    }

    fn extend(&self, old: &Table, positions: usize) -> Table {
        let half = old.half;
        let (mut cos, mut sin) = (old.cos.clone(), old.sin.clone());
        cos.reserve_exact(positions * half - cos.len());
        sin.reserve_exact(positions * half - sin.len());
        let fixed = frequencies(&self.rope, self.dim);
        let amplitude = amplitude(&self.rope.scaling);
        for position in old.positions()..positions {
            let stretched = match self.rope.scaling {
                RopeScaling::Dynamic { factor, original } if position >= original => {
                    Some(dynamic(&self.rope, self.dim, f64::from(factor), original, position + 1))
                }
                _ => None,
            };
            for frequency in stretched.as_ref().unwrap_or(&fixed) {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * amplitude) as f32);
                sin.push((s * amplitude) as f32);
            }
        }
        Table { half, cos, sin }
    }
}

/// Angle by which channel pair `i` turns from one position to the next.
fn frequencies(rope: &Rope, dim: usize) -> Vec<f64> {
    let plain = geometric(f64::from(rope.theta), dim);
    match rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => plain,
        RopeScaling::Linear { factor } => plain.iter().map(|f| f / f64::from(factor)).collect(),
        RopeScaling::Llama3 { factor, low, high, original } => plain
            .iter()
            .map(|f| {
                let (low, high) = (f64::from(low), f64::from(high));
                // Turns over the original context: slow pairs are stretched, fast ones kept.
                let turns = original as f64 * f / (2.0 * PI);
                let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                f * (keep + (1.0 - keep) / f64::from(factor))
            })
            .collect(),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, .. } => {
            // The (fractional) pair that makes so many turns over the original context.
            let pair = |turns: f32| {
                let span = original as f64 / (f64::from(turns) * 2.0 * PI);
                dim as f64 * span.ln() / (2.0 * f64::from(rope.theta).ln())
            };
            let last = (dim - 1) as f64;
            let low = pair(beta_fast).floor().clamp(0.0, last);
            let high = pair(beta_slow).ceil().clamp(0.0, last);
            let width = if high > low { high - low } else { 0.001 };
            plain
                .iter()
                .enumerate()
                .map(|(i, f)| {
                    let stretch = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    f * (1.0 - stretch + stretch / f64::from(factor))
                })
                .collect()
        }
    }
}

fn geometric(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// Frequencies of a sequence of `length > original` positions under NTK scaling.
fn dynamic(rope: &Rope, dim: usize, factor: f64, original: usize, length: usize) -> Vec<f64> {
    let stretch = factor * length as f64 / original as f64 - (factor - 1.0);
    let exponent = dim as f64 / (dim as f64 - 2.0).max(1.0);
    geometric(f64::from(rope.theta) * stretch.powf(exponent), dim)
}

/// Factor on queries and keys (YaRN sharpens attention over long contexts).
fn amplitude(scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Yarn { attention_factor: Some(given), .. } => f64::from(given),
        RopeScaling::Yarn { factor, .. } => 0.1 * f64::from(factor).ln() + 1.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9 * (1.0 + b.abs()), "{a} is not {b}");
    }

    #[test]
    fn kinds_of_scaling() {
        let of = |scaling| frequencies(&Rope { theta: 10_000.0, scaling }, 4);
        // Two pairs: 1 and 10000^(-1/2).
        close(of(RopeScaling::None)[1], 0.01);
        close(of(RopeScaling::Linear { factor: 4.0 })[0], 0.25);
        // Over 100 positions the pairs make 15.9 and 0.159 turns: the first is kept, the second is
        // below low and divided.
        let llama = of(RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 100 });
        close(llama[0], 1.0);
        close(llama[1], 0.01 / 8.0);
        // Over 1600 positions the second pair makes 2.546 turns, between the bounds.
        let middle = of(RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 1600 });
        let keep = (16.0 / (2.0 * PI) - 1.0) / 3.0;
        close(middle[1], 0.01 * (keep + (1.0 - keep) / 8.0));
        // 32 turns fall below pair 0, one turn at pair 2 ln(1000 / 2 pi) / ln 10000 = 1.1: the ramp
        // runs from 0 to 2.
        let yarn = of(RopeScaling::Yarn {
            factor: 4.0,
            original: 1000,
            beta_fast: 320.0,
            beta_slow: 1.0,
            attention_factor: None,
        });
        close(yarn[0], 1.0);
        close(yarn[1], 0.01 * (0.5 + 0.5 / 4.0));
    }

    #[test]
    fn tables_grow_without_changing() {
        let scaling = RopeScaling::Dynamic { factor: 2.0, original: 300 };
        let rotary = Rotary::new(&Rope { theta: 100.0, scaling }, 4);
        let early = rotary.upto(10);
        let late = rotary.upto(700);
        assert_eq!(early.at(9), late.at(9));
        close(f64::from(late.at(9).0[1]), (9.0_f64 * 0.1).cos().into_f32());
        // Position 599 is in a sequence of 600: stretch 2 * 2 - 1 = 3, theta 100 * 3^2.
        let want = (599.0_f64 * 900.0_f64.powf(-0.5)).sin();
        assert!((f64::from(late.at(599).1[1]) - want).abs() < 1e-6);
    }

    trait IntoF32 {
        fn into_f32(self) -> f64;
    }
    impl IntoF32 for f64 {
        fn into_f32(self) -> f64 {
            f64::from(self as f32)
        }
    }
}
