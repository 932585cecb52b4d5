//! The differentiable forward in training: batch norms by the batch's own mean and variance, which move the
//! running ones.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::{Config, Layer};
use crate::error::{Error, Result};
use crate::nn::ops::{Buffer, Loss, Moments, Tape, Value};

/// What a batch norm saw, by its place (`layers.0.norm`).
pub type Seen = BTreeMap<String, Moments>;

/// The trained tensors by name.
pub type Tensors<'a> = dyn Fn(&str) -> Result<&'a Tensor> + 'a;

/// The sum of the cross-entropies of images and their classes. `pixels` are the images as the net sees them,
/// one after another, pixels row by row with their channels.
///
/// # Errors
/// INTERNAL for images of another size or classes that there are not.
pub fn loss(
    tape: &Tape,
    config: &Config,
    tensors: &Tensors<'_>,
    pixels: Buffer,
    classes: &[u32],
) -> Result<(Loss, Seen)> {
    let mut seen = Seen::new();
    if pixels.len() != classes.len() * config.image() {
        return Err(Error::internal("images of another size than the net is for"));
    }
    let mut x = Value::constant(pixels, config.channels);
    let images = config.images();
    let weight = |name: &str| tape.leaf(tensors(name)?);
    let mut norm = |x: Value, place: &str| -> Result<Value> {
        let (scale, shift) =
            (weight(&format!("{place}.weight"))?, weight(&format!("{place}.bias"))?);
        let (y, moments) = tape.batch_norm(&x, &scale, &shift, config.norm_eps)?;
        drop(x);
        seen.insert(place.to_owned(), moments);
        Ok(tape.relu6(y))
    };
    for (i, (layer, sides)) in config.layers.iter().zip(&images).enumerate() {
        let window = layer.window(*sides);
        match layer {
            Layer::Plain { .. } => {
                let rows = tape.unfold(&x, window)?;
                let y = tape.dense(&rows, &weight(&format!("layers.{i}.conv.weight"))?)?;
                x = norm(y, &format!("layers.{i}.norm"))?;
            }
            Layer::Separable { .. } => {
                let w = weight(&format!("layers.{i}.depthwise.weight"))?;
                let y = tape.depthwise(&x, &w, window)?;
                let y = norm(y, &format!("layers.{i}.depthwise_norm"))?;
                let y = tape.dense(&y, &weight(&format!("layers.{i}.pointwise.weight"))?)?;
                x = norm(y, &format!("layers.{i}.pointwise_norm"))?;
            }
        }
    }
    let pixels = images.last().map_or(0, |sides| sides[0] * sides[1]);
    let ranges: Arc<[Range<usize>]> =
        (0..classes.len()).map(|i| i * pixels..(i + 1) * pixels).collect();
    let pooled = tape.mean_rows(&x, &ranges)?;
    let logits = tape.dense(&pooled, &weight("classifier.weight")?)?;
    let logits = tape.add_bias(logits, &weight("classifier.bias")?)?;
    Ok((tape.cross_entropy_of(logits, classes, None)?, seen))
}
