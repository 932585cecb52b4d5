//! A weight in every layout, with values drawn from a seed: what `planish bench kernels` multiplies.

use half::f16;
use rand::{Rng, RngCore};

use crate::error::Result;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{
    Dense, DualGrained, Ggml, GgmlType, Grouped, GroupedSpec, RowGroupValues, RowGroups, Sparse,
    ValueFormat, Weight,
};
use crate::seed::Stream;

/// A layout that can be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layout {
    Dense(Dtype),
    Ggml(GgmlType),
    Grouped(GroupedSpec),
    /// The `keep` largest of each `of` consecutive inputs, with their places or, where that is not larger (as
    /// for 2 of 4), a bit for each input.
    NOfM {
        keep: u8,
        of: u8,
        values: ValueFormat,
    },
    /// Half of the elements, anywhere, with one bit for each.
    Bitmap(ValueFormat),
    /// Eight rows that share their kept columns: `eighths` of eight.
    RowGroups {
        values: RowGroupValues,
        eighths: u32,
    },
    /// 4-bit groups inside 8-bit rows.
    DualGrained,
}

/// Inputs that share a scale, in layouts that leave the choice.
const GROUP: usize = 64;
/// Rows that share their kept columns.
const ROWS: usize = 8;

impl Layout {
    /// Every layout, by the name under which results are printed.
    pub fn all() -> Vec<(String, Self)> {
        let mut all: Vec<(String, Self)> = [Dtype::F32, Dtype::F16, Dtype::BF16]
            .into_iter()
            .map(|dtype| (format!("dense-{}", lower(&dtype)), Self::Dense(dtype)))
            .collect();
        all.extend(
            GgmlType::ALL
                .into_iter()
                .map(|kind| (format!("ggml-{}", lower(&kind)), Self::Ggml(kind))),
        );
        let grid = |bits, symmetric| GroupedSpec { bits, group: GROUP, symmetric };
        for bits in [2, 3, 4, 8] {
            all.push((format!("grouped-{bits}"), Self::Grouped(grid(bits, false))));
        }
        all.push(("grouped-4-symmetric".to_owned(), Self::Grouped(grid(4, true))));
        all.push(("dual-grained".to_owned(), Self::DualGrained));
        for (name, values) in [
            ("f16", ValueFormat::F16),
            ("bf16", ValueFormat::BF16),
            ("8", ValueFormat::Grouped(grid(8, false))),
            ("4", ValueFormat::Grouped(grid(4, false))),
        ] {
            all.push((format!("sparse-2:4-{name}"), Self::NOfM { keep: 2, of: 4, values }));
            all.push((format!("sparse-3:4-{name}"), Self::NOfM { keep: 1, of: 4, values }));
            all.push((format!("sparse-bitmap-{name}"), Self::Bitmap(values)));
        }
        for (name, values) in [
            ("f32", RowGroupValues::F32),
            ("bf16", RowGroupValues::BF16),
            ("int8", RowGroupValues::Int8),
        ] {
            for eighths in [8, 4] {
                let share = eighths * 100 / 8;
                let layout = Self::RowGroups { values, eighths };
                all.push((format!("row-groups-{name}-{share}"), layout));
            }
        }
        all
    }

    /// A weight of `rows` rows; columns are rounded up to whole blocks.
    pub fn build(self, [rows, cols]: [usize; 2], stream: &Stream) -> Result<Weight> {
        let cols = cols.next_multiple_of(match self {
            Self::Ggml(kind) => kind.block_elements(),
            Self::Grouped(spec) => spec.group,
            Self::NOfM { .. } | Self::Bitmap(_) | Self::DualGrained => GROUP,
            Self::Dense(_) | Self::RowGroups { .. } => 1,
        });
        let shape = [rows, cols];
        let mut rng = stream.rng();
        if let Self::Ggml(kind) = self
            && !matches!(kind, GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q8_0)
        {
            return Ok(Weight::Ggml(Ggml::new(shape, kind, blocks(shape, kind, &mut rng).into())?));
        }
        let mut values: Vec<f32> =
            (0..rows * cols).map(|_| rng.random::<f32>() * 0.2 - 0.1).collect();
        Ok(match self {
            Self::Dense(dtype) => Weight::Dense(Dense::from_f32(shape.to_vec(), &values, dtype)?),
            Self::Ggml(kind) => Weight::Ggml(Ggml::quantize(shape, kind, &values)?),
            Self::Grouped(spec) => {
                let (codes, scales, zeros) = round(spec, &values);
                Weight::Grouped(Grouped::pack(shape, spec, &codes, &scales, &zeros)?)
            }
            Self::NOfM { keep, of, values: format } => {
                prune(&mut values, keep.into(), of.into());
                // The layout's hint counts zeros, not what is kept.
                Weight::Sparse(sparse(shape, &values, format, Some((of - keep, of)))?)
            }
            Self::Bitmap(format) => {
                values.iter_mut().for_each(|v| {
                    if rng.random::<bool>() {
                        *v = 0.0;
                    }
                });
                Weight::Sparse(sparse(shape, &values, format, None)?)
            }
            Self::RowGroups { values: format, eighths } => {
                for rows in values.chunks_mut(ROWS * cols) {
                    let kept: Vec<bool> =
                        (0..cols).map(|_| rng.random_range(0..8) < eighths).collect();
                    for row in rows.chunks_exact_mut(cols) {
                        row.iter_mut().zip(&kept).filter(|(_, k)| !**k).for_each(|(v, _)| *v = 0.0);
                    }
                }
                Weight::RowGroups(RowGroups::from_dense(shape, &values, ROWS, format)?)
            }
            Self::DualGrained => Weight::DualGrained(DualGrained::round(shape, GROUP, &values)?),
        })
    }
}

