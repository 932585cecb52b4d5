//! 4-bit codes in groups inside rows that are those of an 8-bit matrix: the layout of dual grained
//! quantization (DGQ, arXiv 2310.04836, section 3).
//!
//! `weight = (code - zero) * factor * scale`: a code is 0 to 15; a group of inputs of a row has a zero
//! point, 0 to 15, and a factor, 1 to 127; a row has a scale. `(code - zero) * factor` lies within -127
//! and 127, so that products with 8-bit activations stay integers over a whole row, which groups with
//! scales of their own do not allow. At groups of 128 that takes 4.125 bits a weight and 4 bytes a row.

use super::*;
use crate::kernels::dual_grained::{BLOCK, DualGrainedRows};
use crate::kernels::packed::{Packed, Source};
use crate::kernels::{dot, product};

/// The largest magnitude of `(code - zero) * factor`.
const TOP: u8 = 127;
/// Part of the step of activations.
const ACTIVATIONS: &str = "activations";
/// The largest code and zero point.
const TOP_CODE: u8 = 15;

/// A matrix of 4-bit codes in groups inside 8-bit rows.
#[derive(Debug, Clone)]
pub struct DualGrained {
    shape: [usize; 2],
    group: usize,
    /// As [`DualGrainedRows`] reads them.
    codes: Bytes,
    factors: Bytes,
    zeros: Bytes,
    scales: Bytes,
    /// The step of 8-bit activations, where it is fixed; each token has its own otherwise.
    activations: Option<f32>,
}

impl DualGrained {
    /// Checks that groups are whole blocks of 32 columns and divide `cols`; the error suggests divisors.
    pub fn check_group(group: usize, cols: usize) -> Result<()> {
        if group > 0 && cols > 0 && group.is_multiple_of(BLOCK) && cols.is_multiple_of(group) {
            return Ok(());
        }
        let mut fitting: Vec<usize> = (BLOCK..=256).step_by(BLOCK).collect();
        fitting.retain(|g| cols > 0 && cols.is_multiple_of(*g));
        let message = if fitting.is_empty() {
            format!(
                "rows of {cols} cannot be split into groups of whole blocks of {BLOCK}; leave this matrix out"
            )
        } else {
            let fitting: Vec<String> = fitting.iter().map(usize::to_string).collect();
            format!(
                "groups of {group} do not split rows of {cols} into whole blocks of {BLOCK}; these do: {}",
                fitting.join(", ")
            )
        };
        Err(Error::option("group", message))
    }

    /// Packs codes `[rows, cols]` (one a byte), factors and zeros `[rows, cols / group]` and scales
    /// `[rows]`.
    ///
    /// # Errors
    /// A group that does not fit; sizes that disagree; values outside their domains, as the module states
    /// them, which is a defect of the caller; a scale whose row is not finite.
    pub fn pack(
        shape: [usize; 2],
        group: usize,
        codes: &[u8],
        factors: &[u8],
        zeros: &[u8],
        scales: &[f32],
    ) -> Result<Self> {
        let [rows, cols] = shape;
        Self::check_group(group, cols)?;
        byte_size(&shape, size_of::<f32>())?;
        let groups = rows * (cols / group);
        if codes.len() != rows * cols
            || factors.len() != groups
            || zeros.len() != groups
            || scales.len() != rows
        {
            return Err(Error::internal(format!(
                "{} codes, {} factors, {} zeros and {} scales for shape {shape:?} in groups of {group}",
                codes.len(),
                factors.len(),
                zeros.len(),
                scales.len()
            )));
        }
        if let Some(code) = codes.iter().find(|c| **c > TOP_CODE) {
            return Err(Error::internal(format!("code {code} has over 4 bits")));
        }
        if let Some(scale) = scales.iter().find(|s| !usable(**s)) {
            return Err(Error::new(
                Reason::NonFinite,
                format!("a row's scale is {scale}; its weights would not be finite"),
            ));
        }
        let mut packed = Vec::with_capacity(codes.len() / 2);
        for block in codes.as_chunks::<BLOCK>().0 {
            packed.extend((0..BLOCK / 2).map(|i| block[i] | block[i + BLOCK / 2] << 4));
        }
        let weight = Self {
            shape,
            group,
            codes: packed.into(),
            factors: Bytes::copy_from_slice(factors),
            zeros: Bytes::copy_from_slice(zeros),
            scales: scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
            activations: None,
        };
        weight.check_grid().map_err(Error::internal)?;
        Ok(weight)
    }

