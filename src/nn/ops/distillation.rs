//! The head of a student that learns from a teacher: logits of both are made for some rows at a time, and
//! are gone when the gradient of their rows is known.

use std::sync::Arc;

use super::head::{LOGITS, Loss, ROWS, Sums};
use super::linear::Linear;
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::distillation::{self, distillation};
use crate::kernels::training::elementwise;

pub use crate::kernels::training::distillation::Weights;

/// What a teacher says of rows.
#[derive(Clone, Copy)]
pub enum Answers<'a> {
    /// Nothing: there is cross-entropy only.
    None,
    /// The states that its head makes logits of, `[rows, width]`, and that head.
    States(&'a [f32], &'a Linear),
    /// The `k` likeliest tokens of each row and the logarithms of their probabilities.
    Top { k: usize, tokens: &'a [u32], logs: &'a [f32] },
}

/// The weighted sum of both losses, and each by itself.
pub struct Distilled {
    pub loss: Loss,
    pub kl: f64,
    pub ce: f64,
}

impl Tape {
    /// `kl KL(teacher || student) + ce CE(target)` of `softmax(cap(x w^T))`, one target a row, summed; both
    /// heads are frozen and have the same outputs. The gradient is made in the same pass over the logits.
    ///
    /// # Errors
    /// INTERNAL if sizes do not fit or a target or an answer is not among the outputs.
    pub fn distilled(
        &self,
        x: &Value,
        head: &Linear,
        targets: &[u32],
        answers: Answers<'_>,
        cap: Option<f32>,
        weights: Weights,
    ) -> Result<Distilled> {
        let [outputs, width] = [head.rows(), head.cols()];
        let rows = x.rows();
        let fits = match answers {
            Answers::None => true,
            Answers::States(states, teacher) => {
                teacher.rows() == outputs && states.len() == rows * teacher.cols()
            }
            Answers::Top { k, tokens, logs } => {
                let known = tokens.iter().all(|t| (*t as usize) < outputs);
                known && tokens.len() == rows * k && logs.len() == rows * k
            }
        };
        if x.width() != width || rows != targets.len() || !fits {
            return Err(Error::internal("a head does not fit the rows before it, or the teacher"));
        }
        if let Some(target) = targets.iter().find(|t| **t as usize >= outputs) {
            return Err(Error::internal(format!("target {target} of {outputs} outputs")));
        }
        let wanted = self.is_recording() && x.tracked();
        let mut dx = wanted.then(|| self.pool().take(rows * width));
        let each = (LOGITS / size_of::<f32>() / outputs).clamp(1, ROWS);
        let mut logits = self.pool().take(each.min(rows) * outputs);
        let mut teacher = match answers {
            Answers::States(..) => Some(self.pool().take(each.min(rows) * outputs)),
            _ => None,
        };
        let (mut kl, mut ce, mut right) = (0.0, 0.0, 0);
        let data = x.read();
        for first in (0..rows).step_by(each) {
            let count = each.min(rows - first);
            let logits = &mut logits[..count * outputs];
            head.multiply(&data[first * width..][..count * width], logits);
            let said = match (answers, &mut teacher) {
                (Answers::States(states, head), Some(teacher)) => {
                    let teacher = &mut teacher[..count * outputs];
                    let width = head.cols();
                    head.multiply(&states[first * width..][..count * width], teacher);
                    distillation::Answers::Logits(teacher)
                }
                (Answers::Top { k, tokens, logs }, _) => {
                    let places = first * k..(first + count) * k;
                    let (tokens, logs) = (&tokens[places.clone()], &logs[places]);
                    distillation::Answers::Top { k, tokens, logs }
                }
                _ => distillation::Answers::None,
            };
            let targets = &targets[first..first + count];
            let own = distillation(logits, outputs, targets, said, cap, weights, wanted);
            (kl, ce, right) = (kl + own.kl, ce + own.ce, right + own.right);
            if let Some(dx) = &mut dx {
                head.multiply_transposed(logits, &mut dx[first * width..][..count * width]);
            }
        }
        drop((logits, teacher));
        let node = x.node();
        let loss = part(weights.kl, kl) + part(weights.ce, ce);
        let value = self.number(loss as f32, &[node], || {
            move |by, sink| {
                if let (Some(node), Some(mut dx)) = (node, dx) {
                    elementwise::scale(&mut dx, by);
                    sink.add(node, Arc::new(dx));
                }
                Ok(())
            }
        });
        Ok(Distilled { loss: Loss { sums: Sums { loss, right }, value }, kl, ce })
    }
}

/// What does not count is left out, whatever it is.
fn part(weight: f64, sum: f64) -> f64 {
    if weight == 0.0 { 0.0 } else { weight * sum }
}
