//! A pass through a network: the loss of some sequences, and its gradient for what is trained.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Tensor, TensorId, Var};

use super::distillation::Distillation;
use super::head::{HEAD_BIAS, HEAD_WEIGHT, HIDDEN_TOKENS};
use super::loss::LossSums;
use super::parameters::{Gradients, Parameters};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::models::encoder::Pooling;
use crate::models::{decoder, encoder};
use crate::nn::ops::{Loss, Network, Pool, Preferred, Run, Sequences, Shared, Tape, Value};
use crate::nn::tuning::{Frozen, Tuning};

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
    /// The token of an encoder behind which, if anything follows, a second text begins.
    pub separator: Option<u32>,
    /// How strongly preferences hold to the model that is not tuned.
    pub beta: f32,
}

impl Default for Options {
    fn default() -> Self {
        Self { checkpoint_activations: false, pooling: Pooling::Mean, separator: None, beta: 0.1 }
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
    /// Any number of classes for each sequence.
    Labels(Vec<Vec<u32>>),
    /// Rows, what each is to predict, and the rows of each pair; what the reference says comes later.
    Pairs(Vec<u32>, Arc<[u32]>, Vec<Preferred>),
}

/// What rows predict.
#[derive(PartialEq)]
enum Rows {
    Next,
    Tags,
    Hidden,
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
        let mut batch = Batch::new(sequences, self.options.separator)?;
        if batch.wanted.count() == 0 {
            return Ok(LossSums::default());
        }
        self.refer(&mut batch)?;
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
        let mut batch = Batch::new(sequences, self.options.separator)?;
        let mut gradients = Gradients::new();
        if batch.wanted.count() == 0 {
            return Ok((LossSums::default(), gradients));
        }
        self.refer(&mut batch)?;
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
        let batch = Batch::new(sequences, self.options.separator)?;
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
            Wanted::Classes(_) | Wanted::Values(_) | Wanted::Labels(_) => {
                graph.pool(&run, &hidden, self.options.pooling)?
            }
            Wanted::Rows(_, _, Rows::Hidden) => {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    "a head for hidden tokens has no classes, numbers or tags",
                ));
            }
            Wanted::Rows(_, _, Rows::Next) | Wanted::Pairs(..) => {
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
            (Family::Decoder(graph), Wanted::Pairs(rows, targets, pairs)) => {
                let rows = tape.rows(hidden, &rows[..].into())?;
                let losses = graph.row_losses(run, &graph.normed(run, &rows)?, targets)?;
                tape.preferences(&losses, pairs, self.options.beta)
            }
            (Family::Encoder(graph), Wanted::Rows(rows, targets, Rows::Hidden)) => {
                let rows = tape.rows(hidden, &rows[..].into())?;
                let part = |name: &str| -> Result<Value> {
                    let missing = || Error::internal(format!("the parameters have no '{name}'"));
                    tape.leaf(parameters.get(name).ok_or_else(missing)?.var.as_tensor())
                };
                let [weight, bias, scale, shift] = HIDDEN_TOKENS;
                let (weight, bias) = (part(weight)?, part(bias)?);
                let (scale, shift) = (part(scale)?, part(shift)?);
                graph.hidden_loss(run, &rows, [&weight, &bias, &scale, &shift], targets)
            }
            (Family::Encoder(graph), Wanted::Labels(classes)) => {
                let pooled = graph.pool(run, hidden, self.options.pooling)?;
                tape.sigmoid_cross_entropy(head(&pooled)?, classes)
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

    /// Lets the model that is not tuned say what it thinks of the answers of pairs.
    fn refer(&self, batch: &mut Batch) -> Result<()> {
        let Wanted::Pairs(rows, targets, pairs) = &batch.wanted else { return Ok(()) };
        let Family::Decoder(graph) = &self.family else { return Ok(()) };
        let tape = Tape::forgetful(&self.pool);
        let run = Run { tuning: &Frozen, ..self.run(&tape, batch, false) };
        let hidden = graph.through(&run, graph.start(&run, &batch.tokens)?)?;
        let rows = tape.rows(&hidden, &rows[..].into())?;
        drop(hidden);
        let losses = graph.row_losses(&run, &graph.normed(&run, &rows)?, targets)?;
        let all = losses.read();
        let sum =
            |rows: &Range<usize>| -> f64 { all[rows.clone()].iter().map(|v| f64::from(*v)).sum() };
        let found: Vec<[f64; 2]> =
            pairs.iter().map(|pair| pair.rows.each_ref().map(&sum)).collect();
        drop(all);
        if let Wanted::Pairs(_, _, pairs) = &mut batch.wanted {
            pairs.iter_mut().zip(found).for_each(|(pair, found)| pair.reference = found);
        }
        Ok(())
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
    fn new(sequences: &[&Sequence], separator: Option<u32>) -> Result<Self> {
        let mixed = || Error::internal("sequences of a batch have targets of different kinds");
        let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.tokens.iter().copied()).collect();
        let (mut rows, mut targets, mut kind) = (Vec::new(), Vec::new(), None);
        let (mut classes, mut values) = (Vec::new(), Vec::new());
        let (mut several, mut pairs, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
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
                Target::Hidden(hidden) => {
                    fits(hidden.len())?;
                    for (i, token) in hidden.iter().enumerate() {
                        if let Some(token) = token {
                            rows.push((start + i) as u32);
                            targets.push(*token);
                        }
                    }
                    kind.get_or_insert(Rows::Hidden);
                }
                Target::Pair { chosen, counts } => {
                    fits(counts.len())?;
                    if *chosen == 0 || *chosen >= length {
                        return Err(Error::internal("a pair without two sides"));
                    }
                    let mut side = |places: Range<usize>| {
                        let first = rows.len();
                        for i in (places.start + 1..places.end).filter(|i| counts[*i]) {
                            rows.push((start + i - 1) as u32);
                            targets.push(sequence.tokens[i]);
                        }
                        first..rows.len()
                    };
                    let both = [side(0..*chosen), side(*chosen..length)];
                    pairs.push(Preferred { rows: both, reference: [0.0; 2] });
                    lengths.extend([*chosen, length - chosen]);
                }
                Target::Class(class) => classes.push(*class),
                Target::Value(value) => values.push(*value),
                Target::Labels(classes) => several.push(classes.clone()),
            }
            let of_rows = matches!(
                (&sequence.target, &kind),
                (Target::Next(_), Some(Rows::Next))
                    | (Target::Tags(_), Some(Rows::Tags))
                    | (Target::Hidden(_), Some(Rows::Hidden))
            );
            let of_texts = matches!(
                &sequence.target,
                Target::Class(_) | Target::Value(_) | Target::Labels(_) | Target::Pair { .. }
            );
            if !of_rows && !of_texts || kind.is_some() && of_texts {
                return Err(mixed());
            }
            start += length;
            if !matches!(sequence.target, Target::Pair { .. }) {
                lengths.push(length);
            }
        }
        let kinds =
            [!classes.is_empty(), !values.is_empty(), !several.is_empty(), !pairs.is_empty()];
        let wanted = match (kind, kinds) {
            (Some(kind), [false, false, false, false]) => Wanted::Rows(rows, targets, kind),
            (None, [true, false, false, false]) => Wanted::Classes(classes),
            (None, [false, _, false, false]) => Wanted::Values(values),
            (None, [false, false, true, false]) => Wanted::Labels(several),
            (None, [false, false, false, true]) => Wanted::Pairs(rows, targets.into(), pairs),
            _ => return Err(mixed()),
        };
        let sequences = Sequences::of(lengths);
        let sequences = match separator {
            None => sequences,
            Some(separator) => {
                let types = types(&tokens, &sequences, separator);
                sequences.with_types(types)
            }
        };
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
            Self::Labels(classes) => classes.len(),
            Self::Pairs(_, _, pairs) => pairs.len(),
        };
        count as u64
    }
}

/// 1 for the tokens behind the first separator of a sequence, 0 for the others.
fn types(tokens: &[u32], sequences: &Sequences, separator: u32) -> Arc<[u32]> {
    let mut types = vec![0; tokens.len()];
    for range in sequences.ranges().iter() {
        if let Some(at) = tokens[range.clone()].iter().position(|token| *token == separator) {
            types[range.start + at + 1..range.end].fill(1);
        }
    }
    types.into()
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
