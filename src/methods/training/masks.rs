//! Which elements of matrices are masked: exact counts, ties by index.

use crate::error::{Error, Result};
use crate::methods::compress::mask::mark_smallest;

/// Elements that go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    Unstructured,
    /// Blocks of so many rows and columns.
    Block {
        rows: usize,
        cols: usize,
    },
    /// At the end `n` zeros in each `m` consecutive elements of a row.
    Groups {
        n: usize,
        m: usize,
    },
}

/// How blocks are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    Average,
    Max,
}

impl Pattern {
    /// From its name in options.
    ///
    /// # Errors
    /// `INVALID_OPTION`.
    pub fn parse(name: &str) -> Result<Self> {
        let bad = || {
            Error::option(
                "pattern",
                format!(
                    "'{name:.40}' is none of 'unstructured', 'block RxC' with sides of 1 to 256, and n:m with \
                     0 < n < m <= 32 (n zeros in each m consecutive inputs)"
                ),
            )
        };
        if name.is_empty() || name == "unstructured" {
            return Ok(Self::Unstructured);
        }
        let pair = |text: &str, by: char| -> Option<(usize, usize)> {
            let (a, b) = text.split_once(by)?;
            Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
        };
        if let Some(sides) = name.strip_prefix("block") {
            return match pair(sides, 'x') {
                Some((rows @ 1..=256, cols @ 1..=256)) => Ok(Self::Block { rows, cols }),
                _ => Err(bad()),
            };
        }
        match pair(name, ':') {
            Some((n, m)) if 0 < n && n < m && m <= 32 => Ok(Self::Groups { n, m }),
            _ => Err(bad()),
        }
    }

    /// Refuses a matrix that is not made of whole blocks or groups.
    ///
    /// # Errors
    /// `INVALID_OPTION`.
    pub fn check(self, name: &str, [rows, cols]: [usize; 2]) -> Result<()> {
        let fits = match self {
            Self::Unstructured => true,
            Self::Block { rows: r, cols: c } => rows.is_multiple_of(r) && cols.is_multiple_of(c),
            Self::Groups { m, .. } => cols.is_multiple_of(m),
        };
        if fits {
            return Ok(());
        }
        let what = match self {
            Self::Block { rows, cols } => format!("blocks of {rows}x{cols}"),
            Self::Groups { m, .. } => format!("groups of {m} inputs"),
            Self::Unstructured => String::new(),
        };
        let problem = format!(
            "'{name}' [{rows}, {cols}] is not made of whole {what}; choose another pattern, or leave it out \
             of the scope"
        );
        Err(Error::option("pattern", problem))
    }

    /// Elements of a unit.
    pub fn unit(self) -> usize {
        match self {
            Self::Block { rows, cols } => rows * cols,
            _ => 1,
        }
    }

    /// Units that are masked of `units` at this share of zeros; at least one stays.
    pub fn masked(units: usize, share: f64) -> usize {
        units - ((units as f64 * (1.0 - share)).round() as usize).clamp(1.min(units), units)
    }

    /// A score for each unit of a matrix with `cols` columns, from scores of elements.
    pub fn scores(self, scores: &[f32], cols: usize, pool: Pool) -> Vec<f32> {
        let Self::Block { rows: r, cols: c } = self else { return scores.to_vec() };
        let across = cols / c;
        let mut out = vec![0.0f32; scores.len() / (r * c)];
        for (i, row) in scores.chunks_exact(cols).enumerate() {
            let out = &mut out[i / r * across..][..across];
            for (out, block) in out.iter_mut().zip(row.chunks_exact(c)) {
                match pool {
                    Pool::Average => *out += block.iter().sum::<f32>(),
                    Pool::Max => *out = block.iter().copied().fold(*out, f32::max),
                }
            }
        }
        out
    }

    /// What masked units are in elements.
    pub fn spread(self, units: &[bool], cols: usize) -> Vec<bool> {
        let Self::Block { rows: r, cols: c } = self else { return units.to_vec() };
        let across = cols / c;
        let rows = units.len() / across * r;
        (0..rows * cols).map(|i| units[i / cols / r * across + i % cols / c]).collect()
    }

    /// Masks units by their scores: the share of them as a whole, or of each group.
    pub fn mask(self, scores: &[f32], share: f64) -> Vec<bool> {
        let mut masked = vec![false; scores.len()];
        match self {
            Self::Groups { m, .. } => {
                let zeros = (share * m as f64).round() as usize;
                for (scores, masked) in scores.chunks_exact(m).zip(masked.chunks_exact_mut(m)) {
                    mark_smallest(scores.iter().copied(), zeros, masked);
                }
            }
            _ => {
                let count = Self::masked(scores.len(), share);
                mark_smallest(scores.iter().copied(), count, &mut masked);
            }
        }
        masked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        let read = |name| Pattern::parse(name).unwrap();
        assert_eq!(read(""), Pattern::Unstructured);
        assert_eq!(read("unstructured"), Pattern::Unstructured);
        assert_eq!(read("block 4x1"), Pattern::Block { rows: 4, cols: 1 });
        assert_eq!(read("block2x3"), Pattern::Block { rows: 2, cols: 3 });
        assert_eq!(read("2:4"), Pattern::Groups { n: 2, m: 4 });
        for bad in ["block", "block 0x4", "block 4", "4x4", "0:4", "4:4", "1:33", "half", ":", "x"]
        {
            let error = Pattern::parse(bad).unwrap_err();
            assert_eq!(error.violations()[0].field, "pattern", "{bad}");
        }
        assert!(read("2:4").check("w", [3, 6]).is_err());
        assert!(read("block 2x3").check("w", [3, 6]).is_err());
        read("block 3x2").check("w", [3, 6]).unwrap();
    }

    #[test]
    fn counts_are_exact_and_ties_go_by_index() {
        // Kept: max(1, round(n (1 - s))).
        assert_eq!([0.0, 0.44, 0.5, 0.99].map(|s| Pattern::masked(9, s)), [0, 4, 4, 8]);
        assert_eq!(Pattern::masked(0, 0.5), 0);
        let masked = Pattern::Unstructured.mask(&[1.0, 1.0, 1.0, 0.5, 2.0], 0.6);
        assert_eq!(masked, [true, true, false, true, false]);
    }

    #[test]
    fn blocks_go_together() {
        let pattern = Pattern::Block { rows: 2, cols: 2 };
        let scores = [1.0, 1.0, 9.0, 0.0, 1.0, 1.0, 0.0, 0.0];
        assert_eq!(pattern.scores(&scores, 4, Pool::Average), [4.0, 9.0]);
        assert_eq!(pattern.scores(&scores, 4, Pool::Max), [1.0, 9.0]);
        let spread = pattern.spread(&[true, false], 4);
        assert_eq!(spread, [true, true, false, false, true, true, false, false]);
        let tall = Pattern::Block { rows: 1, cols: 2 }.spread(&[true, false, false, true], 4);
        assert_eq!(tall, [true, true, false, false, false, false, true, true]);
    }

    #[test]
    fn groups_hold_their_count() {
        let pattern = Pattern::Groups { n: 2, m: 4 };
        let scores = [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(
            pattern.mask(&scores, 0.25),
            [false, false, false, true, true, false, false, false]
        );
        let half = pattern.mask(&scores, 0.5);
        assert!(half.chunks(4).all(|group| group.iter().filter(|m| **m).count() == 2));
    }
}
