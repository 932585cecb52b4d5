//! Grids as the blocks of GGUF files, without rounding: 32 offsets behind one scale.

use std::io::Write;

use half::f16;

use super::grid::Grid;
use super::report::Drift;
use crate::error::Result;
use crate::nn::weight::{Ggml, GgmlType};
use crate::progress::Progress;

/// Columns of a block.
const BLOCK: usize = 32;

/// The smallest block type that holds all values of a grid exactly; `None` where none does.
///
/// Symmetric codes of up to 4 bits are Q4_0, of 8 bits Q8_0. With zero points the minimum `-zero * scale`
/// of Q4_1 is an f16 number for some grids only; Q5_0 holds every difference of two 4-bit codes.
pub(super) fn carrier(grid: &Grid<'_>, progress: &Progress) -> Result<Option<GgmlType>> {
    if !grid.group.is_multiple_of(BLOCK) {
        return Ok(None);
    }
    let check = || progress.check();
    Ok(match (grid.bits, grid.symmetric) {
        (..=4, true) => Some(GgmlType::Q4_0),
        (_, true) => Some(GgmlType::Q8_0),
        (..=4, false) if grid.within(-8, 7, &check)? => Some(GgmlType::Q4_0),
        (..=4, false) if exact_minima(grid, progress)? => Some(GgmlType::Q4_1),
        (..=4, false) => Some(GgmlType::Q5_0),
        (_, false) => grid.within(-128, 127, &check)?.then_some(GgmlType::Q8_0),
    })
}

/// `-zero * scale` as f16 holds it.
fn minimum(grid: &Grid<'_>, row: usize, group: usize) -> f16 {
    f16::from_f32(-f32::from(grid.zero(row, group)) * grid.scale(row, group).to_f32())
}

