//! Keys and values of a sequence.

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::super::{Config, LayerKind};
use super::STEP;
use crate::kernels::attention::{Elements, Rows};

/// How cached keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheFormat {
    #[default]
    F32,
    /// Half the memory; products still run in f32.
    F16,
}

impl CacheFormat {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// Keys and values of one sequence, all layers. Local layers keep a ring of their window and one step;
/// memory is touched, and so taken, only as the sequence grows.
pub struct Cache {
    layers: Vec<Layer>,
    format: CacheFormat,
    key_heads: usize,
    dim: usize,
    capacity: usize,
    len: usize,
}

/// One layer: `[key_heads, slots, dim]` twice.
struct Layer {
    keys: Plane,
    values: Plane,
    slots: usize,
    window: Option<usize>,
}

enum Plane {
    F32(Vec<f32>),
    /// Bits: a zeroed vector of integers costs nothing until it is touched.
    F16(Vec<u16>),
}

impl Plane {
    fn new(format: CacheFormat, len: usize) -> Self {
        match format {
            CacheFormat::F32 => Self::F32(vec![0.0; len]),
            CacheFormat::F16 => Self::F16(vec![0; len]),
        }
    }

    fn write(&mut self, at: usize, row: &[f32]) {
        match self {
            Self::F32(data) => data[at..at + row.len()].copy_from_slice(row),
            Self::F16(data) => {
                data[at..at + row.len()].reinterpret_cast_mut::<f16>().convert_from_f32_slice(row)
            }
        }
    }

    fn rows(&self, at: usize, len: usize) -> Elements<'_> {
        match self {
            Self::F32(data) => Elements::F32(&data[at..at + len]),
            Self::F16(data) => Elements::F16(data[at..at + len].reinterpret_cast()),
        }
    }
}

impl Cache {
    /// An empty cache with room for `capacity` positions, in f32.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self::with_format(config, capacity, CacheFormat::default())
    }

    /// An empty cache with room for `capacity` positions.
    pub fn with_format(config: &Config, capacity: usize, format: CacheFormat) -> Self {
        let layers = (0..config.layers.len())
            .map(|layer| {
                let slots = slots(config, config.layers[layer], capacity);
                let elements = config.key_channels() * slots;
                Layer {
                    keys: Plane::new(format, elements),
                    values: Plane::new(format, elements),
                    slots,
                    window: config.layer_window(layer),
                }
            })
            .collect();
        Self { layers, format, key_heads: config.kv_heads, dim: config.head_dim, capacity, len: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `len` positions. The rings of local layers forget old positions, so
    /// going far back may be impossible; then everything is forgotten. Returns the positions held.
    pub fn truncate(&mut self, len: usize) -> usize {
        if len < self.len {
            let intact = self.layers.iter().all(|layer| match layer.window {
                // The first position the next query sees must still be there.
                Some(window) => (len + 1).saturating_sub(window) + layer.slots >= self.len,
                None => true,
            });
            self.len = if intact { len } else { 0 };
        }
        self.len
    }

    /// Bytes a position takes at most (f32, no ring).
    pub fn bytes_per_position(config: &Config) -> usize {
        Self::bytes_for(config, 1, CacheFormat::F32)
    }

    /// Bytes of a cache that is full to its capacity.
    pub fn bytes_for(config: &Config, capacity: usize, format: CacheFormat) -> usize {
        let slots: usize = config.layers.iter().map(|kind| slots(config, *kind, capacity)).sum();
        slots.saturating_mul(2 * config.key_channels() * format.bytes())
    }

    /// Whether the cache was made for a configuration like this one.
    pub(super) fn fits(&self, config: &Config) -> bool {
        self.layers.len() == config.layers.len()
            && self.key_heads == config.kv_heads
            && self.dim == config.head_dim
            && (0..self.layers.len())
                .all(|i| self.layers[i].slots == slots(config, config.layers[i], self.capacity))
    }

    /// Stores the keys and values (`[tokens, key_heads * dim]`) that follow the positions held.
    pub(super) fn write(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let (first, dim, heads) = (self.len, self.dim, self.key_heads);
        let layer = &mut self.layers[layer];
        let width = heads * dim;
        for (t, (k, v)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            let slot = (first + t) % layer.slots;
            for head in 0..heads {
                let at = (head * layer.slots + slot) * dim;
                layer.keys.write(at, &k[head * dim..][..dim]);
                layer.values.write(at, &v[head * dim..][..dim]);
            }
        }
    }

    /// Counts the positions that were written to every layer.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Keys and values of a head.
    pub(super) fn head(&self, layer: usize, head: usize) -> (Rows<'_>, Rows<'_>) {
        let layer = &self.layers[layer];
        let len = layer.slots * self.dim;
        let rows = |data| Rows { data, stride: self.dim, slots: layer.slots };
        (rows(layer.keys.rows(head * len, len)), rows(layer.values.rows(head * len, len)))
    }

    pub fn format(&self) -> CacheFormat {
        self.format
    }
}

/// Positions a layer keeps. A ring needs the window before the first query of a step and the step.
fn slots(config: &Config, kind: LayerKind, capacity: usize) -> usize {
    match (kind, config.window) {
        (LayerKind::Local, Some(window)) => capacity.min(window.saturating_add(STEP)),
        _ => capacity,
    }
    .max(1)
}