fn lower(name: &impl std::fmt::Debug) -> String {
    format!("{name:?}").to_lowercase()
}

fn sparse(
    shape: [usize; 2],
    values: &[f32],
    format: ValueFormat,
    n_of_m: Option<(u8, u8)>,
) -> Result<Sparse> {
    let ValueFormat::Grouped(spec) = format else {
        return Sparse::from_dense(shape, values, format, n_of_m);
    };
    let mask: Vec<bool> = values.iter().map(|v| *v != 0.0).collect();
    let (codes, scales, zeros) = round(spec, values);
    Sparse::from_codes(shape, &mask, spec, &codes, &scales, &zeros, n_of_m)
}

/// Keeps the `keep` largest of each `of`; of equal ones the first.
fn prune(values: &mut [f32], keep: usize, of: usize) {
    let mut order: Vec<usize> = Vec::with_capacity(of);
    for group in values.chunks_exact_mut(of) {
        order.clear();
        order.extend(0..of);
        order.sort_by(|a, b| group[*b].abs().total_cmp(&group[*a].abs()));
        order[keep..].iter().for_each(|i| group[*i] = 0.0);
    }
}

/// Codes, scales and zeros of the nearest points of each group's grid.
fn round(spec: GroupedSpec, values: &[f32]) -> (Vec<u8>, Vec<f32>, Vec<u8>) {
    let grids: Vec<(f32, u8)> = values.chunks(spec.group).map(|group| spec.fit(group)).collect();
    let codes = values
        .chunks(spec.group)
        .zip(&grids)
        .flat_map(|(group, (scale, zero))| group.iter().map(|v| spec.code(*v, *scale, *zero)))
        .collect();
    let (scales, zeros) = grids.into_iter().unzip();
    (codes, scales, zeros)
}

/// Random blocks whose scales are small normal numbers, as those of real weights are.
fn blocks([rows, cols]: [usize; 2], kind: GgmlType, rng: &mut impl RngCore) -> Vec<u8> {
    let mut data = vec![0; rows * cols / kind.block_elements() * kind.block_bytes()];
    rng.fill_bytes(&mut data);
    let scale = f16::from_f32(1.0 / 1024.0).to_le_bytes();
    for block in data.chunks_exact_mut(kind.block_bytes()) {
        for at in scale_places(kind) {
            block[*at..at + 2].copy_from_slice(&scale);
        }
    }
    data
}

/// Where the f16 numbers of a block stand.
fn scale_places(kind: GgmlType) -> &'static [usize] {
    match kind {
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
        GgmlType::Q2K => &[80, 82],
        GgmlType::Q3K => &[108],
        GgmlType::Q6K => &[208],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::weight::SparsePattern;

    #[test]
    fn every_layout_can_be_made_and_holds_small_numbers() {
        for (name, layout) in Layout::all() {
            let weight = layout.build([3, 70], &Stream::root(1)).expect(&name);
            let values = weight.to_f32();
            let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert!(values.iter().all(|v| v.is_finite()), "{name}");
            assert!(largest > 0.01 && largest < 16.0, "{name}: {largest}");
            assert_eq!(weight.rows(), 3, "{name}");
            assert!(weight.cols() >= 70 && weight.cols() < 70 + 256, "{name}");
        }
    }

    #[test]
    fn patterns_are_what_the_names_say() {
        let names: Vec<String> = Layout::all().into_iter().map(|(name, _)| name).collect();
        for name in ["dense-bf16", "ggml-q4_0", "ggml-q6k", "grouped-3", "sparse-2:4-bf16"] {
            assert!(names.iter().any(|n| n == name), "{name} of {names:?}");
        }
        for (keep, zeros, pattern) in
            [(2, 128, SparsePattern::Bitmap), (1, 192, SparsePattern::NOfM { keep: 1, of: 4 })]
        {
            let layout = Layout::NOfM { keep, of: 4, values: ValueFormat::BF16 };
            let weight = layout.build([4, 64], &Stream::root(2)).expect("a weight");
            assert_eq!(weight.zeros(), zeros);
            let Weight::Sparse(sparse) = &weight else { panic!("not sparse") };
            assert_eq!(sparse.pattern(), pattern);
        }
        let mut group = [1.0, -3.0, 2.0, 2.0];
        prune(&mut group, 2, 4);
        assert_eq!(group, [0.0, -3.0, 2.0, 0.0]);
    }
}
