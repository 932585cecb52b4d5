//! From the layouts to panels: the codes as they are, the scales side by side.

use rayon::prelude::*;

use super::super::ggml::GgmlType;
use super::super::quantize::BLOCK;
use super::super::sparse::SparseRows;
use super::panels::{self, LANES, Panels};
use super::whole::MOST_COLS;
use super::{Codes, Kind, Packed, Source, kept};

/// Columns of a block of the K types.
const SUPER: usize = 256;

impl Kind {
    /// Bytes that the scales of a panel take.
    pub(super) fn scale_bytes(self, cols: usize) -> usize {
        let half = 2 * LANES;
        match self {
            Self::Block { .. } => cols / BLOCK * half,
            Self::BlockMin => cols / BLOCK * 2 * half,
            Self::Super => cols / SUPER * (2 * half + SUPER / BLOCK * 2 * LANES),
            Self::SuperSigned => cols / SUPER * (half + SUPER / 16 * LANES),
            Self::Group { blocks, .. } => cols / BLOCK / blocks * half,
            Self::GroupZero { blocks } => cols / BLOCK / blocks * (half + LANES),
            Self::Row => 4 * LANES,
            Self::Dual { blocks } => 4 * LANES + cols / BLOCK / blocks * 2 * LANES,
        }
    }
}

pub(super) fn pack(source: Source<'_>, rows: usize, cols: usize) -> Option<Packed> {
    let (bits, kind) = kind(&source)?;
    if rows == 0 || cols == 0 || !cols.is_multiple_of(BLOCK) {
        return None;
    }
    if matches!(kind, Kind::Row | Kind::Dual { .. }) && cols > MOST_COLS {
        return None;
    }
    let codes = cols / BLOCK * panels::block_bytes(bits);
    let count = rows.div_ceil(LANES);
    let mut packed = Packed {
        rows,
        cols,
        bits,
        kind,
        codes: Codes::All(Panels::new(0, 0)),
        scales: Panels::new(count, kind.scale_bytes(cols)),
        activations: None,
    };
    let mut all = Panels::new(count, codes);
    let reader = Reader::new(source, rows, cols);
    let panels: Vec<_> = all.panels_mut().zip(packed.scales.panels_mut()).collect();
    panels.into_par_iter().enumerate().for_each(|(panel, (codes, scales))| {
        for lane in 0..LANES.min(rows - panel * LANES) {
            reader.lane(panel * LANES + lane, lane, bits, codes, scales);
        }
    });
    packed.codes = Codes::All(all);
    Some(packed)
}

/// The codes of a sparse matrix: scales as those of [`Source::Grouped`], and codes of what is kept.
pub(super) fn sparse(from: &SparseRows<'_>) -> Option<Packed> {
    let (grid, [rows, cols]) = (from.grid()?, from.shape());
    let (bits, group, from_scales, zeros) = grid.parts();
    if rows == 0 || cols == 0 || !group.is_multiple_of(BLOCK) {
        return None;
    }
    let blocks = group / BLOCK;
    let kind = match zeros {
        None => Kind::Group { blocks, zero: 1 << (bits - 1) },
        Some(_) => Kind::GroupZero { blocks },
    };
    let mut scales = Panels::new(rows.div_ceil(LANES), kind.scale_bytes(cols));
    let panels: Vec<_> = scales.panels_mut().collect();
    let packed = panels.into_par_iter().enumerate().map(|(panel, scales)| {
        let first = panel * LANES;
        let mut codes = vec![None; LANES * cols];
        for (lane, codes) in codes.chunks_exact_mut(cols).take(rows - first).enumerate() {
            from.kept_codes(first + lane, |column, code| codes[column] = Some(code));
            let at = (first + lane) * (cols / group);
            grid_row(&from_scales[2 * at..], zeros.map(|z| &z[at..]), cols / group, lane, scales);
        }
        kept::panel(&codes, cols, bits)
    });
    let codes = kept::Panels::new(packed.collect());
    let codes = Codes::Kept(codes);
    Some(Packed { rows, cols, bits, kind, codes, scales, activations: None })
}

/// Writes the scales and zero points of a row's groups into a lane.
fn grid_row(from: &[u8], zeros: Option<&[u8]>, groups: usize, lane: usize, scales: &mut [u8]) {
    let each = scales.len() / groups;
    for (g, to) in scales.chunks_exact_mut(each).enumerate() {
        half(to, 0, lane, &from[2 * g..]);
        if let Some(zeros) = zeros {
            to[2 * LANES + lane] = zeros[g];
        }
    }
}

