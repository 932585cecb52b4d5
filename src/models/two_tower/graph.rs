//! The differentiable forward: the same mathematics as [`plan`](super::plan), with gradients through every layout,
//! and with what is trained in place of what is stored.

use std::sync::Arc;

use super::prompts::Texts;
use super::{Config, Model, Side, TEMPERATURE, plan};
use crate::error::{Error, Result};
use crate::nn::ops::{
    Attention, Buffer, Function, Loss, Precision, Run, Sequences, Stored, Tape, Value,
};
use crate::nn::tuning::Tuning;

/// Two towers whose forward can be taken back.
pub struct Graph<'a> {
    config: &'a Config,
    stored: Stored,
}

/// Images and captions that belong together.
pub struct Pairs<'a> {
    /// Patches of the images, as [`plan::patches`] makes them.
    pub patches: Buffer,
    pub texts: &'a Texts,
    /// Which text is the caption of each image.
    pub captions: &'a Arc<[u32]>,
    /// The class of each image: images of one class, and their captions, mean the same.
    pub classes: &'a [u32],
}

impl<'a> Graph<'a> {
    /// Checks that every tensor is there and has its shape.
    pub fn new(model: &'a Model) -> Result<Self> {
        let config = &model.family;
        let tensors = config.tensors();
        let tensors = tensors
            .iter()
            .map(|(name, shape)| Ok((&name[..], plan::tensor(&model.weights, name, shape)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { config, stored: Stored::new(tensors, Precision::F32, |_| 0.0) })
    }

    /// The symmetric contrastive loss of a batch, summed over its pairs. Similarities are cosines times the
    /// temperature; each image is to find the captions of its class among those of the batch, all of them with
    /// equal chances, and each caption the images of its class.
    ///
    /// # Errors
    /// INTERNAL for pairs that do not fit.
    pub fn loss(&self, tape: &Tape, tuning: &dyn Tuning, pairs: Pairs<'_>) -> Result<Loss> {
        let images = self.images(tape, tuning, pairs.patches)?;
        let texts = self.texts(tape, tuning, pairs.texts)?;
        let captions = tape.rows(&texts, pairs.captions)?;
        let none = Sequences::of([]);
        let temperature = self.stored.vector(&self.run(tape, tuning, &none), TEMPERATURE, 0.0)?;
        tape.contrast(&images, &captions, &temperature, pairs.classes)
    }

    /// Vectors of images `[images, embedding]`, of any length.
    ///
    /// # Errors
    /// INTERNAL for patches that are no whole images.
    pub fn images(&self, tape: &Tape, tuning: &dyn Tuning, patches: Buffer) -> Result<Value> {
        let (positions, width) = (self.config.image.positions, self.config.patch_pixels());
        if patches.is_empty() || !patches.len().is_multiple_of(positions * width) {
            return Err(Error::internal("patches that are no whole images"));
        }
        let images = patches.len() / (positions * width);
        let sequences = Sequences::of(std::iter::repeat_n(positions, images));
        let run = self.run(tape, tuning, &sequences);
        let patches = Value::constant(patches, width);
        let states = self.stored.linear(&run, &patches, "image.patch", true)?;
        self.through(&run, Side::Image, &states)
    }

    /// Vectors of texts `[texts, embedding]`, of any length.
    ///
    /// # Errors
    /// INTERNAL for tokens or lengths that the model does not know.
    pub fn texts(&self, tape: &Tape, tuning: &dyn Tuning, texts: &Texts) -> Result<Value> {
        let sequences = Sequences::of(texts.ranges.iter().map(ExactSizeIterator::len));
        if sequences.longest() > self.config.text.positions {
            return Err(Error::internal("a caption that is longer than the model sees"));
        }
        let run = self.run(tape, tuning, &sequences);
        let states = self.table(&run, "text.tokens.weight", &texts.tokens[..].into())?;
        self.through(&run, Side::Text, &states)
    }

    fn run<'r>(&self, tape: &'r Tape, tuning: &'r dyn Tuning, sequences: &'r Sequences) -> Run<'r> {
        Run { tape, tuning, sequences, training: true, read: true }
    }

    /// Rows of a table of embeddings.
    fn table(&self, run: &Run<'_>, name: &str, rows: &Arc<[u32]>) -> Result<Value> {
        if let Some(table) = self.stored.trained(run, name)? {
            return run.tape.rows(&table, rows);
        }
        let table = self.stored.matrix(name)?;
        if rows.iter().any(|row| *row as usize >= table.rows()) {
            return Err(Error::internal(format!("a row that '{name}' does not have")));
        }
        let width = table.cols();
        let mut out = run.tape.pool().take(rows.len() * width);
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            table.weight().read_rows(*row as usize, out);
        }
        Ok(Value::constant(out, width))
    }

    /// From embedded patches or tokens to vectors.
    fn through(&self, run: &Run<'_>, side: Side, states: &Value) -> Result<Value> {
        let (tower, place) = (self.config.tower(side), side.name());
        let positions =
            self.table(run, &format!("{place}.positions.weight"), run.sequences.positions())?;
        let mut x = run.tape.add(states, &positions)?;
        for block in 0..tower.layers {
            x = self.block(run, side, &x, block)?;
        }
        let x = self.norm(run, &x, &format!("{place}.norm"))?;
        let pooled = run.tape.mean_rows(&x, run.sequences.ranges())?;
        self.stored.linear(run, &pooled, &format!("{place}.projection"), false)
    }

    fn norm(&self, run: &Run<'_>, x: &Value, place: &str) -> Result<Value> {
        let vector = |which| self.stored.vector(run, &format!("{place}.{which}"), 0.0);
        run.tape.layer_norm(x, &vector("weight")?, &vector("bias")?, self.config.norm_eps)
    }

    fn block(&self, run: &Run<'_>, side: Side, x: &Value, index: usize) -> Result<Value> {
        let (tower, tape) = (self.config.tower(side), run.tape);
        let name = |part: &str| format!("{}.blocks.{index}.{part}", side.name());
        let linear = |x: &Value, part: &str| self.stored.linear(run, x, &name(part), true);
        let shape = Attention {
            heads: tower.heads,
            kv_heads: tower.heads,
            dim: tower.head_dim(),
            scale: 1.0 / (tower.head_dim() as f32).sqrt(),
            softcap: None,
            causal: false,
            window: None,
        };
        let inputs = self.norm(run, x, &name("attention_norm"))?;
        let attended = {
            let q = linear(&inputs, "attention.query")?;
            let k = linear(&inputs, "attention.key")?;
            let v = linear(&inputs, "attention.value")?;
            tape.attention(&shape, run.sequences.ranges(), &q, &k, &v)?
        };
        let x = tape.add(x, &linear(&attended, "attention.output")?)?;
        let inputs = self.norm(run, &x, &name("feed_forward_norm"))?;
        let wide = tape.activation(Function::Gelu, &linear(&inputs, "feed_forward.up")?);
        tape.add(&x, &linear(&wide, "feed_forward.down")?)
    }
}
