//! Products with matrices: stored ones, which are frozen, and trained ones.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use super::buffer::Buffer;
use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::bf16::{Bf16Panels, Rounded};
use crate::kernels::gemm::{self, View};
use crate::kernels::training::elementwise;
use crate::nn::tuning::{Dropout, LowRank};
use crate::nn::weight::Weight;

/// The numbers in which products with stored weights run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Weights as their layout has them, activations f32.
    #[default]
    F32,
    /// Weights, activations and gradients rounded to bf16, sums in f32. Weights are packed when they are first
    /// used, and kept so.
    Bf16,
}

/// A stored matrix `[out, in]`.
pub struct Linear {
    weight: Arc<Weight>,
    precision: Precision,
    packed: OnceLock<Bf16Panels>,
}

impl Linear {
    pub fn new(weight: &Arc<Weight>, precision: Precision) -> Self {
        Self { weight: Arc::clone(weight), precision, packed: OnceLock::new() }
    }

    pub fn weight(&self) -> &Arc<Weight> {
        &self.weight
    }

    pub fn rows(&self) -> usize {
        self.weight.rows()
    }

    pub fn cols(&self) -> usize {
        self.weight.cols()
    }

    /// Bytes that packing has taken so far, beside the weight itself.
    pub fn packed_bytes(&self) -> u64 {
        self.packed.get().map_or(0, |panels| panels.bytes() as u64)
    }

    /// `y = x w^T`, overwritten.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        match self.precision {
            Precision::F32 => self.weight.multiply(x, y),
            Precision::Bf16 => {
                product(self.packed.get_or_init(|| pack(&self.weight)), x, self.cols(), y);
            }
        }
    }

    /// `dx = g w`, overwritten.
    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        match self.precision {
            Precision::F32 => self.weight.multiply_transposed(g, dx),
            Precision::Bf16 => {
                // Packed anew each time: that costs a tenth of the product, and keeping it would double
                // what the weights take.
                let mut panels = TRANSPOSED.take();
                let read = |row: usize, out: &mut [f32]| self.weight.read_rows(row, out);
                panels.set_transposed(self.rows(), self.cols(), read);
                product(&panels, g, self.rows(), dx);
                TRANSPOSED.set(panels);
            }
        }
    }
}

thread_local! {
    /// Room for rounded inputs, kept from one product to the next.
    static ROUNDED: RefCell<Rounded> = RefCell::default();

    /// Room for a transposed weight.
    static TRANSPOSED: RefCell<Bf16Panels> = RefCell::default();
}

/// The product of rows `x` of width `cols` with packed panels.
fn product(panels: &Bf16Panels, x: &[f32], cols: usize, y: &mut [f32]) {
    let mut rounded = ROUNDED.take();
    rounded.set(x, cols);
    panels.multiply(&rounded, y);
    ROUNDED.set(rounded);
}

fn pack(weight: &Weight) -> Bf16Panels {
    Bf16Panels::pack(weight.rows(), weight.cols(), |row, out| weight.read_rows(row, out))
}

impl Tape {
    /// `x w^T`, the weight being frozen.
    ///
    /// # Errors
    /// INTERNAL for an input of another width.
    pub fn product(&self, x: &Value, weight: &Arc<Linear>) -> Result<Value> {
        self.tuned_product(x, weight, None, None)
    }

    /// `(x w^T + bias)`, or with a low-rank addition `rows * (x w^T + scale * dropout(x) a^T b^T) + bias`;
    /// the weight is frozen. `bias` is a constant, which is added without a pass of its own.
    ///
    /// # Errors
    /// INTERNAL for shapes that do not fit.
    pub fn tuned_product(
        &self,
        x: &Value,
        weight: &Arc<Linear>,
        change: Option<&LowRank>,
        bias: Option<&[f32]>,
    ) -> Result<Value> {
        self.any_product(x, weight, change, bias, true)
    }

    /// The same for a result that nobody reads: only its gradient is wanted, so its elements, which are left
    /// unspecified, are not computed.
    ///
    /// # Errors
    /// As of [`Tape::tuned_product`].
    pub fn unread_product(
        &self,
        x: &Value,
        weight: &Arc<Linear>,
        change: Option<&LowRank>,
    ) -> Result<Value> {
        // The gradient of factors on the outputs needs the outputs.
        let needed = change.is_some_and(|change| change.rows.is_some());
        self.any_product(x, weight, change, None, needed)
    }

