//! The fast forward: packed products, no gradients. Towers can be walked block by block, which methods do that look
//! at what enters the weights.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::prompts::Texts;
use super::{Config, Side, Tower};
use crate::error::{Error, Reason, Result};
use crate::kernels::bidirectional::{self, Input};
use crate::kernels::f32_panels::F32Panels;
use crate::kernels::training::contrast::normalised;
use crate::kernels::{activation, norm, threads};
use crate::nn::weight::Weight;

/// Weights by name.
pub type Weights = BTreeMap<String, Arc<Weight>>;

/// Called with the input of each group of linears that share one: the group's index within the block (as in
/// [`Config::linears`]) and the rows `[tokens, in]`.
pub type Tap<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// Images or texts whose rows run at once.
const ROWS: usize = 1 << 13;
/// Elements of rows that are worth a task of their own.
const GRAIN: usize = 1 << 13;

/// The weight `name`, which must have `shape`.
///
/// # Errors
/// `TENSOR_NOT_FOUND`, `MALFORMED_FILE` for another shape.
pub fn tensor<'a>(weights: &'a Weights, name: &str, shape: &[usize]) -> Result<&'a Arc<Weight>> {
    let weight = weights.get(name).ok_or_else(|| {
        Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
    })?;
    if weight.shape() != shape {
        return Err(Error::new(
            Reason::MalformedFile,
            format!(
                "tensor '{name}' has shape {:?}, but the configuration asks for {shape:?}",
                weight.shape()
            ),
        ));
    }
    Ok(weight)
}

/// Images as rows of their patches, row by row, each patch row by row with the channels of its pixels:
/// `[images * patches, patch pixels]`.
///
/// # Panics
/// If the sizes do not fit.
pub fn patches(config: &Config, images: &[u8], out: &mut [f32]) {
    assert!(
        out.len() == images.len() && images.len().is_multiple_of(config.pixels()),
        "sizes of images do not fit"
    );
    let (grid, line) = (config.side / config.patch, config.patch * config.channels);
    let (by, less) = (1.0 / (255.0 * config.deviation), config.mean / config.deviation);
    let image = config.pixels();
    for (image, out) in images.chunks_exact(image).zip(out.chunks_exact_mut(image)) {
        for (patch, out) in out.chunks_exact_mut(config.patch_pixels()).enumerate() {
            for (y, out) in out.chunks_exact_mut(line).enumerate() {
                let row = patch / grid * config.patch + y;
                let from = row * config.side * config.channels + patch % grid * line;
                for (out, pixel) in out.iter_mut().zip(&image[from..from + line]) {
                    *out = f32::from(*pixel) * by - less;
                }
            }
        }
    }
}

/// A weight as it is multiplied.
enum Matrix {
    /// In a layout of its own.
    Plain(Arc<Weight>),
    Panels(F32Panels),
}

impl Matrix {
    fn new(weight: &Arc<Weight>) -> Self {
        match &**weight {
            Weight::Dense(_) => {
                let read = |row: usize, out: &mut [f32]| weight.read_rows(row, out);
                Self::Panels(F32Panels::pack(weight.rows(), weight.cols(), read))
            }
            _ => Self::Plain(Arc::clone(weight)),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Plain(weight) => weight.rows(),
            Self::Panels(panels) => panels.rows(),
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Plain(weight) => weight.cols(),
            Self::Panels(panels) => panels.cols(),
        }
    }

    fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.cols() * self.rows()];
        match self {
            Self::Plain(weight) => weight.multiply(x, &mut y),
            Self::Panels(panels) => panels.multiply(x, &mut y),
        }
        y
    }
}

struct Linear {
    matrix: Matrix,
    bias: Vec<f32>,
}

impl Linear {
    fn new(weights: &Weights, name: &str, shape: [usize; 2]) -> Result<Self> {
        let weight = tensor(weights, &format!("{name}.weight"), &shape)?;
        let bias = tensor(weights, &format!("{name}.bias"), &shape[..1])?;
        Ok(Self { matrix: Matrix::new(weight), bias: bias.to_f32() })
    }
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl Norm {
    fn new(config: &Config, weights: &Weights, name: &str, width: usize) -> Result<Self> {
        let vector = |part: &str| {
            tensor(weights, &format!("{name}.{part}"), &[width]).map(|weight| weight.to_f32())
        };
        Ok(Self { weight: vector("weight")?, bias: vector("bias")?, eps: config.norm_eps })
    }

    fn of(&self, states: &[f32]) -> Vec<f32> {
        let (mut out, width) = (states.to_vec(), self.weight.len());
        threads::for_rows(&mut out, width, GRAIN / width + 1, |_, rows| {
            norm::layer_norm(rows, &self.weight, &self.bias, self.eps);
        });
        out
    }
}

/// A block of a tower.
pub struct Block {
    tower: Tower,
    attention_norm: Norm,
    /// Of queries, keys and values, which share their input.
    qkv: [Linear; 3],
    out: Linear,
    feed_forward_norm: Norm,
    up: Linear,
    down: Linear,
}

impl Block {
    /// Takes the weights of block `index` from the map of a model.
    ///
    /// # Errors
    /// A missing tensor, or one of the wrong shape.
    pub fn new(config: &Config, weights: &Weights, side: Side, index: usize) -> Result<Self> {
        let tower = config.tower(side).clone();
        let (hidden, wide) = (tower.hidden, tower.intermediate);
        let name = |part: &str| format!("{}.blocks.{index}.{part}", side.name());
        let linear = |part: &str, rows, cols| Linear::new(weights, &name(part), [rows, cols]);
        let norm = |part: &str| Norm::new(config, weights, &name(part), hidden);
        Ok(Self {
            attention_norm: norm("attention_norm")?,
            qkv: [
                linear("attention.query", hidden, hidden)?,
                linear("attention.key", hidden, hidden)?,
                linear("attention.value", hidden, hidden)?,
            ],
            out: linear("attention.output", hidden, hidden)?,
            feed_forward_norm: norm("feed_forward_norm")?,
            up: linear("feed_forward.up", wide, hidden)?,
            down: linear("feed_forward.down", hidden, wide)?,
            tower,
        })
    }

