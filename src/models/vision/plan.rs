//! The fast forward: batch norms are folded into the convolutions before them, dense convolutions are products
//! with packed panels, depthwise ones run in place.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Config, Layer, Model};
use crate::error::{Error, Reason, Result};
use crate::kernels::f32_panels::F32Panels;
use crate::kernels::training::{batch_norm, convolution, elementwise};
use crate::nn::ops::{Window, transposed};
use crate::nn::weight::Weight;

/// Elements of unfolded rows that are made at once.
const UNFOLDED: usize = 1 << 22;

/// A classifier ready to run.
pub struct Plan {
    config: Config,
    layers: Vec<Ready>,
    classifier: F32Panels,
    bias: Vec<f32>,
    /// What images are multiplied by and what is added, for each channel.
    input: (Vec<f32>, Vec<f32>),
}

enum Ready {
    Plain { window: Window, weight: F32Panels, bias: Vec<f32> },
    Separable { window: Window, taps: Vec<f32>, mid: Vec<f32>, weight: F32Panels, bias: Vec<f32> },
}

impl Plan {
    /// # Errors
    /// `TENSOR_NOT_FOUND`.
    pub fn new(model: &Model) -> Result<Self> {
        Self::of(&model.family, &model.weights)
    }

    /// # Errors
    /// `TENSOR_NOT_FOUND`.
    pub fn of(config: &Config, weights: &BTreeMap<String, Arc<Weight>>) -> Result<Self> {
        Self::with(config, &|name| {
            let weight = weights.get(name).ok_or_else(|| {
                Error::new(
                    Reason::TensorNotFound,
                    format!("tensor '{name}' is missing from the model"),
                )
            })?;
            Ok(weight.to_f32())
        })
    }

