//! Convolutions in which groups of consecutive outputs share the channels they keep, with all taps of a channel.
//!
//! Nothing is unfolded. Images are turned into planes, one a channel, with zeros around them, so that what lies
//! under a tap at neighbouring places lies side by side in memory, shifted by the tap (columns that a stride
//! leaves apart are brought together first). For each kept channel and each tap a vector of places is loaded once
//! and multiplied with the weights of all outputs of the group.

use std::ops::Range;

use super::super::training::convolution::Window;
use super::put;
use crate::kernels::simd::{self, Level, Simd, Task};
use crate::kernels::threads::{self, Shared, with_scratch};

/// Lanes of a vector.
const LANES: usize = 16;

/// Elements of the planes that one pass over the weight uses: they stay in the second-level cache.
const PASS: usize = 1 << 18;

/// Products that are worth a thread of their own.
const GRAIN: usize = 1 << 16;

/// A weight of a convolution: for each group of outputs the channels it keeps, and `[kept][taps][outputs of
/// the group]` values.
#[derive(Debug, Clone)]
pub struct Convolution {
    outputs: usize,
    inputs: usize,
    taps: usize,
    group: usize,
    /// Kept channels before each group, and of all.
    starts: Box<[usize]>,
    channels: Box<[u32]>,
    values: Box<[f32]>,
}

impl Convolution {
    /// Packs `[outputs, taps * inputs]`, taps row by row: the channels of a group with an element that is not
    /// zero. Panics if sizes do not fit.
    pub fn pack([outputs, inputs]: [usize; 2], taps: usize, group: usize, dense: &[f32]) -> Self {
        let wide = taps * inputs;
        assert!(group > 0 && dense.len() == outputs * wide, "size of a convolution's weight");
        let (mut starts, mut channels, mut values) = (vec![0], Vec::new(), Vec::new());
        for first in (0..outputs).step_by(group) {
            let rows = &dense[first * wide..(first + group).min(outputs) * wide];
            for channel in 0..inputs {
                let at = |tap: usize| rows.iter().skip(tap * inputs + channel).step_by(wide);
                if (0..taps).any(|tap| at(tap).any(|v| *v != 0.0)) {
                    channels.push(channel as u32);
                    (0..taps).for_each(|tap| values.extend(at(tap)));
                }
            }
            starts.push(channels.len());
        }
        Self {
            outputs,
            inputs,
            taps,
            group,
            starts: starts.into(),
            channels: channels.into(),
            values: values.into(),
        }
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Channels that all groups keep, together.
    pub fn kept(&self) -> usize {
        self.channels.len()
    }

    /// Bytes as they would be packed in a file: 4 a value, 2 a kept channel (4 beyond 65536 channels), 4 for the
    /// end of each group and the beginning of the first.
    pub fn bytes(&self) -> usize {
        let index = if self.inputs > usize::from(u16::MAX) { 4 } else { 2 };
        4 * self.values.len() + index * self.channels.len() + 4 * self.starts.len()
    }

    /// Whether vectors of places are mostly full: rows of narrow images fill a part of each only.
    pub fn suits(window: &Window) -> bool {
        let wide = window.out()[1];
        4 * wide >= 3 * wide.next_multiple_of(LANES)
    }

    /// `y[place, o] = sum over taps and channels of x[pixel, c] w[o, tap, c]`, overwritten; `x` is whole images,
    /// pixels row by row with their channels, `y` their places with the outputs. Panics if sizes do not
    /// fit.
    pub fn multiply(&self, window: &Window, x: &[f32], y: &mut [f32]) {
        self.multiply_at(Level::best(), window, x, y);
    }

    pub(super) fn multiply_at(&self, level: Level, window: &Window, x: &[f32], y: &mut [f32]) {
        let (image, result) = (window.image(), window.places() * self.outputs);
        assert!(window.channels == self.inputs && window.taps() == self.taps, "another window");
        let images = x.len().checked_div(image).unwrap_or(0);
        assert!(x.len() == images * image && y.len() == images * result, "sizes of a convolution");
        if images == 0 || result == 0 {
            return;
        }
        let planes = Planes::new(window);
        let each = (PASS / planes.image).clamp(1, images);
        let offsets: Vec<usize> = (0..self.taps).map(|tap| planes.offset(tap)).collect();
        let groups = self.starts.len() - 1;
        let work = window.places() * self.values.len() / groups;
        let grain = GRAIN / work.max(1) + 1;
        // The thread keeps its scratch: planes of a large image are not for keeping.
        let mut large = match each * planes.image {
            ..=PASS => Vec::new(),
            len => vec![0.0; len],
        };
        for (x, y) in x.chunks(each * image).zip(y.chunks_mut(each * result)) {
            let images = x.len() / image;
            let mut work = |out: &mut [f32]| {
                planes.fill(x, out);
                let (x, y) = (&*out, Shared::new(y));
                threads::for_ranges(images * groups, grain, |range| {
                    let offsets = offsets.as_slice();
                    simd::run(level, Direct { weight: self, planes, offsets, x, y, range });
                });
            };
            match images * planes.image {
                len if large.is_empty() => with_scratch(len, work),
                len => work(&mut large[..len]),
            }
        }
    }
}

/// Images as planes.
#[derive(Debug, Clone, Copy)]
struct Planes {
    window: Window,
    /// Rows of a plane.
    rows: usize,
    /// Elements of a row that come from columns `stride` apart, with room for whole vectors.
    part: usize,
    /// Elements of a plane, and of all planes of an image.
    plane: usize,
    image: usize,
}

impl Planes {
    fn new(window: &Window) -> Self {
        let [high, wide] = window.out();
        let rows = (high - 1) * window.stride + window.size;
        let part = wide.next_multiple_of(LANES) + window.size.div_ceil(window.stride);
        let plane = rows * window.stride * part;
        Self { window: *window, rows, part, plane, image: plane * window.channels }
    }