    fn any_product(
        &self,
        x: &Value,
        weight: &Arc<Linear>,
        change: Option<&LowRank>,
        bias: Option<&[f32]>,
        read: bool,
    ) -> Result<Value> {
        let (inner, outer) = (weight.cols(), weight.rows());
        if x.width() != inner || bias.is_some_and(|bias| bias.len() != outer) {
            return Err(Error::internal(format!(
                "rows of {} do not fit a weight of shape [{outer}, {inner}]",
                x.width()
            )));
        }
        let mut y = self.pool().take(x.rows() * outer);
        if read {
            weight.multiply(&x.read(), &mut y);
        }
        let Some(change) = change else {
            if let Some(bias) = bias {
                elementwise::add_bias(&mut y, bias);
            }
            return Ok(self.result(y, outer, &[x], || {
                let (weight, node, len) = (Arc::clone(weight), x.node(), x.rows() * inner);
                move |g, sink| {
                    let Some(node) = node else { return Ok(()) };
                    let mut dx = sink.pool().take(len);
                    weight.multiply_transposed(&g, &mut dx);
                    sink.add(node, Arc::new(dx));
                    Ok(())
                }
            }));
        };

        let factors = Factors::new(self, change, [outer, inner])?;
        let tokens = x.rows();
        let dropped = change.dropout.map(|dropout| drop_some(self, &x.read(), dropout));
        // `h = scale * dropout(x) a^T`
        let mut h = self.pool().take(tokens * factors.rank);
        {
            let (x, a) = (x.read(), factors.a.read());
            let x = View::new(dropped.as_deref().unwrap_or(&x), tokens, inner);
            gemm::gemm(
                x,
                View::new(&a, factors.rank, inner).t(),
                &mut h,
                factors.rank,
                false,
                true,
            );
            elementwise::scale(&mut h, factors.scale);
            if read {
                let h = View::new(&h, tokens, factors.rank);
                let b = factors.b.read();
                gemm::gemm(h, View::new(&b, outer, factors.rank).t(), &mut y, outer, true, true);
            }
        }
        let inputs = [Some(x), Some(&factors.a), Some(&factors.b), factors.rows.as_ref()];
        let inputs: Vec<&Value> = inputs.into_iter().flatten().collect();
        let mut before = None;
        if let Some(rows) = &factors.rows {
            if rows.tracked() {
                before = Some(self.copy(&y));
            }
            elementwise::scale_columns(&mut y, &rows.read());
        }
        if let Some(bias) = bias {
            elementwise::add_bias(&mut y, bias);
        }
        let back = || {
            let back = Back {
                weight: Arc::clone(weight),
                // What was dropped can be dropped again; the gradient of `a` needs the input.
                x: x.clone(),
                h,
                before,
                dropout: change.dropout,
                factors: factors.clone(),
            };
            move |g: super::Shared, sink: &super::Sink<'_>| {
                back.run(&g, sink);
                Ok(())
            }
        };
        Ok(self.result(y, outer, &inputs, back))
    }

    /// `x w^T` for a trained weight `[out, in]`.
    ///
    /// # Errors
    /// INTERNAL for an input of another width.
    pub fn dense(&self, x: &Value, weight: &Value) -> Result<Value> {
        let (tokens, inner, outer) = (x.rows(), x.width(), weight.rows());
        if weight.width() != inner {
            return Err(Error::internal(format!(
                "rows of {inner} do not fit a trained weight of shape [{outer}, {}]",
                weight.width()
            )));
        }
        let mut y = self.pool().take(tokens * outer);
        gemm::multiply(&x.read(), &weight.read(), &mut y, inner);
        Ok(self.result(y, outer, &[x, weight], || {
            let (x, weight) = (x.clone(), weight.clone());
            move |g, sink| {
                if let Some(node) = x.node() {
                    sink.accumulate(node, tokens * inner, |dx, adding| {
                        let w = weight.read();
                        let (g, w) = (View::new(&g, tokens, outer), View::new(&w, outer, inner));
                        gemm::gemm(g, w, dx, inner, adding, true);
                    });
                }
                if let Some(node) = weight.node() {
                    sink.accumulate(node, outer * inner, |dw, adding| {
                        let x = x.read();
                        let (g, x) = (View::new(&g, tokens, outer), View::new(&x, tokens, inner));
                        gemm::gemm(g.t(), x, dw, inner, adding, true);
                    });
                }
                Ok(())
            }
        }))
    }

    /// `x + bias` for each row, in the place of `x`.
    ///
    /// # Errors
    /// INTERNAL for a bias of another length.
    pub fn add_bias(&self, x: Value, bias: &Value) -> Result<Value> {
        let width = x.width();
        if bias.rows() != 1 || bias.width() != width {
            return Err(Error::internal(format!(
                "a bias of {} does not fit rows of {width}",
                bias.width()
            )));
        }
        let nodes = [x.node(), bias.node()];
        let mut y = self.own(x);
        elementwise::add_bias(&mut y, &bias.read());
        Ok(self.result_of(Arc::new(y), width, &nodes, |_| {
            move |g, sink| {
                if let Some(node) = nodes[1] {
                    sink.accumulate_zeroed(node, width, |db| elementwise::add_columns(&g, db));
                }
                if let Some(node) = nodes[0] {
                    sink.add(node, g);
                }
                Ok(())
            }
        }))
    }
}