    /// States in, states out, in place: `[rows, hidden]`, which `sequences` tile.
    pub fn forward(
        &self,
        states: &mut [f32],
        sequences: &[Range<usize>],
        tap: &mut Option<&mut Tap<'_>>,
    ) {
        let mut seen = |group: usize, rows: &[f32]| {
            if let Some(tap) = tap {
                tap(group, rows);
            }
        };
        let inputs = self.attention_norm.of(states);
        seen(0, &inputs);
        let [q, k, v] = self.qkv.each_ref().map(|linear| linear.matrix.multiply(&inputs));
        let mut attended = inputs;
        let shape = bidirectional::Shape {
            heads: self.tower.heads,
            dim: self.tower.head_dim(),
            scale: 1.0 / (self.tower.head_dim() as f32).sqrt(),
        };
        let [q, k, v] =
            [(&q, 0), (&k, 1), (&v, 2)].map(|(rows, i)| Input { rows, bias: &self.qkv[i].bias });
        bidirectional::attend(&shape, sequences, (q, k, v), &mut attended);
        seen(1, &attended);
        add(states, &self.out.matrix.multiply(&attended), &self.out.bias);
        let inputs = self.feed_forward_norm.of(states);
        seen(2, &inputs);
        let mut wide = self.up.matrix.multiply(&inputs);
        let bias = &self.up.bias;
        threads::for_rows(&mut wide, bias.len(), GRAIN / bias.len() + 1, |_, rows| {
            activation::bias_gelu(rows, bias);
        });
        seen(3, &wide);
        add(states, &self.down.matrix.multiply(&wide), &self.down.bias);
    }
}

/// `states += delta + bias`
fn add(states: &mut [f32], delta: &[f32], bias: &[f32]) {
    let width = bias.len();
    threads::for_rows(states, width, GRAIN / width + 1, |first, rows| {
        let delta = delta[first * width..].chunks_exact(width);
        for (row, delta) in rows.chunks_exact_mut(width).zip(delta) {
            norm::add(row, delta);
            norm::add(row, bias);
        }
    });
}

/// What stands before and after the blocks of a tower.
pub struct Ends {
    embed: Embed,
    positions: Vec<f32>,
    norm: Norm,
    projection: Matrix,
    hidden: usize,
}

enum Embed {
    Patches(Linear),
    Tokens(Arc<Weight>),
}

/// What goes into a tower.
pub enum Inputs<'a> {
    /// As [`patches`] makes them.
    Patches(&'a [f32]),
    Texts(&'a Texts),
}

impl Ends {
    /// Takes the weights from the map of a model.
    ///
    /// # Errors
    /// A missing tensor, or one of the wrong shape.
    pub fn new(config: &Config, weights: &Weights, side: Side) -> Result<Self> {
        let (tower, place) = (config.tower(side), side.name());
        let hidden = tower.hidden;
        let embed = match side {
            Side::Image => Embed::Patches(Linear::new(
                weights,
                "image.patch",
                [hidden, config.patch_pixels()],
            )?),
            Side::Text => Embed::Tokens(Arc::clone(tensor(
                weights,
                "text.tokens.weight",
                &[config.vocab, hidden],
            )?)),
        };
        let positions = format!("{place}.positions.weight");
        let projection = format!("{place}.projection.weight");
        Ok(Self {
            embed,
            positions: tensor(weights, &positions, &[tower.positions, hidden])?.to_f32(),
            norm: Norm::new(config, weights, &format!("{place}.norm"), hidden)?,
            projection: Matrix::new(tensor(weights, &projection, &[config.embedding, hidden])?),
            hidden,
        })
    }

    /// The states that enter the first block, and the rows of each image or text.
    ///
    /// # Errors
    /// INTERNAL for inputs of the other tower, tokens that the model does not know and texts that are too long.
    pub fn start(&self, inputs: &Inputs<'_>) -> Result<(Vec<f32>, Arc<[Range<usize>]>)> {
        let (mut states, ranges) = match (&self.embed, inputs) {
            (Embed::Patches(linear), Inputs::Patches(patches)) => {
                let rows = patches.len() / linear.matrix.cols();
                let each = self.positions.len() / self.hidden;
                if !rows.is_multiple_of(each) {
                    return Err(Error::internal("patches that are no whole images"));
                }
                let mut states = linear.matrix.multiply(patches);
                states.chunks_exact_mut(self.hidden).for_each(|row| norm::add(row, &linear.bias));
                let ranges = (0..rows / each).map(|i| i * each..(i + 1) * each);
                (states, ranges.collect())
            }
            (Embed::Tokens(table), Inputs::Texts(texts)) => {
                let long = |r: &Range<usize>| r.len() * self.hidden > self.positions.len();
                if texts.tokens.iter().any(|token| *token as usize >= table.rows())
                    || texts.ranges.iter().any(long)
                {
                    return Err(Error::internal("a caption that the model cannot read"));
                }
                let mut states = vec![0.0; texts.tokens.len() * self.hidden];
                for (token, row) in texts.tokens.iter().zip(states.chunks_exact_mut(self.hidden)) {
                    table.read_rows(*token as usize, row);
                }
                (states, Arc::clone(&texts.ranges))
            }
            _ => return Err(Error::internal("inputs of the other tower")),
        };
        for range in ranges.iter() {
            let own = &mut states[range.start * self.hidden..range.end * self.hidden];
            norm::add(own, &self.positions[..own.len()]);
        }
        Ok((states, ranges))
    }

    /// Vectors `[images or texts, embedding]`, of any length, from the states that leave the last block.
    pub fn finish(&self, states: &[f32], sequences: &[Range<usize>]) -> Vec<f32> {
        let states = self.norm.of(states);
        let mut pooled = vec![0.0; sequences.len() * self.hidden];
        for (range, out) in sequences.iter().zip(pooled.chunks_exact_mut(self.hidden)) {
            for row in
                states[range.start * self.hidden..range.end * self.hidden].chunks_exact(self.hidden)
            {
                norm::add(out, row);
            }
            let share = 1.0 / range.len().max(1) as f32;
            out.iter_mut().for_each(|v| *v *= share);
        }
        self.projection.multiply(&pooled)
    }
}

/// Both towers, ready to run.
pub struct Plan<'a> {
    config: &'a Config,
    towers: [(Ends, Vec<Block>); 2],
}

impl<'a> Plan<'a> {
    /// Packs the weights.
    ///
    /// # Errors
    /// A missing tensor, or one of the wrong shape.
    pub fn new(config: &'a Config, weights: &Weights) -> Result<Self> {
        let tower = |side: Side| -> Result<(Ends, Vec<Block>)> {
            let blocks = 0..config.tower(side).layers;
            let blocks = blocks.map(|index| Block::new(config, weights, side, index));
            Ok((Ends::new(config, weights, side)?, blocks.collect::<Result<_>>()?))
        };
        Ok(Self { config, towers: [tower(Side::Image)?, tower(Side::Text)?] })
    }

