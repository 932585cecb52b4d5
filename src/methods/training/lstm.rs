//! An LSTM language model as the loop sees it. Texts are learnt in windows; each begins with nothing remembered.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::net::{self, tensor};
use crate::error::{Error, Result};
use crate::models::lstm::{Config, graph};
use crate::nn::ops::{Loss, Pool, Tape};
use crate::train::batch::{Batch, NO_LABEL, Targets};
use crate::train::loss::{LossAndGradients, LossSums};
use crate::train::parameters::{Gradients, Parameters};

/// A language model.
pub struct Learner<'a> {
    pub config: &'a Config,
    pub losses: Rc<Cell<LossSums>>,
    pub pool: Pool,
}

impl Learner<'_> {
    fn pass(
        &self,
        tape: &Tape,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(Loss, LossSums)> {
        let Targets::Next(labels) = &batch.targets else {
            return Err(Error::internal("a batch that is not of texts"));
        };
        if let Some(token) = batch.tokens.iter().find(|t| **t as usize >= self.config.vocab) {
            return Err(Error::internal(format!("token {token} of {}", self.config.vocab)));
        }
        // Documents count their positions from 0, and so does padding, which nobody looks at.
        let rows = graph::Rows::new(batch.width, &batch.tokens, |i| batch.positions[i] == 0);
        let tensors = |name: &str| tensor(parameters, name);
        let states = graph::states(tape, self.config, &tensors, &rows)?;
        let wanted = labels.iter().enumerate().filter(|(_, label)| **label != NO_LABEL);
        let (at, targets): (Vec<u32>, Vec<u32>) =
            wanted.map(|(i, label)| (rows.row(i) as u32, *label)).unzip();
        let states = tape.rows(&states, &Arc::from(at))?;
        let logits = graph::logits(tape, &tensors, &states)?;
        let loss = tape.cross_entropy_of(logits, &targets, None)?;
        let sums = LossSums {
            loss: loss.sums.loss,
            count: targets.len() as u64,
            correct: loss.sums.right as u64,
        };
        Ok((loss, sums))
    }
}

impl LossAndGradients for Learner<'_> {
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        let mut gradients = Gradients::new();
        if batch.counted() == 0 {
            return Ok((LossSums::default(), gradients));
        }
        let tape = Tape::new(&self.pool);
        let (loss, sums) = self.pass(&tape, batch, parameters)?;
        let names: HashMap<_, _> =
            parameters.iter().map(|(name, p)| (p.var.id(), (&name[..], &p.var))).collect();
        let mut one = self.pool.take(1);
        one[0] = 1.0;
        tape.backward(&loss.value, one.into())?.collect(&names, &mut gradients)?;
        net::add(&self.losses, sums);
        Ok((sums, gradients))
    }

    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums> {
        if batch.counted() == 0 {
            return Ok(LossSums::default());
        }
        let tape = Tape::forgetful(&self.pool);
        Ok(self.pass(&tape, batch, parameters)?.1)
    }
}
