//! Codes of 2, 3, 4 or 8 bits with a scale and a zero point for each group of inputs of a row.

use half::f16;

use super::*;
use crate::kernels::grouped::{Grid, GroupedRows};
use crate::kernels::packed::{Packed, Source};
use crate::kernels::{dot, product};

/// The grid: `weight = (code - zero) * scale`, codes in `0 .. 2^bits`. A symmetric grid has the fixed
/// zero `2^(bits-1)` and stores none. Code `zero` is exactly 0, so pruned elements stay 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupedSpec {
    pub bits: u8,
    pub group: usize,
    pub symmetric: bool,
}

impl GroupedSpec {
    /// Checks bits (2, 3, 4, 8) and that the group divides `cols`; the error suggests divisors.
    pub fn check(&self, cols: usize) -> Result<()> {
        if !matches!(self.bits, 2 | 3 | 4 | 8) {
            let message = format!("{} bits are not supported; take 2, 3, 4 or 8", self.bits);
            return Err(Error::option("bits", message));
        }
        if self.group == 0 || cols == 0 || !cols.is_multiple_of(self.group) {
            let mut fitting = vec![8, 16, 32, 64, 96, 128, 192, 256, cols];
            fitting.retain(|g| cols > 0 && cols.is_multiple_of(*g));
            fitting.sort_unstable();
            fitting.dedup();
            let fitting: Vec<String> = fitting.iter().map(usize::to_string).collect();
            let message = format!(
                "groups of {} do not divide rows of {cols}; these do: {}",
                self.group,
                fitting.join(", ")
            );
            return Err(Error::option("group", message));
        }
        Ok(())
    }

    /// The largest code.
    fn top(&self) -> u8 {
        (0xff_u16 >> (8 - self.bits)) as u8
    }

    /// The zero point of a symmetric grid.
    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Scale and zero of the grid that spans `values` (one group of a row) and contains 0. The scale is
    /// rounded to f16, the way it is stored, and is never 0: a group of zeros gets scale 1. Values that
    /// f16 scales cannot span are clipped by [`GroupedSpec::code`].
    pub fn fit(&self, values: &[f32]) -> (f32, u8) {
        let (min, max) =
            values.iter().fold((0.0_f32, 0.0_f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
        let top = f32::from(self.top());
        let scale = if self.symmetric {
            let middle = f32::from(self.middle());
            (-min / middle).max(max / (top - middle))
        } else {
            // Divided before they are subtracted: the difference of extremes may overflow.
            max / top - min / top
        };
        let scale = stored_scale(scale);
        let zero = if self.symmetric {
            self.middle()
        } else {
            (-min / scale).round_ties_even().min(top) as u8
        };
        (scale, zero)
    }

    /// Nearest code of `value`.
    pub fn code(&self, value: f32, scale: f32, zero: u8) -> u8 {
        if scale == 0.0 {
            return zero;
        }
        // A cast saturates, also at what is not a number.
        ((value / scale).round_ties_even() + f32::from(zero)).min(f32::from(self.top())) as u8
    }

    /// Bytes of the parts of a `[rows, cols]` weight.
    pub fn bytes(&self, rows: usize, cols: usize) -> u64 {
        let codes = bits::stream_bytes(cols, self.bits.into()) as u64;
        let groups = (cols / self.group.max(1)) as u64;
        rows as u64 * (codes + groups * if self.symmetric { 2 } else { 3 })
    }

    /// Packs scales `[rows, cols / group]` and, if the grid is not symmetric, zeros.
    pub(super) fn pack_grid(
        &self,
        [rows, cols]: [usize; 2],
        scales: &[f32],
        zeros: &[u8],
    ) -> Result<(Bytes, Bytes)> {
        let groups = rows * (cols / self.group);
        if scales.len() != groups || (!self.symmetric && zeros.len() != groups) {
            return Err(Error::internal(format!(
                "{} scales and {} zeros for {groups} groups",
                scales.len(),
                zeros.len()
            )));
        }
        let mut stored = Vec::with_capacity(2 * groups);
        for &scale in scales {
            let rounded = f16::from_f32(scale);
            if !rounded.is_finite() {
                return Err(Error::new(
                    Reason::NonFinite,
                    format!("a group's scale is {scale}, which f16 cannot hold"),
                ));
            }
            stored.extend_from_slice(&rounded.to_le_bytes());
        }
        if self.symmetric {
            return Ok((stored.into(), Bytes::new()));
        }
        if let Some(zero) = zeros.iter().find(|z| **z > self.top()) {
            return Err(Error::internal(format!("zero point {zero} has over {} bits", self.bits)));
        }
        Ok((stored.into(), Bytes::copy_from_slice(zeros)))
    }

    /// The parts that [`GroupedSpec::pack_grid`] made.
    pub(super) fn grid_parts(
        &self,
        [rows, cols]: [usize; 2],
        scales: &Bytes,
        zeros: &Bytes,
    ) -> Vec<Part> {
        let shape = vec![rows, cols / self.group];
        let scales = Part {
            suffix: "scales",
            dtype: Dtype::F16,
            shape: shape.clone(),
            data: scales.clone(),
        };
        let zeros = Part { suffix: "zeros", dtype: Dtype::U8, shape, data: zeros.clone() };
        if self.symmetric { vec![scales] } else { vec![scales, zeros] }
    }

    /// Takes scales and zeros from the parts of a file, checking sizes and domains.
    pub(super) fn take_grid(
        &self,
        [rows, cols]: [usize; 2],
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<(Bytes, Bytes)> {
        self.check(cols).map_err(|e| malformed(e.message()))?;
        let shape = [rows, cols / self.group];
        let scales = take_exact(parts, "scales", Dtype::F16, &shape)?;
        let finite = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).is_finite();
        if !scales.chunks_exact(2).all(finite) {
            return Err(malformed("part 'scales' holds values that are not finite"));
        }
        if self.symmetric {
            return Ok((scales, Bytes::new()));
        }
        let zeros = take_exact(parts, "zeros", Dtype::U8, &shape)?;
        if let Some(zero) = zeros.iter().find(|z| **z > self.top()) {
            return Err(malformed(format!(
                "part 'zeros' holds {zero}, which is no code of {} bits",
                self.bits
            )));
        }
        Ok((scales, zeros))
    }

    pub(super) fn grid<'a>(
        &self,
        shape: [usize; 2],
        scales: &'a Bytes,
        zeros: &'a Bytes,
    ) -> Grid<'a> {
        Grid::new(self.bits, self.group, shape, scales, (!self.symmetric).then_some(&zeros[..]))
    }
}

