//! Non-zero elements and where they stand: n:m index lists or a bitmap, whichever is smaller.

use std::sync::Arc;

use super::*;
use crate::kernels::dot::DenseKind;
use crate::kernels::packed::Packed;
use crate::kernels::sparse::{MAX_OF, Places, SparseRows, Values, list_row_bytes, place_bits};
use crate::kernels::{dot, product};

/// How positions are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SparsePattern {
    /// One bit an element.
    Bitmap,
    /// `keep` elements of each `of` consecutive inputs of a row, with their places.
    NOfM { keep: u8, of: u8 },
}

/// How the non-zero elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ValueFormat {
    F32,
    F16,
    BF16,
    /// Grid codes, with scales and zeros by group of the row's original columns.
    Grouped(GroupedSpec),
}

impl ValueFormat {
    fn dense(self) -> Option<(Dtype, DenseKind)> {
        match self {
            Self::F32 => Some((Dtype::F32, DenseKind::F32)),
            Self::F16 => Some((Dtype::F16, DenseKind::F16)),
            Self::BF16 => Some((Dtype::BF16, DenseKind::BF16)),
            Self::Grouped(_) => None,
        }
    }
}

/// Rows may keep different numbers of elements with a bitmap. With n:m places every group stores `keep`
/// elements; where fewer are kept, places with the value 0 fill it up (never with grid codes, where
/// a stored element counts as kept whatever its code).
#[derive(Debug, Clone)]
pub struct Sparse {
    shape: [usize; 2],
    pattern: SparsePattern,
    format: ValueFormat,
    places: Bytes,
    /// Elements, or the bit streams of codes.
    values: Bytes,
    scales: Bytes,
    zeros: Bytes,
    /// Where each row's values start: an element, or a byte of codes. Derived from the places.
    starts: Arc<[usize]>,
}

impl Sparse {
    /// Stores the non-zero elements of dense rows in F32, F16 or BF16; what rounds to zero is not stored.
    /// `n_of_m` is a hint: where every group of `m` has at most `m - n` non-zeros and the index list is
    /// smaller than the bitmap, it is taken (n counts zeros, as in recipes). Rounding to F16 that
    /// overflows is an error.
    pub fn from_dense(
        shape: [usize; 2],
        dense: &[f32],
        values: ValueFormat,
        n_of_m: Option<(u8, u8)>,
    ) -> Result<Self> {
        let (dtype, _) = values
            .dense()
            .ok_or_else(|| Error::internal("codes are stored by from_codes, not from_dense"))?;
        check_count(shape, dense.len())?;
        let rounded = Dense::from_f32(shape.to_vec(), dense, dtype)?;
        let mut elements = vec![0.0; dense.len()];
        rounded.read_rows(0, &mut elements);
        let mask: Vec<bool> = elements.iter().map(|v| *v != 0.0).collect();

        let kept = mask.iter().filter(|kept| **kept).count();
        let list = candidate(shape, n_of_m).filter(|&(keep, of)| {
            let groups = elements.len() / usize::from(of);
            let padding = (groups * usize::from(keep)).saturating_sub(kept) * dtype.size();
            mask.chunks_exact(of.into()).all(|g| count(g) <= usize::from(keep))
                && list_bytes(shape, keep, of) + padding < bitmap_bytes(shape)
        });
        let (pattern, stored) = match list {
            None => (SparsePattern::Bitmap, mask),
            Some((keep, of)) => {
                let mut stored = mask;
                stored.chunks_exact_mut(of.into()).for_each(|g| fill(g, keep.into()));
                (SparsePattern::NOfM { keep, of }, stored)
            }
        };
        let kept: Vec<f32> =
            elements.iter().zip(&stored).filter_map(|(v, stored)| stored.then_some(*v)).collect();
        Ok(Self {
            shape,
            pattern,
            format: values,
            places: pack_places(shape, pattern, &stored),
            values: dense::encode(&kept, dtype)?,
            scales: Bytes::new(),
            zeros: Bytes::new(),
            starts: starts(stored.chunks_exact(shape[1]).map(count)),
        })
    }