    /// Rounds dense rows to the nearest codes, without any search: grids of groups that span their values
    /// and 0, then the row scale that makes the largest magnitude of the row 127.
    ///
    /// # Errors
    /// A group that does not fit; values that are not `shape`, or not finite.
    pub fn round(shape: [usize; 2], group: usize, values: &[f32]) -> Result<Self> {
        let [rows, cols] = shape;
        Self::check_group(group, cols)?;
        byte_size(&shape, size_of::<f32>())?;
        if values.len() != rows * cols {
            return Err(Error::internal(format!("{} values for shape {shape:?}", values.len())));
        }
        if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
            return Err(Error::new(Reason::NonFinite, format!("a weight to be rounded is {bad}")));
        }
        let mut codes = vec![0; rows * cols];
        let (mut factors, mut zeros, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for (values, codes) in values.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)) {
            let scale = row_scale(values);
            for (values, codes) in values.chunks_exact(group).zip(codes.chunks_exact_mut(group)) {
                let (step, zero) = fit(values);
                factors.push(round_group(values, step, zero, scale, codes));
                zeros.push(zero);
            }
            scales.push(scale);
        }
        Self::pack(shape, group, &codes, &factors, &zeros, &scales)
    }

    /// The same weight, whose products in integers round activations to multiples of `step`, up to 127 of
    /// them either way.
    ///
    /// # Errors
    /// NON_FINITE unless `step` is a number above 0.
    pub fn with_activations(self, step: f32) -> Result<Self> {
        if !fixed(step) {
            let message = format!("activations cannot be rounded to multiples of {step}");
            return Err(Error::new(Reason::NonFinite, message));
        }
        Ok(Self { activations: Some(step), ..self })
    }

    /// What the values of every group must keep to, sizes being right.
    fn check_grid(&self) -> std::result::Result<(), String> {
        let groups = self.factors.iter().zip(&self.zeros);
        for ((&factor, &zero), codes) in groups.zip(self.codes.chunks_exact(self.group / 2)) {
            if !(1..=TOP).contains(&factor) {
                return Err(format!("factor {factor} is not within 1 and {TOP}"));
            }
            if zero > TOP_CODE {
                return Err(format!("zero point {zero} has over 4 bits"));
            }
            let [low, high] = allowed(factor, zero);
            if low == 0 && high == TOP_CODE {
                continue;
            }
            let (least, most) = codes.iter().fold((TOP_CODE, 0), |(least, most): (u8, u8), b| {
                let (a, b) = (b & 15, b >> 4);
                (least.min(a).min(b), most.max(a).max(b))
            });
            if least < low || most > high {
                let code = if least < low { least } else { most };
                return Err(format!(
                    "code {code} less zero point {zero} times factor {factor} does not fit into a \
                     signed byte"
                ));
            }
        }
        Ok(())
    }

    /// Inputs that share a factor and a zero point.
    pub fn group(&self) -> usize {
        self.group
    }

    fn view(&self) -> DualGrainedRows<'_> {
        let (codes, scales) = (&self.codes, &self.scales);
        DualGrainedRows::new(self.shape, self.group, codes, &self.factors, &self.zeros, scales)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        let step = if self.activations.is_some() { size_of::<f32>() } else { 0 };
        let parts = [&self.codes, &self.factors, &self.zeros, &self.scales];
        (parts.into_iter().map(Bytes::len).sum::<usize>() + step) as u64
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        dot::read(&self.view(), first, out);
    }

    /// Packed for products with 8-bit activations, unless rows are so wide that their sums leave an i32.
    pub fn packed(&self) -> Option<Packed> {
        let scales: Vec<f32> = floats(&self.scales).collect();
        let source = Source::DualGrained {
            group: self.group,
            codes: &self.codes,
            factors: &self.factors,
            zeros: &self.zeros,
            scales: &scales,
        };
        let packed = Packed::new(source, self.shape[0], self.shape[1])?;
        Some(packed.with_activations(self.activations))
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        product::multiply(&self.view(), x, y);
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        product::multiply_transposed(&self.view(), g, dx);
    }

    /// `codes` (U8: 16 bytes for 32 columns of a row, column i in the low half of byte i, column i + 16 in
    /// its high half), `factors` and `zeros` (U8, by row and group), `scales` (F32, by row), and `activations`
    /// (F32, one) where their step is fixed.
    pub fn parts(&self) -> Vec<Part> {
        let [rows, cols] = self.shape;
        let part =
            |suffix, dtype, shape, data: &Bytes| Part { suffix, dtype, shape, data: data.clone() };
        let groups = vec![rows, cols / self.group];
        let mut parts = vec![
            part("codes", Dtype::U8, vec![rows, cols / 2], &self.codes),
            part("factors", Dtype::U8, groups.clone(), &self.factors),
            part("zeros", Dtype::U8, groups, &self.zeros),
            part("scales", Dtype::F32, vec![rows], &self.scales),
        ];
        if let Some(step) = self.activations {
            let step = Bytes::copy_from_slice(&step.to_le_bytes());
            parts.push(part(ACTIVATIONS, Dtype::F32, vec![1], &step));
        }
        parts
    }

    pub fn record(&self) -> Record {
        let static_activations = self.activations.is_some();
        Record::DualGrained { shape: self.shape, group: self.group, static_activations }
    }

    pub fn from_parts(
        shape: [usize; 2],
        group: usize,
        static_activations: bool,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        let [rows, cols] = shape;
        byte_size(&shape, size_of::<f32>())?;
        Self::check_group(group, cols).map_err(|e| malformed(e.message()))?;
        let groups = [rows, cols / group];
        let weight = Self {
            shape,
            group,
            codes: take_exact(parts, "codes", Dtype::U8, &[rows, cols / 2])?,
            factors: take_exact(parts, "factors", Dtype::U8, &groups)?,
            zeros: take_exact(parts, "zeros", Dtype::U8, &groups)?,
            scales: take_exact(parts, "scales", Dtype::F32, &[rows])?,
            activations: match static_activations {
                true => floats(&take_exact(parts, ACTIVATIONS, Dtype::F32, &[1])?).next(),
                false => None,
            },
        };
        if let Some(step) = weight.activations.filter(|step| !fixed(*step)) {
            return Err(malformed(format!("part '{ACTIVATIONS}' holds {step}, no step")));
        }
        if let Some(scale) = floats(&weight.scales).find(|s| !usable(*s)) {
            return Err(malformed(format!(
                "part 'scales' holds {scale}, whose weights are not finite"
            )));
        }
        weight.check_grid().map_err(malformed)?;
        Ok(weight)
    }
}