/// `scale` as f16 stores it, kept positive and finite.
fn stored_scale(scale: f32) -> f32 {
    if scale == 0.0 {
        return 1.0;
    }
    let rounded = f16::from_f32(scale);
    if rounded == f16::ZERO {
        f16::MIN_POSITIVE_SUBNORMAL.to_f32()
    } else {
        rounded.min(f16::MAX).to_f32()
    }
}

#[derive(Debug, Clone)]
pub struct Grouped {
    shape: [usize; 2],
    spec: GroupedSpec,
    codes: Bytes,
    scales: Bytes,
    zeros: Bytes,
}

impl Grouped {
    /// Packs codes `[rows, cols]`, scales and zeros `[rows, cols / group]` (zeros ignored if symmetric).
    pub fn pack(
        shape: [usize; 2],
        spec: GroupedSpec,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
    ) -> Result<Self> {
        let [rows, cols] = shape;
        spec.check(cols)?;
        byte_size(&shape, size_of::<f32>())?;
        if codes.len() != rows * cols {
            return Err(Error::internal(format!("{} codes for shape {shape:?}", codes.len())));
        }
        if let Some(code) = codes.iter().find(|c| **c > spec.top()) {
            return Err(Error::internal(format!("code {code} has over {} bits", spec.bits)));
        }
        let (scales, zeros) = spec.pack_grid(shape, scales, zeros)?;
        let width = usize::from(spec.bits);
        let mut packed = Vec::with_capacity(rows * bits::stream_bytes(cols, width));
        for row in codes.chunks_exact(cols) {
            bits::put(row.iter().copied(), width, &mut packed);
        }
        Ok(Self { shape, spec, codes: packed.into(), scales, zeros })
    }

    pub fn spec(&self) -> GroupedSpec {
        self.spec
    }

