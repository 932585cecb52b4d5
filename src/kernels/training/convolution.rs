//! Convolutions over images whose channels lie side by side: an image is `[height * width, channels]`,
//! a batch of images is their rows one after another. A dense convolution is the product of unfolded rows
//! with its weight; a depthwise one is computed in place, a vector of channels at a time.

use super::super::multiversion::{mul_add, multiversion};
use super::super::threads;

/// A square window that slides over images of one size. Outside an image there are zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    /// Length of the window's sides, at least 1.
    pub size: usize,
    /// Pixels from one window to the next, at least 1.
    pub stride: usize,
    /// Zeros on each side, less than `size`.
    pub pad: usize,
}

impl Window {
    /// `size` wide, `stride` apart, centred: an odd window with stride 1 gives images of the same size.
    pub fn centred(
        [height, width]: [usize; 2],
        channels: usize,
        size: usize,
        stride: usize,
    ) -> Self {
        Self { height, width, channels, size, stride, pad: (size - 1) / 2 }
    }

    /// Height and width of what comes out; 0 where no window fits.
    pub fn out(&self) -> [usize; 2] {
        [self.height, self.width].map(|side| {
            (side + 2 * self.pad).checked_sub(self.size).map_or(0, |rest| rest / self.stride + 1)
        })
    }

    /// Positions of the window.
    pub fn places(&self) -> usize {
        let [height, width] = self.out();
        height * width
    }

    /// Pixels under a window.
    pub fn taps(&self) -> usize {
        self.size * self.size
    }

    /// Elements of an image.
    pub fn image(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// For each window and tap the pixel under it, where it lies inside the image.
    #[inline(always)]
    fn pixel(&self, y: usize, x: usize, tap: usize) -> Option<usize> {
        let row = (y * self.stride + tap / self.size).wrapping_sub(self.pad);
        let column = (x * self.stride + tap % self.size).wrapping_sub(self.pad);
        (row < self.height && column < self.width).then(|| row * self.width + column)
    }

    fn images(&self, elements: usize) -> usize {
        let image = self.image();
        assert!(image > 0 && elements.is_multiple_of(image), "elements of whole images");
        elements / image
    }
}

/// Rows of what is under each window, `[places, taps * channels]` an image, taps row by row.
pub fn unfold(window: &Window, x: &[f32], out: &mut [f32]) {
    let (image, wide) = (window.image(), window.taps() * window.channels);
    let rows = window.places() * wide;
    assert_eq!(out.len(), window.images(x.len()) * rows, "size of unfolded images");
    threads::for_rows(out, rows, 1, |first, outs| {
        for (i, out) in outs.chunks_exact_mut(rows).enumerate() {
            unfold_image(window, &x[(first + i) * image..][..image], out);
        }
    });
}

/// `dx = ` the sum of what the windows say of each pixel: the gradient of [`unfold`].
pub fn fold(window: &Window, g: &[f32], dx: &mut [f32]) {
    let (image, wide) = (window.image(), window.taps() * window.channels);
    let rows = window.places() * wide;
    assert_eq!(g.len(), window.images(dx.len()) * rows, "size of unfolded images");
    threads::for_rows(dx, image, 1, |first, images| {
        for (i, dx) in images.chunks_exact_mut(image).enumerate() {
            dx.fill(0.0);
            fold_image(window, &g[(first + i) * rows..][..rows], dx);
        }
    });
}

/// `y[place, c] = sum over taps of x[pixel, c] w[tap, c]`, overwritten; `w` is `[taps, channels]`.
pub fn depthwise(window: &Window, x: &[f32], w: &[f32], y: &mut [f32]) {
    let (image, rows) = (window.image(), window.places() * window.channels);
    assert_eq!(w.len(), window.taps() * window.channels, "size of a depthwise weight");
    assert_eq!(y.len(), window.images(x.len()) * rows, "size of a depthwise result");
    threads::for_rows(y, rows, 1, |first, outs| {
        for (i, y) in outs.chunks_exact_mut(rows).enumerate() {
            depthwise_image(window, &x[(first + i) * image..][..image], w, y);
        }
    });
}

/// `dx`, overwritten: the gradient of [`depthwise`] for its input.
pub fn depthwise_input(window: &Window, g: &[f32], w: &[f32], dx: &mut [f32]) {
    let (image, rows) = (window.image(), window.places() * window.channels);
    assert_eq!(g.len(), window.images(dx.len()) * rows, "size of a depthwise result");
    threads::for_rows(dx, image, 1, |first, images| {
        for (i, dx) in images.chunks_exact_mut(image).enumerate() {
            dx.fill(0.0);
            input_image(window, &g[(first + i) * rows..][..rows], w, dx);
        }
    });
}

/// `dw += ` the gradient of [`depthwise`] for its weight, `[taps, channels]`. Images are summed one by one
/// and then in their order, so the sum does not depend on threads.
pub fn depthwise_weight(window: &Window, x: &[f32], g: &[f32], dw: &mut [f32]) {
    let (image, rows) = (window.image(), window.places() * window.channels);
    let images = window.images(x.len());
    assert_eq!(g.len(), images * rows, "size of a depthwise result");
    let size = dw.len();
    let mut parts = vec![0.0; images * size];
    threads::for_rows(&mut parts, size, 1, |first, parts| {
        for (i, part) in parts.chunks_exact_mut(size).enumerate() {
            let at = first + i;
            weight_image(window, &x[at * image..][..image], &g[at * rows..][..rows], part);
        }
    });
    for part in parts.chunks_exact(size) {
        super::super::norm::add(dw, part);
    }
}

multiversion! {
    fn unfold_image(window: &Window, x: &[f32], out: &mut [f32]) {
        let (channels, taps, [_, wide]) = (window.channels, window.taps(), window.out());
        for (place, row) in out.chunks_exact_mut(taps * channels).enumerate() {
            for (tap, out) in row.chunks_exact_mut(channels).enumerate() {
                match window.pixel(place / wide, place % wide, tap) {
                    Some(pixel) => out.copy_from_slice(&x[pixel * channels..][..channels]),
                    None => out.fill(0.0),
                }
            }
        }
    }

    fn fold_image(window: &Window, g: &[f32], dx: &mut [f32]) {
        let (channels, taps, [_, wide]) = (window.channels, window.taps(), window.out());
        for (place, row) in g.chunks_exact(taps * channels).enumerate() {
            for (tap, g) in row.chunks_exact(channels).enumerate() {
                if let Some(pixel) = window.pixel(place / wide, place % wide, tap) {
                    let dx = &mut dx[pixel * channels..][..channels];
                    dx.iter_mut().zip(g).for_each(|(d, g)| *d += g);
                }
            }
        }
    }

    fn depthwise_image(window: &Window, x: &[f32], w: &[f32], y: &mut [f32]) {
        let (channels, taps, [_, wide]) = (window.channels, window.taps(), window.out());
        for (place, y) in y.chunks_exact_mut(channels).enumerate() {
            y.fill(0.0);
            for tap in 0..taps {
                if let Some(pixel) = window.pixel(place / wide, place % wide, tap) {
                    let x = &x[pixel * channels..][..channels];
                    let w = &w[tap * channels..][..channels];
                    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                        *y = mul_add::<FMA>(*x, *w, *y);
                    }
                }
            }
        }
    }