/// The factors of a change, on the tape.
#[derive(Clone)]
struct Factors {
    rank: usize,
    a: Value,
    b: Value,
    rows: Option<Value>,
    scale: f32,
}

impl Factors {
    fn new(tape: &Tape, change: &LowRank, [outer, inner]: [usize; 2]) -> Result<Self> {
        let rank = change.a.dims().first().copied().unwrap_or(0);
        let rows = change.rows.as_ref();
        if change.a.dims() != [rank, inner]
            || change.b.dims() != [outer, rank]
            || rows.is_some_and(|rows| rows.dims() != [outer])
        {
            return Err(Error::internal(format!(
                "factors of shapes {:?} and {:?} do not fit a weight of shape [{outer}, {inner}]",
                change.b.dims(),
                change.a.dims()
            )));
        }
        Ok(Self {
            rank,
            a: tape.leaf(&change.a)?,
            b: tape.leaf(&change.b)?,
            rows: rows.map(|rows| tape.leaf(rows)).transpose()?,
            scale: change.scale as f32,
        })
    }
}

fn drop_some(tape: &Tape, x: &[f32], dropout: Dropout) -> Buffer {
    let mut out = tape.pool().take(x.len());
    elementwise::dropout(x, 1.0 - dropout.probability, dropout.seed, &mut out);
    out
}

/// What the gradient of a tuned product is made from.
struct Back {
    weight: Arc<Linear>,
    x: Value,
    h: Buffer,
    /// The sum that was multiplied by `rows`, if those are trained.
    before: Option<Buffer>,
    dropout: Option<Dropout>,
    factors: Factors,
}

impl Back {
    fn run(self, g: &[f32], sink: &super::Sink<'_>) {
        let (outer, inner) = (self.weight.rows(), self.weight.cols());
        let (tokens, rank) = (self.x.rows(), self.factors.rank);
        let pool = sink.pool();
        let mut scaled = None;
        if let Some(rows) = &self.factors.rows {
            if let (Some(node), Some(before)) = (rows.node(), &self.before) {
                sink.accumulate_zeroed(node, outer, |dm| {
                    elementwise::add_column_products(g, before, dm);
                });
            }
            let mut own = pool.take(g.len());
            elementwise::copy(g, &mut own);
            elementwise::scale_columns(&mut own, &rows.read());
            scaled = Some(own);
        }
        let g = scaled.as_deref().unwrap_or(g);
        let g_view = View::new(g, tokens, outer);

        if let Some(node) = self.factors.b.node() {
            sink.accumulate(node, outer * rank, |db, adding| {
                gemm::gemm(g_view.t(), View::new(&self.h, tokens, rank), db, rank, adding, true);
            });
        }
        if self.factors.a.node().is_none() && self.x.node().is_none() {
            return;
        }
        // `dh = scale * g b`
        let mut dh = pool.take(tokens * rank);
        {
            let b = self.factors.b.read();
            gemm::gemm(g_view, View::new(&b, outer, rank), &mut dh, rank, false, true);
            elementwise::scale(&mut dh, self.factors.scale);
        }
        let dh = View::new(&dh, tokens, rank);
        if let Some(node) = self.factors.a.node() {
            let x = self.x.read();
            let dropped = self.dropout.map(|dropout| {
                let mut out = pool.take(x.len());
                elementwise::dropout(&x, 1.0 - dropout.probability, dropout.seed, &mut out);
                out
            });
            let x = View::new(dropped.as_deref().unwrap_or(&x), tokens, inner);
            sink.accumulate(node, rank * inner, |da, adding| {
                gemm::gemm(dh.t(), x, da, inner, adding, true);
            });
        }
        if let Some(node) = self.x.node() {
            let a = self.factors.a.read();
            let a = View::new(&a, rank, inner);
            let mut dx = pool.take(tokens * inner);
            self.weight.multiply_transposed(g, &mut dx);
            match self.dropout {
                None => gemm::gemm(dh, a, &mut dx, inner, true, true),
                Some(dropout) => {
                    let mut own = pool.take(tokens * inner);
                    gemm::gemm(dh, a, &mut own, inner, false, true);
                    let mut kept = pool.take(own.len());
                    let keep = 1.0 - dropout.probability;
                    elementwise::dropout(&own, keep, dropout.seed, &mut kept);
                    elementwise::add(&mut dx, &kept);
                }
            }
            sink.add(node, Arc::new(dx));
        }
    }
}
