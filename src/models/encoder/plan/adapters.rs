//! Adapters in the forward: texts side by side, each with the adapters of its request.
//!
//! An encoder computes in f32 unless told otherwise, and so do its adapters: vectors are kept for years.
//! Rows of neighbouring texts with the same adapters go through a factor together.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::super::Config;
use super::layer::{Norm, sized};
use crate::error::{Error, Reason, Result};
use crate::kernels::f32_panels::F32Panels;
use crate::kernels::norm;
use crate::nn::adapter::{Changes, Product};

/// The linears of a block, in the order in which it runs them.
const SITES: [&str; 6] = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
];

/// A linear of a block: its place in [`SITES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Site {
    Query,
    Key,
    Value,
    Out,
    Up,
    Down,
}

/// A normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Embeddings,
    AfterAttention(usize),
    AfterMlp(usize),
}

type Values = Option<Arc<[f32]>>;

#[derive(Debug, Default)]
struct Linear {
    /// `A` `[rank, in]` and `B` `[out, rank]`, and their scale.
    product: Option<(F32Panels, F32Panels, f32)>,
    gain: Values,
    shift: Values,
}

/// By how much the weight and the shift of a normalisation differ.
#[derive(Debug, Default)]
struct Normed {
    weight: Values,
    shift: Values,
}

#[derive(Debug, Default)]
struct Layer {
    linears: [Linear; SITES.len()],
    norms: [Normed; 2],
}

/// An adapter that fits the shapes of an encoder, ready to run.
#[derive(Debug)]
pub struct Fitted {
    digest: String,
    layers: Vec<Layer>,
    embeddings: Normed,
    /// Of the table of words.
    table: Option<Product>,
    bytes: u64,
    /// Width and inner width of the encoder.
    shape: [usize; 2],
}

impl Fitted {
    /// Finds the place of every part. `digest` stands for the adapter's content and the version that it was
    /// made ready for.
    ///
    /// # Errors
    /// MODEL_UNSUITABLE for what the encoder does not have or has in another shape, UNSUPPORTED for whole
    /// matrices, which do not serve beside their base.
    pub fn of(digest: &str, changes: &Changes, config: &Config) -> Result<Self> {
        let mut found = Finder { changes, places: 0, bytes: 0 };
        let (hidden, wide) = (config.hidden, config.intermediate);
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let mut layer = Layer::default();
            for (site, (linear, name)) in layer.linears.iter_mut().zip(SITES).enumerate() {
                let shape = match site {
                    4 => [wide, hidden],
                    5 => [hidden, wide],
                    _ => [hidden, hidden],
                };
                let path = format!("encoder.layer.{index}.{name}");
                let weight = format!("{path}.weight");
                linear.product = found.product(&weight, shape)?;
                linear.gain = found.values(&changes.gains, &weight, shape[0])?;
                linear.shift = found.values(&changes.tensors, &format!("{path}.bias"), shape[0])?;
            }
            for (normed, name) in layer.norms.iter_mut().zip(["attention.output", "output"]) {
                *normed = found.norm(&format!("encoder.layer.{index}.{name}"), hidden)?;
            }
            layers.push(layer);
        }
        let embeddings = found.norm("embeddings", hidden)?;
        let table = found.table("embeddings.word_embeddings.weight", [config.vocab, hidden])?;
        let parts = changes.products.len() + changes.gains.len() + changes.tensors.len();
        if found.places != parts {
            return Err(stranger(changes, config));
        }
        let bytes = found.bytes as u64;
        let shape = [hidden, wide];
        Ok(Self { digest: digest.to_owned(), layers, embeddings, table, bytes, shape })
    }

    /// Digest of the adapter's content.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn norm(&self, place: Place) -> Option<&Normed> {
        match place {
            Place::Embeddings => Some(&self.embeddings),
            Place::AfterAttention(layer) => Some(&self.layers.get(layer)?.norms[0]),
            Place::AfterMlp(layer) => Some(&self.layers.get(layer)?.norms[1]),
        }
    }
}

/// Takes parts of an adapter to their places.
struct Finder<'a> {
    changes: &'a Changes,
    places: usize,
    bytes: usize,
}

