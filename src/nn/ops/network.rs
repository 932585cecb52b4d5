//! What the differentiable forwards of the families share: how a pass runs, and how a layer asks what is
//! tuned of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::linear::{Linear, Precision};
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::nn::tuning::{LowRank, Tuning};
use crate::nn::weight::Weight;

/// Sequences that stand one after another.
#[derive(Debug, Clone)]
pub struct Sequences {
    ranges: Arc<[Range<usize>]>,
    positions: Arc<[u32]>,
    /// What kind of token each row is; 0 where absent.
    types: Option<Arc<[u32]>>,
}

impl Sequences {
    /// Of these lengths, in this order; each starts at position 0.
    pub fn of(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let ranges: Vec<_> = lengths
            .into_iter()
            .map(|length| {
                end += length;
                end - length..end
            })
            .collect();
        let positions = ranges.iter().flat_map(|range| 0..range.len() as u32).collect();
        Self { ranges: ranges.into(), positions, types: None }
    }

    /// The same with a type for each row.
    #[must_use]
    pub fn with_types(self, types: Arc<[u32]>) -> Self {
        Self { types: Some(types), ..self }
    }

    /// The type of each row: which text of two it belongs to.
    pub fn types(&self) -> Arc<[u32]> {
        match &self.types {
            Some(types) => Arc::clone(types),
            None => vec![0; self.rows()].into(),
        }
    }

    /// The rows of each.
    pub fn ranges(&self) -> &Arc<[Range<usize>]> {
        &self.ranges
    }

    /// The position of each row in its sequence.
    pub fn positions(&self) -> &Arc<[u32]> {
        &self.positions
    }

    /// Rows of all of them.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Tokens of the longest.
    pub fn longest(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).max().unwrap_or(0)
    }
}

/// What one pass through a network works with.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub tape: &'a Tape,
    pub tuning: &'a dyn Tuning,
    pub sequences: &'a Sequences,
    /// Whether dropout applies.
    pub training: bool,
    /// Whether the result of a block is read; where only its gradient is wanted, a block may leave out what
    /// its result alone needs.
    pub read: bool,
}

/// A network as a row of blocks, which can be run one at a time.
pub trait Network {
    /// Number of blocks.
    fn blocks(&self) -> usize;

