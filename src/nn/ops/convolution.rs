//! Convolutions over images as rows of pixels, see [`crate::kernels::training::convolution`].

use std::sync::Arc;

use super::tape::{Tape, Value};
use crate::error::{Error, Result};
use crate::kernels::training::{batch_norm, convolution};

pub use crate::kernels::training::convolution::Window;

impl Tape {
    /// What is under each window, `[places of all images, taps * channels]`; a convolution is the product of
    /// that with a weight `[out, taps * channels]`.
    ///
    /// # Errors
    /// INTERNAL for rows that are not whole images of the window's size.
    pub fn unfold(&self, x: &Value, window: Window) -> Result<Value> {
        let images = images(x, &window)?;
        let width = window.taps() * window.channels;
        let mut y = self.pool().take(images * window.places() * width);
        convolution::unfold(&window, &x.read(), &mut y);
        Ok(self.result(y, width, &[x], || {
            let node = x.node();
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.pool().take(images * window.image());
                convolution::fold(&window, &g, &mut dx);
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        }))
    }

    /// A convolution of each channel with its own window; `weight` is `[channels, taps]`.
    ///
    /// # Errors
    /// INTERNAL for shapes that do not fit.
    pub fn depthwise(&self, x: &Value, weight: &Value, window: Window) -> Result<Value> {
        let images = images(x, &window)?;
        let (channels, taps) = (window.channels, window.taps());
        if weight.rows() != channels || weight.width() != taps {
            return Err(Error::internal("a depthwise weight of another shape than its window"));
        }
        let across = transposed(&weight.read(), channels, taps);
        let mut y = self.pool().take(images * window.places() * channels);
        convolution::depthwise(&window, &x.read(), &across, &mut y);
        Ok(self.result(y, channels, &[x, weight], || {
            let (x, to) = (x.clone(), weight.node());
            move |g, sink| {
                if let Some(node) = to {
                    let mut dw = vec![0.0; taps * channels];
                    convolution::depthwise_weight(&window, &x.read(), &g, &mut dw);
                    let mut out = sink.pool().take(dw.len());
                    out.copy_from_slice(&transposed(&dw, taps, channels));
                    sink.add(node, Arc::new(out));
                }
                if let Some(node) = x.node() {
                    let mut dx = sink.pool().take(images * window.image());
                    convolution::depthwise_input(&window, &g, &across, &mut dx);
                    sink.add(node, Arc::new(dx));
                }
                Ok(())
            }
        }))
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + shift`, mean and variance being those of each channel over
    /// all rows. Gives them, too, for the running ones.
    ///
    /// # Errors
    /// INTERNAL for a weight or shift of another length.
    pub fn batch_norm(
        &self,
        x: &Value,
        weight: &Value,
        shift: &Value,
        eps: f32,
    ) -> Result<(Value, Moments)> {
        let (width, len) = (x.width(), x.rows() * x.width());
        if [weight, shift].iter().any(|v| v.rows() != 1 || v.width() != width) {
            return Err(Error::internal(format!("a batch norm does not fit {width} channels")));
        }
        let (mean, variance) = batch_norm::moments(&x.read(), width);
        let inverse: Vec<f32> = variance.iter().map(|v| 1.0 / (v + eps).sqrt()).collect();
        let scale: Vec<f32> = weight.read().iter().zip(&inverse).map(|(w, i)| w * i).collect();
        let mut y = self.pool().take(len);
        batch_norm::apply(&x.read(), &mean, &scale, &shift.read(), &mut y);
        let moments = Moments { mean: mean.clone(), variance, rows: x.rows() };
        let y = self.result(y, width, &[x, weight, shift], || {
            let (x, weight, shift) = (x.clone(), weight.clone(), shift.node());
            move |g, sink| {
                let data = x.read();
                let sums = batch_norm::gradient_sums(&data, &g, &mean, &inverse);
                for (node, sum) in [(shift, &sums[0]), (weight.node(), &sums[1])] {
                    if let Some(node) = node {
                        let mut out = sink.pool().take(width);
                        out.copy_from_slice(sum);
                        sink.add(node, Arc::new(out));
                    }
                }
                if let Some(node) = x.node() {
                    let mut dx = sink.pool().take(len);
                    let weight = weight.read();
                    let by = (&mean[..], &inverse[..], &weight[..]);
                    batch_norm::backward(&data, &g, by, &sums, &mut dx);
                    sink.add(node, Arc::new(dx));
                }
                Ok(())
            }
        });
        Ok((y, moments))
    }

    /// `min(max(x, 0), 6)`, in the place of `x`.
    #[must_use]
    pub fn relu6(&self, x: Value) -> Value {
        let (width, node) = (x.width(), x.node());
        let mut y = self.own(x);
        batch_norm::relu6(&mut y);
        self.result_of(Arc::new(y), width, &[node], |y| {
            let y = Arc::clone(y);
            move |g, sink| {
                let Some(node) = node else { return Ok(()) };
                let mut dx = sink.unique(g);
                batch_norm::relu6_backward(&y, &mut dx);
                sink.add(node, Arc::new(dx));
                Ok(())
            }
        })
    }
}

/// Mean and variance of each channel over some rows.
#[derive(Debug, Clone)]
pub struct Moments {
    pub mean: Vec<f32>,
    /// Of all rows, not of a sample.
    pub variance: Vec<f32>,
    pub rows: usize,
}

fn images(x: &Value, window: &Window) -> Result<usize> {
    let (pixels, channels) = (window.height * window.width, window.channels);
    if x.width() != channels || pixels == 0 || !x.rows().is_multiple_of(pixels) {
        return Err(Error::internal(format!(
            "rows of {} are no images of {} x {} pixels with {channels} channels",
            x.width(),
            window.height,
            window.width
        )));
    }
    Ok(x.rows() / pixels)
}

/// `[rows, cols]` as `[cols, rows]`.
pub fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (r, row) in values.chunks_exact(cols.max(1)).enumerate() {
        for (c, v) in row.iter().enumerate() {
            out[c * rows + r] = *v;
        }
    }
    out
}