    /// Vectors of length 1 `[images, embedding]` of images, pixels row by row with their channels.
    ///
    /// # Errors
    /// INTERNAL for bytes that are no whole images.
    pub fn images(&self, images: &[u8]) -> Result<Vec<f32>> {
        let image = self.config.pixels();
        if !images.len().is_multiple_of(image) {
            return Err(Error::internal("bytes that are no whole images"));
        }
        let each = (ROWS / self.config.image.positions).max(1) * image;
        let mut out = Vec::new();
        for some in images.chunks(each) {
            let mut rows = vec![0.0; some.len()];
            patches(self.config, some, &mut rows);
            out.extend(self.embed(Side::Image, &Inputs::Patches(&rows))?);
        }
        Ok(normalised(&out, self.config.embedding))
    }

    /// Vectors of length 1 `[texts, embedding]`.
    ///
    /// # Errors
    /// INTERNAL for texts that the model cannot read.
    pub fn texts(&self, texts: &[Vec<u32>]) -> Result<Vec<f32>> {
        let each = (ROWS / self.config.text.positions).max(1);
        let mut out = Vec::new();
        for some in texts.chunks(each) {
            let texts = Texts::of(some.iter().map(Vec::as_slice));
            out.extend(self.embed(Side::Text, &Inputs::Texts(&texts))?);
        }
        Ok(normalised(&out, self.config.embedding))
    }

    /// Vectors of any length.
    ///
    /// # Errors
    /// As of [`Ends::start`].
    pub fn embed(&self, side: Side, inputs: &Inputs<'_>) -> Result<Vec<f32>> {
        let (ends, blocks) = &self.towers[side as usize];
        let (mut states, sequences) = ends.start(inputs)?;
        for block in blocks {
            block.forward(&mut states, &sequences, &mut None);
        }
        Ok(ends.finish(&states, &sequences))
    }
}
