//! Groups of consecutive rows that share the list of their kept columns.

use std::sync::Arc;

use super::*;
use crate::kernels::dot;
use crate::kernels::row_groups::{self as kernels, MAX_INT8_COLS, Pattern, Values};

/// How the values of kept columns are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RowGroupValues {
    F32,
    BF16,
    /// Signed bytes with one f32 scale a row. Products round activations to 8 bits as well.
    Int8,
}

impl RowGroupValues {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::BF16 => Dtype::BF16,
            Self::Int8 => Dtype::I8,
        }
    }
}

/// Rows are cut into groups of 2, 4, 8, 16 or 32, of which the last may be short. Every group has a list
/// of columns, and for each of these a value of each of its rows.
#[derive(Debug, Clone)]
pub struct RowGroups {
    shape: [usize; 2],
    format: RowGroupValues,
    /// u32 counts of the kept columns before each group, and of all.
    starts: Bytes,
    /// Kept columns, u16, or u32 where rows are longer than 65535.
    columns: Bytes,
    values: Bytes,
    /// f32, one a row, with `Int8`.
    scales: Bytes,
    derived: Arc<Derived>,
}

/// What the kernels want beside the values.
#[derive(Debug)]
struct Derived {
    pattern: Pattern,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl RowGroups {
    /// Stores the units (a column of a group) in which an element is not zero.
    pub fn from_dense(
        shape: [usize; 2],
        dense: &[f32],
        group: usize,
        format: RowGroupValues,
    ) -> Result<Self> {
        check_group(group)?;
        check_elements(shape, dense.len())?;
        let cols = shape[1];
        let mut units = vec![false; shape[0].div_ceil(group) * cols];
        for (row, values) in dense.chunks_exact(cols).enumerate() {
            let units = &mut units[row / group * cols..][..cols];
            units.iter_mut().zip(values).for_each(|(kept, v)| *kept |= *v != 0.0);
        }
        Self::from_units(shape, dense, &units, group, format)
    }

    /// Stores the units where `units`, `[groups, cols]`, is true. Values in `Int8` are rounded to 127 steps of
    /// the largest of their row; they must be finite.
    pub fn from_units(
        shape: [usize; 2],
        dense: &[f32],
        units: &[bool],
        group: usize,
        format: RowGroupValues,
    ) -> Result<Self> {
        check_group(group)?;
        check_elements(shape, dense.len())?;
        let [rows, cols] = shape;
        check_int8(format, cols)?;
        let groups = rows.div_ceil(group);
        if units.len() != groups * cols {
            return Err(Error::internal(format!(
                "{} units for {groups} groups of {cols} columns",
                units.len()
            )));
        }
        let (mut starts, mut columns) = (vec![0], Vec::new());
        for units in units.chunks_exact(cols) {
            columns.extend((0..cols).filter(|&c| units[c]));
            starts.push(columns.len());
        }
        let wide = columns.len() > u32::MAX as usize;
        let pattern = Pattern::new(shape, group, starts.clone().into(), columns.iter().copied());
        let pattern = pattern.map_err(Error::internal)?;
        if wide {
            return Err(Error::new(
                Reason::UnsupportedModel,
                format!("shape {shape:?} keeps more columns of groups than row groups can count"),
            ));
        }

        let scales = match format {
            RowGroupValues::Int8 => row_scales(shape, dense, &pattern)?,
            RowGroupValues::F32 | RowGroupValues::BF16 => Vec::new(),
        };
        let values = match format {
            RowGroupValues::Int8 => int8_values(cols, dense, &pattern, &scales),
            RowGroupValues::F32 | RowGroupValues::BF16 => {
                let mut values = Vec::with_capacity(pattern.values());
                for g in 0..pattern.groups() {
                    for column in pattern.columns(g) {
                        let first = g * group;
                        let rows = first..first + pattern.lanes(g);
                        values.extend(rows.map(|row| dense[row * cols + column]));
                    }
                }
                dense::encode(&values, format.dtype())?
            }
        };
        let columns = if cols > usize::from(u16::MAX) {
            columns.iter().flat_map(|c| (*c as u32).to_le_bytes()).collect::<Vec<_>>()
        } else {
            columns.iter().flat_map(|c| (*c as u16).to_le_bytes()).collect()
        };
        let starts: Vec<u8> = starts.iter().flat_map(|s| (*s as u32).to_le_bytes()).collect();
        let sums = match format {
            RowGroupValues::Int8 => kernels::row_sums(&pattern, &values),
            RowGroupValues::F32 | RowGroupValues::BF16 => Vec::new(),
        };
        Ok(Self {
            shape,
            format,
            starts: starts.into(),
            columns: columns.into(),
            values,
            scales: scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<_>>().into(),
            derived: Arc::new(Derived { pattern, scales, sums }),
        })
    }

    /// The bytes of a `[rows, cols]` weight of which `kept` units stay, where groups divide the rows.
    pub fn expected(shape: [usize; 2], kept: u64, group: usize, format: RowGroupValues) -> u64 {
        let (fixed, each) = Self::costs(shape, group, format);
        kept * each + fixed
    }

    /// Units that stay in a matrix of this many bytes.
    pub fn kept(shape: [usize; 2], bytes: u64, group: usize, format: RowGroupValues) -> u64 {
        let (fixed, each) = Self::costs(shape, group, format);
        bytes.saturating_sub(fixed) / each
    }

    /// Bytes without any unit, and of each.
    fn costs(shape: [usize; 2], group: usize, format: RowGroupValues) -> (u64, u64) {
        let index = if shape[1] > usize::from(u16::MAX) { 4 } else { 2 };
        let groups = shape[0].div_ceil(group.max(1)) as u64;
        let scales = if format == RowGroupValues::Int8 { 4 * shape[0] as u64 } else { 0 };
        (4 * (groups + 1) + scales, group as u64 * format.dtype().size() as u64 + index)
    }

    /// Rows that share a list.
    pub fn group(&self) -> usize {
        self.derived.pattern.group()
    }

    pub fn values(&self) -> RowGroupValues {
        self.format
    }

    /// True where a unit is kept, `[groups, cols]`.
    pub fn units(&self) -> Vec<bool> {
        let (pattern, cols) = (&self.derived.pattern, self.shape[1]);
        let mut units = vec![false; pattern.groups() * cols];
        for (g, units) in units.chunks_exact_mut(cols).enumerate() {
            pattern.columns(g).for_each(|column| units[column] = true);
        }
        units
    }

    /// Values that are stored, zeros among them included.
    pub fn stored(&self) -> u64 {
        self.derived.pattern.values() as u64
    }

    fn view(&self) -> kernels::RowGroups<'_> {
        let values = match self.format {
            RowGroupValues::F32 => Values::F32(&self.values),
            RowGroupValues::BF16 => Values::BF16(&self.values),
            RowGroupValues::Int8 => Values::Int8 {
                values: &self.values,
                scales: &self.derived.scales,
                sums: &self.derived.sums,
            },
        };
        kernels::RowGroups::new(&self.derived.pattern, values)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        let parts = [&self.starts, &self.columns, &self.values, &self.scales];
        parts.iter().map(|part| part.len() as u64).sum()
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        dot::read(&self.view(), first, out);
    }

