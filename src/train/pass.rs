//! A pass through a network: the loss of some sequences, and its gradient for what is trained.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Tensor, TensorId, Var};

use super::distillation::Distillation;
use super::head::{HEAD_BIAS, HEAD_WEIGHT};
use super::loss::LossSums;
use super::parameters::{Gradients, Parameters};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::models::encoder::Pooling;
use crate::models::{decoder, encoder};
use crate::nn::ops::{Loss, Network, Pool, Run, Sequences, Shared, Tape, Value};
use crate::nn::tuning::Tuning;

/// The weight of an encoder's head, `[outputs, hidden]`, and its bias.
pub const CLASSIFIER: [&str; 2] = [HEAD_WEIGHT, HEAD_BIAS];

/// How a pass runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Keep the inputs of blocks only, and compute each block again for its gradient: a fraction of the
    /// memory for about a third more time. Gradients are the same.
    pub checkpoint_activations: bool,
    /// What of an encoder's states its head sees, for targets that belong to whole texts.
    pub pooling: Pooling,
}

impl Default for Options {
    fn default() -> Self {
        Self { checkpoint_activations: false, pooling: Pooling::Mean }
    }
}

/// A model whose loss can be taken and differentiated.
pub struct Pass<'a> {
    family: Family<'a>,
    tuning: &'a dyn Tuning,
    options: Options,
    distillation: Option<&'a Distillation<'a>>,
    /// Memory of activations and gradients, kept from one pass to the next.
    pool: Pool,
}