/// Width of the codes and kind of the scales, if there is a kernel for them.
fn kind(source: &Source<'_>) -> Option<(u8, Kind)> {
    Some(match *source {
        Source::Ggml { kind, .. } => match kind {
            GgmlType::Q4_0 => (4, Kind::Block { zero: 8 }),
            GgmlType::Q4_1 => (4, Kind::BlockMin),
            GgmlType::Q5_0 => (5, Kind::Block { zero: 16 }),
            GgmlType::Q5_1 => (5, Kind::BlockMin),
            GgmlType::Q8_0 => (8, Kind::Block { zero: 128 }),
            GgmlType::Q4K => (4, Kind::Super),
            GgmlType::Q5K => (5, Kind::Super),
            GgmlType::Q6K => (6, Kind::SuperSigned),
            GgmlType::Q2K | GgmlType::Q3K => return None,
        },
        Source::Grouped { bits, group, zeros, .. } => {
            if group == 0 || !group.is_multiple_of(BLOCK) {
                return None;
            }
            let blocks = group / BLOCK;
            let kind = match zeros {
                None => Kind::Group { blocks, zero: 1 << (bits - 1) },
                Some(_) => Kind::GroupZero { blocks },
            };
            (bits, kind)
        }
        Source::Rows { .. } => (8, Kind::Row),
        Source::DualGrained { group, .. } => {
            if group == 0 || !group.is_multiple_of(BLOCK) {
                return None;
            }
            (4, Kind::Dual { blocks: group / BLOCK })
        }
    })
}

/// Reads rows of the source.
struct Reader<'a> {
    source: Source<'a>,
    cols: usize,
}

impl<'a> Reader<'a> {
    fn new(source: Source<'a>, rows: usize, cols: usize) -> Self {
        match source {
            Source::Ggml { kind, blocks } => {
                let row = cols / kind.block_elements() * kind.block_bytes();
                assert!(cols.is_multiple_of(kind.block_elements()) && blocks.len() == rows * row);
            }
            Source::Grouped { bits, group, codes, scales, zeros } => {
                assert!(matches!(bits, 2 | 3 | 4 | 8) && cols.is_multiple_of(group));
                let groups = rows * (cols / group);
                assert!(codes.len() == rows * (cols * bits as usize).div_ceil(8));
                assert!(scales.len() == 2 * groups && zeros.is_none_or(|z| z.len() == groups));
            }
            Source::Rows { codes, scales } => {
                assert!(codes.len() == rows * cols && scales.len() == rows);
            }
            Source::DualGrained { group, codes, factors, zeros, scales } => {
                assert!(cols.is_multiple_of(group) && codes.len() == rows * (cols / 2));
                let groups = rows * (cols / group);
                assert!(factors.len() == groups && zeros.len() == groups && scales.len() == rows);
            }
        }
        Self { source, cols }
    }

    /// Writes row `row` into lane `lane` of a panel.
    fn lane(&self, row: usize, lane: usize, bits: u8, codes: &mut [u8], scales: &mut [u8]) {
        let mut put = |block: usize, values: &[u8; BLOCK]| {
            let each = panels::block_bytes(bits);
            put_block(&mut codes[block * each..(block + 1) * each], bits, lane, values);
        };
        match self.source {
            Source::Ggml { kind, blocks } => {
                let size = kind.block_bytes();
                let row_bytes = self.cols / kind.block_elements() * size;
                let row = &blocks[row * row_bytes..(row + 1) * row_bytes];
                for (b, block) in row.chunks_exact(size).enumerate() {
                    ggml_block(kind, block, b, lane, scales, &mut put);
                }
            }
            Source::Grouped { bits, group, codes, scales: from, zeros } => {
                let row_bytes = (self.cols * bits as usize).div_ceil(8);
                let codes = &codes[row * row_bytes..(row + 1) * row_bytes];
                for block in 0..self.cols / BLOCK {
                    let bytes = &codes[block * BLOCK * bits as usize / 8..];
                    put(block, &stream(bytes, bits));
                }
                let groups = self.cols / group;
                let at = row * groups;
                grid_row(&from[2 * at..], zeros.map(|z| &z[at..]), groups, lane, scales);
            }
            Source::Rows { codes, scales: from } => {
                let codes = &codes[row * self.cols..(row + 1) * self.cols];
                for (block, codes) in codes.as_chunks::<BLOCK>().0.iter().enumerate() {
                    put(block, &codes.map(|code| code as u8 ^ 0x80));
                }
                scales[4 * lane..][..4].copy_from_slice(&from[row].to_le_bytes());
            }
            Source::DualGrained { group, codes, factors, zeros, scales: from } => {
                let codes = &codes[row * (self.cols / 2)..(row + 1) * (self.cols / 2)];
                for (block, codes) in codes.chunks_exact(BLOCK / 2).enumerate() {
                    put(block, &nibbles(codes));
                }
                scales[4 * lane..][..4].copy_from_slice(&from[row].to_le_bytes());
                let groups = self.cols / group;
                for (g, to) in scales[4 * LANES..].chunks_exact_mut(2 * LANES).enumerate() {
                    to[lane] = factors[row * groups + g];
                    to[LANES + lane] = zeros[row * groups + g];
                }
            }
        }
    }
}