/// Whether activations can be rounded to multiples of this step.
fn fixed(step: f32) -> bool {
    step.is_finite() && step > 1e-38
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))
}

/// Whether every weight of a row with this scale is finite.
fn usable(scale: f32) -> bool {
    (scale * f32::from(TOP)).is_finite()
}

/// The least and the largest code that keep `(code - zero) * factor` within a signed byte.
fn allowed(factor: u8, zero: u8) -> [u8; 2] {
    let limit = TOP / factor;
    [zero.saturating_sub(limit), (zero + limit).min(TOP_CODE)]
}

/// Step and zero point of the grid of 16 codes that spans the values of a group and 0.
fn fit(values: &[f32]) -> (f32, u8) {
    let (low, high) =
        values.iter().fold((0.0_f32, 0.0_f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let top = f32::from(TOP_CODE);
    // Divided before they are subtracted: the difference of extremes may overflow.
    let step = high / top - low / top;
    if step == 0.0 {
        return (0.0, 0);
    }
    (step, (-low / step).round_ties_even().min(top) as u8)
}

/// The scale that makes the largest magnitude of a row 127.
fn row_scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    let scale = largest / f32::from(TOP);
    // Rounded up, the scale of the largest f32 there is would not be usable.
    if usable(scale) { scale } else { scale.next_down() }
}

/// Rounds a group whose grid has this step and zero point to whole multiples of the row's scale: writes
/// its codes and gives its factor.
fn round_group(values: &[f32], step: f32, zero: u8, scale: f32, codes: &mut [u8]) -> u8 {
    // A row of zeros, or of values that no scale reaches.
    if scale == 0.0 {
        codes.fill(zero);
        return 1;
    }
    // A cast saturates.
    let factor = ((step / scale).round_ties_even() as u8).clamp(1, TOP);
    let [low, high] = allowed(factor, zero).map(f32::from);
    let unit = scale * f32::from(factor);
    for (code, value) in codes.iter_mut().zip(values) {
        let nearest = (value / unit).round_ties_even() + f32::from(zero);
        *code = nearest.clamp(low, high) as u8;
    }
    factor
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::packed::{Job, multiply};
    use crate::kernels::quantize::Activations;

    /// The 8-bit row values of a weight whose scales are all 1.
    fn bytes_of(w: &DualGrained) -> Vec<f32> {
        let scales = std::iter::repeat_n(1.0_f32.to_le_bytes(), w.shape[0]).flatten().collect();
        Weight::DualGrained(DualGrained { scales, ..w.clone() }).to_f32()
    }

    /// Columns 0, 1, ... of one group of 32, the rest 0.
    fn group(first: &[f32]) -> Vec<f32> {
        let mut values = first.to_vec();
        values.resize(BLOCK, 0.0);
        values
    }

    #[test]
    fn a_row_worked_out_by_hand() {
        // Row scale 1. Group 0 spans -30 to 127: a step of 157 / 15 = 10.47, so zero 3 and factor 10,
        // which leaves 12 codes on either side of 3. Group 1 spans 0 to 1: factor 1, zero 0.
        let values = [group(&[127.0, -30.0, 96.0, 4.0]), group(&[1.0, 0.2])].concat();
        let w = DualGrained::round([1, 64], 32, &values).unwrap();
        assert_eq!((&w.factors[..], &w.zeros[..]), (&[10, 1][..], &[3, 0][..]));
        assert_eq!(w.scales, 1.0_f32.to_le_bytes()[..]);
        assert_eq!(w.codes[..4], [15 | 3 << 4, 3 << 4, 13 | 3 << 4, 3 | 3 << 4]);
        assert_eq!(w.codes[16..19], [1, 0, 0]);
        let read = Weight::DualGrained(w).to_f32();
        assert_eq!(read[..5], [120.0, -30.0, 100.0, 0.0, 0.0]);
        assert_eq!(read[32..35], [1.0, 0.0, 0.0]);
    }

    #[test]
    fn columns_16_apart_share_a_byte() {
        let codes: Vec<u8> = (0..64).map(|i| (i % 16) as u8 ^ (i / 16) as u8).collect();
        let w = DualGrained::pack([2, 32], 32, &codes, &[1, 8], &[8, 0], &[1.0, 0.5]).unwrap();
        for (i, byte) in w.codes.iter().enumerate() {
            let at = i / 16 * 32 + i % 16;
            assert_eq!((byte & 15, byte >> 4), (codes[at], codes[at + 16]));
        }
        let weights = |i: usize| match i / 32 {
            0 => f32::from(codes[i]) - 8.0,
            _ => f32::from(codes[i]) * 8.0 * 0.5,
        };
        assert_eq!(Weight::DualGrained(w).to_f32(), (0..64).map(weights).collect::<Vec<_>>());
    }

    #[test]
    fn bits_per_weight_are_as_published() {
        // 4 + 8/128 + 8/128 in groups of 128, and a scale of 32 bits a row.
        let (rows, cols) = (16, 1024);
        let w = DualGrained::round([rows, cols], 128, &vec![0.5; rows * cols]).unwrap();
        assert_eq!(w.bytes() * 8, (rows * cols / 8 * 33 + 32 * rows) as u64);
        // A code, a factor and a zero point take the same packed; rows of 16 fill their panels.
        assert_eq!(w.packed().unwrap().bytes() as u64, w.bytes());
    }

    #[test]
    fn rows_of_zeros_and_extreme_rows_stay_what_they_are() {
        let w = DualGrained::round([2, 32], 32, &[[0.0; 32], [-0.0; 32]].concat()).unwrap();
        assert_eq!((&w.factors[..], &w.zeros[..]), (&[1, 1][..], &[0, 0][..]));
        assert_eq!(Weight::DualGrained(w).to_f32(), [0.0; 64]);
        // Below what a scale can divide; the largest numbers there are.
        for extreme in [1e-45, -1e-45, 3e-43, f32::MAX, f32::MIN] {
            let w = DualGrained::round([1, 32], 32, &group(&[extreme])).unwrap();
            let read = Weight::DualGrained(w).to_f32();
            assert!(read.iter().all(|v| v.is_finite()), "{extreme}: {read:?}");
            assert_eq!(read[1..], [0.0; 31]);
        }
        let w = DualGrained::round([1, 32], 32, &group(&[f32::MAX, f32::MIN])).unwrap();
        assert!(Weight::DualGrained(w).to_f32().iter().all(|v| v.is_finite()));
        for bad in [f32::NAN, f32::INFINITY] {
            let error = DualGrained::round([1, 32], 32, &group(&[bad])).unwrap_err();
            assert_eq!(error.reason(), Reason::NonFinite);
        }
    }

    #[test]
    fn values_outside_their_domains_are_refused() {
        let codes = [5; 32];
        let pack = |codes: &[u8], factor: u8, zero: u8, scale: f32| {
            DualGrained::pack([1, 32], 32, codes, &[factor], &[zero], &[scale])
        };
        assert!(pack(&codes, 127, 4, 1.0).is_ok());
        assert!(pack(&codes, 12, 15, -1.0).is_ok());
        for (factor, zero, scale, what) in [
            (0, 5, 1.0, "factor 0"),
            (128, 5, 1.0, "factor 128"),
            (1, 16, 1.0, "zero point 16"),
            (13, 15, 1.0, "code 5 less zero point 15 times factor 13"),
            (64, 3, 1.0, "code 5 less zero point 3 times factor 64"),
            (1, 5, f32::NAN, "scale"),
            (1, 5, f32::INFINITY, "scale"),
            (1, 5, 1e38, "scale"),
        ] {
            let error = pack(&codes, factor, zero, scale).unwrap_err();
            assert!(error.message().contains(what), "{what}: {error}");
            // The same from a file.
            let good = Weight::DualGrained(pack(&codes, 1, 5, 1.0).unwrap());
            let mut parts: BTreeMap<_, _> =
                good.parts().into_iter().map(|p| (p.suffix.to_string(), p)).collect();
            parts.get_mut("factors").unwrap().data = vec![factor].into();
            parts.get_mut("zeros").unwrap().data = vec![zero].into();
            parts.get_mut("scales").unwrap().data = scale.to_le_bytes().to_vec().into();
            let error = Weight::from_parts(&good.record(), parts).unwrap_err();
            assert_eq!(error.reason(), Reason::MalformedFile);
            assert!(error.message().contains(what), "{what}: {error}");
        }
        assert!(pack(&[16; 32], 1, 5, 1.0).is_err());
        // A single code that leaves the byte, in a high half.
        let mut one = [5; 32];
        one[31] = 9;
        assert!(pack(&one, 31, 5, 1.0).is_ok());
        assert!(pack(&one, 32, 5, 1.0).is_err());
    }

    #[test]
    fn bad_groups_are_refused_with_a_way_out() {
        let error = DualGrained::check_group(128, 576).unwrap_err();
        assert_eq!(error.violations()[0].field, "group");
        assert!(error.message().ends_with("these do: 32, 64, 96, 192"), "{error}");
        assert!(DualGrained::check_group(64, 80).unwrap_err().message().contains("leave"));
        for (group, cols) in [(0, 64), (16, 64), (64, 0), (128, 64), (48, 96)] {
            assert!(DualGrained::check_group(group, cols).is_err(), "{group} {cols}");
        }
        let w = Weight::DualGrained(DualGrained::round([1, 96], 96, &[1.0; 96]).unwrap());
        for group in [0, 1, 64, 192, usize::MAX, usize::MAX - 31] {
            let parts = w.parts().into_iter().map(|p| (p.suffix.to_string(), p)).collect();
            let record = Record::DualGrained { shape: [1, 96], group, static_activations: false };
            let error = Weight::from_parts(&record, parts).unwrap_err();
            assert_eq!(error.reason(), Reason::MalformedFile, "{group}");
        }
    }

    /// Rows of bell-shaped values with outliers; every third group without negatives.
    fn rows() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
        let group = prop::sample::select(vec![32_usize, 64, 96]);
        (group, 1_usize..5, 1_usize..4, any::<u64>(), -30_i32..20).prop_map(
            |(group, groups, rows, seed, exponent)| {
                let mut state = seed | 1;
                let mut next = || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 40) as f32 / (1 << 23) as f32 - 1.0
                };
                let values = (0..rows * groups * group)
                    .map(|i| {
                        let mut v = (next() + next() + next()) * 2.0_f32.powi(exponent);
                        if next() > 0.99 {
                            v *= 40.0;
                        }
                        if i / group % 3 == 2 { v.abs() } else { v }
                    })
                    .collect();
                (group, groups * group, values)
            },
        )
    }

    proptest! {
        #[test]
        fn rounded_rows_are_signed_bytes_times_a_scale((group, cols, values) in rows()) {
            let shape = [values.len() / cols, cols];
            let w = DualGrained::round(shape, group, &values).unwrap();
            for byte in bytes_of(&w) {
                prop_assert!(byte.abs() <= 127.0 && byte == byte.trunc(), "{byte}");
            }
            let scales: Vec<f32> = floats(&w.scales).collect();
            let factors = w.factors.to_vec();
            let read = Weight::DualGrained(w).to_f32();
            for (i, (read, value)) in read.iter().zip(&values).enumerate() {
                let unit = scales[i / cols] * f32::from(factors[i / group]);
                // Half a step by rounding, half a step by the zero point's; rounding the factor moves an end
                // of 15 steps by up to a half in one, or by up to 7.5 row scales.
                let most = 1.01 * unit + 7.6 * scales[i / cols];
                prop_assert!((read - value).abs() <= most, "{value} came back as {read}");
            }
        }

        #[test]
        fn packed_products_are_those_of_the_same_rounded_activations(
            (group, cols, values) in rows(),
            tokens in 1_usize..10,
        ) {
            let shape = [values.len() / cols, cols];
            let w = Weight::DualGrained(DualGrained::round(shape, group, &values).unwrap());
            let packed = w.packed().unwrap();
            let x: Vec<f32> = (0..tokens * cols)
                .map(|i| ((i * 7919) % 1013) as f32 / 300.0 - 1.6)
                .collect();
            let mut rounded = Activations::default();
            rounded.set(&x, cols, packed.grain());
            let mut y = vec![f32::NAN; tokens * shape[0]];
            multiply(&rounded, &mut [Some(Job { weight: &packed, y: &mut y })]);
            let mut exact = vec![f32::NAN; tokens * shape[0]];
            let x = rounded.to_f32();
            w.multiply(&x, &mut exact);
            let dense = w.to_f32();
            for (i, (y, exact)) in y.iter().zip(&exact).enumerate() {
                let (token, row) = (i / shape[0], i % shape[0]);
                let terms = x[token * cols..][..cols].iter().zip(&dense[row * cols..][..cols]);
                let size: f32 = terms.map(|(x, w)| (x * w).abs()).sum();
                prop_assert!((y - exact).abs() <= 1e-5 * size, "{y} is not {exact}");
            }
        }
    }

    #[test]
    fn a_fixed_step_is_kept_with_the_weight_and_has_to_be_one() {
        let w = DualGrained::round([2, 32], 32, &[0.5; 64]).unwrap();
        let plain = w.bytes();
        for bad in [0.0, -1.0, 1e-39, f32::NAN, f32::INFINITY] {
            let error = w.clone().with_activations(bad).unwrap_err();
            assert_eq!(error.reason(), Reason::NonFinite, "{bad}");
        }
        let w = Weight::DualGrained(w.with_activations(0.25).unwrap());
        assert_eq!(w.bytes(), plain + 4);
        let parts = || -> BTreeMap<String, Part> {
            w.parts().into_iter().map(|part| (part.suffix.to_string(), part)).collect()
        };
        let back = Weight::from_parts(&w.record(), parts()).unwrap();
        assert_eq!((back.record(), back.to_f32()), (w.record(), w.to_f32()));
        let Weight::DualGrained(back) = back else { panic!("another layout") };
        assert_eq!(back.activations, Some(0.25));
        let refused = |record: &Record, parts: BTreeMap<String, Part>| {
            let error = Weight::from_parts(record, parts).unwrap_err();
            let reasons = [Reason::MalformedFile, Reason::UnsupportedFormat];
            assert!(reasons.contains(&error.reason()), "{error}");
        };
        for bad in [0.0_f32, -1.0, f32::NAN, f32::INFINITY] {
            let mut lying = parts();
            lying.get_mut(ACTIVATIONS).unwrap().data = bad.to_le_bytes().to_vec().into();
            refused(&w.record(), lying);
        }
        // Missing where the record speaks of it, and there where it does not.
        let mut missing = parts();
        missing.remove(ACTIVATIONS);
        refused(&w.record(), missing);
        let silent = Record::DualGrained { shape: [2, 32], group: 32, static_activations: false };
        refused(&silent, parts());
    }
}
