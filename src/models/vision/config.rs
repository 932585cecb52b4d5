//! The settings of an image classifier, read from `config.json`, and the names of its tensors.

use serde_json::Value;

use crate::error::Result;
use crate::models::decoder::hugging_face::{Keys, MAX_PARAMETERS, refuse};
use crate::nn::ops::Window;

/// The family's name.
pub const FAMILY: &str = "vision";

/// Sides of an image, classes and layers, at most.
const MAX_SIDE: usize = 4096;
const MAX_CHANNELS: usize = 1 << 16;
const MAX_CLASSES: usize = 1 << 16;
const MAX_LAYERS: usize = 256;

/// The convolutions of MobileNet-v1 after the first (arXiv 1704.04861, table 1): channels and stride.
const MOBILENET: [(usize, usize); 13] = [
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
];

/// What a layer is made of; each convolution is followed by a batch norm and ReLU6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// A 3 x 3 convolution.
    Plain { inputs: usize, outputs: usize, stride: usize },
    /// A depthwise 3 x 3 convolution and then one of 1 x 1.
    Separable { inputs: usize, outputs: usize, stride: usize },
}

impl Layer {
    /// Channels that go in.
    pub fn inputs(self) -> usize {
        match self {
            Self::Plain { inputs, .. } | Self::Separable { inputs, .. } => inputs,
        }
    }

    /// Channels that come out.
    pub fn outputs(self) -> usize {
        match self {
            Self::Plain { outputs, .. } | Self::Separable { outputs, .. } => outputs,
        }
    }

    /// Pixels from one window to the next.
    pub fn stride(self) -> usize {
        match self {
            Self::Plain { stride, .. } | Self::Separable { stride, .. } => stride,
        }
    }

    /// The window of the layer's 3 x 3 convolution over images of these sides.
    pub fn window(self, sides: [usize; 2]) -> Window {
        Window::centred(sides, self.inputs(), 3, self.stride())
    }
}

/// Configuration of an image classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `model_type`: `conv_net` or `mobilenet_v1`.
    pub architecture: String,
    /// Height and width of the images.
    pub sides: [usize; 2],
    /// Channels of the images.
    pub channels: usize,
    pub classes: usize,
    /// The convolutions in their order.
    pub layers: Vec<Layer>,
    /// Added to variances before their root is taken.
    pub norm_eps: f32,
    /// Share of a batch's mean and variance in the running ones.
    pub norm_momentum: f32,
    /// What is taken from each channel of an image in [0, 1], and what the rest is divided by.
    pub mean: Vec<f32>,
    pub deviation: Vec<f32>,
}

/// Whether a configuration belongs to this family.
pub fn is_vision(config: &Value) -> bool {
    let kind = config.get("model_type").and_then(Value::as_str);
    matches!(kind, Some("conv_net" | "mobilenet_v1"))
}

impl Config {
    /// From `config.json`; every value is checked. Errors are `UNSUPPORTED_MODEL` and name the key.
    pub fn from_hugging_face(config: &Value) -> Result<Self> {
        let keys = Keys { map: config };
        let architecture = keys.text("model_type")?.unwrap_or_default().to_owned();
        let sides = match config.get("image_size").filter(|size| !size.is_null()) {
            Some(Value::Array(sides)) if sides.len() == 2 => {
                let side = |value: &Value| {
                    let inner = serde_json::json!({ "image_size": value });
                    Keys { map: &inner }.size("image_size", None, MAX_SIDE)
                };
                [side(&sides[0])?, side(&sides[1])?]
            }
            _ => [keys.size("image_size", Some(28), MAX_SIDE)?; 2],
        };
        let channels = keys.size("num_channels", Some(1), 64)?;
        let (layers, eps) = match architecture.as_str() {
            "conv_net" => (plain(config, channels)?, 1e-5),
            "mobilenet_v1" => (mobilenet(&keys, channels)?, 1e-3),
            _ => return Err(refuse("model_type", "is neither conv_net nor mobilenet_v1")),
        };
        if let Some(act) = keys.text("hidden_act")?.filter(|act| *act != "relu6") {
            let act: String = act.chars().take(40).collect();
            return Err(refuse("hidden_act", format!("'{act}' is not supported; use relu6")));
        }
        let per_channel = |key: &str, default: f32, least: f64| -> Result<Vec<f32>> {
            let Some(value) = config.get(key).filter(|value| !value.is_null()) else {
                return Ok(vec![default; channels]);
            };
            let numbers = value.as_array().filter(|list| list.len() == channels);
            let number = |v: &Value| v.as_f64().filter(|v| v.abs() <= 1e3 && *v >= least);
            let values =
                numbers.and_then(|list| list.iter().map(number).collect::<Option<Vec<_>>>());
            let values = values.ok_or_else(|| {
                refuse(key, format!("is no list of {channels} numbers in [{least}, 1000]"))
            })?;
            Ok(values.into_iter().map(|v| v as f32).collect())
        };
        let this = Self {
            architecture,
            sides,
            channels,
            classes: keys.size("num_labels", Some(10), MAX_CLASSES)?,
            layers,
            norm_eps: keys.number("layer_norm_eps", eps, 1e-8..=1.0)? as f32,
            norm_momentum: keys.number("norm_momentum", 0.1, 1e-6..=1.0)? as f32,
            mean: per_channel("image_mean", 0.5, -1e3)?,
            deviation: per_channel("image_std", 0.5, 1e-6)?,
        };
        let elements = |(_, shape): (String, Vec<usize>)| -> u128 {
            shape.iter().map(|side| *side as u128).product()
        };
        if this.tensors().into_iter().map(elements).sum::<u128>() > MAX_PARAMETERS {
            return Err(refuse("channels", "the model would have more than 2^40 weights"));
        }
        Ok(this)
    }