    /// Stores grid codes of the elements where `mask` is true; scales and zeros as in [`Grouped::pack`].
    /// Index lists are taken only where every group of `m` keeps exactly `m - n`.
    pub fn from_codes(
        shape: [usize; 2],
        mask: &[bool],
        spec: GroupedSpec,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
        n_of_m: Option<(u8, u8)>,
    ) -> Result<Self> {
        let cols = shape[1];
        spec.check(cols)?;
        check_count(shape, mask.len())?;
        check_count(shape, codes.len())?;
        let width = usize::from(spec.bits);
        if let Some(code) = codes.iter().find(|c| u32::from(**c) >> spec.bits != 0) {
            return Err(Error::internal(format!("code {code} has over {} bits", spec.bits)));
        }
        let (scales, zeros) = spec.pack_grid(shape, scales, zeros)?;
        let pattern = candidate(shape, n_of_m)
            .filter(|&(keep, of)| {
                mask.chunks_exact(of.into()).all(|g| count(g) == usize::from(keep))
                    && list_bytes(shape, keep, of) < bitmap_bytes(shape)
            })
            .map_or(SparsePattern::Bitmap, |(keep, of)| SparsePattern::NOfM { keep, of });
        let mut values = Vec::new();
        for (codes, mask) in codes.chunks_exact(cols).zip(mask.chunks_exact(cols)) {
            let kept = codes.iter().zip(mask).filter_map(|(code, kept)| kept.then_some(*code));
            bits::put(kept, width, &mut values);
        }
        Ok(Self {
            shape,
            pattern,
            format: ValueFormat::Grouped(spec),
            places: pack_places(shape, pattern, mask),
            values: values.into(),
            scales,
            zeros,
            starts: starts(
                mask.chunks_exact(cols).map(|row| bits::stream_bytes(count(row), width)),
            ),
        })
    }

    /// The pattern and the bytes of a `[rows, cols]` weight of which `kept` elements stay, spread evenly
    /// over the rows; with a hint `n_of_m`, over its groups.
    pub fn expected(
        shape: [usize; 2],
        kept: usize,
        values: ValueFormat,
        n_of_m: Option<(u8, u8)>,
    ) -> (SparsePattern, u64) {
        let list = candidate(shape, n_of_m)
            .map(|(keep, of)| (SparsePattern::NOfM { keep, of }, list_bytes(shape, keep, of)));
        let bitmap = (SparsePattern::Bitmap, bitmap_bytes(shape));
        let (pattern, places) = list.filter(|list| list.1 < bitmap.1).unwrap_or(bitmap);
        let rows = shape[0].max(1);
        let stored = match (values, values.dense()) {
            (_, Some((dtype, _))) => (kept * dtype.size()) as u64,
            (ValueFormat::Grouped(spec), None) => {
                let grid = GroupedSpec { bits: 8, ..spec }.bytes(shape[0], shape[1])
                    - (shape[0] * shape[1]) as u64;
                grid + (rows * bits::stream_bytes(kept.div_ceil(rows), spec.bits.into())) as u64
            }
            (_, None) => 0,
        };
        (pattern, places as u64 + stored)
    }

    pub fn pattern(&self) -> SparsePattern {
        self.pattern
    }

    pub fn values(&self) -> ValueFormat {
        self.format
    }

    /// True where an element is kept, `[rows, cols]`. With grid codes a kept element may be 0.
    pub fn mask(&self) -> Vec<bool> {
        let [rows, cols] = self.shape;
        let mut mask = vec![false; rows * cols];
        let view = self.view();
        for (row, mask) in mask.chunks_exact_mut(cols).enumerate() {
            view.mask(row, mask);
        }
        if let (SparsePattern::NOfM { .. }, Some(_)) = (self.pattern, self.format.dense()) {
            let mut values = vec![0.0; cols];
            for (row, mask) in mask.chunks_exact_mut(cols).enumerate() {
                self.read_rows(row, &mut values);
                mask.iter_mut().zip(&values).for_each(|(kept, v)| *kept &= *v != 0.0);
            }
        }
        mask
    }

