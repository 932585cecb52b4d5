//! The fast forward: batch norms are folded into the convolutions before them, dense convolutions are products
//! with packed panels, depthwise ones run in place. Row groups stay what they are: 1 x 1 convolutions multiply by
//! them, those of 3 x 3 read the images' planes by taps where rows of pixels fill vectors ([`Convolution`]).
//!
//! That holds on every processor: the layout decides, not a measurement. Where there are tiles (AMX), dense f32 products
//! of many rows take them (`kernels::gemm::parts`) and run about twice as fast as by vectors, which row groups
//! go on using; so there a net can be slower with row groups than with the same values dense, unless few are left.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Config, Layer, Model};
use crate::error::{Error, Reason, Result};
use crate::kernels::f32_panels::F32Panels;
use crate::kernels::row_groups::taps::Convolution;
use crate::kernels::training::{batch_norm, convolution, elementwise};
use crate::nn::ops::{Window, transposed};
use crate::nn::weight::{RowGroupValues, RowGroups, Weight};

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
    Plain {
        window: Window,
        weight: Product,
        bias: Vec<f32>,
    },
    /// The same without unfolded rows.
    Direct {
        window: Window,
        weight: Convolution,
        bias: Vec<f32>,
    },
    Separable {
        window: Window,
        taps: Vec<f32>,
        mid: Vec<f32>,
        weight: Product,
        bias: Vec<f32>,
    },
}

/// A weight as it is multiplied.
enum Product {
    Panels(F32Panels),
    Groups(RowGroups),
}

impl Product {
    /// A `[rows, cols]` weight whose rows were scaled, with the pattern of what it was stored as.
    fn of([rows, cols]: [usize; 2], values: &[f32], groups: Option<&RowGroups>) -> Result<Self> {
        let Some(groups) = groups else {
            return Ok(Self::Panels(F32Panels::pack(rows, cols, |row, out| {
                out.copy_from_slice(&values[row * cols..][..cols]);
            })));
        };
        let (units, group, format) = (groups.units(), groups.group(), RowGroupValues::F32);
        Ok(Self::Groups(RowGroups::from_units([rows, cols], values, &units, group, format)?))
    }

    fn rows(&self) -> usize {
        match self {
            Self::Panels(weight) => weight.rows(),
            Self::Groups(weight) => weight.shape()[0],
        }
    }

    /// `y = x W^T`, overwritten.
    fn multiply(&self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Panels(weight) => weight.multiply(x, y),
            Self::Groups(weight) => weight.multiply(x, y),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Panels(weight) => weight.bytes(),
            Self::Groups(weight) => weight.bytes() as usize,
        }
    }
}

/// What sees the rows that enter a weight: its name, the rows, and their channels.
pub type Watch<'a> = dyn FnMut(&str, &[f32], usize) + 'a;

impl Plan {
    /// # Errors
    /// `TENSOR_NOT_FOUND`.
    pub fn new(model: &Model) -> Result<Self> {
        Self::of(&model.family, &model.weights)
    }

    /// # Errors
    /// `TENSOR_NOT_FOUND`.
    pub fn of(config: &Config, weights: &BTreeMap<String, Arc<Weight>>) -> Result<Self> {
        let read = |name: &str| {
            let weight = weights.get(name).ok_or_else(|| {
                Error::new(
                    Reason::TensorNotFound,
                    format!("tensor '{name}' is missing from the model"),
                )
            })?;
            Ok(weight.to_f32())
        };
        let groups = |name: &str| match weights.get(name).map(|weight| &**weight) {
            Some(Weight::RowGroups(groups)) => Some(groups),
            _ => None,
        };
        Self::made(config, &read, &groups)
    }

    /// With tensors from anywhere.
    ///
    /// # Errors
    /// What `read` gives, and INTERNAL for tensors of other sizes.
    pub fn with(config: &Config, read: &dyn Fn(&str) -> Result<Vec<f32>>) -> Result<Self> {
        Self::made(config, read, &|_| None)
    }