    /// Sides of the images that go into each layer, and after the last.
    pub fn images(&self) -> Vec<[usize; 2]> {
        let mut sides = vec![self.sides];
        for layer in &self.layers {
            sides.push(layer.window(sides[sides.len() - 1]).out());
        }
        sides
    }

    /// Elements of an image.
    pub fn image(&self) -> usize {
        self.sides[0] * self.sides[1] * self.channels
    }

    /// Channels that the classifier sees.
    pub fn features(&self) -> usize {
        self.layers.last().map_or(self.channels, |layer| layer.outputs())
    }

    /// Every tensor the model must have, with its shape. Weights of convolutions are matrices: taps row by row,
    /// each with all input channels; those of depthwise ones are `[channels, taps]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        let norm = |all: &mut Vec<_>, place: &str, channels: usize| {
            for part in ["weight", "bias", "running_mean", "running_var"] {
                all.push((format!("{place}.{part}"), vec![channels]));
            }
        };
        for (i, layer) in self.layers.iter().enumerate() {
            match *layer {
                Layer::Plain { inputs, outputs, .. } => {
                    all.push((format!("layers.{i}.conv.weight"), vec![outputs, 9 * inputs]));
                    norm(&mut all, &format!("layers.{i}.norm"), outputs);
                }
                Layer::Separable { inputs, outputs, .. } => {
                    all.push((format!("layers.{i}.depthwise.weight"), vec![inputs, 9]));
                    norm(&mut all, &format!("layers.{i}.depthwise_norm"), inputs);
                    all.push((format!("layers.{i}.pointwise.weight"), vec![outputs, inputs]));
                    norm(&mut all, &format!("layers.{i}.pointwise_norm"), outputs);
                }
            }
        }
        all.push(("classifier.weight".to_owned(), vec![self.classes, self.features()]));
        all.push(("classifier.bias".to_owned(), vec![self.classes]));
        all
    }

    /// Names of the weights that pruning takes when nothing is said: convolutions but depthwise ones, which
    /// are few and matter much, and not the classifier.
    pub fn prunable(&self) -> Vec<String> {
        let name = |(i, layer): (usize, &Layer)| match layer {
            Layer::Plain { .. } => format!("layers.{i}.conv.weight"),
            Layer::Separable { .. } => format!("layers.{i}.pointwise.weight"),
        };
        self.layers.iter().enumerate().map(name).collect()
    }
}

/// Whether a tensor holds running statistics, which no gradient changes.
pub fn is_statistic(name: &str) -> bool {
    name.ends_with(".running_mean") || name.ends_with(".running_var")
}

fn plain(config: &Value, channels: usize) -> Result<Vec<Layer>> {
    let list = |key: &str, most: usize, default: &[usize]| -> Result<Vec<usize>> {
        let Some(value) = config.get(key).filter(|value| !value.is_null()) else {
            return Ok(default.to_vec());
        };
        let numbers = value.as_array().filter(|list| (1..=MAX_LAYERS).contains(&list.len()));
        let whole = |v: &Value| {
            let number = v.as_f64().filter(|v| v.fract() == 0.0 && *v >= 1.0 && *v <= most as f64);
            number.map(|v| v as usize)
        };
        let values = numbers.and_then(|list| list.iter().map(whole).collect::<Option<Vec<_>>>());
        values.ok_or_else(|| {
            refuse(key, format!("is no list of 1 to {MAX_LAYERS} whole numbers in 1..={most}"))
        })
    };
    let outputs = list("channels", MAX_CHANNELS, &[32, 64, 128, 256])?;
    let mut strides: Vec<usize> = vec![2; outputs.len()];
    strides[0] = 1;
    let strides = list("strides", 16, &strides)?;
    if strides.len() != outputs.len() {
        let (strides, outputs) = (strides.len(), outputs.len());
        return Err(refuse("strides", format!("{strides} strides for {outputs} channels")));
    }
    let width = Keys { map: config }.number("width", 1.0, 1e-3..=64.0)?;
    let mut inputs = channels;
    let layers = outputs.iter().zip(&strides).map(|(outputs, stride)| {
        let outputs = scaled(*outputs, width, 1);
        let layer = Layer::Plain { inputs, outputs, stride: *stride };
        inputs = outputs;
        layer
    });
    Ok(layers.collect())
}

fn mobilenet(keys: &Keys<'_>, channels: usize) -> Result<Vec<Layer>> {
    let width = keys.number("depth_multiplier", 1.0, 1e-3..=64.0)?;
    let least = keys.size("min_depth", Some(8), 1024)?;
    // Small images would be gone after five strides of 2: the first layer's can be chosen.
    let stride = keys.size("first_stride", Some(2), 2)?;
    let mut inputs = scaled(32, width, least);
    let mut layers = vec![Layer::Plain { inputs: channels, outputs: inputs, stride }];
    for (outputs, stride) in MOBILENET {
        let outputs = scaled(outputs, width, least);
        layers.push(Layer::Separable { inputs, outputs, stride });
        inputs = outputs;
    }
    Ok(layers)
}

/// Channels of a narrower or wider layer.
fn scaled(channels: usize, width: f64, least: usize) -> usize {
    ((channels as f64 * width).round() as usize).clamp(least, MAX_CHANNELS)
}
