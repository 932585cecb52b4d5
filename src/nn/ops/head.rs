//! Heads and their losses: logits are made for some rows at a time, and are gone when the gradient of
//! their rows is known.

use std::sync::Arc;

use super::linear::Linear;
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::gemm::{self, View};
use crate::kernels::training::{elementwise, entropy};

pub use crate::kernels::training::entropy::Sums;

/// Bytes of logits that are in memory at once.
pub(super) const LOGITS: usize = 64 << 20;
/// Rows of a chunk, where they fit: enough to use each weight of the head well.
pub(super) const ROWS: usize = 256;

/// What makes logits of rows.
pub enum Matrix<'a> {
    Frozen(&'a Linear),
    /// `[outputs, width]`
    Trained(&'a Value),
}

impl Matrix<'_> {
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Frozen(linear) => [linear.rows(), linear.cols()],
            Self::Trained(value) => [value.rows(), value.width()],
        }
    }

    fn logits(&self, x: &[f32], logits: &mut [f32]) {
        match self {
            Self::Frozen(linear) => linear.multiply(x, logits),
            Self::Trained(value) => gemm::multiply(x, &value.read(), logits, value.width()),
        }
    }
}

/// The sum of losses, whose gradient is that of the sum.
pub struct Loss {
    pub sums: Sums,
    /// One element.
    pub value: Value,
}

impl Tape {
    /// The cross-entropies of `softmax(cap(x w^T))`, one target a row, summed. The gradient is made in the
    /// same pass over the logits.
    ///
    /// # Errors
    /// INTERNAL if sizes do not fit or a target is not among the outputs.
    pub fn cross_entropy(
        &self,
        x: &Value,
        matrix: &Matrix<'_>,
        targets: &[u32],
        cap: Option<f32>,
    ) -> Result<Loss> {
        let [outputs, width] = matrix.shape();
        let rows = x.rows();
        if x.width() != width || rows != targets.len() {
            return Err(Error::internal("a head does not fit the rows before it"));
        }
        if let Some(target) = targets.iter().find(|t| **t as usize >= outputs) {
            return Err(Error::internal(format!("target {target} of {outputs} outputs")));
        }
        let trained = match matrix {
            Matrix::Trained(value) => value.node(),
            Matrix::Frozen(_) => None,
        };
        let wanted = self.is_recording() && (x.tracked() || trained.is_some());
        let mut dx = (wanted && x.tracked()).then(|| self.pool().take(rows * width));
        let mut dw = (wanted && trained.is_some()).then(|| self.pool().take(outputs * width));
        let each = (LOGITS / size_of::<f32>() / outputs).clamp(1, ROWS);
        let mut logits = self.pool().take(each.min(rows) * outputs);
        let mut sums = Sums::default();
        let data = x.read();
        for first in (0..rows).step_by(each) {
            let count = each.min(rows - first);
            let logits = &mut logits[..count * outputs];
            let x = &data[first * width..][..count * width];
            matrix.logits(x, logits);
            let targets = &targets[first..first + count];
            let own = entropy::cross_entropy(logits, outputs, targets, cap, wanted);
            sums = Sums { loss: sums.loss + own.loss, right: sums.right + own.right };
            let g = View::new(logits, count, outputs);
            if let Some(dx) = &mut dx {
                let dx = &mut dx[first * width..][..count * width];
                match matrix {
                    Matrix::Frozen(linear) => linear.multiply_transposed(logits, dx),
                    Matrix::Trained(value) => {
                        gemm::multiply_transposed(logits, &value.read(), dx, outputs);
                    }
                }
            }
            if let Some(dw) = &mut dw {
                gemm::gemm(g.t(), View::new(x, count, width), dw, width, first > 0, true);
            }
        }
        drop(logits);
        let nodes = [x.node(), trained];
        let value = self.number(sums.loss as f32, &nodes, || {
            move |by, sink| {
                let gradients = [(nodes[0], dx), (nodes[1], dw)];
                for (node, gradient) in gradients {
                    if let (Some(node), Some(mut gradient)) = (node, gradient) {
                        elementwise::scale(&mut gradient, by);
                        sink.add(node, Arc::new(gradient));
                    }
                }
                Ok(())
            }
        });
        Ok(Loss { sums, value })
    }

    /// `sum (x - target)^2` over rows of one number.
    ///
    /// # Errors
    /// INTERNAL unless there is one target a row of one number.
    pub fn squares(&self, x: &Value, targets: &[f32]) -> Result<Loss> {
        if x.width() != 1 || x.rows() != targets.len() {
            return Err(Error::internal("one number a row and one target each are needed"));
        }
        let differences: Vec<f32> = x.read().iter().zip(targets).map(|(x, t)| x - t).collect();
        let loss: f64 = differences.iter().map(|d| f64::from(*d).powi(2)).sum();
        let node = x.node();
        let value = self.number(loss as f32, &[node], || {
            move |by, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.pool().take(differences.len());
                dx.iter_mut().zip(&differences).for_each(|(dx, d)| *dx = 2.0 * by * d);
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        });
        Ok(Loss { sums: Sums { loss, right: 0 }, value })
    }
}

impl Tape {
    /// The cross-entropies of `softmax(cap(logits))`, one target a row, summed; in the place of the logits.
    ///
    /// # Errors
    /// INTERNAL if there is not one target among the outputs for each row.
    pub fn cross_entropy_of(
        &self,
        logits: Value,
        targets: &[u32],
        cap: Option<f32>,
    ) -> Result<Loss> {
        let (outputs, node) = (logits.width(), logits.node());
        if logits.rows() != targets.len() || targets.iter().any(|t| *t as usize >= outputs) {
            return Err(Error::internal("targets do not fit the logits"));
        }
        let wanted = self.is_recording() && node.is_some();
        let mut logits = self.own(logits);
        let sums = entropy::cross_entropy(&mut logits, outputs, targets, cap, wanted);
        let value = self.number(sums.loss as f32, &[node], || {
            move |by, sink| {
                let Some(node) = node else { return Ok(()) };
                elementwise::scale(&mut logits, by);
                sink.add(node, Arc::new(logits));
                Ok(())
            }
        });
        Ok(Loss { sums, value })
    }
}