    /// Where what lies under a tap at place 0 of a row stands, from the beginning of the row's first row.
    fn offset(&self, tap: usize) -> usize {
        let Window { size, stride, .. } = self.window;
        let (row, column) = (tap / size, tap % size);
        (row * stride + column % stride) * self.part + column / stride
    }

    /// Writes the planes of whole images.
    fn fill(&self, x: &[f32], out: &mut [f32]) {
        let Window { height, width, channels, stride, pad, .. } = self.window;
        let (image, line) = (self.window.image(), stride * self.part);
        let images = x.len() / image;
        let out = Shared::new(out);
        threads::for_ranges(images * self.rows, 1 + GRAIN / 8 / (line * channels), |range| {
            for at in range {
                let (which, row) = (at / self.rows, at % self.rows);
                let source = row.checked_sub(pad).filter(|row| *row < height);
                let pixels = source
                    .map(|row| &x[which * image + row * width * channels..][..width * channels]);
                for channel in 0..channels {
                    let start = which * self.image + channel * self.plane + row * line;
                    // SAFETY: rows of planes are disjoint.
                    let out = unsafe { out.slice(start..start + line) };
                    out.fill(0.0);
                    let Some(pixels) = pixels else { continue };
                    for column in 0..width {
                        let (place, phase) = ((column + pad) / stride, (column + pad) % stride);
                        // What no window reaches has no place.
                        if place < self.part {
                            out[phase * self.part + place] = pixels[column * channels + channel];
                        }
                    }
                }
            }
        });
    }
}

/// Groups of images: `range` counts the groups of all images.
struct Direct<'a> {
    weight: &'a Convolution,
    planes: Planes,
    /// Of each tap.
    offsets: &'a [usize],
    x: &'a [f32],
    y: Shared<'a>,
    range: Range<usize>,
}