/// The differentiable forwards.
enum Family<'a> {
    Decoder(Arc<decoder::graph::Graph<'a>>),
    Encoder(Arc<encoder::graph::Graph<'a>>),
}

/// Sequences side by side, and what is wanted of them.
struct Batch {
    tokens: Vec<u32>,
    sequences: Sequences,
    wanted: Wanted,
}

enum Wanted {
    /// Rows, and what each is to predict.
    Rows(Vec<u32>, Vec<u32>, Rows),
    /// A class for each sequence.
    Classes(Vec<u32>),
    /// A number for each sequence.
    Values(Vec<f32>),
}

/// What rows predict.
#[derive(PartialEq)]
enum Rows {
    Next,
    Tags,
}

impl<'a> Pass<'a> {
    pub fn decoder(
        graph: impl Into<Arc<decoder::graph::Graph<'a>>>,
        tuning: &'a dyn Tuning,
        options: Options,
    ) -> Self {
        Self::new(Family::Decoder(graph.into()), tuning, options)
    }

    pub fn encoder(
        graph: impl Into<Arc<encoder::graph::Graph<'a>>>,
        tuning: &'a dyn Tuning,
        options: Options,
    ) -> Self {
        Self::new(Family::Encoder(graph.into()), tuning, options)
    }

    fn new(family: Family<'a>, tuning: &'a dyn Tuning, options: Options) -> Self {
        Self { family, tuning, options, distillation: None, pool: Pool::default() }
    }

    /// The same pass of a decoder whose loss has a teacher.
    #[must_use]
    pub fn distilled(self, distillation: &'a Distillation<'a>) -> Self {
        Self { distillation: Some(distillation), ..self }
    }

    /// Where activations and gradients are.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The loss of sequences, which all have targets of one kind, as evaluation sees it: without dropout.
    ///
    /// # Errors
    /// INVALID_FIELD for ids or lengths that the model has no rows for, MODEL_UNSUITABLE for targets that its
    /// family has no head for, INTERNAL for targets of mixed kinds or other lengths than their tokens.
    pub fn loss(&self, sequences: &[&Sequence], parameters: &Parameters) -> Result<LossSums> {
        let batch = Batch::new(sequences)?;
        if batch.wanted.count() == 0 {
            return Ok(LossSums::default());
        }
        let tape = Tape::forgetful(&self.pool);
        let run = self.run(&tape, &batch, false);
        let hidden = self.network().start(&run, &batch.tokens)?;
        let hidden = self.network().through(&run, hidden)?;
        let loss = self.end(&run, &hidden, &batch, parameters)?;
        Ok(batch.sums(&loss))
    }

    /// The loss and the gradient of its sum, for the parameters that had a part in it.
    ///
    /// # Errors
    /// As of [`Pass::loss`].
    pub fn loss_and_gradients(
        &self,
        sequences: &[&Sequence],
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        let batch = Batch::new(sequences)?;
        let mut gradients = Gradients::new();
        if batch.wanted.count() == 0 {
            return Ok((LossSums::default(), gradients));
        }
        let names = parameters.iter().map(|(name, p)| (p.var.id(), (&name[..], &p.var)));
        let names = names.collect();
        let sums = match self.options.checkpoint_activations {
            true => self.by_blocks(&batch, parameters, &names, &mut gradients)?,
            false => self.whole(&batch, parameters, &names, &mut gradients)?,
        };
        Ok((sums, gradients))
    }

    /// What the head of an encoder says, as evaluation sees it: `[rows, outputs]`, a row for each sequence, or
    /// for each tag.
    ///
    /// # Errors
    /// As of [`Pass::loss`].
    pub fn scores(&self, sequences: &[&Sequence], parameters: &Parameters) -> Result<Vec<f32>> {
        let batch = Batch::new(sequences)?;
        if batch.wanted.count() == 0 {
            return Ok(Vec::new());
        }
        let Family::Encoder(graph) = &self.family else {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "a decoder has no head for classes, numbers or tags; name an encoder",
            ));
        };
        let tape = Tape::forgetful(&self.pool);
        let run = self.run(&tape, &batch, false);
        let hidden = self.network().start(&run, &batch.tokens)?;
        let hidden = self.network().through(&run, hidden)?;
        let states = match &batch.wanted {
            Wanted::Rows(rows, _, Rows::Tags) => tape.rows(&hidden, &rows[..].into())?,
            Wanted::Classes(_) | Wanted::Values(_) => {
                graph.pool(&run, &hidden, self.options.pooling)?
            }
            Wanted::Rows(_, _, Rows::Next) => {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    "an encoder does not predict the next token; name a decoder",
                ));
            }
        };
        Ok(head(&tape, &states, parameters)?.read().to_vec())
    }

    fn whole(
        &self,
        batch: &Batch,
        parameters: &Parameters,
        names: &Names<'_>,
        gradients: &mut Gradients,
    ) -> Result<LossSums> {
        let tape = Tape::new(&self.pool);
        let run = self.run(&tape, batch, true);
        let hidden = self.network().start(&run, &batch.tokens)?;
        let hidden = self.network().through(&run, hidden)?;
        let loss = self.end(&run, &hidden, batch, parameters)?;
        drop(hidden);
        if loss.value.tracked() {
            let one = self.one();
            tape.backward(&loss.value, one)?.collect(names, gradients)?;
        }
        Ok(batch.sums(&loss))
    }

    /// The same with the inputs of blocks kept only.
    fn by_blocks(
        &self,
        batch: &Batch,
        parameters: &Parameters,
        names: &Names<'_>,
        gradients: &mut Gradients,
    ) -> Result<LossSums> {
        let network = self.network();
        let mut inputs = Vec::with_capacity(network.blocks());
        let forgetful = Tape::forgetful(&self.pool);
        let forward = self.run(&forgetful, batch, true);
        let mut hidden = network.start(&forward, &batch.tokens)?;
        for index in 0..network.blocks() {
            let next = network.block(&forward, &hidden, index)?;
            inputs.push(std::mem::replace(&mut hidden, next));
        }

        // Above the blocks.
        let tape = Tape::new(&self.pool);
        let start = if hidden.tracked() { tape.start(&hidden) } else { hidden.detached() };
        drop(hidden);
        let loss = self.end(&self.run(&tape, batch, true), &start, batch, parameters)?;
        let sums = batch.sums(&loss);
        if !loss.value.tracked() {
            return Ok(sums);
        }
        let one = self.one();
        let mut taken = tape.backward(&loss.value, one)?;
        let mut gradient = taken.of(&start);
        drop(start);
        taken.collect(names, gradients)?;

        // The blocks, from the last.
        for index in (0..network.blocks()).rev() {
            let (Some(input), Some(g)) = (inputs.pop(), gradient.take()) else { return Ok(sums) };
            let tape = Tape::new(&self.pool);
            let start = if input.tracked() { tape.start(&input) } else { input.detached() };
            drop(input);
            let again = Run { read: false, ..self.run(&tape, batch, true) };
            let end = network.block(&again, &start, index)?;
            if !end.tracked() {
                return Ok(sums);
            }
            let mut taken = tape.backward(&end, g)?;
            drop(end);
            gradient = taken.of(&start);
            taken.collect(names, gradients)?;
        }
        // What is below them.
        if let Some(g) = gradient {
            let tape = Tape::new(&self.pool);
            let end = network.start(&self.run(&tape, batch, true), &batch.tokens)?;
            if end.tracked() {
                tape.backward(&end, g)?.collect(names, gradients)?;
            }
        }
        Ok(sums)
    }

    /// From the last hidden states to the loss.
    fn end(
        &self,
        run: &Run<'_>,
        hidden: &Value,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<Loss> {
        let tape = run.tape;
        let head = |x: &Value| head(tape, x, parameters);
        match (&self.family, &batch.wanted) {
            (Family::Decoder(graph), Wanted::Rows(rows, targets, Rows::Next)) => {
                let normed = graph.normed(run, &tape.rows(hidden, &rows[..].into())?)?;
                match self.distillation {
                    Some(taught) => {
                        taught.loss(graph, run, &normed, (&batch.tokens, rows, targets))
                    }
                    None => graph.loss(run, &normed, targets),
                }
            }
            (Family::Encoder(_), Wanted::Rows(rows, targets, Rows::Tags)) => {
                let rows = tape.rows(hidden, &rows[..].into())?;
                tape.cross_entropy_of(head(&rows)?, targets, None)
            }
            (Family::Encoder(graph), Wanted::Classes(classes)) => {
                let pooled = graph.pool(run, hidden, self.options.pooling)?;
                tape.cross_entropy_of(head(&pooled)?, classes, None)
            }
            (Family::Encoder(graph), Wanted::Values(values)) => {
                let pooled = graph.pool(run, hidden, self.options.pooling)?;
                tape.squares(&head(&pooled)?, values)
            }
            (Family::Decoder(_), _) => Err(Error::new(
                Reason::ModelUnsuitable,
                "a decoder is trained to predict tokens; classes, numbers and tags need an encoder",
            )),
            (Family::Encoder(_), _) => Err(Error::new(
                Reason::ModelUnsuitable,
                "an encoder does not predict the next token; name a decoder, or a dataset of classes, \
                 numbers or tags",
            )),
        }
    }

    fn network(&self) -> &dyn Network {
        match &self.family {
            Family::Decoder(graph) => graph.as_ref(),
            Family::Encoder(graph) => graph.as_ref(),
        }
    }

    fn run<'b>(&'b self, tape: &'b Tape, batch: &'b Batch, training: bool) -> Run<'b> {
        let sequences = &batch.sequences;
        Run { tape, tuning: self.tuning, sequences, training, read: true }
    }

    /// The gradient of a loss with respect to itself.
    fn one(&self) -> Shared {
        let mut one = self.pool.take(1);
        one[0] = 1.0;
        one.into()
    }
}