/// [`panels::put`] for the 32 columns of a block, with the width known to the compiler.
fn put_block(block: &mut [u8], bits: u8, lane: usize, values: &[u8; BLOCK]) {
    #[inline(always)]
    fn all(block: &mut [u8], bits: u8, lane: usize, values: &[u8; BLOCK]) {
        for (column, value) in values.iter().enumerate() {
            panels::put(block, bits, lane, column, *value);
        }
    }
    match bits {
        2 => all(block, 2, lane, values),
        3 => all(block, 3, lane, values),
        4 => all(block, 4, lane, values),
        5 => all(block, 5, lane, values),
        6 => all(block, 6, lane, values),
        _ => all(block, 8, lane, values),
    }
}

/// Copies two bytes of `from` into the place of a lane in the vector `vector` of f16.
fn half(scales: &mut [u8], vector: usize, lane: usize, from: &[u8]) {
    scales[2 * (vector * LANES + lane)..][..2].copy_from_slice(&from[..2]);
}

/// 32 codes from a little-endian stream of bits.
fn stream(bytes: &[u8], bits: u8) -> [u8; BLOCK] {
    let bits = bits as usize;
    std::array::from_fn(|i| {
        let at = i * bits;
        let low = u16::from(bytes[at / 8]) >> (at % 8);
        let high = match at % 8 + bits > 8 {
            true => u16::from(bytes[at / 8 + 1]) << (8 - at % 8),
            false => 0,
        };
        (low | high) as u8 & ((1_u16 << bits) - 1) as u8
    })
}

/// 32 codes of which i and i + 16 share a byte.
fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| bytes[i % 16] >> (4 * (i / 16)) & 15)
}

/// Block `b` of a row: its codes to `put` (by number of 32 columns), its scales into a lane.
fn ggml_block(
    kind: GgmlType,
    block: &[u8],
    b: usize,
    lane: usize,
    scales: &mut [u8],
    put: &mut impl FnMut(usize, &[u8; BLOCK]),
) {
    let fifth = |codes: [u8; BLOCK], bits: &[u8]| {
        std::array::from_fn(|i| codes[i] | (bits[i / 8] >> (i % 8) & 1) << 4)
    };
    match kind {
        GgmlType::Q4_0 => {
            half(scales, b, lane, block);
            put(b, &nibbles(&block[2..]));
        }
        GgmlType::Q4_1 => {
            half(scales, 2 * b, lane, block);
            half(scales, 2 * b + 1, lane, &block[2..]);
            put(b, &nibbles(&block[4..]));
        }
        GgmlType::Q5_0 => {
            half(scales, b, lane, block);
            put(b, &fifth(nibbles(&block[6..]), &block[2..6]));
        }
        GgmlType::Q5_1 => {
            half(scales, 2 * b, lane, block);
            half(scales, 2 * b + 1, lane, &block[2..]);
            put(b, &fifth(nibbles(&block[8..]), &block[4..8]));
        }
        GgmlType::Q8_0 => {
            half(scales, b, lane, block);
            put(b, &std::array::from_fn(|i| block[2 + i] ^ 0x80));
        }
        GgmlType::Q4K | GgmlType::Q5K => {
            let each = 2 * 2 * LANES + 8 * 2 * LANES;
            let scales = &mut scales[b * each..(b + 1) * each];
            half(scales, 0, lane, block);
            half(scales, 1, lane, &block[2..]);
            for j in 0..8 {
                let (scale, min) = super::super::ggml::factors(&block[4..16], j);
                scales[4 * LANES + 2 * j * LANES + lane] = scale;
                scales[4 * LANES + (2 * j + 1) * LANES + lane] = min;
                let at = if kind == GgmlType::Q4K { 16 } else { 48 } + 32 * (j / 2);
                let codes = std::array::from_fn(|i| {
                    let low = block[at + i] >> (4 * (j % 2)) & 15;
                    match kind {
                        GgmlType::Q4K => low,
                        _ => low | (block[16 + i] >> j & 1) << 4,
                    }
                });
                put(8 * b + j, &codes);
            }
        }
        GgmlType::Q6K => {
            let each = 2 * LANES + 16 * LANES;
            let scales = &mut scales[b * each..(b + 1) * each];
            half(scales, 0, lane, &block[208..]);
            for j in 0..16 {
                scales[2 * LANES + j * LANES + lane] = block[192 + j];
            }
            for n in 0..8 {
                let (h, j) = (n / 4, n % 4);
                let codes = std::array::from_fn(|i| {
                    let low = block[64 * h + 32 * (j % 2) + i] >> (4 * (j / 2)) & 15;
                    low | (block[128 + 32 * h + i] >> (2 * j) & 3) << 4
                });
                put(8 * b + n, &codes);
            }
        }
        GgmlType::Q2K | GgmlType::Q3K => unreachable!("has no packed kind"),
    }
}
