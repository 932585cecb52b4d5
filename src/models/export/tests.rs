use std::sync::Arc;

use rand::Rng;
use serde_json::{Value, json};

use super::*;
use crate::formats::gguf::{File, TensorType};
use crate::formats::hostile::damage;
use crate::models::decoder::random::{self, tiny};
use crate::models::{Model, import};
use crate::nn::weight::{Dense, Ggml, GgmlType};
use crate::seed::Stream;

/// Small configurations with settings that GGUF files can express.
fn configs() -> Vec<Value> {
    let mut llama3 = tiny("llama");
    llama3["rope_theta"] = json!(500_000.0);
    llama3["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let mut tied = tiny("llama");
    tied["tie_word_embeddings"] = json!(true);
    tied["attention_bias"] = json!(true);
    let mut yarn = tiny("qwen2");
    yarn["rope_scaling"] = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    });
    let mut gemma = tiny("gemma3_text");
    gemma["query_pre_attn_scalar"] = json!(16);
    gemma["attn_logit_softcapping"] = Value::Null;
    gemma["final_logit_softcapping"] = Value::Null;
    gemma["rope_scaling"] = json!({ "rope_type": "linear", "factor": 8.0 });
    let mut pattern = gemma.clone();
    pattern["sliding_window_pattern"] = json!(6);
    pattern["num_hidden_layers"] = json!(7);
    pattern["rope_local_base_freq"] = json!(20_000.0);
    let mut narrower = tiny("llama");
    narrower["intermediate_size"] = json!([64, 32, 96]);
    narrower["mlp_bias"] = json!(true);
    let mut narrow_gemma = gemma.clone();
    narrow_gemma["intermediate_size"] = json!([32, 32, 64, 32]);
    narrow_gemma["mlp_bias"] = json!(true);
    vec![
        narrower,
        narrow_gemma,
        tiny("llama"),
        llama3,
        tied,
        tiny("mistral"),
        tiny("qwen2"),
        yarn,
        tiny("qwen3"),
        gemma,
        pattern,
    ]
}

fn assert_same(a: &Model, b: &Model) {
    assert_eq!(a.family, b.family);
    assert_eq!(a.weights.len(), b.weights.len());
    for (name, weight) in &a.weights {
        let other = &b.weights[name];
        assert_eq!(weight.shape(), other.shape(), "{name}");
        let close = weight
            .to_f32()
            .iter()
            .zip(other.to_f32())
            .all(|(x, y)| (x - y).abs() <= 1e-7 * x.abs().max(1.0));
        assert!(close, "{name}");
    }
}

#[test]
fn hugging_face_folders_open_as_the_same_model() {
    for config in configs() {
        let folder = tempfile::tempdir().unwrap();
        let model = random::model(config, 5).unwrap();
        let files = hugging_face(&model, folder.path(), Dtype::F32).unwrap();
        assert!(files.iter().all(|f| f.is_file()));
        let again = import::open(folder.path()).unwrap();
        assert_same(&model, &again);
        assert_eq!(again.config["torch_dtype"], "float32");
        let file = import::open(&folder.path().join("model.safetensors")).unwrap();
        assert_same(&model, &file);
    }
}

#[test]
fn gguf_files_open_as_the_same_model() {
    for config in configs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let model = random::model(config, 6).unwrap();
        gguf(&model, &path, GgufFormat::F32).unwrap();
        assert_same(&model, &import::open(&path).unwrap());
        assert_same(&model, &import::open(folder.path()).unwrap());
    }
}

#[test]
fn each_tensor_gets_the_type_it_can_have() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    // 80 columns of the last projection are not whole blocks of 32.
    let model = random::model(tiny("llama"), 7).unwrap();
    gguf(&model, &path, GgufFormat::Q4_1).unwrap();
    let file = crate::formats::gguf::open(&path).unwrap();
    let kind = |name: &str| file.tensors[name].kind;
    assert_eq!(kind("token_embd.weight"), TensorType::Blocks(GgmlType::Q8_0));
    assert_eq!(kind("output.weight"), TensorType::Blocks(GgmlType::Q8_0));
    assert_eq!(kind("blk.0.attn_q.weight"), TensorType::Blocks(GgmlType::Q4_1));
    assert_eq!(kind("blk.0.ffn_down.weight"), TensorType::F16);
    assert_eq!(kind("blk.0.attn_norm.weight"), TensorType::F32);
    assert_eq!(file.tensors["blk.0.attn_k.weight"].shape, [32, 32]);
    // Opened and exported again, blocks are copied: nothing is rounded twice.
    let second = folder.path().join("second.gguf");
    gguf(&import::open(&path).unwrap(), &second, GgufFormat::Q4_1).unwrap();
    assert!(std::fs::read(path).unwrap() == std::fs::read(second).unwrap());
}

#[test]
fn blocks_move_with_the_rows_of_rotated_heads() {
    let mut model = random::model(tiny("llama"), 8).unwrap();
    let name = "model.layers.1.self_attn.q_proj.weight";
    let dense = model.weights[name].to_f32();
    let blocks = Ggml::quantize([64, 32], GgmlType::Q8_0, &dense).unwrap();
    model.weights.insert(name.to_owned(), Arc::new(Weight::Ggml(blocks.clone())));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf(&model, &path, GgufFormat::Q8_0).unwrap();
    let file = crate::formats::gguf::open(&path).unwrap();
    let theirs = &file.tensors["blk.1.attn_q.weight"].data;
    // Heads of 16 rows of one block: row 1 there is row 8 here, the first of the second half.
    assert_eq!(theirs[34..68], blocks.data()[8 * 34..9 * 34]);
    let Weight::Ggml(again) = &*import::open(&path).unwrap().weights[name].clone() else {
        panic!("the blocks were unpacked");
    };
    assert_eq!(again.data(), blocks.data());
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    let path = tempfile::tempdir().unwrap().path().join("never.gguf");
    let model = random::model(tiny("gemma3_text"), 9).unwrap();
    let error = gguf(&model, &path, GgufFormat::F16).unwrap_err();
    assert_eq!(error.reason(), Reason::UnsupportedModel);
}

