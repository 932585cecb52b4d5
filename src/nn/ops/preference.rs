//! Losses of single rows, and what is made of them: the loss of pairs of sequences of which one is preferred;
//! and losses of rows that may have several classes.

use std::ops::Range;
use std::sync::Arc;

use super::head::{Loss, Sums};
use super::linear::Linear;
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::gemm::{self, View};
use crate::kernels::training::{elementwise, entropy};

/// Bytes of logits that are in memory at once.
const LOGITS: usize = 64 << 20;
/// Rows of a chunk, where they fit.
const ROWS: usize = 256;

/// What makes logits of rows, kept for the gradient.
#[derive(Clone)]
pub enum Head {
    Frozen(Arc<Linear>),
    /// `[outputs, width]`
    Trained(Value),
}

impl Head {
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

/// Rows of two sequences with one beginning, and what the model that is not tuned says of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Preferred {
    /// Rows of the better answer's tokens, and of the worse one's.
    pub rows: [Range<usize>; 2],
    /// Negative logarithms of the likelihoods that the reference gives both.
    pub reference: [f64; 2],
}

impl Tape {
    /// `-ln softmax(cap(x w^T))[target]` of each row, `[rows, 1]`. Logits are made again for the gradient.
    ///
    /// # Errors
    /// INTERNAL if sizes do not fit or a target is not among the outputs.
    pub fn row_losses(
        &self,
        x: &Value,
        head: &Head,
        targets: &Arc<[u32]>,
        cap: Option<f32>,
    ) -> Result<Value> {
        let [outputs, width] = head.shape();
        let rows = x.rows();
        if x.width() != width || rows != targets.len() {
            return Err(Error::internal("a head does not fit the rows before it"));
        }
        if let Some(target) = targets.iter().find(|t| **t as usize >= outputs) {
            return Err(Error::internal(format!("target {target} of {outputs} outputs")));
        }
        let each = (LOGITS / size_of::<f32>() / outputs).clamp(1, ROWS).min(rows.max(1));
        let mut losses = self.pool().take(rows);
        {
            let mut logits = self.pool().take(each * outputs);
            let data = x.read();
            for first in (0..rows).step_by(each) {
                let count = each.min(rows - first);
                let logits = &mut logits[..count * outputs];
                head.logits(&data[first * width..][..count * width], logits);
                let (targets, losses) =
                    (&targets[first..first + count], &mut losses[first..first + count]);
                entropy::losses(logits, outputs, targets, cap, losses);
            }
        }
        let trained = match head {
            Head::Trained(value) => value.node(),
            Head::Frozen(_) => None,
        };
        let inputs = [x.node(), trained];
        Ok(self.result_of(Arc::new(losses), 1, &inputs, |_| {
            let (x, head, targets) = (x.clone(), head.clone(), Arc::clone(targets));
            move |g, sink| {
                let mut logits = sink.pool().take(each * outputs);
                let mut dx = x.node().map(|_| sink.pool().take(rows * width));
                let data = x.read();
                for first in (0..rows).step_by(each) {
                    let count = each.min(rows - first);
                    let logits = &mut logits[..count * outputs];
                    let x = &data[first * width..][..count * width];
                    head.logits(x, logits);
                    entropy::cross_entropy(
                        logits,
                        outputs,
                        &targets[first..first + count],
                        cap,
                        true,
                    );
                    for (row, by) in logits.chunks_exact_mut(outputs).zip(&g[first..]) {
                        row.iter_mut().for_each(|v| *v *= by);
                    }
                    if let Some(dx) = &mut dx {
                        let dx = &mut dx[first * width..][..count * width];
                        match &head {
                            Head::Frozen(linear) => linear.multiply_transposed(logits, dx),
                            Head::Trained(value) => {
                                gemm::multiply_transposed(logits, &value.read(), dx, outputs);
                            }
                        }
                    }
                    if let Some(node) = trained {
                        let g = View::new(logits, count, outputs);
                        sink.accumulate(node, outputs * width, |dw, adding| {
                            gemm::gemm(g.t(), View::new(x, count, width), dw, width, adding, true);
                        });
                    }
                }
                if let (Some(node), Some(dx)) = (x.node(), dx) {
                    sink.add(node, Arc::new(dx));
                }
                Ok(())
            }
        }))
    }