    fn input_image(window: &Window, g: &[f32], w: &[f32], dx: &mut [f32]) {
        let (channels, taps, [_, wide]) = (window.channels, window.taps(), window.out());
        for (place, g) in g.chunks_exact(channels).enumerate() {
            for tap in 0..taps {
                if let Some(pixel) = window.pixel(place / wide, place % wide, tap) {
                    let dx = &mut dx[pixel * channels..][..channels];
                    let w = &w[tap * channels..][..channels];
                    for ((d, g), w) in dx.iter_mut().zip(g).zip(w) {
                        *d = mul_add::<FMA>(*g, *w, *d);
                    }
                }
            }
        }
    }

    fn weight_image(window: &Window, x: &[f32], g: &[f32], dw: &mut [f32]) {
        let (channels, taps, [_, wide]) = (window.channels, window.taps(), window.out());
        for (place, g) in g.chunks_exact(channels).enumerate() {
            for tap in 0..taps {
                if let Some(pixel) = window.pixel(place / wide, place % wide, tap) {
                    let dw = &mut dw[tap * channels..][..channels];
                    let x = &x[pixel * channels..][..channels];
                    for ((d, g), x) in dw.iter_mut().zip(g).zip(x) {
                        *d = mul_add::<FMA>(*g, *x, *d);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_by_hand() {
        let window = Window::centred([3, 3], 1, 3, 2);
        assert_eq!((window.out(), window.taps(), window.image()), ([2, 2], 9, 9));
        let x: Vec<f32> = (1..=9).map(|v| v as f32).collect();
        let mut rows = vec![f32::NAN; 36];
        unfold(&window, &x, &mut rows);
        // Centres are the corners: what is outside is zero.
        assert_eq!(rows[..9], [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 4.0, 5.0]);
        assert_eq!(rows[27..], [5.0, 6.0, 0.0, 8.0, 9.0, 0.0, 0.0, 0.0, 0.0]);
        let mut back = vec![f32::NAN; 9];
        fold(&window, &rows, &mut back);
        // Each pixel as often as windows see it: corners once, edges twice, the middle four times.
        assert_eq!(back, [1.0, 4.0, 3.0, 8.0, 20.0, 12.0, 7.0, 16.0, 9.0]);
    }

    #[test]
    fn a_depthwise_convolution_is_a_product_of_each_channel() {
        let window = Window::centred([4, 5], 3, 3, 1);
        let noise = |n: usize, by: f32| (0..n).map(|i| (i as f32 * by).sin()).collect::<Vec<_>>();
        let (x, w) = (noise(2 * window.image(), 0.7), noise(27, 1.3));
        let mut rows = vec![0.0; 2 * window.places() * 27];
        unfold(&window, &x, &mut rows);
        let mut y = vec![f32::NAN; 2 * window.places() * 3];
        depthwise(&window, &x, &w, &mut y);
        for (row, y) in rows.chunks_exact(27).zip(y.chunks_exact(3)) {
            for (c, y) in y.iter().enumerate() {
                let want: f32 = (0..9).map(|t| row[t * 3 + c] * w[t * 3 + c]).sum();
                assert!((want - y).abs() < 1e-5, "{want} {y}");
            }
        }
    }

    #[test]
    fn windows_that_do_not_fit_give_nothing() {
        let window = Window { height: 1, width: 1, channels: 2, size: 3, stride: 1, pad: 0 };
        assert_eq!(window.places(), 0);
    }
}
