//! What `config.json` says of a compressed folder.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::packed::Scheme;
use super::{Way, linear, module};
use crate::models::AnyModel;

/// Name of a decoder's head as a module.
const HEAD: &str = "lm_head";

/// The value of `quantization_config`.
pub(super) fn config(model: &AnyModel, ways: &BTreeMap<String, Way>) -> Value {
    let schemes: Vec<Scheme> = {
        let mut all: Vec<Scheme> = ways
            .values()
            .filter_map(|way| match way {
                Way::Packed(scheme) => Some(*scheme),
                _ => None,
            })
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    match schemes[..] {
        [] => {
            json!({ "quant_method": "compressed-tensors", "sparsity_config": sparse(model, ways) })
        }
        _ => packed(model, ways, &schemes),
    }
}

/// Linear layers that are written as they are. A head that shares the embeddings has no tensor and is a
/// module all the same.
fn ignored(model: &AnyModel, ways: &BTreeMap<String, Way>) -> Vec<String> {
    let mut names: Vec<String> = ways
        .iter()
        .filter(|(name, way)| **way == Way::Dense && linear(name, &model.weights()[*name]))
        .map(|(name, _)| module(name).to_owned())
        .collect();
    let has_head = ways.contains_key("lm_head.weight");
    if matches!(model, AnyModel::Decoder(_)) && !has_head {
        names.push(HEAD.to_owned());
    }
    names
}

fn packed(model: &AnyModel, ways: &BTreeMap<String, Way>, schemes: &[Scheme]) -> Value {
    let mut groups = serde_json::Map::new();
    for (i, scheme) in schemes.iter().enumerate() {
        // One word for all where one scheme does; an encoder has linear layers that are not in the file.
        let targets: Vec<&str> = match (schemes.len(), model) {
            (1, AnyModel::Decoder(_)) => vec!["Linear"],
            _ => ways
                .iter()
                .filter(|(_, way)| **way == Way::Packed(*scheme))
                .map(|(name, _)| module(name))
                .collect(),
        };
        let strategy = if scheme.channel { "channel" } else { "group" };
        let size = if scheme.channel { Value::Null } else { json!(scheme.group) };
        let group = json!({
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric,
                "strategy": strategy, "group_size": size, "dynamic": false,
            },
            "input_activations": null,
            "output_activations": null,
            "format": "pack-quantized",
        });
        groups.insert(format!("group_{i}"), group);
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(model, ways),
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
    })
}

fn sparse(model: &AnyModel, ways: &BTreeMap<String, Way>) -> Value {
    let targets: Vec<&str> = match model {
        AnyModel::Decoder(_) => vec!["Linear"],
        _ => {
            let sparse = ways.iter().filter(|(_, way)| **way == Way::Sparse24);
            sparse.map(|(name, _)| module(name)).collect()
        }
    };
    let elements = |sparse: bool| -> f64 {
        let those = ways.iter().filter(|(_, way)| !sparse || **way == Way::Sparse24);
        those.map(|(name, _)| model.weights()[name].shape().iter().product::<usize>() as f64).sum()
    };
    json!({
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5 * elements(true) / elements(false),
        "targets": targets,
        "ignore": ignored(model, ways),
    })
}
