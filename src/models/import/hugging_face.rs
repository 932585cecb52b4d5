//! Hugging Face folders: `config.json`, safetensors files, tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Reason, Result};
use crate::formats::{malformed, mmap, quoted, safetensors};
use crate::models::decoder::Config;
use crate::models::{AnyFamily, AnyModel, Family, encoder, files};
use crate::nn::weight::{Dense, Weight};

/// Largest index of a sharded checkpoint.
const MAX_INDEX: usize = 64 << 20;

/// Opens the model in `folder`; `only` names the one file of weights where the caller chose it.
pub(super) fn open(folder: &Path, only: Option<&Path>) -> Result<AnyModel> {
    let (mut config, family) = files::config(&folder.join(files::CONFIG))?;
    let find = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
    let decoder = match family {
        AnyFamily::Decoder(decoder) => decoder,
        AnyFamily::Encoder(_) => {
            encoder::sentence::read(folder, &mut config)?;
            let family = encoder::Config::from_hugging_face(&config)?;
            let weights = weights(folder, only, encoder::tensor_name)?;
            let tokenizer = files::tokenizer(find, &config)?;
            return Ok(files::assemble(family, config, weights, tokenizer)?.into());
        }
        // Of these only what this program exported is read, whose names are ours.
        AnyFamily::Vision(family) => {
            let weights = weights(folder, only, |name| Ok(Some(name.to_owned())))?;
            return Ok(files::assemble(family, config, weights, None)?.into());
        }
        AnyFamily::Lstm(family) => {
            let weights = weights(folder, only, |name| Ok(Some(name.to_owned())))?;
            let tokenizer = files::tokenizer(find, &config)?;
            return Ok(files::assemble(family, config, weights, tokenizer)?.into());
        }
        AnyFamily::TwoTower(family) => {
            let weights = weights(folder, only, |name| Ok(Some(name.to_owned())))?;
            let tokenizer = files::tokenizer(find, &config)?;
            return Ok(files::assemble(family, config, weights, tokenizer)?.into());
        }
    };
    // A multimodal configuration: only the text model is read, so only that is kept.
    if let Some(text) = config.get_mut("text_config").map(serde_json::Value::take) {
        let tied = config.get("tie_word_embeddings").cloned();
        config = text;
        if let Some(map) = config.as_object_mut() {
            map.insert("model_type".to_owned(), "gemma3_text".into());
            map.insert("architectures".to_owned(), ["Gemma3ForCausalLM"].into_iter().collect());
            if let Some(tied) = tied {
                map.entry("tie_word_embeddings").or_insert(tied);
            }
        }
    }
    let weights = weights(folder, only, |name| tensor_name(&decoder, name))?;
    let tokenizer = files::tokenizer(find, &config)?;
    Ok(files::assemble(Family::Decoder(decoder), config, weights, tokenizer)?.into())
}

/// The tensors under our names; `rename` gives none for those that are left out.
fn weights(
    folder: &Path,
    only: Option<&Path>,
    rename: impl Fn(&str) -> Result<Option<String>>,
) -> Result<BTreeMap<String, Arc<Weight>>> {
    let mut weights = BTreeMap::new();
    for (name, tensor) in tensors(folder, only)? {
        let Some(ours) = rename(&name)? else { continue };
        let weight = Dense::new(tensor.shape, tensor.dtype, tensor.data)
            .map_err(|e| e.within(&format!("tensor {}", quoted(&name))))?;
        if weights.insert(ours, Arc::new(Weight::Dense(weight))).is_some() {
            return Err(malformed(format!("tensor {} appears twice", quoted(&name))));
        }
    }
    Ok(weights)
}

/// All tensors of the folder's file or shards.
fn tensors(folder: &Path, only: Option<&Path>) -> Result<BTreeMap<String, safetensors::Tensor>> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if let Some(path) = only {
        return Ok(safetensors::open(path)?.tensors);
    }
    if single.is_file() {
        return Ok(safetensors::open(&single)?.tensors);
    }
    if !index.is_file() {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!(
                "{} holds neither model.safetensors nor its index; convert the weights to safetensors",
                folder.display()
            ),
        ));
    }
    let json = mmap::map(&index)?;
    if json.len() > MAX_INDEX {
        return Err(malformed("the index of the safetensors files is larger than 64 MB"));
    }
    let index = safetensors::read_index(&json)?;
    let shards: BTreeSet<&String> = index.values().collect();
    let mut all = BTreeMap::new();
    for shard in shards {
        let path: PathBuf = folder.join(shard);
        for (name, tensor) in safetensors::open(&path)?.tensors {
            if index.get(&name) != Some(shard) {
                return Err(malformed(format!(
                    "tensor {} lies in {shard}, where the index does not expect it",
                    quoted(&name)
                )));
            }
            all.insert(name, tensor);
        }
    }
    if let Some(name) = index.keys().find(|name| !all.contains_key(*name)) {
        return Err(malformed(format!(
            "tensor {} does not lie in the file that the index names",
            quoted(name)
        )));
    }
    Ok(all)
}

/// The name of a tensor in our models; `None` for one that is left out on purpose.
fn tensor_name(config: &Config, name: &str) -> Result<Option<String>> {
    // The text model inside a multimodal one, by the old and the new layout of its classes.
    let inner = match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}"),
        None => name.strip_prefix("language_model.").unwrap_or(name).to_owned(),
    };
    // Checkpoints of the model without its head have no prefix.
    let full = match inner.split('.').next() {
        Some("layers" | "embed_tokens" | "norm") => format!("model.{inner}"),
        _ => inner,
    };
    let outside = [
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ];
    let ignored = if full.ends_with(".rotary_emb.inv_freq") {
        "rotary frequencies are computed"
    } else if config.tied && full == "lm_head.weight" {
        "the head is tied to the embeddings"
    } else if config.architecture == "gemma3_text" && outside.iter().any(|p| name.starts_with(p)) {
        "only the text model is read"
    } else {
        return Ok(Some(full));
    };
    tracing::debug!(tensor = name, "left out: {ignored}");
    Ok(None)
}