/// The head over some states.
fn head(tape: &Tape, x: &Value, parameters: &Parameters) -> Result<Value> {
    let [weight, bias] = CLASSIFIER.map(|name| parameters.get(name));
    let (Some(weight), Some(bias)) = (weight, bias) else {
        return Err(Error::internal(format!(
            "the parameters have no '{}' and '{}'",
            CLASSIFIER[0], CLASSIFIER[1]
        )));
    };
    let y = tape.dense(x, &tape.leaf(weight.var.as_tensor())?)?;
    tape.add_bias(y, &tape.leaf(bias.var.as_tensor())?)
}

/// Names and variables of parameters by the id of their tensor.
type Names<'a> = HashMap<TensorId, (&'a str, &'a Var)>;

impl Batch {
    fn new(sequences: &[&Sequence]) -> Result<Self> {
        let mixed = || Error::internal("sequences of a batch have targets of different kinds");
        let tokens = sequences.iter().flat_map(|s| s.tokens.iter().copied()).collect();
        let (mut rows, mut targets, mut kind) = (Vec::new(), Vec::new(), None);
        let (mut classes, mut values) = (Vec::new(), Vec::new());
        let mut start = 0;
        for sequence in sequences {
            let length = sequence.tokens.len();
            let fits = |n: usize| match n == length {
                true => Ok(()),
                false => Err(Error::internal(format!(
                    "the record of line {} has {n} targets for {length} tokens",
                    sequence.line
                ))),
            };
            match &sequence.target {
                Target::Next(counts) => {
                    fits(counts.len())?;
                    for i in (1..length).filter(|i| counts[*i]) {
                        rows.push((start + i - 1) as u32);
                        targets.push(sequence.tokens[i]);
                    }
                    kind.get_or_insert(Rows::Next);
                }
                Target::Tags(tags) => {
                    fits(tags.len())?;
                    for (i, tag) in tags.iter().enumerate() {
                        if let Some(tag) = tag {
                            rows.push((start + i) as u32);
                            targets.push(*tag);
                        }
                    }
                    kind.get_or_insert(Rows::Tags);
                }
                Target::Class(class) => classes.push(*class),
                Target::Value(value) => values.push(*value),
            }
            let of_rows = matches!(
                (&sequence.target, &kind),
                (Target::Next(_), Some(Rows::Next)) | (Target::Tags(_), Some(Rows::Tags))
            );
            let of_texts = matches!(&sequence.target, Target::Class(_) | Target::Value(_));
            if !of_rows && !of_texts || kind.is_some() && of_texts {
                return Err(mixed());
            }
            start += length;
        }
        let wanted = match (kind, classes.is_empty(), values.is_empty()) {
            (Some(kind), true, true) => Wanted::Rows(rows, targets, kind),
            (None, false, true) => Wanted::Classes(classes),
            (None, true, _) => Wanted::Values(values),
            _ => return Err(mixed()),
        };
        let sequences = Sequences::of(sequences.iter().map(|s| s.tokens.len()));
        Ok(Self { tokens, sequences, wanted })
    }

    fn sums(&self, loss: &Loss) -> LossSums {
        let count = self.wanted.count();
        LossSums { loss: loss.sums.loss, count, correct: loss.sums.right }
    }
}

impl Wanted {
    fn count(&self) -> u64 {
        let count = match self {
            Self::Rows(rows, _, _) => rows.len(),
            Self::Classes(classes) => classes.len(),
            Self::Values(values) => values.len(),
        };
        count as u64
    }
}

/// Parameters that stand in place of stored tensors of the same name: training of whole tensors.
pub struct InPlace<'a>(pub &'a Parameters);

impl Tuning for InPlace<'_> {
    fn linear(
        &self,
        _: &str,
        _: &Tensor,
        _: &Arc<crate::nn::weight::Weight>,
    ) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.0.get(name).map(|parameter| parameter.var.as_tensor().clone()))
    }
}

#[cfg(test)]
mod tests;