    fn view(&self) -> SparseRows<'_> {
        let places = match self.pattern {
            SparsePattern::Bitmap => Places::Bitmap(&self.places),
            SparsePattern::NOfM { keep, of } => {
                Places::NOfM { places: &self.places, keep: keep.into(), of: of.into() }
            }
        };
        let values = match self.format {
            ValueFormat::Grouped(spec) => {
                Values::Codes(&self.values, spec.grid(self.shape, &self.scales, &self.zeros))
            }
            ValueFormat::F32 => Values::Dense(&self.values, DenseKind::F32),
            ValueFormat::F16 => Values::Dense(&self.values, DenseKind::F16),
            ValueFormat::BF16 => Values::Dense(&self.values, DenseKind::BF16),
        };
        SparseRows::new(self.shape, places, values, &self.starts)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        (self.places.len() + self.values.len() + self.scales.len() + self.zeros.len()) as u64
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        dot::read(&self.view(), first, out);
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        self.view().multiply(x, y);
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        product::multiply_transposed(&self.view(), g, dx);
    }

    /// Packed for products with 8-bit activations, if the values are codes in groups of whole blocks of 32
    /// columns.
    pub fn packed(&self) -> Option<Packed> {
        Packed::sparse(&self.view())
    }

    /// The same elements with a bitmap in place of a list: some more bytes where few of a group are kept, but
    /// vectors can use them as they are. `None` if there is one already, or if values are codes.
    pub fn with_bitmap(&self) -> Option<Self> {
        if self.pattern == SparsePattern::Bitmap || self.format.dense().is_none() {
            return None;
        }
        let mut stored = vec![false; self.shape[0] * self.shape[1]];
        let view = self.view();
        for (row, stored) in stored.chunks_exact_mut(self.shape[1]).enumerate() {
            view.mask(row, stored);
        }
        let pattern = SparsePattern::Bitmap;
        let places = pack_places(self.shape, pattern, &stored);
        Some(Self { pattern, places, ..self.clone() })
    }

    /// `mask` (a bit a column) or `places` (a little-endian bit stream), rows padded to a byte; `values`
    /// in row order, or `codes` (a bit stream a row, padded to a byte), `scales` and `zeros`. A weight
    /// without non-zeros has an empty `values` or `codes`.
    pub fn parts(&self) -> Vec<Part> {
        let rows = self.shape[0];
        let suffix = match self.pattern {
            SparsePattern::Bitmap => "mask",
            SparsePattern::NOfM { .. } => "places",
        };
        let shape = vec![rows, self.places.len() / rows];
        let mut parts = vec![Part { suffix, dtype: Dtype::U8, shape, data: self.places.clone() }];
        let data = self.values.clone();
        match self.format {
            ValueFormat::Grouped(spec) => {
                let shape = vec![data.len()];
                parts.push(Part { suffix: "codes", dtype: Dtype::U8, shape, data });
                parts.extend(spec.grid_parts(self.shape, &self.scales, &self.zeros));
            }
            ValueFormat::F32 | ValueFormat::F16 | ValueFormat::BF16 => {
                let dtype = self.format.dense().map_or(Dtype::F32, |(dtype, _)| dtype);
                let shape = vec![data.len() / dtype.size()];
                parts.push(Part { suffix: "values", dtype, shape, data });
            }
        }
        parts
    }

    pub fn record(&self) -> Record {
        Record::Sparse { shape: self.shape, pattern: self.pattern, values: self.format }
    }

    pub fn from_parts(
        shape: [usize; 2],
        pattern: SparsePattern,
        format: ValueFormat,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        byte_size(&shape, size_of::<f32>())?;
        let (places, counts) = take_places(shape, pattern, parts)?;
        let (suffix, dtype, starts, scales, zeros) = match format {
            ValueFormat::Grouped(spec) => {
                let (scales, zeros) = spec.take_grid(shape, parts)?;
                let row = |count| bits::stream_bytes(count, spec.bits.into());
                ("codes", Dtype::U8, starts(counts.into_iter().map(row)), scales, zeros)
            }
            ValueFormat::F32 | ValueFormat::F16 | ValueFormat::BF16 => {
                let dtype = format.dense().map_or(Dtype::F32, |(dtype, _)| dtype);
                ("values", dtype, starts(counts), Bytes::new(), Bytes::new())
            }
        };
        // The number of columns bounds each count, so the sums cannot have overflowed.
        let wanted = starts.last().copied().unwrap_or(0);
        let part = take(parts, suffix)?;
        let size = part.data.len();
        if part.dtype != dtype || part.shape != [wanted] || size != wanted * dtype.size() {
            return Err(malformed(format!(
                "part '{suffix}' is {} {:?} in {size} bytes but the positions ask for {dtype} \
                 [{wanted}]",
                part.dtype, part.shape
            )));
        }
        Ok(Self { shape, pattern, format, places, values: part.data, scales, zeros, starts })
    }
}

fn count(mask: &[bool]) -> usize {
    mask.iter().filter(|kept| **kept).count()
}

fn check_count(shape: [usize; 2], elements: usize) -> Result<()> {
    byte_size(&shape, size_of::<f32>())?;
    if shape[0] * shape[1] == elements {
        return Ok(());
    }
    Err(Error::internal(format!("{elements} elements for shape {shape:?}")))
}