impl Finder<'_> {
    fn product(
        &mut self,
        name: &str,
        shape: [usize; 2],
    ) -> Result<Option<(F32Panels, F32Panels, f32)>> {
        let Some(product) = self.changes.products.get(name) else { return Ok(None) };
        let Product { rank, a, b, scale, .. } = product;
        let (rank, [rows, cols]) = (*rank, shape);
        if product.shape != shape || a.len() != rank * cols || b.len() != rows * rank {
            return Err(misfit(&format!(
                "'{name}' is {shape:?}, but the adapter adds to {:?}",
                product.shape
            )));
        }
        let a = F32Panels::pack(rank, cols, |row, out| {
            out.copy_from_slice(&a[row * cols..][..cols]);
        });
        let b =
            F32Panels::pack(rows, rank, |row, out| out.copy_from_slice(&b[row * rank..][..rank]));
        self.places += 1;
        self.bytes += a.bytes() + b.bytes();
        Ok(Some((a, b, *scale)))
    }

    fn table(&mut self, name: &str, shape: [usize; 2]) -> Result<Option<Product>> {
        let Some(table) = self.changes.products.get(name) else { return Ok(None) };
        let (rank, [rows, cols]) = (table.rank, shape);
        if table.shape != shape || table.a.len() != rank * cols || table.b.len() != rows * rank {
            return Err(misfit(&format!(
                "'{name}' is {shape:?}, but the adapter adds to {:?}",
                table.shape
            )));
        }
        self.places += 1;
        self.bytes += size_of_val(&table.a[..]) + size_of_val(&table.b[..]);
        Ok(Some(table.clone()))
    }

    fn values(
        &mut self,
        of: &BTreeMap<String, Arc<[f32]>>,
        name: &str,
        width: usize,
    ) -> Result<Values> {
        let Some(values) = of.get(name) else { return Ok(None) };
        if values.len() != width {
            return Err(misfit(&format!(
                "'{name}' has {width} elements, but the adapter changes {}",
                values.len()
            )));
        }
        self.places += 1;
        self.bytes += size_of_val(&values[..]);
        Ok(Some(Arc::clone(values)))
    }

    fn norm(&mut self, path: &str, width: usize) -> Result<Normed> {
        let tensors = &self.changes.tensors;
        Ok(Normed {
            weight: self.values(tensors, &format!("{path}.LayerNorm.weight"), width)?,
            shift: self.values(tensors, &format!("{path}.LayerNorm.bias"), width)?,
        })
    }
}

fn misfit(problem: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!("{problem}; the adapter belongs to another model: name the one it was made for"),
    )
}

/// The error of a part without a place.
fn stranger(changes: &Changes, config: &Config) -> Error {
    let known = config.tensors();
    let matrix = |name: &&String| known.iter().any(|(n, shape)| n == *name && shape.len() > 1);
    match changes.tensors.keys().find(matrix) {
        Some(name) => Error::new(
            Reason::Unsupported,
            format!(
                "the adapter has all of '{name}', a matrix, which does not serve beside its base: merge \
                 the adapter into a version (MergeAdapter, `planish adapters merge`) and use that"
            ),
        ),
        None => misfit("the adapter changes tensors that the model does not have"),
    }
}

/// The adapters of a request with their weights. Cheap to clone; empty by default.
#[derive(Debug, Clone, Default)]
pub struct Mix {
    parts: Arc<[(Arc<Fitted>, f32)]>,
}

