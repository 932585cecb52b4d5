//! A weight and a low-rank correction, `W = base + L R`: what error correction leaves of a quantised weight.
//!
//! The correction is kept apart: rounded into the base it would be lost. A product is that of the base and
//! [`Factored::add_product`].

use super::*;

/// Suffixes of the correction's parts, beside those of the base.
const SUFFIXES: [&str; 2] = ["correction_left", "correction_right"];

/// A base in any layout but this, and what is added to it.
#[derive(Debug, Clone)]
pub struct Sum {
    base: Box<Weight>,
    correction: Factored,
}

impl Sum {
    /// # Errors
    /// `MALFORMED_FILE` if the shapes differ or the base is a sum itself: add the corrections up instead.
    pub fn new(base: Weight, correction: Factored) -> Result<Self> {
        if matches!(base, Weight::Sum(_)) {
            return Err(malformed("a sum of sums; add the corrections up instead"));
        }
        if base.shape() != correction.shape() {
            return Err(malformed(format!(
                "a correction of shape {:?} does not fit a weight of shape {:?}",
                correction.shape(),
                base.shape()
            )));
        }
        Ok(Self { base: Box::new(base), correction })
    }

    pub fn base(&self) -> &Weight {
        &self.base
    }

    pub fn correction(&self) -> &Factored {
        &self.correction
    }

    pub fn shape(&self) -> &[usize] {
        self.base.shape()
    }

    pub fn bytes(&self) -> u64 {
        self.base.bytes() + self.correction.bytes()
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        self.base.read_rows(first, out);
        self.correction.add_rows(first, out);
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        self.base.multiply(x, y);
        self.correction.add_product(x, y, &mut Vec::new());
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        let mut added = vec![0.0; dx.len()];
        self.base.multiply_transposed(g, dx);
        self.correction.multiply_transposed(g, &mut added);
        dx.iter_mut().zip(added).for_each(|(dx, added)| *dx += added);
    }

    /// The parts of the base, then those of the correction.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = self.base.parts();
        parts.extend(self.correction.parts_as(SUFFIXES));
        parts
    }

    pub fn record(&self) -> Record {
        Record::Sum { base: Box::new(self.base.record()), rank: self.correction.rank() }
    }

    pub fn from_parts(
        base: &Record,
        rank: usize,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        // Before the base is read, so that records within records end here.
        if matches!(base, Record::Sum { .. }) {
            return Err(malformed("a sum of sums; add the corrections up instead"));
        }
        let &[rows, cols] = base.shape() else {
            return Err(malformed(format!(
                "a correction belongs to a matrix, not to a tensor of shape {:?}",
                base.shape()
            )));
        };
        let correction = Factored::from_parts_as(SUFFIXES, [rows, cols], rank, parts)?;
        Self::new(Weight::from_parts(base, std::mem::take(parts))?, correction)
    }
}