/// Sums up to each row, and the whole sum.
fn starts(sizes: impl IntoIterator<Item = usize>) -> Arc<[usize]> {
    let sums = sizes.into_iter().scan(0, |sum, size| {
        *sum += size;
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

/// Kept elements and size of the groups that a recipe's n:m means, if places can be stored for them.
fn candidate(shape: [usize; 2], n_of_m: Option<(u8, u8)>) -> Option<(u8, u8)> {
    let (zeros, of) = n_of_m?;
    let keep = of.checked_sub(zeros)?;
    check_groups(shape[1], keep, of).ok().map(|()| (keep, of))
}

fn check_groups(cols: usize, keep: u8, of: u8) -> Result<()> {
    if of < 2 || u32::from(of) > MAX_OF || keep == 0 || keep > of {
        return Err(malformed(format!("{keep} of {of} is not a pattern that is stored as places")));
    }
    if !cols.is_multiple_of(of.into()) {
        return Err(malformed(format!("groups of {of} do not divide rows of {cols}")));
    }
    Ok(())
}

fn row_list_bytes(cols: usize, keep: u8, of: u8) -> usize {
    list_row_bytes(cols, keep.into(), of.into())
}

fn list_bytes(shape: [usize; 2], keep: u8, of: u8) -> usize {
    shape[0] * row_list_bytes(shape[1], keep, of)
}

fn bitmap_bytes(shape: [usize; 2]) -> usize {
    shape[0] * shape[1].div_ceil(8)
}

/// Marks unmarked elements until `keep` are marked.
fn fill(group: &mut [bool], keep: usize) {
    let missing = keep - count(group);
    group.iter_mut().filter(|stored| !**stored).take(missing).for_each(|stored| *stored = true);
}

fn pack_places(shape: [usize; 2], pattern: SparsePattern, stored: &[bool]) -> Bytes {
    let mut out = Vec::new();
    for row in stored.chunks_exact(shape[1]) {
        match pattern {
            SparsePattern::Bitmap => bits::put(row.iter().map(|kept| u8::from(*kept)), 1, &mut out),
            SparsePattern::NOfM { of, .. } => {
                let places = row
                    .chunks_exact(of.into())
                    .flat_map(|group| (0..of).filter(|place| group[usize::from(*place)]));
                bits::put(places, place_bits(of.into()) as usize, &mut out);
            }
        }
    }
    out.into()
}

/// Takes the positions and counts the stored elements of each row. Everything that the kernels rely on
/// is checked here.
fn take_places(
    shape: [usize; 2],
    pattern: SparsePattern,
    parts: &mut BTreeMap<String, Part>,
) -> Result<(Bytes, Vec<usize>)> {
    let [rows, cols] = shape;
    match pattern {
        SparsePattern::Bitmap => {
            let row = cols.div_ceil(8);
            let mask = take_exact(parts, "mask", Dtype::U8, &[rows, row])?;
            let padding = if cols.is_multiple_of(8) { 0 } else { 0xff_u8 << (cols % 8) };
            let mut counts = Vec::with_capacity(rows);
            for (r, bytes) in mask.chunks_exact(row).enumerate() {
                if bytes[row - 1] & padding != 0 {
                    return Err(malformed(format!(
                        "part 'mask' has bits beyond column {cols} in row {r}"
                    )));
                }
                counts.push(bytes.iter().map(|b| b.count_ones() as usize).sum());
            }
            Ok((mask, counts))
        }
        SparsePattern::NOfM { keep, of } => {
            check_groups(cols, keep, of)?;
            let row = row_list_bytes(cols, keep, of);
            let places = take_exact(parts, "places", Dtype::U8, &[rows, row])?;
            let (groups, width) = (cols / usize::from(of), place_bits(of.into()) as usize);
            for (r, bytes) in places.chunks_exact(row).enumerate() {
                for group in 0..groups {
                    let first = group * usize::from(keep);
                    let mut above = 0;
                    for i in first..first + usize::from(keep) {
                        let place = bits::get(bytes, i, width);
                        if place < above || place >= of {
                            return Err(malformed(format!(
                                "part 'places' has place {place} where one in {above}..{of} must \
                                 follow (row {r}, group {group})"
                            )));
                        }
                        above = place + 1;
                    }
                }
            }
            Ok((places, vec![groups * usize::from(keep); rows]))
        }
    }
}