    /// [`Tape::row_losses`] of logits that are there already.
    ///
    /// # Errors
    /// INTERNAL if there is not one target among the outputs for each row.
    pub fn row_losses_of(
        &self,
        logits: &Value,
        targets: &Arc<[u32]>,
        cap: Option<f32>,
    ) -> Result<Value> {
        let (outputs, rows) = (logits.width(), logits.rows());
        if rows != targets.len() || targets.iter().any(|t| *t as usize >= outputs) {
            return Err(Error::internal("targets do not fit the logits"));
        }
        let mut losses = self.pool().take(rows);
        let mut own = self.copy(&logits.read());
        entropy::losses(&mut own, outputs, targets, cap, &mut losses);
        drop(own);
        let node = logits.node();
        Ok(self.result_of(Arc::new(losses), 1, &[node], |_| {
            let (logits, targets) = (logits.clone(), Arc::clone(targets));
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.pool().take(rows * outputs);
                elementwise::copy(&logits.read(), &mut dx);
                entropy::cross_entropy(&mut dx, outputs, &targets, cap, true);
                for (row, by) in dx.chunks_exact_mut(outputs).zip(g.iter()) {
                    row.iter_mut().for_each(|v| *v *= by);
                }
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        }))
    }

    /// The loss of pairs (Rafailov et al. 2023, "Direct preference optimization", arXiv 2305.18290, equation
    /// 7): `-ln sigmoid(beta (r_better - r_worse))`, `r` being the logarithm of how much likelier an answer
    /// is than for the reference. `losses` are those of rows, `[rows, 1]`. A pair is right when its better
    /// answer gained more.
    ///
    /// # Errors
    /// INTERNAL for rows that are not there.
    pub fn preferences(&self, losses: &Value, pairs: &[Preferred], beta: f32) -> Result<Loss> {
        let rows = losses.rows();
        if losses.width() != 1 || pairs.iter().flat_map(|pair| &pair.rows).any(|r| r.end > rows) {
            return Err(Error::internal("pairs do not fit the rows"));
        }
        let beta = f64::from(beta);
        let mut sums = Sums::default();
        let mut gradients = Vec::new();
        {
            let all = losses.read();
            for pair in pairs {
                let gain = |side: usize| {
                    let own: f64 = all[pair.rows[side].clone()].iter().map(|v| f64::from(*v)).sum();
                    pair.reference[side] - own
                };
                let margin = beta * (gain(0) - gain(1));
                // ln(1 + exp(-margin)), without overflow.
                sums.loss += (-margin).max(0.0) + (-margin.abs()).exp().ln_1p();
                sums.right += u64::from(margin > 0.0);
                let slope = (beta / (1.0 + margin.exp())) as f32;
                gradients.push((pair.rows[0].clone(), slope));
                gradients.push((pair.rows[1].clone(), -slope));
            }
        }
        let node = losses.node();
        let value = self.number(sums.loss as f32, &[node], || {
            move |by, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut g = sink.pool().take(rows);
                g.fill(0.0);
                for (rows, slope) in gradients {
                    g[rows].iter_mut().for_each(|g| *g += by * slope);
                }
                sink.add(node, Arc::new(g));
                Ok(())
            }
        });
        Ok(Loss { sums, value })
    }

    /// The cross-entropies of `sigmoid(logits)` with the classes of each row, the mean over the classes, summed
    /// over the rows. A row is right when it has exactly the classes whose logits are positive.
    ///
    /// # Errors
    /// INTERNAL if there is not one list a row or a class is not among the outputs.
    pub fn sigmoid_cross_entropy(&self, logits: Value, classes: &[Vec<u32>]) -> Result<Loss> {
        let (outputs, node) = (logits.width(), logits.node());
        if logits.rows() != classes.len()
            || classes.iter().flatten().any(|c| *c as usize >= outputs)
        {
            return Err(Error::internal("classes do not fit the logits"));
        }
        let mut logits = self.own(logits);
        let (mut sums, share) = (Sums::default(), 1.0 / outputs as f64);
        for (row, classes) in logits.chunks_exact_mut(outputs).zip(classes) {
            let mut wanted = vec![false; outputs];
            classes.iter().for_each(|class| wanted[*class as usize] = true);
            let mut right = true;
            for (x, wanted) in row.iter_mut().zip(wanted) {
                let z = f64::from(*x);
                right &= (z > 0.0) == wanted;
                let target = if wanted { 1.0 } else { 0.0 };
                sums.loss += share * (z.max(0.0) - z * target + (-z.abs()).exp().ln_1p());
                *x = (share * (1.0 / (1.0 + (-z).exp()) - target)) as f32;
            }
            sums.right += u64::from(right);
        }
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::super::Pool;
    use super::*;
    use crate::nn::dtype::Dtype;
    use crate::nn::ops::Precision;
    use crate::nn::weight::{Dense, Weight};

    fn noise(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 997) as f32 / 498.5 - 1.0).collect()
    }

    fn var(rows: usize, cols: usize, seed: usize) -> Var {
        let tensor = Tensor::from_vec(noise(rows * cols, seed), (rows, cols), &Device::Cpu);
        Var::from_tensor(&tensor.unwrap()).unwrap()
    }

    /// Compares the gradients of `loss` at `vars` with differences.
    fn check(vars: &[Var], loss: impl Fn(&Tape, &[Value]) -> Loss) {
        let take = |recording: bool| {
            let pool = Pool::default();
            let tape = if recording { Tape::new(&pool) } else { Tape::forgetful(&pool) };
            let leaves: Vec<Value> =
                vars.iter().map(|var| tape.leaf(var.as_tensor()).unwrap()).collect();
            let starts: Vec<Value> = leaves.iter().map(|leaf| tape.start(leaf)).collect();
            let found = loss(&tape, &starts);
            if !recording {
                return (found.sums.loss, Vec::new());
            }
            let one = tape.copy(&[1.0]);
            let sums = found.sums.loss;
            let mut taken = tape.backward(&found.value, Arc::new(one)).unwrap();
            let of = |start: &Value| taken.of(start).unwrap().to_vec();
            (sums, starts.iter().map(of).collect::<Vec<_>>())
        };
        let (_, gradients) = take(true);
        for (var, gradient) in vars.iter().zip(gradients) {
            let start: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            for at in (0..start.len()).step_by(3) {
                let moved = |by: f32| {
                    let mut values = start.clone();
                    values[at] += by;
                    let moved = Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap();
                    var.set(&moved).unwrap();
                    take(false).0
                };
                let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                moved(0.0);
                let got = f64::from(gradient[at]);
                assert!((got - want).abs() < 1e-3 + 0.01 * want.abs(), "{at}: {got} is not {want}");
            }
        }
    }

    #[test]
    fn losses_of_rows_by_every_head() {
        let targets: Arc<[u32]> = vec![3, 0, 8, 8, 1].into();
        let weight = Dense::from_f32(vec![9, 4], &noise(36, 5), Dtype::F32).unwrap();
        let weight = Arc::new(Weight::Dense(weight));
        let weigh = |losses: &Value, tape: &Tape| {
            let pairs = [
                Preferred { rows: [0..2, 2..3], reference: [3.0, 1.5] },
                Preferred { rows: [3..4, 4..5], reference: [2.5, 1.0] },
            ];
            tape.preferences(losses, &pairs, 0.7).unwrap()
        };
        for cap in [None, Some(1.5)] {
            check(&[var(5, 4, 1)], |tape, x| {
                let linear = Arc::new(Linear::new(&weight, Precision::F32));
                let losses = tape.row_losses(&x[0], &Head::Frozen(linear), &targets, cap).unwrap();
                weigh(&losses, tape)
            });
            check(&[var(5, 4, 1), var(9, 4, 2)], |tape, x| {
                let head = Head::Trained(x[1].clone());
                let losses = tape.row_losses(&x[0], &head, &targets, cap).unwrap();
                weigh(&losses, tape)
            });
            check(&[var(5, 9, 3)], |tape, x| {
                weigh(&tape.row_losses_of(&x[0], &targets, cap).unwrap(), tape)
            });
        }
        let tape = Tape::forgetful(&Pool::default());
        let x = tape.leaf(var(5, 4, 1).as_tensor()).unwrap();
        let linear = Arc::new(Linear::new(&weight, Precision::F32));
        let head = Head::Frozen(Arc::clone(&linear));
        let each = tape.row_losses(&x, &head, &targets, None).unwrap();
        let all = super::super::Matrix::Frozen(&linear);
        let all = tape.cross_entropy(&x, &all, &targets, None).unwrap();
        let sum: f64 = each.read().iter().map(|v| f64::from(*v)).sum();
        assert!((sum - all.sums.loss).abs() < 1e-4);
        let absurd: Arc<[u32]> = vec![9; 5].into();
        assert!(tape.row_losses(&x, &head, &absurd, None).is_err());
    }

    #[test]
    fn preferences_by_hand() {
        let tape = Tape::forgetful(&Pool::default());
        let losses = tape.leaf(&Tensor::new(&[[2.0_f32], [1.0], [4.0]], &Device::Cpu).unwrap());
        let losses = losses.unwrap();
        // The better answer gained 1, the worse one lost 1: a margin of 0.5 * 2.
        let pair = Preferred { rows: [0..2, 2..3], reference: [4.0, 3.0] };
        let found = tape.preferences(&losses, std::slice::from_ref(&pair), 0.5).unwrap();
        assert!((found.sums.loss - (1.0 + (-1.0_f64).exp()).ln()).abs() < 1e-9);
        assert_eq!(found.sums.right, 1);
        // As the reference says: ln 2, and nothing is preferred.
        let same = Preferred { reference: [3.0, 4.0], ..pair.clone() };
        let found = tape.preferences(&losses, &[same], 0.5).unwrap();
        assert!((found.sums.loss - std::f64::consts::LN_2).abs() < 1e-9);
        assert_eq!(found.sums.right, 0);
        let far = Preferred { reference: [-1e6, 1e6], ..pair.clone() };
        let found = tape.preferences(&losses, &[far], 1.0).unwrap();
        assert!((found.sums.loss - 2e6).abs() < 10.0, "{}", found.sums.loss);
        let absent = Preferred { rows: [0..2, 2..4], ..pair };
        assert!(tape.preferences(&losses, &[absent], 0.5).is_err());
    }

    #[test]
    fn several_classes_a_row() {
        let classes = [vec![0, 2], vec![], vec![1]];
        check(&[var(3, 4, 6)], |tape, x| {
            tape.sigmoid_cross_entropy(x[0].clone(), &classes).unwrap()
        });
        let tape = Tape::forgetful(&Pool::default());
        let logits = Tensor::new(&[[1.0_f32, -1.0], [0.0, 2.0]], &Device::Cpu).unwrap();
        let leaf = || tape.leaf(&logits).unwrap();
        let found = tape.sigmoid_cross_entropy(leaf(), &[vec![0], vec![0]]).unwrap();
        let plus = |z: f64| (1.0 + z.exp()).ln();
        // -ln sigmoid(1) twice; -ln sigmoid(0) and -ln(1 - sigmoid(2)); the mean of two classes.
        let want = (2.0 * plus(-1.0) + plus(0.0) + plus(2.0)) / 2.0;
        assert!((found.sums.loss - want).abs() < 1e-6);
        assert_eq!(found.sums.right, 1);
        assert!(tape.sigmoid_cross_entropy(leaf(), &[vec![2], vec![]]).is_err());
        assert!(tape.sigmoid_cross_entropy(leaf(), &[vec![0]]).is_err());
    }
}