    fn view(&self) -> GroupedRows<'_> {
        let grid = self.spec.grid(self.shape, &self.scales, &self.zeros);
        GroupedRows::new(&self.codes, self.shape[0], self.shape[1], grid)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        (self.codes.len() + self.scales.len() + self.zeros.len()) as u64
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        dot::read(&self.view(), first, out);
    }

    /// Packed for products with 8-bit activations, if groups are whole blocks of 32 columns.
    pub fn packed(&self) -> Option<Packed> {
        let zeros = (!self.spec.symmetric).then_some(&self.zeros[..]);
        let (bits, group) = (self.spec.bits, self.spec.group);
        let (codes, scales) = (&self.codes, &self.scales);
        let source = Source::Grouped { bits, group, codes, scales, zeros };
        Packed::new(source, self.shape[0], self.shape[1])
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        product::multiply(&self.view(), x, y);
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        product::multiply_transposed(&self.view(), g, dx);
    }

    /// `codes` (a little-endian bit stream a row, padded to a byte), `scales` (F16) and, unless the grid
    /// is symmetric, `zeros` (U8), both by row and group.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = vec![Part {
            suffix: "codes",
            dtype: Dtype::U8,
            shape: vec![self.shape[0], self.codes.len() / self.shape[0]],
            data: self.codes.clone(),
        }];
        parts.extend(self.spec.grid_parts(self.shape, &self.scales, &self.zeros));
        parts
    }

    pub fn record(&self) -> Record {
        Record::Grouped { shape: self.shape, spec: self.spec }
    }

    pub fn from_parts(
        shape: [usize; 2],
        spec: GroupedSpec,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        byte_size(&shape, size_of::<f32>())?;
        let (scales, zeros) = spec.take_grid(shape, parts)?;
        let row = bits::stream_bytes(shape[1], spec.bits.into());
        let codes = take_exact(parts, "codes", Dtype::U8, &[shape[0], row])?;
        Ok(Self { shape, spec, codes, scales, zeros })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(bits: u8, group: usize, symmetric: bool) -> GroupedSpec {
        GroupedSpec { bits, group, symmetric }
    }

    #[test]
    fn grids_worked_out_by_hand() {
        // -1 .. 2 in steps of 1/5 has 0 at code 5.
        let (scale, zero) = spec(4, 4, false).fit(&[-1.0, 0.5, 2.0, 1.0]);
        assert_eq!((scale, zero), (f16::from_f32(0.2).to_f32(), 5));
        // Codes 0..15 stand for -8..7: -4 needs steps of 1/2, 3.5 too.
        assert_eq!(spec(4, 2, true).fit(&[-4.0, 1.0]), (0.5, 8));
        assert_eq!(spec(4, 2, true).fit(&[3.5, -1.0]), (0.5, 8));
        assert_eq!(spec(2, 2, false).fit(&[3.0, 6.0]), (2.0, 0));
        assert_eq!(spec(2, 2, false).fit(&[-3.0, -6.0]), (2.0, 3));
        let g = spec(4, 4, false);
        assert_eq!([-9.0, -1.0, -0.3, 0.25, 4.0].map(|v| g.code(v, 0.5, 3)), [0, 1, 2, 3, 11]);
        assert_eq!(g.code(f32::INFINITY, 0.5, 3), 15);
        assert!(g.code(f32::NAN, 0.5, 3) <= 15);
        assert_eq!(g.code(1.0, 0.0, 3), 3);
    }

    #[test]
    fn degenerate_groups_have_usable_grids() {
        for s in [spec(2, 1, false), spec(3, 1, true), spec(8, 1, false)] {
            let (scale, zero) = s.fit(&[0.0, -0.0]);
            assert_eq!((scale, s.code(0.0, scale, zero)), (1.0, zero));
            for v in [1e-12, -1e-12, f32::MAX, f32::MIN] {
                let (scale, zero) = s.fit(&[v, 0.0]);
                assert!(scale > 0.0 && scale.is_finite(), "{v}");
                assert_eq!(s.code(0.0, scale, zero), zero);
            }
        }
        // Nothing wider fits into f16.
        assert_eq!(spec(8, 1, false).fit(&[f32::MIN, f32::MAX]), (65504.0, 255));
    }

    #[test]
    fn codes_are_packed_by_row() {
        let s = spec(3, 3, false);
        let w = Grouped::pack([2, 3], s, &[1, 2, 7, 4, 0, 3], &[0.5, 2.0], &[2, 1]).unwrap();
        assert_eq!(w.codes, [0xd1, 0x01, 0xc4, 0x00][..]);
        let mut out = [0.0; 6];
        w.read_rows(0, &mut out);
        assert_eq!(out, [-0.5, 0.0, 2.5, 6.0, -2.0, 4.0]);
        assert_eq!(w.bytes(), s.bytes(2, 3));
    }

    #[test]
    fn bad_specs_are_refused_with_a_way_out() {
        let error = spec(5, 32, true).check(64).unwrap_err();
        assert_eq!(error.violations()[0].field, "bits");
        let error = spec(4, 48, true).check(64).unwrap_err();
        assert!(error.message().ends_with("these do: 8, 16, 32, 64"));
        assert!(spec(4, 0, true).check(64).is_err());
        assert!(Grouped::pack([1, 2], spec(2, 2, true), &[0, 4], &[1.0], &[]).is_err());
        assert!(Grouped::pack([1, 2], spec(2, 2, true), &[0, 3], &[1e6], &[]).is_err());
        assert!(Grouped::pack([1, 2], spec(2, 2, false), &[0, 3], &[1.0], &[4]).is_err());
    }

    proptest! {
        #[test]
        fn rounding_errors_are_at_most_half_a_step(
            values in prop::collection::vec(-100.0_f32..100.0, 1..40),
            bits in prop::sample::select(vec![2_u8, 3, 4, 8]),
            symmetric: bool,
        ) {
            let s = spec(bits, values.len(), symmetric);
            let (scale, zero) = s.fit(&values);
            for v in values {
                let back = (f32::from(s.code(v, scale, zero)) - f32::from(zero)) * scale;
                // Rounding the scale to f16 and the zero point to a code costs up to another half step.
                prop_assert!((back - v).abs() <= scale * 1.07, "{v} came back as {back}");
            }
        }
    }

    #[test]
    fn every_code_comes_back_from_every_place() {
        for bits in [2_u8, 3, 4, 8] {
            let count = 1_usize << bits;
            // Whole vectors, half ones, and rows that end within a byte.
            for (cols, group) in [(96, 32), (48, 16), (24, 12), (11, 11)] {
                // Each row begins with another code, so every code stands at every place.
                let codes: Vec<u8> =
                    (0..count * cols).map(|i| ((i / cols + i % cols) % count) as u8).collect();
                let (shape, spec) = ([count, cols], spec(bits, group, false));
                let groups = count * cols / group;
                let w = Grouped::pack(shape, spec, &codes, &vec![1.0; groups], &vec![0; groups]);
                let w = w.unwrap();
                let wanted: Vec<f32> = codes.iter().map(|code| f32::from(*code)).collect();
                let mut parts: BTreeMap<String, Part> =
                    w.parts().into_iter().map(|p| (p.suffix.to_owned(), p)).collect();
                let again = Grouped::from_parts(shape, spec, &mut parts).unwrap();
                for weight in [w, again] {
                    let mut out = vec![f32::NAN; codes.len()];
                    weight.read_rows(0, &mut out);
                    assert!(out == wanted, "{bits} bits in groups of {group}");
                }
            }
        }
    }

    #[test]
    fn every_code_comes_back_as_the_number_it_stands_for() {
        for bits in [2, 3, 4, 8] {
            let up: Vec<u8> = (0..=u8::MAX >> (8 - bits)).collect();
            let down: Vec<u8> = up.iter().rev().copied().collect();
            let (cols, top) = (up.len(), up[up.len() - 1]);
            for zero in [0, top / 2, top] {
                for symmetric in [false, true] {
                    let s = spec(bits, cols, symmetric);
                    let codes = [up.clone(), down.clone()].concat();
                    let w = Grouped::pack([2, cols], s, &codes, &[0.125, 3.0], &[zero, top]);
                    let w = Weight::Grouped(w.unwrap());
                    let zeros = if symmetric { [1 << (bits - 1); 2] } else { [zero, top] };
                    let want = codes.iter().enumerate().map(|(i, code)| {
                        let (zero, scale) = (zeros[i / cols], [0.125, 3.0][i / cols]);
                        (f32::from(*code) - f32::from(zero)) * scale
                    });
                    assert_eq!(w.to_f32(), want.collect::<Vec<_>>(), "{bits} bits");
                }
            }
        }
    }
}
