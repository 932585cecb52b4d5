//! A page: the keys and values of some consecutive positions, all layers.

use std::sync::Arc;

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::super::super::Config;
use super::pool::Inner;
use crate::kernels::attention::{Elements, Rows, Segment, quantize};

/// Positions of a page. A quarter of the tile that attention works on; small enough that sequences
/// share most of what they have in common, large enough that a head's keys are read in one go.
pub const PAGE: usize = 64;

/// How cached keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheFormat {
    #[default]
    F32,
    /// Half the memory; products still run in f32.
    F16,
    /// A quarter: whole numbers of -127 to 127 times a scale for each position and head.
    Q8,
}

/// What pages that can stand for each other have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    layers: usize,
    heads: usize,
    dim: usize,
    format: CacheFormat,
}

impl Layout {
    pub fn new(config: &Config, format: CacheFormat) -> Self {
        Self { layers: config.layers.len(), heads: config.kv_heads, dim: config.head_dim, format }
    }

    pub fn format(self) -> CacheFormat {
        self.format
    }

    /// Elements of a position's keys.
    pub fn width(self) -> usize {
        self.heads * self.dim
    }

    /// Rows of keys and of values.
    fn rows(self) -> usize {
        2 * self.layers * self.heads * PAGE
    }

    /// Bytes of a page.
    pub fn bytes(self) -> usize {
        let row = match self.format {
            CacheFormat::F32 => 4 * self.dim,
            CacheFormat::F16 => 2 * self.dim,
            CacheFormat::Q8 => self.dim + 4,
        };
        self.rows().saturating_mul(row)
    }

    /// The first row of a head's keys (`kind` 0) or values (1).
    fn plane(self, layer: usize, kind: usize, head: usize) -> usize {
        ((layer * 2 + kind) * self.heads + head) * PAGE
    }
}

/// Elements `[layer][keys, values][head][position][dim]`. A new page is zeroed memory, which costs
/// nothing until it is touched.
pub(super) enum Data {
    F32(Vec<f32>),
    /// Bits.
    F16(Vec<u16>),
    Q8 {
        codes: Vec<i8>,
        /// One for each row of `codes`.
        scales: Vec<f32>,
    },
}

impl Data {
    pub fn new(layout: Layout) -> Self {
        let rows = layout.rows();
        let len = rows * layout.dim;
        match layout.format {
            CacheFormat::F32 => Self::F32(vec![0.0; len]),
            CacheFormat::F16 => Self::F16(vec![0; len]),
            CacheFormat::Q8 => Self::Q8 { codes: vec![0; len], scales: vec![0.0; rows] },
        }
    }

    /// Takes over the content of a page of the same layout.
    pub fn copy_from(&mut self, other: &Self) {
        match (self, other) {
            (Self::F32(to), Self::F32(from)) => to.copy_from_slice(from),
            (Self::F16(to), Self::F16(from)) => to.copy_from_slice(from),
            (Self::Q8 { codes, scales }, Self::Q8 { codes: from_codes, scales: from_scales }) => {
                codes.copy_from_slice(from_codes);
                scales.copy_from_slice(from_scales);
            }
            _ => unreachable!("pages of one pool have one format"),
        }
    }

    fn write(&mut self, row: usize, dim: usize, elements: &[f32]) {
        let at = row * dim;
        match self {
            Self::F32(data) => data[at..at + dim].copy_from_slice(elements),
            Self::F16(data) => {
                data[at..at + dim].reinterpret_cast_mut::<f16>().convert_from_f32_slice(elements)
            }
            Self::Q8 { codes, scales } => {
                scales[row] = quantize(elements, &mut codes[at..at + dim]);
            }
        }
    }

    fn rows(&self, row: usize, count: usize, dim: usize) -> Rows<'_> {
        let range = row * dim..(row + count) * dim;
        let data = match self {
            Self::F32(data) => Elements::F32(&data[range]),
            Self::F16(data) => Elements::F16(data[range].reinterpret_cast()),
            Self::Q8 { codes, scales } => {
                Elements::Q8 { codes: &codes[range], scales: &scales[row..row + count] }
            }
        };
        Rows { data, stride: dim }
    }
}

/// Keys and values of [`PAGE`] positions. Its memory goes back to the pool when the last that holds
/// the page lets go.
pub struct Page {
    /// Present until the page is dropped.
    data: Option<Data>,
    pool: Arc<Inner>,
}

impl Page {
    pub(super) fn new(data: Data, pool: Arc<Inner>) -> Self {
        Self { data: Some(data), pool }
    }

    pub(super) fn layout(&self) -> Layout {
        self.pool.layout()
    }

    pub(super) fn data(&self) -> &Data {
        self.data.as_ref().expect("a page that lives has its memory")
    }

    /// Stores keys and values `[positions, heads * dim]` from position `first` of the page on.
    pub(super) fn write(&mut self, layer: usize, first: usize, keys: &[f32], values: &[f32]) {
        let layout = self.layout();
        let data = self.data.as_mut().expect("a page that lives has its memory");
        for (kind, rows) in [keys, values].into_iter().enumerate() {
            for (t, row) in rows.chunks_exact(layout.width()).enumerate() {
                for (head, elements) in row.chunks_exact(layout.dim).enumerate() {
                    data.write(layout.plane(layer, kind, head) + first + t, layout.dim, elements);
                }
            }
        }
    }

    /// Keys and values of a head from position `first` of the page on.
    pub(super) fn segment(&self, layer: usize, head: usize, first: usize) -> Segment<'_> {
        let layout = self.layout();
        let count = PAGE - first;
        let rows =
            |kind| self.data().rows(layout.plane(layer, kind, head) + first, count, layout.dim);
        Segment { keys: rows(0), values: rows(1), count }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            self.pool.put_back(data);
        }
    }
}