impl Mix {
    /// Parts in any order; those with weight 0 are left out. What they change is summed.
    pub fn new(parts: impl IntoIterator<Item = (Arc<Fitted>, f32)>) -> Self {
        let mut parts: Vec<_> = parts.into_iter().filter(|(_, weight)| *weight != 0.0).collect();
        // In one order, so that a set adds up to the same bits however it was written.
        parts.sort_by(|(a, v), (b, w)| a.digest.cmp(&b.digest).then(v.total_cmp(w)));
        Self { parts: parts.into() }
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Refuses an encoder with other shapes than the adapters'.
    pub fn check(&self, config: &Config) -> Result<()> {
        let fits = |(adapter, _): &(Arc<Fitted>, f32)| {
            adapter.shape == [config.hidden, config.intermediate]
                && adapter.layers.len() == config.layers
        };
        match self.parts.iter().all(fits) {
            true => Ok(()),
            false => Err(misfit("the adapter was made for a model with other shapes")),
        }
    }

    /// Whether both are the same adapters with the same weights.
    fn same(&self, other: &Self) -> bool {
        let equal = |((a, v), (b, w)): (&(Arc<Fitted>, f32), &(Arc<Fitted>, f32))| {
            a.digest == b.digest && v.to_bits() == w.to_bits()
        };
        self.parts.len() == other.parts.len() && self.parts.iter().zip(&*other.parts).all(equal)
    }
}

/// Rows with adapters, in order; rows between them have none.
#[derive(Debug, Default)]
pub(super) struct Rows<'a> {
    runs: Vec<(Range<usize>, &'a Mix)>,
}

impl<'a> Rows<'a> {
    /// Of texts one after the other; those with the same adapters side by side become one run.
    pub fn new(texts: impl Iterator<Item = (Range<usize>, Option<&'a Mix>)>) -> Self {
        let mut runs: Vec<(Range<usize>, &'a Mix)> = Vec::new();
        for (rows, mix) in texts {
            let Some(mix) = mix.filter(|mix| !mix.is_empty()) else { continue };
            match runs.last_mut() {
                Some((last, known)) if last.end == rows.start && known.same(mix) => {
                    last.end = rows.end;
                }
                _ => runs.push((rows, mix)),
            }
        }
        Self { runs }
    }

    /// What of them is among some rows, counted from the first of these.
    pub fn within(&self, rows: Range<usize>) -> Self {
        let runs = self.runs.iter().filter_map(|(run, mix)| {
            let (start, end) = (run.start.max(rows.start), run.end.min(rows.end));
            (start < end).then(|| (start - rows.start..end - rows.start, *mix))
        });
        Self { runs: runs.collect() }
    }

    /// `y += weight * (g (y + bias) + scale * B A x + t)` for every row with its adapters; `bias` is what
    /// will be added to `y` later.
    pub fn add(
        &self,
        (layer, site): (usize, Site),
        x: &[f32],
        y: &mut [f32],
        bias: &[f32],
        room: &mut Room,
    ) {
        for (rows, mix) in &self.runs {
            let width = bias.len();
            let y = &mut y[rows.start * width..rows.end * width];
            let linears = || {
                mix.parts.iter().filter_map(|(adapter, by)| {
                    Some((&adapter.layers.get(layer)?.linears[site as usize], *by))
                })
            };
            if linears().any(|(linear, _)| linear.gain.is_some() || linear.shift.is_some()) {
                let sums = sized(&mut room.sums, 2 * width);
                sums.fill(0.0);
                let (gains, shifts) = sums.split_at_mut(width);
                for (linear, by) in linears() {
                    for (sum, values) in
                        [(&mut *gains, &linear.gain), (&mut *shifts, &linear.shift)]
                    {
                        let values = values.iter().flat_map(|values| values.iter());
                        sum.iter_mut().zip(values).for_each(|(sum, v)| *sum += by * v);
                    }
                }
                for row in y.chunks_exact_mut(width) {
                    for (i, y) in row.iter_mut().enumerate() {
                        *y += gains[i] * (*y + bias[i]) + shifts[i];
                    }
                }
            }
            for (linear, by) in linears() {
                let Some((a, b, scale)) = &linear.product else { continue };
                let count = rows.len();
                let x = &x[rows.start * a.cols()..rows.end * a.cols()];
                let h = sized(&mut room.h, count * a.rows());
                a.multiply(x, h);
                let factor = by * scale;
                h.iter_mut().for_each(|h| *h *= factor);
                let out = sized(&mut room.out, y.len());
                b.multiply(h, out);
                norm::add(y, out);
            }
        }
    }

    /// Whether some adapter changes the states before the blocks.
    pub fn embed(&self) -> bool {
        self.runs.iter().flat_map(|(_, mix)| mix.parts.iter()).any(|(adapter, _)| {
            let Normed { weight, shift } = &adapter.embeddings;
            adapter.table.is_some() || weight.is_some() || shift.is_some()
        })
    }

    /// What the tables of the adapters add to rows of `tokens`, before they are normed.
    pub fn add_words(&self, tokens: &[(u32, usize)], states: &mut [f32]) {
        for (rows, mix) in &self.runs {
            for (adapter, by) in mix.parts.iter() {
                let Some(Product { shape: [_, width], rank, a, b, scale }) = &adapter.table else {
                    continue;
                };
                for row in rows.clone() {
                    let factors = &b[tokens[row].0 as usize * rank..][..*rank];
                    let state = &mut states[row * width..][..*width];
                    for (factor, a) in factors.iter().zip(a.chunks_exact(*width)) {
                        let factor = by * scale * factor;
                        state.iter_mut().zip(a).for_each(|(s, a)| *s += factor * a);
                    }
                }
            }
        }
    }

    /// Runs whose adapters change a normalisation, with its weight and shift as they are then.
    pub fn norms(&self, place: Place, base: &Norm) -> Vec<(Range<usize>, Norm)> {
        let changed = self.runs.iter().filter_map(|(rows, mix)| {
            let parts =
                || mix.parts.iter().filter_map(|(adapter, by)| Some((adapter.norm(place)?, *by)));
            let any = parts().any(|(n, _)| n.weight.is_some() || n.shift.is_some());
            any.then(|| {
                let mut norm = base.clone();
                for (part, by) in parts() {
                    for (to, values) in
                        [(&mut norm.weight, &part.weight), (&mut norm.shift, &part.shift)]
                    {
                        let values = values.iter().flat_map(|values| values.iter());
                        to.iter_mut().zip(values).for_each(|(to, v)| *to += by * v);
                    }
                }
                (rows.clone(), norm)
            })
        });
        changed.collect()
    }
}

/// What applying adapters takes, kept between steps.
#[derive(Debug, Default)]
pub(super) struct Room {
    h: Vec<f32>,
    out: Vec<f32>,
    sums: Vec<f32>,
}