    /// What the first block gets, `[tokens, hidden]`; ids are checked.
    fn start(&self, run: &Run<'_>, tokens: &[u32]) -> Result<Value>;

    /// Block `index`: hidden states in, hidden states out.
    fn block(&self, run: &Run<'_>, hidden: &Value, index: usize) -> Result<Value>;

    /// All blocks.
    fn through(&self, run: &Run<'_>, hidden: Value) -> Result<Value> {
        (0..self.blocks()).try_fold(hidden, |hidden, index| self.block(run, &hidden, index))
    }
}

/// The stored tensors of a network as a pass uses them: matrices ready to multiply, vectors in f32.
pub struct Stored {
    precision: Precision,
    linears: BTreeMap<String, Arc<Linear>>,
    vectors: BTreeMap<String, Value>,
}

impl Stored {
    /// Of tensors by name. Matrices run as `precision` says; `offset` is added to the vectors that it is
    /// given for.
    pub fn new<'a>(
        tensors: impl IntoIterator<Item = (&'a str, &'a Arc<Weight>)>,
        precision: Precision,
        offset: impl Fn(&str) -> f32,
    ) -> Self {
        let pool = super::Pool::default();
        let (mut linears, mut vectors) = (BTreeMap::new(), BTreeMap::new());
        for (name, weight) in tensors {
            if weight.shape().len() == 1 {
                let mut data = pool.take(weight.cols());
                weight.read_rows(0, &mut data);
                let by = offset(name);
                data.iter_mut().for_each(|v| *v += by);
                vectors.insert(name.to_owned(), Value::constant(data, weight.cols()));
            } else {
                linears.insert(name.to_owned(), Arc::new(Linear::new(weight, precision)));
            }
        }
        Self { precision, linears, vectors }
    }

    /// How matrices run.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The matrix `name`.
    pub fn matrix(&self, name: &str) -> Result<&Arc<Linear>> {
        self.linears.get(name).ok_or_else(|| missing(name))
    }

    /// The vector `name`, or what is tuned in its place, to which `offset` is added.
    pub fn vector(&self, run: &Run<'_>, name: &str, offset: f32) -> Result<Value> {
        let stored = self.vectors.get(name).ok_or_else(|| missing(name))?;
        let Some(tuned) = run.tuning.tensor(name)? else { return Ok(stored.clone()) };
        let tuned = run.tape.leaf(&tuned)?;
        if tuned.rows() != 1 || tuned.width() != stored.width() {
            return Err(Error::internal(format!("what is tuned of '{name}' has another shape")));
        }
        Ok(if offset == 0.0 { tuned } else { run.tape.offset(tuned, offset) })
    }

    /// The table or matrix that is trained in place of `name`, if one is.
    pub fn trained(&self, run: &Run<'_>, name: &str) -> Result<Option<Value>> {
        let Some(tuned) = run.tuning.tensor(name)? else { return Ok(None) };
        let stored = self.matrix(name)?;
        if tuned.dims() != [stored.rows(), stored.cols()] {
            return Err(Error::internal(format!(
                "what is trained in place of '{name}' has shape {:?}, not [{}, {}]",
                tuned.dims(),
                stored.rows(),
                stored.cols()
            )));
        }
        run.tape.leaf(&tuned).map(Some)
    }

    /// The linear layer `name` (without `.weight`), as it is tuned.
    pub fn linear(&self, run: &Run<'_>, x: &Value, name: &str, biased: bool) -> Result<Value> {
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        let stored = self.matrix(&weight)?;
        let bias = match biased {
            true => Some(self.vector(run, &bias, 0.0)?),
            false => None,
        };
        let tape = run.tape;
        // A frozen bias is added together with the product.
        let constant = bias.as_ref().filter(|bias| !bias.tracked()).map(Value::read);
        let together = constant.as_deref();
        let y = if let Some(trained) = self.trained(run, &weight)? {
            tape.dense(x, &trained)?
        } else if let Some(change) = self.change(run, &weight)? {
            let y = tape.tuned_product(x, stored, Some(&change), together)?;
            if together.is_some() {
                return Ok(y);
            }
            y
        } else if let Some(y) = self.computed(run, x, &weight, stored)? {
            y
        } else {
            let y = tape.tuned_product(x, stored, None, together)?;
            if together.is_some() {
                return Ok(y);
            }
            y
        };
        match &bias {
            Some(bias) => tape.add_bias(y, bias),
            None => Ok(y),
        }
    }

    /// The linear layer `name`, whose result is read if `read` says so and only added to something if not.
    pub fn last_linear(
        &self,
        run: &Run<'_>,
        x: &Value,
        name: &str,
        biased: bool,
        read: bool,
    ) -> Result<Value> {
        let weight = format!("{name}.weight");
        let special =
            biased || run.tuning.computes(&weight) || run.tuning.tensor(&weight)?.is_some();
        if read || special {
            return self.linear(run, x, name, biased);
        }
        let change = self.change(run, &weight)?;
        run.tape.unread_product(x, self.matrix(&weight)?, change.as_ref())
    }

    fn change(&self, run: &Run<'_>, weight: &str) -> Result<Option<LowRank>> {
        let change = run.tuning.low_rank(weight)?;
        Ok(change.map(|mut change| {
            change.dropout = change.dropout.filter(|d| run.training && d.probability > 0.0);
            change
        }))
    }

    fn computed(
        &self,
        run: &Run<'_>,
        x: &Value,
        name: &str,
        stored: &Arc<Linear>,
    ) -> Result<Option<Value>> {
        if !run.tuning.computes(name) {
            return Ok(None);
        }
        let y = run.tape.foreign(x, |x| run.tuning.linear(name, x, stored.weight()))?;
        match y {
            Some(y) if y.width() != stored.rows() || y.rows() != x.rows() => {
                Err(Error::internal(format!("what is tuned of '{name}' gives another shape")))
            }
            y => Ok(y),
        }
    }
}

fn missing(name: &str) -> Error {
    Error::new(
        crate::error::Reason::TensorNotFound,
        format!("tensor '{name}' is missing from the model; import the model again"),
    )
}