    /// Exact up to the rounding of f32, except with `Int8`: there activations are rounded to 127 steps of
    /// the largest of their token.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        self.view().multiply(x, y);
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        self.view().multiply_transposed(g, dx);
    }

    /// `starts`, `columns`, `values` and, with `Int8`, `scales`. Values are `[kept][rows]` group after group;
    /// in 8 bits `[kept / 4][rows][4]`, then the rest of `r < 4` columns as `[rows][r]`. A weight that keeps
    /// nothing has empty `columns` and `values`.
    pub fn parts(&self) -> Vec<Part> {
        let index = if self.shape[1] > usize::from(u16::MAX) { Dtype::U32 } else { Dtype::U16 };
        let mut parts = vec![
            ("starts", Dtype::U32, &self.starts),
            ("columns", index, &self.columns),
            ("values", self.format.dtype(), &self.values),
        ];
        if self.format == RowGroupValues::Int8 {
            parts.push(("scales", Dtype::F32, &self.scales));
        }
        let part = |(suffix, dtype, data): (&'static str, Dtype, &Bytes)| Part {
            suffix,
            dtype,
            shape: vec![data.len() / dtype.size()],
            data: data.clone(),
        };
        parts.into_iter().map(part).collect()
    }

    pub fn record(&self) -> Record {
        Record::RowGroups { shape: self.shape, group: self.group() as u32, values: self.format }
    }

    pub fn from_parts(
        shape: [usize; 2],
        group: u32,
        format: RowGroupValues,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        byte_size(&shape, size_of::<f32>())?;
        let group = group as usize;
        check_group(group)?;
        check_int8(format, shape[1])?;
        let groups = shape[0].div_ceil(group);
        let starts = take_exact(parts, "starts", Dtype::U32, &[groups + 1])?;
        let index = if shape[1] > usize::from(u16::MAX) { Dtype::U32 } else { Dtype::U16 };
        let columns = take_list(parts, "columns", index)?;
        check_bitmaps(shape, groups, starts.len() + columns.len())?;
        let counts: Box<[usize]> = u32s(&starts).map(|s| s as usize).collect();
        let pattern = match index {
            Dtype::U32 => Pattern::new(shape, group, counts, u32s(&columns).map(|c| c as usize)),
            _ => {
                let columns = columns.chunks_exact(2);
                let columns = columns.map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
                Pattern::new(shape, group, counts, columns)
            }
        };
        let pattern = pattern.map_err(|what| malformed(format!("part 'columns': {what}")))?;
        let values = take_list(parts, "values", format.dtype())?;
        let stored = values.len() / format.dtype().size();
        if stored != pattern.values() {
            return Err(malformed(format!(
                "part 'values' has {stored} elements but the kept columns ask for {}",
                pattern.values()
            )));
        }
        let (mut scales, mut derived) = (Bytes::new(), (Vec::new(), Vec::new()));
        if format == RowGroupValues::Int8 {
            scales = take_exact(parts, "scales", Dtype::F32, &[shape[0]])?;
            derived.0 = u32s(&scales).map(f32::from_bits).collect();
            if let Some(row) = derived.0.iter().position(|s| !s.is_finite()) {
                return Err(malformed(format!("the scale of row {row} is not a finite number")));
            }
            derived.1 = kernels::row_sums(&pattern, &values);
        }
        let derived = Arc::new(Derived { pattern, scales: derived.0, sums: derived.1 });
        Ok(Self { shape, format, starts, columns, values, scales, derived })
    }
}

