//! Image classifiers with random weights: where training from scratch begins.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::{Config, Model};
use crate::error::Result;
use crate::models::random::{check_size, normal};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::seed::Stream;

/// A classifier of the given configuration with weights drawn from `random`: normal with the deviation
/// `sqrt(2 / inputs)` for what is followed by ReLU (He et al., arXiv 1502.01852), `sqrt(1 / inputs)` for the
/// classifier; norms do nothing.
///
/// # Errors
/// What [`Config::from_hugging_face`] refuses, and more weights than fit.
pub fn model(config: Value, random: &Stream) -> Result<Model> {
    let family = Config::from_hugging_face(&config)?;
    let tensors = family.tensors();
    check_size(&tensors)?;
    let mut weights = BTreeMap::new();
    for (name, shape) in tensors {
        let elements = shape.iter().product();
        let values = match (shape.as_slice(), name.as_str()) {
            ([_, inputs], "classifier.weight") => {
                normal(elements, 1.0 / (*inputs as f64).sqrt(), &random.child(&name))
            }
            ([_, inputs], _) => {
                normal(elements, (2.0 / *inputs as f64).sqrt(), &random.child(&name))
            }
            (_, name) if name.ends_with("norm.weight") || name.ends_with(".running_var") => {
                vec![1.0; elements]
            }
            _ => vec![0.0; elements],
        };
        let weight = Dense::from_f32(shape, &values, Dtype::F32)?;
        weights.insert(name, Arc::new(Weight::Dense(weight)));
    }
    Ok(Model { family, config, weights, tokenizer: None })
}