impl Task for Direct<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let w = self.weight;
        let groups = w.starts.len() - 1;
        let [high, wide] = self.planes.window.out();
        let (line, stride) =
            (self.planes.part * self.planes.window.stride, self.planes.window.stride);
        for at in self.range.clone() {
            let (image, g) = (at / groups, at % groups);
            let first = g * w.group;
            let lanes = w.group.min(w.outputs - first);
            let kept = w.starts[g]..w.starts[g + 1];
            let values = &w.values[kept.start * w.group * w.taps..][..kept.len() * lanes * w.taps];
            let x = &self.x[image * self.planes.image..][..self.planes.image];
            for row in 0..high {
                let tile = Tile {
                    plane: self.planes.plane,
                    offsets: self.offsets,
                    channels: &w.channels[kept.clone()],
                    values,
                    lanes,
                    x: x.as_ptr().add(row * stride * line),
                    wide,
                    y: self.y,
                    at: (image * high + row) * wide * w.outputs + first,
                    step: w.outputs,
                };
                let mut lane = 0;
                while lane < lanes {
                    let many = S::TILE >= 8;
                    let two = many && wide > LANES;
                    lane += match lanes - lane {
                        8.. if two => tile.multiply::<S, 8, 2>(lane),
                        8.. if many => tile.multiply::<S, 8, 1>(lane),
                        4.. if two => tile.multiply::<S, 4, 2>(lane),
                        4.. => tile.multiply::<S, 4, 1>(lane),
                        2.. => tile.multiply::<S, 2, 1>(lane),
                        _ => tile.multiply::<S, 1, 1>(lane),
                    };
                }
            }
        }
    }
}

/// A row of places of one group.
struct Tile<'a> {
    plane: usize,
    offsets: &'a [usize],
    channels: &'a [u32],
    values: &'a [f32],
    lanes: usize,
    /// The first row of the first plane that the places see.
    x: *const f32,
    wide: usize,
    y: Shared<'a>,
    /// Where the first place's first output stands, and how far apart places are.
    at: usize,
    step: usize,
}