fn u32s(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Takes the data of a part that has one dimension, which may be 0.
fn take_list(parts: &mut BTreeMap<String, Part>, suffix: &str, dtype: Dtype) -> Result<Bytes> {
    let part = take(parts, suffix)?;
    let fits = match part.shape[..] {
        [count] => count.checked_mul(dtype.size()) == Some(part.data.len()),
        _ => false,
    };
    if part.dtype != dtype || !fits {
        return Err(malformed(format!(
            "part '{suffix}' is {} {:?} in {} bytes but must be a list of {dtype}",
            part.dtype,
            part.shape,
            part.data.len()
        )));
    }
    Ok(part.data)
}

fn check_group(group: usize) -> Result<()> {
    if Pattern::GROUPS.contains(&group) {
        return Ok(());
    }
    Err(malformed(format!("groups of {group} rows cannot be stored; take 2, 4, 8, 16 or 32")))
}

/// Bitmaps are made of lists that may be much shorter, by which a file could ask for any amount of memory.
fn check_bitmaps(shape: [usize; 2], groups: usize, listed: usize) -> Result<()> {
    // 64 bytes for each that is listed, and 64 MB that anyone may have.
    let limit = listed.saturating_mul(64).saturating_add(1 << 26);
    match shape[1].div_ceil(8).checked_mul(groups) {
        Some(bytes) if bytes <= limit => Ok(()),
        _ => Err(malformed(format!(
            "shape {shape:?} is absurdly large for {listed} bytes of columns and starts"
        ))),
    }
}

fn check_int8(format: RowGroupValues, cols: usize) -> Result<()> {
    if format != RowGroupValues::Int8 || cols <= MAX_INT8_COLS {
        return Ok(());
    }
    Err(malformed(format!(
        "rows of {cols} are too long for 8-bit values, whose sums have room for {MAX_INT8_COLS}; take \
         bf16"
    )))
}

fn check_elements(shape: [usize; 2], elements: usize) -> Result<()> {
    byte_size(&shape, size_of::<f32>())?;
    if shape[0] * shape[1] == elements {
        return Ok(());
    }
    Err(Error::internal(format!("{elements} elements for shape {shape:?}")))
}

/// For each row a 127th of its largest kept element.
fn row_scales([rows, cols]: [usize; 2], dense: &[f32], pattern: &Pattern) -> Result<Vec<f32>> {
    let mut scales = vec![0.0_f32; rows];
    for (row, scale) in scales.iter_mut().enumerate() {
        let values = &dense[row * cols..(row + 1) * cols];
        for column in pattern.columns(row / pattern.group()) {
            if !values[column].is_finite() {
                return Err(Error::new(
                    Reason::NonFinite,
                    format!("{} in row {row} cannot be rounded to 8 bits", values[column]),
                ));
            }
            *scale = scale.max(values[column].abs());
        }
        *scale /= 127.0;
    }
    Ok(scales)
}

fn int8_values(cols: usize, dense: &[f32], pattern: &Pattern, scales: &[f32]) -> Bytes {
    let mut values = vec![0_u8; pattern.values()];
    let mut rest = &mut values[..];
    for g in 0..pattern.groups() {
        let (kept, lanes) = (pattern.kept(g), pattern.lanes(g));
        let (values, after) = rest.split_at_mut(kept * lanes);
        rest = after;
        for (k, column) in pattern.columns(g).enumerate() {
            for lane in 0..lanes {
                let row = g * pattern.group() + lane;
                // A row of numbers so small that their 127th is 0 is a row of zeros.
                let by = if scales[row] > 0.0 { 1.0 / f64::from(scales[row]) } else { 0.0 };
                let code = f64::from(dense[row * cols + column]) * by;
                let code = code.round_ties_even().clamp(-127.0, 127.0) as i8;
                values[kernels::quad_place(lanes, kept, lane, k)] = code as u8;
            }
        }
    }
    values.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_suffix(w: &Weight) -> BTreeMap<String, Part> {
        w.parts().into_iter().map(|p| (p.suffix.to_string(), p)).collect()
    }

    /// Three rows by three columns in groups of two; column 1 is zero in rows 0 and 1, column 0 in row 2.
    const DENSE: [f32; 9] = [1.0, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, 3.0, 4.0];

    #[test]
    fn units_with_an_element_are_kept_and_the_last_group_is_short() {
        let w = RowGroups::from_dense([3, 3], &DENSE, 2, RowGroupValues::F32).unwrap();
        assert_eq!(w.units(), [true, false, true, false, true, true]);
        let parts = by_suffix(&Weight::RowGroups(w.clone()));
        let u32s = |v: &[u32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let u16s = |v: &[u16]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        let f32s = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(parts["starts"].data, u32s(&[0, 2, 4]));
        assert_eq!(parts["columns"].data, u16s(&[0, 2, 1, 2]));
        assert_eq!(parts["values"].data, f32s(&[1.0, 0.0, 0.0, -2.0, 3.0, 4.0]));
        let (mut y, w) = ([0.0; 3], Weight::RowGroups(w));
        w.multiply(&[1.0, 10.0, 100.0], &mut y);
        assert_eq!((w.to_f32(), y), (DENSE.to_vec(), [1.0, -200.0, 430.0]));
    }

    #[test]
    fn bytes_are_those_of_the_formula() {
        let dense: Vec<f32> = (0..64 * 40).map(|i| if i % 40 < 10 { 1.0 } else { 0.0 }).collect();
        for (format, size, scales) in [
            (RowGroupValues::F32, 4, 0),
            (RowGroupValues::BF16, 2, 0),
            (RowGroupValues::Int8, 1, 4 * 64),
        ] {
            for group in [2, 4, 8, 16, 32] {
                let w = RowGroups::from_dense([64, 40], &dense, group, format).unwrap();
                let (groups, kept) = (64 / group, 10 * 64 / group);
                let bytes = (kept * (group * size + 2) + 4 * (groups + 1) + scales) as u64;
                assert_eq!(w.bytes(), bytes);
                assert_eq!(RowGroups::expected([64, 40], kept as u64, group, format), bytes);
                assert_eq!(RowGroups::kept([64, 40], bytes, group, format), kept as u64);
                assert_eq!(w.stored(), 640);
            }
        }
        // Long rows have u32 columns.
        let mut long = vec![0.0; 2 * 70_000];
        (long[69_999], long[70_000]) = (1.0, 2.0);
        let w = RowGroups::from_dense([2, 70_000], &long, 2, RowGroupValues::Int8).unwrap();
        assert_eq!(w.bytes(), 2 * (2 + 4) + 4 * 2 + 8);
        let w = Weight::RowGroups(w);
        assert_eq!(Weight::from_parts(&w.record(), by_suffix(&w)).unwrap().to_f32(), long);
    }

    #[test]
    fn int8_rounds_to_127_steps_of_a_row() {
        let dense = [12.7, 0.0, -6.35, 0.26, 0.0, 0.0, 0.0, 0.0];
        let w = RowGroups::from_dense([2, 4], &dense, 2, RowGroupValues::Int8).unwrap();
        let values = by_suffix(&Weight::RowGroups(w.clone()))["values"].data.clone();
        // 12.7 / 0.1 = 127, -63.5 to the even -64 (in f32 -63.500004 or -63.499996), 2.6 to 3.
        assert_eq!(values[0], 127);
        assert!([-64_i8, -63].contains(&(values[1] as i8)));
        assert_eq!((values[2], &values[3..]), (3, &[0, 0, 0][..]));
        let nan = RowGroups::from_dense([1, 2], &[f32::NAN, 1.0], 2, RowGroupValues::Int8);
        assert_eq!(nan.unwrap_err().reason(), Reason::NonFinite);
        // Stored in f32, all is as it came.
        let w = RowGroups::from_dense([1, 2], &[f32::INFINITY, 1.0], 2, RowGroupValues::F32);
        assert_eq!(Weight::RowGroups(w.unwrap()).to_f32(), [f32::INFINITY, 1.0]);
    }

    #[test]
    fn nothing_kept_is_stored_and_comes_back() {
        for format in [RowGroupValues::F32, RowGroupValues::BF16, RowGroupValues::Int8] {
            let w = RowGroups::from_dense([5, 7], &[0.0; 35], 4, format).unwrap();
            let w = Weight::RowGroups(w);
            let w = Weight::from_parts(&w.record(), by_suffix(&w)).unwrap();
            for tokens in [1, 20] {
                let mut y = vec![f32::NAN; 5 * tokens];
                w.multiply(&vec![1.0; 7 * tokens], &mut y);
                assert!(y.iter().all(|y| *y == 0.0));
            }
        }
    }

    #[test]
    fn lists_that_lie_are_refused() {
        let w = RowGroups::from_dense([3, 3], &DENSE, 2, RowGroupValues::Int8).unwrap();
        let w = Weight::RowGroups(w);
        let good = by_suffix(&w);
        let refused = |name: &str, bytes: Vec<u8>, what: &str| {
            let mut parts = good.clone();
            parts.get_mut(name).unwrap().data = bytes.into();
            let error = Weight::from_parts(&w.record(), parts).expect_err(what);
            assert_eq!(error.reason(), Reason::MalformedFile, "{what}");
        };
        let u32s = |v: [u32; 3]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        refused("starts", u32s([0, 3, 4]), "another split than the values'");
        refused("starts", u32s([1, 2, 4]), "a start that is not 0");
        refused("starts", u32s([0, 5, 4]), "falling starts");
        refused("starts", u32s([0, 2, u32::MAX]), "more columns than there are");
        refused("columns", vec![2, 0, 0, 0, 1, 0, 2, 0], "falling columns");
        refused("columns", vec![0, 0, 0, 0, 1, 0, 2, 0], "a column twice");
        refused("columns", vec![0, 0, 3, 0, 1, 0, 2, 0], "a column beyond the row");
        refused("scales", vec![0, 0, 0x80, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0], "an infinite scale");
        for group in [0, 1, 3, 33, u32::MAX] {
            let format = RowGroupValues::Int8;
            let record = Record::RowGroups { shape: [3, 3], group, values: format };
            assert!(Weight::from_parts(&record, good.clone()).is_err(), "groups of {group}");
        }
        let vast = Record::RowGroups { shape: [3, 1 << 40], group: 2, values: RowGroupValues::F32 };
        let mut parts = good.clone();
        parts.remove("scales");
        for (name, dtype, size) in [("columns", Dtype::U32, 4), ("values", Dtype::F32, 4)] {
            let part = parts.get_mut(name).unwrap();
            *part = Part { dtype, shape: vec![1], data: vec![0; size].into(), ..part.clone() };
        }
        let error = Weight::from_parts(&vast, parts).unwrap_err();
        assert!(error.to_string().contains("absurdly"), "{error}");
        let long = Record::RowGroups {
            shape: [3, MAX_INT8_COLS + 1],
            group: 2,
            values: RowGroupValues::Int8,
        };
        assert!(Weight::from_parts(&long, good).is_err());
    }
}
