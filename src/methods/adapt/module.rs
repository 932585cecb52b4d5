//! The one form of an adapter on a linear weight that all low-rank methods share:
//!
//! `y = (m / n) (W x + s (B C A - B0 C0 A0) drop(x))`
//!
//! `A` is `[r, in]`, `B` is `[out, r]`, the core `C` is nothing, an `[r, r]` matrix or a diagonal. What is
//! subtracted is what the product was at the start, for methods whose paper changes the base: so the
//! base here never changes, and dropout acts on all that is added to it. `m / n` is DoRA's magnitude over the
//! norm of each row. Methods differ in which of these there are, how they start, and which of them are
//! trained.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::basis::{self, Combined};
use crate::error::{Error, Reason, Result};
use crate::nn::tuning;
use crate::nn::weight::{Weight, product};

/// A tensor that is trained or stays.
#[derive(Debug, Clone)]
pub enum Part {
    Trained(Var),
    Fixed(Tensor),
}

impl Part {
    pub fn trained(values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        Ok(Self::Trained(Var::from_vec(values, shape, &Device::Cpu)?))
    }

    pub fn fixed(values: Vec<f32>, shape: &[usize]) -> Result<Self> {
        Ok(Self::Fixed(Tensor::from_vec(values, shape, &Device::Cpu)?))
    }

    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Trained(var) => var.as_tensor(),
            Self::Fixed(tensor) => tensor,
        }
    }

    pub fn values(&self) -> Result<Vec<f32>> {
        Ok(self.tensor().flatten_all()?.to_vec1::<f32>()?)
    }

    fn var(&self) -> Option<&Var> {
        match self {
            Self::Trained(var) => Some(var),
            Self::Fixed(_) => None,
        }
    }
}

/// One of the two narrow matrices.
#[derive(Debug, Clone)]
pub enum Factor {
    Plain(Part),
    Combined(Arc<Combined>),
}

impl Factor {
    /// Differentiable in what is trained.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Plain(part) => Ok(part.tensor().clone()),
            Self::Combined(combined) => combined.tensor(),
        }
    }

    pub fn values(&self) -> Result<Vec<f32>> {
        match self {
            Self::Plain(part) => part.values(),
            Self::Combined(combined) => {
                Ok(combined.basis.combine(&combined.coefficients.to_vec1::<f32>()?))
            }
        }
    }
}

/// What stands between the factors.
#[derive(Debug, Clone)]
pub enum Core {
    Identity,
    /// `[r, r]`, from `A`'s outputs to `B`'s inputs: `B R A x`.
    Matrix(Part),
    /// `[r]`
    Diagonal(Part),
}

/// What is subtracted: the product as it was at the start.
#[derive(Debug, Clone)]
pub enum Start {
    /// `B0 A0`.
    Factors { a: Tensor, b: Tensor },
    /// `B diag(c) A` with the factors that are there.
    Diagonal(Tensor),
}

/// DoRA's magnitudes.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// `[out]`
    pub values: Part,
    /// The base's weight, for the norms.
    pub stored: Arc<Weight>,
    /// Squares of the norms of its rows.
    pub squares: Vec<f64>,
}

impl Magnitude {
    /// Magnitudes that are trained, beside a base.
    pub fn new(values: Vec<f32>, stored: &Arc<Weight>, squares: Vec<f64>) -> Result<Self> {
        let rows = values.len();
        Ok(Self { values: Part::trained(values, &[rows])?, stored: Arc::clone(stored), squares })
    }
}

/// An adapter on one linear weight.
#[derive(Debug, Clone)]
pub struct Module {
    /// Name of the weight.
    pub linear: String,
    /// `[out, in]`
    pub shape: [usize; 2],
    pub rank: usize,
    /// `s`
    pub scale: f64,
    /// Alpha is divided by the root of the rank; matters to files only.
    pub rslora: bool,
    pub a: Factor,
    pub b: Factor,
    pub core: Core,
    /// Name of the trained core: `lora_E`, `lora_R`, `lora_z`, ...
    pub core_name: &'static str,
    pub start: Option<Start>,
    pub magnitude: Option<Magnitude>,
    /// The frozen factors are these components of the weight's LDU decomposition, so files need not hold
    /// them.
    pub ldu: Option<Vec<usize>>,
}

/// `delta = scale * b a`, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    pub shape: [usize; 2],
    pub rank: usize,
    /// `[rank, in]`
    pub a: Vec<f32>,
    /// `[out, rank]`
    pub b: Vec<f32>,
    pub scale: f64,
    pub rslora: bool,
}