#[test]
fn values_that_a_type_cannot_hold_are_refused() {
    for value in [f32::NAN, f32::INFINITY, 1e6] {
        let mut model = random::model(tiny("llama"), 10).unwrap();
        let name = "model.layers.0.mlp.down_proj.weight";
        let mut values = model.weights[name].to_f32();
        values[3] = value;
        let dense = Dense::from_f32(vec![32, 80], &values, Dtype::F32).unwrap();
        model.weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
        let folder = tempfile::tempdir().unwrap();
        let error = hugging_face(&model, folder.path(), Dtype::F16).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains(name), "{error}");
        let finite = value.is_finite();
        assert_eq!(hugging_face(&model, folder.path(), Dtype::BF16).is_ok(), finite);
    }
}

#[test]
fn folders_of_other_shapes_are_understood_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let open = || import::open(path).map(|_| ()).map_err(|e| e.reason());
    assert_eq!(open(), Err(Reason::UnsupportedFormat));
    std::fs::write(path.join("config.json"), tiny("llama").to_string()).unwrap();
    assert_eq!(open(), Err(Reason::UnsupportedFormat));
    std::fs::write(path.join("config.json"), "[".repeat(1 << 20)).unwrap();
    assert_eq!(open(), Err(Reason::MalformedFile));

    let mut config = tiny("llama");
    config["tie_word_embeddings"] = json!(true);
    let model = random::model(config, 11).unwrap();
    hugging_face(&model, path, Dtype::F32).unwrap();
    let file = crate::formats::safetensors::open(&path.join("model.safetensors")).unwrap();
    // Names without prefix, a copy of the tied head, old buffers: all as published checkpoints have it.
    let renamed = |rename: &dyn Fn(&str) -> String, extra: &[(&str, usize)]| {
        use crate::formats::safetensors::{Plan, write};
        let mut plans: Vec<Plan> = file
            .tensors
            .iter()
            .map(|(n, t)| Plan { name: rename(n), dtype: t.dtype, shape: t.shape.clone() })
            .collect();
        let data: std::collections::BTreeMap<String, _> =
            file.tensors.iter().map(|(n, t)| (rename(n), t.data.clone())).collect();
        plans.extend(extra.iter().map(|(name, n)| Plan {
            name: (*name).to_owned(),
            dtype: Dtype::F32,
            shape: vec![*n],
        }));
        write(&path.join("model.safetensors"), &plans, &mut |plan, out| {
            match data.get(&plan.name) {
                Some(data) => out.write_all(data)?,
                None => out.write_all(&vec![0; plan.shape[0] * 4])?,
            }
            Ok(())
        })
        .unwrap();
    };
    let bare = |n: &str| n.trim_start_matches("model.").to_owned();
    renamed(&bare, &[("lm_head.weight", 8), ("layers.0.self_attn.rotary_emb.inv_freq", 8)]);
    assert_same(&model, &import::open(path).unwrap());
    renamed(&|n| format!("language_model.{n}"), &[]);
    assert_same(&model, &import::open(path).unwrap());
    renamed(&str::to_owned, &[("model.layers.0.self_attn.q_proj.bias", 64)]);
    assert_eq!(open(), Err(Reason::UnsupportedModel));
    renamed(&|n| n.replace("layers.2", "layers.3"), &[]);
    assert_eq!(open(), Err(Reason::MalformedFile));
}

#[test]
fn shards_open_as_the_same_model() {
    use crate::formats::safetensors::{Plan, write_shards};
    let folder = tempfile::tempdir().unwrap();
    let model = random::model(tiny("qwen3"), 12).unwrap();
    std::fs::write(folder.path().join("config.json"), model.config.to_string()).unwrap();
    let plans: Vec<Plan> = model
        .weights
        .iter()
        .map(|(n, w)| Plan { name: n.clone(), dtype: Dtype::F32, shape: w.shape().to_vec() })
        .collect();
    let names = write_shards(folder.path(), &plans, 40_000, &mut |plan, out| {
        each_rows(&model.weights[&plan.name], None, |rows| put_dense(rows, Dtype::F32, out))
    })
    .unwrap();
    assert!(names.len() > 3, "{names:?}");
    assert_same(&model, &import::open(folder.path()).unwrap());
    std::fs::remove_file(folder.path().join(&names[1])).unwrap();
    assert!(import::open(folder.path()).is_err());
}

#[test]
fn damaged_gguf_models_are_survived() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf(&random::model(tiny("llama"), 13).unwrap(), &path, GgufFormat::Q8_0).unwrap();
    let good = std::fs::read(&path).unwrap();
    let file = File::parse(good.clone().into()).unwrap();
    let data: usize = file.tensors.values().map(|t| t.data.len()).sum();
    let mut rng = Stream::root(4).child("damage").rng();
    for _ in 0..1000 {
        // Half of the damage goes where the settings are.
        let header = if rng.random_bool(0.5) { 1000 } else { good.len() - data };
        std::fs::write(&path, damage(&good, header, &mut rng)).unwrap();
        let _ = import::open(&path);
    }
}
