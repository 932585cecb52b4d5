//! Gradients of chosen weights over a few records, a group of weights at a time, so that no more than a
//! group's gradients are in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::find;
use super::tuned::Tuned;
use crate::error::{Error, Reason, Result};
use crate::nn::weight::Weight;
use crate::progress::Progress;
use crate::train::parameters::Gradients;

/// Takes the name of a weight and its summed gradient `[out, in]` in row order.
pub type Sink<'a> = dyn FnMut(&str, Vec<f32>) -> Result<()> + 'a;

/// Gives the sums of the gradients of weights over a sample of the training data.
pub trait WeightGradients {
    /// Calls `sink` once for each of `names`, in their order.
    fn each(&mut self, names: &[String], sink: &mut Sink<'_>) -> Result<()>;

    /// Passes that are summed.
    fn passes(&self) -> usize;
}

/// Runs pass number `i` of the sample through a model whose parts are tuned so, in training mode, and
/// gives the gradients of its loss.
pub type Pass<'a> = dyn FnMut(usize, &Tuned) -> Result<Gradients> + 'a;

/// Collects by running the sample once for each group of weights, with those weights trained whole.
pub struct Collector<'a> {
    pub weights: &'a BTreeMap<String, Arc<Weight>>,
    /// Passes of the sample.
    pub passes: usize,
    pub pass: &'a mut Pass<'a>,
    /// Elements of the gradients that are held at once; one weight at least.
    pub elements: usize,
    pub progress: &'a Progress,
}

impl WeightGradients for Collector<'_> {
    fn each(&mut self, names: &[String], sink: &mut Sink<'_>) -> Result<()> {
        let mut rest = names;
        while !rest.is_empty() {
            let done = 1.0 - rest.len() as f64 / names.len() as f64;
            self.progress.report(done, "collecting gradients")?;
            let mut room = self.elements;
            let mut count = 0;
            for name in rest {
                let weight = find(self.weights, name)?;
                let elements = weight.rows() * weight.cols();
                if count > 0 && elements > room {
                    break;
                }
                room = room.saturating_sub(elements);
                count += 1;
            }
            let (group, others) = rest.split_at(count);
            rest = others;
            for (name, sum) in group.iter().zip(self.sums(group)?) {
                sink(name, sum)?;
            }
        }
        Ok(())
    }

    fn passes(&self) -> usize {
        self.passes
    }
}

impl Collector<'_> {
    fn sums(&mut self, group: &[String]) -> Result<Vec<Vec<f32>>> {
        let mut tuned = Tuned::new(0.0, "");
        tuned.add_whole(group.iter(), self.weights)?;
        let mut sums: Vec<Vec<f32>> = Vec::new();
        for name in group {
            let weight = find(self.weights, name)?;
            sums.push(vec![0.0; weight.rows() * weight.cols()]);
        }
        for i in 0..self.passes {
            self.progress.check()?;
            let gradients = (self.pass)(i, &tuned)?;
            for (name, sum) in group.iter().zip(&mut sums) {
                let Some(gradient) = gradients.get(name) else { continue };
                let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
                if !gradient.iter().all(|v| v.is_finite()) {
                    return Err(Error::new(
                        Reason::NonFinite,
                        format!(
                            "the gradient of '{name}' is not finite in pass {} of the sample; look at \
                             the training data and the base",
                            i + 1
                        ),
                    ));
                }
                sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
            }
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Toy;
    use super::*;

    #[test]
    fn groups_do_not_change_the_sums() {
        let toy = Toy::new(3);
        let names = toy.names();
        let collect = |elements| {
            let progress = Progress::silent();
            let mut pass = |i: usize, tuned: &Tuned| toy.gradients(i, tuned, &tuned.parameters());
            let mut collector = Collector {
                weights: &toy.weights,
                passes: 2,
                pass: &mut pass,
                elements,
                progress: &progress,
            };
            let mut all = Vec::new();
            collector
                .each(&names, &mut |name, sum| {
                    all.push((name.to_owned(), sum));
                    Ok(())
                })
                .unwrap();
            all
        };
        let together = collect(1 << 20);
        assert_eq!(together.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>(), names);
        // Only rounding may differ: the toy's products are candle's, of other graphs.
        for ((name, a), (other, b)) in together.iter().zip(collect(1)) {
            assert!(*name == other && a.len() == b.len());
            let size = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * size), "{name}");
        }
        assert!(together.iter().all(|(_, g)| g.iter().any(|v| *v != 0.0)));
    }
}