fn exact_minima(grid: &Grid<'_>, progress: &Progress) -> Result<bool> {
    for row in 0..grid.rows() {
        progress.check()?;
        let exact = |group: usize| {
            let exact = -f32::from(grid.zero(row, group)) * grid.scale(row, group).to_f32();
            minimum(grid, row, group).to_f32() == exact
        };
        if !(0..grid.groups()).all(exact) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Writes the blocks of a grid, its rows in `order` or their own, and counts how far they are from it: not at
/// all, or the format would be at fault.
pub(super) fn put(
    grid: &Grid<'_>,
    kind: GgmlType,
    order: Option<&[usize]>,
    out: &mut dyn Write,
    progress: &Progress,
) -> Result<Drift> {
    let cols = grid.cols();
    let (mut values, mut offsets) = (vec![0.0; cols], vec![0; cols]);
    let mut back = vec![0.0; cols];
    let mut drift = Drift::default();
    for place in 0..grid.rows() {
        progress.check()?;
        let row = order.map_or(place, |order| order[place]);
        grid.read(row, &mut values, &mut offsets)?;
        let mut data = Vec::with_capacity(cols / BLOCK * kind.block_bytes());
        for (block, offsets) in offsets.as_chunks::<BLOCK>().0.iter().enumerate() {
            let group = block * BLOCK / grid.group;
            data.extend(grid.scale(row, group).to_le_bytes());
            if kind == GgmlType::Q4_1 {
                data.extend(minimum(grid, row, group).to_le_bytes());
            }
            put_offsets(kind, offsets, grid.zero(row, group), &mut data);
        }
        let blocks = Ggml::new([1, cols], kind, data.into())?;
        blocks.read_rows(0, &mut back);
        drift.add_all(&values, &back);
        out.write_all(blocks.data())?;
    }
    Ok(drift)
}

#[allow(clippy::cast_sign_loss)]
fn put_offsets(kind: GgmlType, offsets: &[i16; BLOCK], zero: u8, out: &mut Vec<u8>) {
    if kind == GgmlType::Q8_0 {
        out.extend(offsets.iter().map(|q| *q as u8));
        return;
    }
    // The code that means 0: of the type, or of the group where the block has a minimum.
    let middle = match kind {
        GgmlType::Q4_0 => 8,
        GgmlType::Q4_1 => i16::from(zero),
        _ => 16,
    };
    let codes = offsets.map(|q| (q + middle) as u8);
    if kind == GgmlType::Q5_0 {
        let fifth = codes.iter().enumerate().map(|(i, code)| u32::from(code >> 4 & 1) << i);
        out.extend(fifth.fold(0, |bits, bit| bits | bit).to_le_bytes());
    }
    out.extend((0..BLOCK / 2).map(|i| codes[i] & 15 | (codes[i + BLOCK / 2] & 15) << 4));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nn::weight::{Grouped, GroupedSpec, Sparse, Weight};

    fn weight(bits: u8, group: usize, symmetric: bool, scale: f32, zero: u8) -> Weight {
        let spec = GroupedSpec { bits, group, symmetric };
        let codes: Vec<u8> = (0..128_u32).map(|i| (i * 37 % (1 << bits)) as u8).collect();
        let groups = 128 / group;
        let (scales, zeros) = (vec![scale; groups], vec![zero; groups]);
        Weight::Grouped(Grouped::pack([2, 64], spec, &codes, &scales, &zeros).unwrap())
    }

    fn carried(weight: &Weight) -> Option<GgmlType> {
        let grid = Grid::of(weight).unwrap();
        let kind = carrier(&grid, &Progress::silent()).unwrap()?;
        for order in [None, Some([1, 0])] {
            let mut data = Vec::new();
            let order = order.as_ref().map(|o: &[usize; 2]| &o[..]);
            let drift = put(&grid, kind, order, &mut data, &Progress::silent()).unwrap();
            assert_eq!(drift.max(), 0.0);
            let back = Weight::Ggml(Ggml::new([2, 64], kind, data.into()).unwrap()).to_f32();
            let mut values = weight.to_f32();
            if order.is_some() {
                values.rotate_left(64);
            }
            let bits = |v: &[f32]| v.iter().map(|v| (v + 0.0).to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&back), bits(&values), "{kind:?}");
        }
        Some(kind)
    }

    #[test]
    fn each_grid_gets_the_smallest_type_that_holds_it() {
        use GgmlType::{Q4_0, Q4_1, Q5_0, Q8_0};
        for (bits, kind) in [(2, Q4_0), (3, Q4_0), (4, Q4_0), (8, Q8_0)] {
            for group in [32, 64] {
                assert_eq!(carried(&weight(bits, group, true, 0.0124, 0)), Some(kind), "{bits}");
            }
            assert_eq!(carried(&weight(bits, 16, true, 0.0124, 0)), None);
        }
        // Minima of -8 and -4 scales are f16 numbers, those of -5 scales only where the scale is short.
        assert_eq!(carried(&weight(4, 32, false, 0.0124, 8)), Some(Q4_0));
        assert_eq!(carried(&weight(4, 32, false, 0.0124, 4)), Some(Q4_1));
        assert_eq!(carried(&weight(4, 32, false, 0.25, 5)), Some(Q4_1));
        assert_eq!(carried(&weight(4, 32, false, 0.0124, 5)), Some(Q5_0));
        assert_eq!(carried(&weight(3, 32, false, 0.0124, 5)), Some(Q4_0));
        // 8-bit codes with a zero point of their own reach beyond a byte, unless they do not use it all.
        assert_eq!(carried(&weight(8, 32, false, 0.0124, 3)), None);
        assert_eq!(carried(&weight(8, 32, false, 0.0124, 128)), Some(Q8_0));
    }

    #[test]
    fn pruned_codes_are_zeros_of_the_block() {
        let spec = GroupedSpec { bits: 4, group: 32, symmetric: false };
        let codes: Vec<u8> = (0..64).map(|i| i % 16).collect();
        let mask: Vec<bool> = (0..64).map(|i| i % 4 < 2).collect();
        let sparse =
            Sparse::from_codes([1, 64], &mask, spec, &codes, &[0.1; 2], &[3, 11], Some((2, 4)));
        let weight = Weight::Sparse(sparse.unwrap());
        let grid = Grid::of(&weight).unwrap();
        let kind = carrier(&grid, &Progress::silent()).unwrap().unwrap();
        let mut data = Vec::new();
        put(&grid, kind, None, &mut data, &Progress::silent()).unwrap();
        let back = Weight::Ggml(Ggml::new([1, 64], kind, data.into()).unwrap());
        assert_eq!(back.to_f32(), weight.to_f32());
        assert!(back.zeros() >= 32);
    }

    #[test]
    fn a_block_of_five_bits_by_hand() {
        let mut offsets = [0; 32];
        (offsets[0], offsets[1], offsets[16]) = (-15, 15, 1);
        let mut out = Vec::new();
        put_offsets(GgmlType::Q5_0, &offsets, 0, &mut out);
        // Code 1 has no fifth bit; 31, 16 and 17 do.
        assert_eq!(out[..4], 0xffff_fffe_u32.to_le_bytes());
        assert_eq!(out[4..7], [0x11, 0x0f, 0x00]);
        assert_eq!(out.len(), 20);
    }

    proptest! {
        #[test]
        fn whatever_is_carried_is_the_same_to_the_bit(
            codes in prop::collection::vec(0_u8..=15, 128),
            zeros in prop::collection::vec(0_u8..=15, 4),
            scales in prop::collection::vec(6e-8_f32..60000.0, 4),
            symmetric: bool,
        ) {
            let spec = GroupedSpec { bits: 4, group: 32, symmetric };
            let grouped = Grouped::pack([2, 64], spec, &codes, &scales, &zeros).unwrap();
            prop_assert!(carried(&Weight::Grouped(grouped)).is_some());
        }
    }
}
