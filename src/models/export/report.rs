//! What an export made of each tensor, and how far that is from what was stored.

use crate::nn::weight::{Record, SparsePattern, ValueFormat, Weight};

/// Differences between stored and written values.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Drift {
    max: f32,
    squared: f64,
    norm: f64,
}

impl Drift {
    /// Counts one value.
    pub(super) fn add(&mut self, stored: f32, written: f32) {
        let difference = (stored - written).abs();
        self.max = self.max.max(difference);
        self.squared += f64::from(difference).powi(2);
        self.norm += f64::from(stored).powi(2);
    }

    /// Counts values side by side.
    pub(super) fn add_all(&mut self, stored: &[f32], written: &[f32]) {
        for (stored, written) in stored.iter().zip(written) {
            self.add(*stored, *written);
        }
    }

    /// The largest difference of a value.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// The norm of the differences as a share of the norm of the values.
    pub fn relative(&self) -> f64 {
        match self.squared {
            0.0 => 0.0,
            squared => (squared / self.norm).sqrt(),
        }
    }
}

/// What became of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorReport {
    /// Name in the model.
    pub name: String,
    /// Layout it has in the version.
    pub stored_as: String,
    /// Layout it has in the export.
    pub written_as: String,
    /// Bytes in the export.
    pub bytes: u64,
    /// Blocks, codes or sparse elements went over without being decoded.
    pub carried: bool,
    pub drift: Drift,
}

/// What became of a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// In the order in which they were written.
    pub tensors: Vec<TensorReport>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// A layout in a few words.
pub(super) fn describe(weight: &Weight) -> String {
    match weight {
        Weight::Dense(dense) => dense.dtype().to_string(),
        other => record(&other.record()),
    }
}

fn record(record: &Record) -> String {
    match record {
        Record::Dense { .. } => "dense".to_owned(),
        Record::Grouped { spec, .. } => {
            let kind = if spec.symmetric { ", symmetric" } else { "" };
            format!("{} bits in groups of {}{kind}", spec.bits, spec.group)
        }
        Record::DualGrained { group, .. } => format!("4 bits in groups of {group} in 8-bit rows"),
        Record::Ggml { r#type, .. } => format!("{type:?} blocks"),
        Record::Sparse { pattern, values, .. } => {
            let places = match pattern {
                SparsePattern::Bitmap => "a bitmap".to_owned(),
                SparsePattern::NOfM { keep, of } => format!("{keep} of {of}"),
            };
            match values {
                ValueFormat::F32 => format!("{places} of F32"),
                ValueFormat::F16 => format!("{places} of F16"),
                ValueFormat::BF16 => format!("{places} of BF16"),
                ValueFormat::Grouped(spec) => {
                    let kind = if spec.symmetric { ", symmetric" } else { "" };
                    format!("{places} of {} bits in groups of {}{kind}", spec.bits, spec.group)
                }
            }
        }
        Record::RowGroups { group, values, .. } => {
            format!("groups of {group} rows of {values:?}")
        }
        Record::Factored { rank, .. } => format!("a product of rank {rank}"),
        Record::Sum { base, rank } => {
            format!("{} and a correction of rank {rank}", self::record(base))
        }
        Record::Nf4 { .. } => "4-bit normal floats".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drifts_worked_out_by_hand() {
        let mut drift = Drift::default();
        assert_eq!((drift.max(), drift.relative()), (0.0, 0.0));
        drift.add_all(&[3.0, 0.0, -4.0], &[3.0, 0.0, -4.0]);
        assert_eq!((drift.max(), drift.relative()), (0.0, 0.0));
        // Differences 0.3 and 0.4 of a vector of length 5 (twice): 0.5 over the root of 50.
        drift.add_all(&[3.0, 4.0], &[2.7, 4.4]);
        assert!((drift.max() - 0.4).abs() < 1e-6);
        assert!((drift.relative() - 0.5 / 50.0_f64.sqrt()).abs() < 1e-6);
        // Nothing of which something became.
        let mut grown = Drift::default();
        grown.add(0.0, 1.0);
        assert_eq!(grown.relative(), f64::INFINITY);
    }
}