    fn made<'w>(
        config: &Config,
        read: &dyn Fn(&str) -> Result<Vec<f32>>,
        groups: &dyn Fn(&str) -> Option<&'w RowGroups>,
    ) -> Result<Self> {
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
        // Values of a weight whose rows are multiplied by what the norm after it amounts to, and the summand.
        let folded = |name: &str, place: &str| -> Result<(Vec<f32>, Vec<f32>)> {
            let (mut values, (scale, shift)) = (read(name)?, norm(place)?);
            let cols = values.len() / scale.len().max(1);
            for (row, scale) in values.chunks_exact_mut(cols.max(1)).zip(&scale) {
                row.iter_mut().for_each(|v| *v *= scale);
            }
            Ok((values, shift))
        };
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, (layer, sides)) in config.layers.iter().zip(config.images()).enumerate() {
            let (window, at) = (layer.window(sides), |part: &str| format!("layers.{i}.{part}"));
            layers.push(match *layer {
                Layer::Plain { .. } => {
                    let name = at("conv.weight");
                    let (values, bias) = folded(&name, &at("norm"))?;
                    let (outputs, inputs, taps) = (bias.len(), window.channels, window.taps());
                    match groups(&name).filter(|_| Convolution::suits(&window)) {
                        Some(groups) => {
                            let (shape, group) = ([outputs, inputs], groups.group());
                            let weight = Convolution::pack(shape, taps, group, &values);
                            Ready::Direct { window, weight, bias }
                        }
                        None => {
                            let shape = [outputs, taps * inputs];
                            let weight = Product::of(shape, &values, groups(&name))?;
                            Ready::Plain { window, weight, bias }
                        }
                    }
                }
                Layer::Separable { inputs, outputs, .. } => {
                    let (scale, mid) = norm(&at("depthwise_norm"))?;
                    let mut taps = read(&at("depthwise.weight"))?;
                    for (taps, scale) in taps.chunks_exact_mut(9).zip(&scale) {
                        taps.iter_mut().for_each(|t| *t *= scale);
                    }
                    let name = at("pointwise.weight");
                    let (values, bias) = folded(&name, &at("pointwise_norm"))?;
                    let weight = Product::of([outputs, inputs], &values, groups(&name))?;
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
    pub fn forward(&self, x: Vec<f32>) -> Result<Vec<f32>> {
        self.run(x, None)
    }

    /// Runs images as bytes and shows what enters each weight: pixels with their channels.
    ///
    /// # Errors
    /// As [`Plan::classify`].
    pub fn watch(&self, images: &[u8], watch: &mut Watch<'_>) -> Result<()> {
        let mut x = vec![0.0; images.len()];
        prepare(&self.input, images, &mut x);
        self.run(x, Some(watch)).map(|_| ())
    }

    /// Bytes of the weights as they are multiplied.
    pub fn bytes(&self) -> u64 {
        let own = |ready: &Ready| match ready {
            Ready::Plain { weight, bias, .. } => weight.bytes() + 4 * bias.len(),
            Ready::Direct { weight, bias, .. } => weight.bytes() + 4 * bias.len(),
            Ready::Separable { taps, mid, weight, bias, .. } => {
                weight.bytes() + 4 * (taps.len() + mid.len() + bias.len())
            }
        };
        let layers: usize = self.layers.iter().map(own).sum();
        (layers + self.classifier.bytes() + 4 * self.bias.len()) as u64
    }

    fn run(&self, mut x: Vec<f32>, mut watch: Option<&mut Watch<'_>>) -> Result<Vec<f32>> {
        let image = self.config.image();
        if x.is_empty() || !x.len().is_multiple_of(image) {
            return Err(Error::internal("images of another size than the net is for"));
        }
        let count = x.len() / image;
        for (i, layer) in self.layers.iter().enumerate() {
            let mut show = |part: &str, rows: &[f32], channels: usize| {
                if let Some(watch) = &mut watch {
                    watch(&format!("layers.{i}.{part}.weight"), rows, channels);
                }
            };
            x = match layer {
                Ready::Direct { window, weight, bias } => {
                    show("conv", &x, window.channels);
                    let mut y = vec![0.0; count * window.places() * weight.outputs()];
                    weight.multiply(window, &x, &mut y);
                    finish(&mut y, bias);
                    y
                }
                Ready::Plain { window, weight, bias } => {
                    show("conv", &x, window.channels);
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
                    show("depthwise", &x, window.channels);
                    let mut middle = vec![0.0; count * window.places() * window.channels];
                    convolution::depthwise(window, &x, taps, &mut middle);
                    finish(&mut middle, mid);
                    show("pointwise", &middle, window.channels);
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
        if let Some(watch) = watch {
            watch("classifier.weight", &pooled, features);
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
