//! An image classifier as the loop sees it. A record is one token, the number of an image: first those to
//! learn from, then those to measure on.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use super::net::{self, read, tensor};
use crate::data::images::Images;
use crate::error::{Error, Result};
use crate::models::vision::{Config, graph, plan};
use crate::nn::ops::{Moments, Pool, Tape};
use crate::train::batch::{Batch, Targets};
use crate::train::loss::{LossAndGradients, LossSums};
use crate::train::parameters::{Gradients, Parameters};
use crate::train::tensors;

/// Images that go through the net at once where nothing is learnt.
const CHUNK: usize = 256;

/// A net and its images.
pub struct Learner<'a> {
    pub config: &'a Config,
    pub training: &'a Images,
    pub validation: Option<&'a Images>,
    pub losses: Rc<Cell<LossSums>>,
    pub pool: Pool,
}

impl Learner<'_> {
    fn image(&self, number: u32) -> Result<&[u8]> {
        net::image((self.training, self.validation), number)
    }

    /// Writes the images of a batch as the net sees them.
    fn pixels(&self, numbers: &[u32], out: &mut [f32]) -> Result<()> {
        let (input, image) = (plan::input(self.config), self.config.image());
        for (number, out) in numbers.iter().zip(out.chunks_exact_mut(image)) {
            plan::prepare(&input, self.image(*number)?, out);
        }
        Ok(())
    }

    /// Moves running statistics towards what a batch had.
    fn follow(&self, seen: &graph::Seen, parameters: &Parameters) -> Result<()> {
        let share = self.config.norm_momentum;
        for (place, Moments { mean, variance, rows }) in seen {
            // Of a sample, as PyTorch keeps it.
            let more = *rows as f32 / rows.saturating_sub(1).max(1) as f32;
            let parts = [("running_mean", mean, 1.0), ("running_var", variance, more)];
            for (part, new, by) in parts {
                let var = net::variable(parameters, &format!("{place}.{part}"))?;
                tensors::change(var, |old| {
                    old.iter_mut().zip(new).for_each(|(o, n)| *o += share * (n * by - *o));
                })?;
            }
        }
        Ok(())
    }
}

fn classes(batch: &Batch) -> Result<&[u32]> {
    match &batch.targets {
        Targets::Classes(classes) if batch.width == 1 && classes.len() == batch.rows => Ok(classes),
        _ => Err(Error::internal("a batch that is not of images")),
    }
}

impl LossAndGradients for Learner<'_> {
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        let classes = classes(batch)?;
        let mut pixels = self.pool.take(batch.rows * self.config.image());
        self.pixels(&batch.tokens, &mut pixels)?;
        let tape = Tape::new(&self.pool);
        let tensors = |name: &str| tensor(parameters, name);
        let (loss, seen) = graph::loss(&tape, self.config, &tensors, pixels, classes)?;
        let sums = LossSums {
            loss: loss.sums.loss,
            count: classes.len() as u64,
            correct: loss.sums.right,
        };
        let names: HashMap<_, _> =
            parameters.iter().map(|(name, p)| (p.var.id(), (&name[..], &p.var))).collect();
        let mut gradients = Gradients::new();
        let mut one = self.pool.take(1);
        one[0] = 1.0;
        tape.backward(&loss.value, one.into())?.collect(&names, &mut gradients)?;
        self.follow(&seen, parameters)?;
        net::add(&self.losses, sums);
        Ok((sums, gradients))
    }

    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums> {
        let ready = plan::Plan::with(self.config, &|name| read(parameters, name))?;
        let mut sums = LossSums::default();
        for (numbers, classes) in batch.tokens.chunks(CHUNK).zip(classes(batch)?.chunks(CHUNK)) {
            let mut pixels = vec![0.0; numbers.len() * self.config.image()];
            self.pixels(numbers, &mut pixels)?;
            let logits = ready.forward(pixels)?;
            for (row, class) in logits.chunks_exact(self.config.classes).zip(classes) {
                let (loss, right) = net::score(row, *class as usize);
                sums.add(LossSums { loss, count: 1, correct: u64::from(right) });
            }
        }
        Ok(sums)
    }
}