    /// With tensors from anywhere.
    ///
    /// # Errors
    /// What `read` gives, and INTERNAL for tensors of other sizes.
    pub fn with(config: &Config, read: &dyn Fn(&str) -> Result<Vec<f32>>) -> Result<Self> {
        let sizes: BTreeMap<String, usize> =
            config.tensors().into_iter().map(|(n, s)| (n, s.iter().product())).collect();
        let read = |name: &str| -> Result<Vec<f32>> {
            let values = read(name)?;
            match sizes.get(name) == Some(&values.len()) {
                true => Ok(values),
                false => Err(Error::internal(format!("'{name}' has another size"))),
            }
        };
        // Factor and summand of each channel that a norm amounts to.
        let norm = |place: &str| -> Result<(Vec<f32>, Vec<f32>)> {
            let part = |name: &str| read(&format!("{place}.{name}"));
            let (weight, bias) = (part("weight")?, part("bias")?);
            let (mean, variance) = (part("running_mean")?, part("running_var")?);
            let scale: Vec<f32> = weight
                .iter()
                .zip(&variance)
                .map(|(w, v)| w / (v + config.norm_eps).sqrt())
                .collect();
            let shift = bias.iter().zip(&scale).zip(&mean).map(|((b, s), m)| b - s * m).collect();
            Ok((scale, shift))
        };
        let folded = |name: &str, place: &str| -> Result<(F32Panels, Vec<f32>)> {
            let (values, (scale, shift)) = (read(name)?, norm(place)?);
            let cols = values.len() / scale.len().max(1);
            let panels = F32Panels::pack(scale.len(), cols, |row, out| {
                let from = &values[row * cols..][..cols];
                out.iter_mut().zip(from).for_each(|(o, v)| *o = v * scale[row]);
            });
            Ok((panels, shift))
        };
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, (layer, sides)) in config.layers.iter().zip(config.images()).enumerate() {
            let (window, place) = (layer.window(sides), format!("layers.{i}"));
            layers.push(match *layer {
                Layer::Plain { .. } => {
                    let (weight, bias) =
                        folded(&format!("{place}.conv.weight"), &format!("{place}.norm"))?;
                    Ready::Plain { window, weight, bias }
                }
                Layer::Separable { inputs, .. } => {
                    let (scale, mid) = norm(&format!("{place}.depthwise_norm"))?;
                    let mut taps = read(&format!("{place}.depthwise.weight"))?;
                    for (taps, scale) in taps.chunks_exact_mut(9).zip(&scale) {
                        taps.iter_mut().for_each(|t| *t *= scale);
                    }
                    let (weight, bias) = folded(
                        &format!("{place}.pointwise.weight"),
                        &format!("{place}.pointwise_norm"),
                    )?;
                    Ready::Separable {
                        window,
                        taps: transposed(&taps, inputs, 9),
                        mid,
                        weight,
                        bias,
                    }
                }
            });
        }
        let (weight, features) = (read("classifier.weight")?, config.features());
        let classifier = F32Panels::pack(config.classes, features, |row, out| {
            out.copy_from_slice(&weight[row * features..][..features]);
        });
        Ok(Self {
            classifier,
            bias: read("classifier.bias")?,
            layers,
            input: input(config),
            config: config.clone(),
        })
    }

    /// Logits `[images, classes]` of images as bytes, pixels row by row with their channels.
    ///
    /// # Errors
    /// INTERNAL for bytes that are not whole images.
    pub fn classify(&self, images: &[u8]) -> Result<Vec<f32>> {
        let mut x = vec![0.0; images.len()];
        prepare(&self.input, images, &mut x);
        self.forward(x)
    }

    /// Logits of images that are prepared, see [`prepare`].
    ///
    /// # Errors
    /// INTERNAL for numbers that are not whole images.
    pub fn forward(&self, mut x: Vec<f32>) -> Result<Vec<f32>> {
        let image = self.config.image();
        if x.is_empty() || !x.len().is_multiple_of(image) {
            return Err(Error::internal("images of another size than the net is for"));
        }
        let count = x.len() / image;
        for layer in &self.layers {
            x = match layer {
                Ready::Plain { window, weight, bias } => {
                    let (places, wide) = (window.places(), window.taps() * window.channels);
                    let mut y = vec![0.0; count * places * weight.rows()];
                    let each = (UNFOLDED / (places * wide).max(1)).clamp(1, count);
                    let mut rows = vec![0.0; each * places * wide];
                    let parts = x.chunks(each * window.image());
                    for (x, y) in parts.zip(y.chunks_mut(each * places * weight.rows())) {
                        let rows = &mut rows[..x.len() / window.image() * places * wide];
                        convolution::unfold(window, x, rows);
                        weight.multiply(rows, y);
                    }
                    finish(&mut y, bias);
                    y
                }
                Ready::Separable { window, taps, mid, weight, bias } => {
                    let mut middle = vec![0.0; count * window.places() * window.channels];
                    convolution::depthwise(window, &x, taps, &mut middle);
                    finish(&mut middle, mid);
                    let mut y = vec![0.0; count * window.places() * weight.rows()];
                    weight.multiply(&middle, &mut y);
                    finish(&mut y, bias);
                    y
                }
            };
        }
        let features = self.config.features();
        let pixels = x.len() / features / count;
        let mut pooled = vec![0.0; count * features];
        for (x, out) in x.chunks_exact(pixels * features).zip(pooled.chunks_exact_mut(features)) {
            elementwise::add_columns(x, out);
            out.iter_mut().for_each(|v| *v /= pixels as f32);
        }
        let mut logits = vec![0.0; count * self.config.classes];
        self.classifier.multiply(&pooled, &mut logits);
        elementwise::add_bias(&mut logits, &self.bias);
        Ok(logits)
    }
}

fn finish(y: &mut [f32], bias: &[f32]) {
    elementwise::add_bias(y, bias);
    batch_norm::relu6(y);
}

/// Factor and summand of each channel that turn bytes into what the net sees.
pub fn input(config: &Config) -> (Vec<f32>, Vec<f32>) {
    let scale: Vec<f32> = config.deviation.iter().map(|d| 1.0 / (255.0 * d)).collect();
    let shift = config.mean.iter().zip(&config.deviation).map(|(m, d)| -m / d).collect();
    (scale, shift)
}

/// Writes images as the net sees them.
pub fn prepare((scale, shift): &(Vec<f32>, Vec<f32>), bytes: &[u8], out: &mut [f32]) {
    let channels = scale.len().max(1);
    for (bytes, out) in bytes.chunks_exact(channels).zip(out.chunks_exact_mut(channels)) {
        for (c, (byte, out)) in bytes.iter().zip(out).enumerate() {
            *out = f32::from(*byte) * scale[c] + shift[c];
        }
    }
}