impl Tile<'_> {
    /// `R` outputs from `lane` on, `P` vectors of places at a time. Answers `R`.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const R: usize, const P: usize>(&self, lane: usize) -> usize {
        for first in (0..self.wide).step_by(LANES * P) {
            // The last vector of an odd number is loaded from the one before.
            let mut acc = [[S::splat(0.0); P]; R];
            let second = if first + LANES < self.wide { LANES } else { 0 };
            let mut values = self.values.as_ptr().add(lane);
            for channel in self.channels {
                let plane = self.x.add(*channel as usize * self.plane + first);
                for offset in self.offsets {
                    let x = plane.add(*offset);
                    let x: [S::F; P] = std::array::from_fn(|p| S::load(x.add(p * second)));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let v = S::splat(*values.add(r));
                        for (acc, x) in acc.iter_mut().zip(x) {
                            *acc = S::mul_add(v, x, *acc);
                        }
                    }
                    values = values.add(self.lanes);
                }
            }
            let at = self.at + first * self.step + lane;
            let count = (LANES * P).min(self.wide - first);
            put::<S, R, P>(acc, self.y, (at, self.step), count);
        }
        R
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::training::convolution;

    fn noise(len: usize, mut state: u32) -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
            })
            .collect()
    }

    /// Group 0 keeps about half of its channels, group 1 none, group 2 one, others all.
    fn weight([outputs, inputs]: [usize; 2], taps: usize, group: usize) -> Vec<f32> {
        let mut values = noise(outputs * taps * inputs, 3);
        for (at, v) in values.iter_mut().enumerate() {
            let (row, channel) = (at / (taps * inputs), at % inputs);
            let kept = match row / group {
                0 => channel * 7 % 11 < 6,
                1 => false,
                2 => channel == inputs / 2,
                _ => true,
            };
            if !kept {
                *v = 0.0;
            }
        }
        values
    }

    #[test]
    fn convolutions_are_products_of_unfolded_rows_at_all_levels() {
        for (sides, [outputs, inputs], size, stride) in [
            ([1, 1], [3, 2], 3, 1),
            ([5, 7], [13, 3], 3, 1),
            ([5, 7], [9, 3], 3, 2),
            ([3, 16], [32, 5], 3, 1),
            ([4, 17], [40, 4], 3, 1),
            ([4, 35], [24, 3], 3, 2),
            ([6, 33], [70, 2], 3, 1),
            ([6, 21], [17, 3], 5, 3),
            ([2, 40], [10, 3], 1, 1),
        ] {
            let window = Window::centred(sides, inputs, size, stride);
            let taps = window.taps();
            for group in [2, 4, 8, 16, 32] {
                let dense = weight([outputs, inputs], taps, group);
                let packed = Convolution::pack([outputs, inputs], taps, group, &dense);
                for images in [1, 3] {
                    let x = noise(images * window.image(), 5);
                    let mut rows = vec![0.0; images * window.places() * taps * inputs];
                    convolution::unfold(&window, &x, &mut rows);
                    for level in Level::available() {
                        let mut y = vec![f32::NAN; images * window.places() * outputs];
                        packed.multiply_at(level, &window, &x, &mut y);
                        for (i, y) in y.iter().enumerate() {
                            let (place, o) = (i / outputs, i % outputs);
                            let row = &rows[place * taps * inputs..][..taps * inputs];
                            let w = &dense[o * taps * inputs..][..taps * inputs];
                            let terms = row.iter().zip(w).map(|(x, w)| f64::from(x * w));
                            let size: f64 = terms.clone().map(f64::abs).sum();
                            let want: f64 = terms.sum();
                            let error = (f64::from(*y) - want).abs();
                            assert!(
                                error <= 1e-5 * (1.0 + size),
                                "{level:?} {window:?} by {group}: {y} is not {want}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn levels_agree() {
        let window = Window::centred([7, 19], 6, 3, 1);
        let dense = weight([20, 6], 9, 8);
        let packed = Convolution::pack([20, 6], 9, 8, &dense);
        let x = noise(2 * window.image(), 8);
        let mut plain = vec![f32::NAN; 2 * window.places() * 20];
        packed.multiply_at(Level::Arrays, &window, &x, &mut plain);
        for level in Level::available() {
            let mut y = vec![f32::NAN; plain.len()];
            packed.multiply_at(level, &window, &x, &mut y);
            for (a, b) in y.iter().zip(&plain) {
                assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{level:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn bytes_are_those_of_the_formula_and_nothing_kept_is_zero() {
        // Groups of 4 outputs: the first keeps 2 of 3 channels, the second none, the short third all.
        let mut dense = vec![0.0; 10 * 27];
        for tap in 0..9 {
            dense[tap * 3] = 1.0;
            dense[3 * 27 + tap * 3 + 2] = 1.0;
        }
        dense[8 * 27..].fill(1.0);
        let packed = Convolution::pack([10, 3], 9, 4, &dense);
        assert_eq!(packed.kept(), 2 + 3);
        assert_eq!(packed.bytes(), 4 * (2 * 9 * 4 + 3 * 9 * 2) + 2 * 5 + 4 * 4);
        let none = Convolution::pack([10, 3], 9, 4, &[0.0; 270]);
        assert_eq!((none.kept(), none.bytes()), (0, 16));
        let window = Window::centred([2, 2], 3, 3, 1);
        let mut y = vec![f32::NAN; 40];
        none.multiply(&window, &noise(12, 1), &mut y);
        assert!(y.iter().all(|v| *v == 0.0));
        assert!(!Convolution::suits(&Window::centred([7, 7], 3, 3, 1)));
        assert!(Convolution::suits(&Window::centred([28, 28], 3, 3, 1)));
    }
}