impl Module {
    /// Trained tensors by the end of their names.
    pub fn trained(&self) -> Vec<(&'static str, &Var)> {
        let factor = |factor: &'static str, combined: &'static str, f: &'_ Factor| match f {
            Factor::Plain(Part::Trained(_)) => Some(factor),
            Factor::Plain(Part::Fixed(_)) => None,
            Factor::Combined(_) => Some(combined),
        };
        let mut all = Vec::new();
        for (name, f) in [
            (factor("lora_A", "nola_A", &self.a), &self.a),
            (factor("lora_B", "nola_B", &self.b), &self.b),
        ] {
            let var = match f {
                Factor::Plain(part) => part.var(),
                Factor::Combined(combined) => Some(&combined.coefficients),
            };
            all.extend(name.zip(var));
        }
        if let Core::Matrix(part) | Core::Diagonal(part) = &self.core {
            all.extend(part.var().map(|var| (self.core_name, var)));
        }
        if let Some(magnitude) = &self.magnitude {
            all.extend(magnitude.values.var().map(|var| ("lora_magnitude_vector", var)));
        }
        all
    }

    /// What is added, differentiable in what is trained.
    pub fn addition(&self, dropout: Option<tuning::Dropout>) -> Result<tuning::LowRank> {
        let (mut a, mut b) = (self.a.tensor()?, self.b.tensor()?);
        match (&self.core, &self.start) {
            (Core::Identity, _) => {}
            (Core::Matrix(r), _) => b = b.matmul(r.tensor())?,
            (Core::Diagonal(c), Some(Start::Diagonal(start))) => {
                b = b.broadcast_mul(&(c.tensor() - start)?)?;
            }
            (Core::Diagonal(c), _) => b = b.broadcast_mul(c.tensor())?,
        }
        if let Some(Start::Factors { a: a0, b: b0 }) = &self.start {
            a = Tensor::cat(&[&a, a0], 0)?;
            b = Tensor::cat(&[&b, &b0.neg()?], 1)?;
        }
        let rows = match &self.magnitude {
            None => None,
            Some(magnitude) => {
                let norms = Tensor::from_vec(self.norms(magnitude)?, self.shape[0], &Device::Cpu)?;
                Some(magnitude.values.tensor().div(&norms)?)
            }
        };
        Ok(tuning::LowRank { a, b, rows, scale: self.scale, dropout })
    }

    /// `y [.., out]` of `x [.., in]`, without bias, by the tensor library alone.
    pub fn forward(
        &self,
        x: &Tensor,
        stored: &Arc<Weight>,
        dropout: Option<tuning::Dropout>,
    ) -> Result<Tensor> {
        let [rows, cols] = self.shape;
        let mut dims = x.dims().to_vec();
        if dims.last() != Some(&cols) || stored.shape() != self.shape {
            return Err(Error::internal(format!(
                "an adapter of '{}' {:?} met a weight {:?} and inputs {dims:?}",
                self.linear,
                self.shape,
                stored.shape()
            )));
        }
        let added = self.addition(dropout)?;
        let flat = x.reshape(((), cols))?;
        let seen = match dropout {
            Some(dropout) => basis::dropout(&flat, dropout)?,
            None => flat.clone(),
        };
        let y = (seen.matmul(&added.a.t()?)?.matmul(&added.b.t()?)? * added.scale)?;
        let mut y = (product(&flat, stored)? + y)?;
        if let Some(rows) = &added.rows {
            y = y.broadcast_mul(rows)?;
        }
        if let Some(last) = dims.last_mut() {
            *last = rows;
        }
        Ok(y.reshape(dims)?)
    }

    /// DoRA's factors on the rows, `m / n`; `None` of other adapters.
    pub fn ratios(&self) -> Result<Option<Vec<f32>>> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        let (values, norms) = (magnitude.values.values()?, self.norms(magnitude)?);
        Ok(Some(values.iter().zip(norms).map(|(m, n)| m / n).collect()))
    }

    /// Norms of the rows of `W + delta` without making it: `|w + d|^2 = |w|^2 + 2 w.d + |d|^2`, where
    /// `w.d` needs the product of `W` with the few rows of `A` alone.
    fn norms(&self, magnitude: &Magnitude) -> Result<Vec<f32>> {
        let LowRank { rank, a, b, scale, .. } = self.low_rank_part()?;
        let [rows, cols] = self.shape;
        let mut seen = vec![0.0; rank * rows];
        magnitude.stored.multiply(&a, &mut seen);
        let dot = |x: &[f32], y: &[f32]| -> f64 {
            x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        };
        let gram: Vec<f64> = (0..rank * rank)
            .map(|at| {
                let row = |r: usize| &a[r * cols..(r + 1) * cols];
                dot(row(at / rank), row(at % rank))
            })
            .collect();
        let norms = b.chunks(rank).enumerate().map(|(o, b)| {
            let mut cross = 0.0;
            let mut square = 0.0;
            for (i, bi) in b.iter().enumerate() {
                cross += f64::from(*bi) * f64::from(seen[i * rows + o]);
                for (j, bj) in b.iter().enumerate() {
                    square += f64::from(*bi) * f64::from(*bj) * gram[i * rank + j];
                }
            }
            let sum = magnitude.squares[o] + scale * (2.0 * cross + scale * square);
            sum.max(f64::MIN_POSITIVE).sqrt() as f32
        });
        Ok(norms.collect())
    }

    /// All of the addition as one product, exact, the start included; an error for DoRA, which is more
    /// than an addition.
    pub fn low_rank(&self) -> Result<LowRank> {
        match self.magnitude {
            None => self.low_rank_part(),
            Some(_) => Err(Error::new(
                Reason::Unsupported,
                format!(
                    "the adapter of '{}' scales the rows of its weight (DoRA), which is no low-rank \
                     addition; merge it into its base",
                    self.linear
                ),
            )),
        }
    }

    /// As [`Module::low_rank`], without the magnitude.
    pub fn low_rank_part(&self) -> Result<LowRank> {
        let [rows, cols] = self.shape;
        let rank = self.rank;
        let (mut a, mut b) = (self.a.values()?, self.b.values()?);
        let (mut out_rank, start) = (rank, &self.start);
        match &self.core {
            Core::Identity => {}
            Core::Matrix(r) => {
                let r = r.tensor();
                let b_tensor = Tensor::from_vec(b, (rows, rank), &Device::Cpu)?;
                b = b_tensor.matmul(r)?.flatten_all()?.to_vec1()?;
            }
            Core::Diagonal(c) => {
                let mut c = c.values()?;
                if let Some(Start::Diagonal(start)) = start {
                    c.iter_mut().zip(start.to_vec1::<f32>()?).for_each(|(c, s)| *c -= s);
                }
                for row in b.chunks_mut(rank) {
                    row.iter_mut().zip(&c).for_each(|(b, c)| *b *= c);
                }
                // Ranks that are shut add nothing, and are left out.
                let kept: Vec<usize> = (0..rank).filter(|i| c[*i] != 0.0).collect();
                if kept.len() < rank && !kept.is_empty() {
                    a = kept.iter().flat_map(|i| &a[i * cols..(i + 1) * cols]).copied().collect();
                    b = b.chunks(rank).flat_map(|row| kept.iter().map(|i| row[*i])).collect();
                    out_rank = kept.len();
                }
            }
        }
        if let Some(Start::Factors { a: a0, b: b0 }) = start {
            a.extend(a0.flatten_all()?.to_vec1::<f32>()?);
            let b0 = b0.flatten_all()?.to_vec1::<f32>()?;
            let inner = b0.len() / rows;
            let pairs = b.chunks(out_rank).zip(b0.chunks(inner));
            b = pairs.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|v| -v))).collect();
            out_rank += inner;
        }
        Ok(LowRank {
            shape: self.shape,
            rank: out_rank,
            a,
            b,
            scale: self.scale,
            rslora: self.rslora,
        })
    }

    /// The weight that gives what base and adapter give together, `[out, in]` in row order.
    pub fn merged(&self, stored: &Arc<Weight>) -> Result<Vec<f32>> {
        let mut out = stored.to_f32();
        self.low_rank_part()?.add_to(&mut out);
        if let Some(ratios) = self.ratios()? {
            for (row, ratio) in out.chunks_mut(self.shape[1]).zip(ratios) {
                row.iter_mut().for_each(|v| *v *= ratio);
            }
        }
        Ok(out)
    }

    /// Number of trained elements.
    pub fn parameters(&self) -> u64 {
        self.trained().iter().map(|(_, var)| var.elem_count() as u64).sum()
    }
}

impl LowRank {
    /// `weight += scale * b a`; sums in f64, rounded once.
    pub fn add_to(&self, weight: &mut [f32]) {
        use rayon::prelude::*;
        let cols = self.shape[1];
        let rows = weight.par_chunks_mut(cols).zip(self.b.par_chunks(self.rank));
        rows.for_each(|(weight, b)| {
            let mut sum = vec![0f64; cols];
            for (b, a) in b.iter().zip(self.a.chunks(cols)) {
                let b = self.scale * f64::from(*b);
                sum.iter_mut().zip(a).for_each(|(s, a)| *s += b * f64::from(*a));
            }
            weight.iter_mut().zip(sum).for_each(|(w, s)| *w = (f64::from(*w) + s) as f32);
        });
    }

    /// Alpha as files say it: what gives the scale for this rank.
    pub fn alpha(&self) -> f64 {
        let rank = self.rank as f64;
        self.scale * if self.rslora { rank.sqrt() } else { rank }
    }
}

/// Squares of the norms of a weight's rows.
pub fn row_squares(weight: &Weight) -> Vec<f64> {
    let mut row = vec![0.0; weight.cols()];
    (0..weight.rows())
        .map(|r| {
            weight.read_rows(r, &mut row);
            row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
        })
        .collect()
}

/// A weight `[out, in]` as a product with a whole trained matrix: `x W^T`.
pub fn whole(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, cols) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    let y = x.reshape(((), cols))?.matmul(&weight.t()?)?;
    if let Some(last) = dims.last_mut() {
        *last = rows;
    }
    Ok(y.reshape(dims)?)
}

/// Modules by the names of their weights.
pub type Modules = BTreeMap<String, Module>;
