use std::sync::Arc;

use rand::Rng;
use serde_json::{Value, json};

use super::*;
use crate::formats::gguf::{File, TensorType};
use crate::formats::hostile::damage;
use crate::models::decoder::random::{self, tiny};
use crate::models::{AnyModel, Model, import};
use crate::nn::weight::{Dense, Ggml, GgmlType, Grouped, GroupedSpec, Sparse, ValueFormat};
use crate::seed::Stream;

fn silent() -> Progress {
    Progress::silent()
}

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
        gguf(&model, &path, GgufFormat::F32, &silent()).unwrap();
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
    gguf(&model, &path, GgufFormat::Q4_1, &silent()).unwrap();
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
    gguf(&import::open(&path).unwrap(), &second, GgufFormat::Q4_1, &silent()).unwrap();
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
    gguf(&model, &path, GgufFormat::Q8_0, &silent()).unwrap();
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
    let error = gguf(&model, &path, GgufFormat::F16, &silent()).unwrap_err();
    assert_eq!(error.reason(), Reason::UnsupportedModel);
}

#[test]
fn what_only_planish_loads_of_gguf_is_said() {
    let warnings = |config: Value| {
        let folder = tempfile::tempdir().unwrap();
        let model = random::model(config, 1).unwrap();
        gguf(&model, &folder.path().join("m.gguf"), GgufFormat::F32, &silent()).unwrap().warnings
    };
    assert!(warnings(tiny("llama")).is_empty());
    let mut narrow = tiny("llama");
    narrow["intermediate_size"] = json!([64, 32, 96]);
    let found = warnings(narrow);
    assert!(found.len() == 1 && found[0].contains("llama.cpp"), "{found:?}");
    let mut biased = tiny("qwen2");
    biased["mlp_bias"] = json!(true);
    let found = warnings(biased);
    assert!(found.len() == 1 && found[0].contains("mlp_bias of qwen2"), "{found:?}");
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
        let weight = &model.weights[&plan.name];
        let mut drift = Drift::default();
        each_rows(weight, None, &silent(), |rows| put_dense(rows, Dtype::F32, out, &mut drift))
    })
    .unwrap();
    assert!(names.len() > 3, "{names:?}");
    assert_same(&model, &import::open(folder.path()).unwrap());
    std::fs::remove_file(folder.path().join(&names[1])).unwrap();
    assert!(import::open(folder.path()).is_err());

    // A shard halfway fails: those before it go.
    let folder = tempfile::tempdir().unwrap();
    let mut left = plans.len() / 2;
    let failed = write_shards(folder.path(), &plans, 40_000, &mut |plan, out| {
        left = left.checked_sub(1).ok_or_else(|| Error::internal("no more"))?;
        let values = model.weights[&plan.name].to_f32();
        put_dense(&values, Dtype::F32, out, &mut Drift::default())
    });
    assert!(failed.is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn damaged_gguf_models_are_survived() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let model = random::model(tiny("llama"), 13).unwrap();
    gguf(&model, &path, GgufFormat::Q8_0, &silent()).unwrap();
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

/// Linear weights in turn: 4 bits symmetric, 4 bits with zero points, 8 bits, 2:4 of 4 bits, a bitmap, groups
/// that are no whole blocks.
fn compressed() -> Model {
    let mut config = tiny("llama");
    config["intermediate_size"] = json!(96);
    config["tie_word_embeddings"] = json!(true);
    let mut model = random::model(config, 21).unwrap();
    let names: Vec<String> =
        model.weights.keys().filter(|n| n.contains("_proj.")).cloned().collect();
    for (i, name) in names.iter().enumerate() {
        let weight = &model.weights[name];
        let shape = [weight.rows(), weight.cols()];
        let values = weight.to_f32();
        let on_grid = |bits, group, symmetric| {
            let spec = GroupedSpec { bits, group, symmetric };
            let grids: Vec<_> = values.chunks_exact(group).map(|g| spec.fit(g)).collect();
            let codes: Vec<u8> = values
                .chunks_exact(group)
                .zip(&grids)
                .flat_map(|(g, (scale, zero))| g.iter().map(|v| spec.code(*v, *scale, *zero)))
                .collect();
            let (scales, zeros): (Vec<f32>, Vec<u8>) = grids.into_iter().unzip();
            (spec, codes, scales, zeros)
        };
        let grouped = |bits, group, symmetric| {
            let (spec, codes, scales, zeros) = on_grid(bits, group, symmetric);
            Weight::Grouped(Grouped::pack(shape, spec, &codes, &scales, &zeros).unwrap())
        };
        let weight = match i % 6 {
            0 => grouped(4, 32, true),
            1 => grouped(4, 32, false),
            2 => grouped(8, 32, true),
            3 => {
                let mask: Vec<bool> = (0..values.len()).map(|i| i % 4 > 1).collect();
                let (spec, codes, scales, zeros) = on_grid(4, 32, false);
                let hint = Some((2, 4));
                let sparse =
                    Sparse::from_codes(shape, &mask, spec, &codes, &scales, &zeros, hint).unwrap();
                Weight::Sparse(sparse)
            }
            4 => {
                let mut values = values.clone();
                values.iter_mut().step_by(3).for_each(|v| *v = 0.0);
                let format = ValueFormat::F16;
                Weight::Sparse(Sparse::from_dense(shape, &values, format, None).unwrap())
            }
            _ => grouped(4, 16, true),
        };
        model.weights.insert(name.clone(), Arc::new(weight));
    }
    model
}

#[test]
fn grids_go_into_gguf_files_and_come_back_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let model = compressed();
    let report = gguf(&model, &path, GgufFormat::F32, &silent()).unwrap();
    let again = import::open(&path).unwrap();
    let mut carried = std::collections::BTreeSet::new();
    for tensor in &report.tensors {
        let (before, after) = (&model.weights[&tensor.name], &again.weights[&tensor.name]);
        let exact = before.to_f32().iter().zip(after.to_f32()).all(|(a, b)| *a == b);
        assert!(exact, "{}", tensor.name);
        assert_eq!((tensor.drift.max(), tensor.drift.relative()), (0.0, 0.0), "{}", tensor.name);
        if tensor.carried {
            carried.insert(tensor.written_as.clone());
            assert!(matches!(**after, Weight::Ggml(_)), "{}", tensor.name);
            assert!(tensor.bytes * 3 < before.to_f32().len() as u64 * 4);
        } else {
            assert_eq!(tensor.written_as, "F32");
        }
    }
    assert_eq!(carried.iter().map(String::as_str).collect::<Vec<_>>(), ["Q4_0", "Q5_0", "Q8_0"]);
    // What is read again is copied.
    let second = folder.path().join("second.gguf");
    gguf(&again, &second, GgufFormat::F32, &silent()).unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(second).unwrap());

    let all = Gguf { format: GgufFormat::F16, decode_grids: true };
    let report = gguf(&again, &path, all, &silent()).unwrap();
    assert!(report.tensors.iter().all(|t| !t.carried && ["F16", "F32"].contains(&&*t.written_as)));
}

#[test]
fn what_is_rounded_anew_says_how_far_it_went() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let model = compressed();
    let report = gguf(&model, &path, GgufFormat::Q8_0, &silent()).unwrap();
    let again = import::open(&path).unwrap();
    let mut rounded = 0;
    for tensor in report.tensors.iter().filter(|t| !t.carried && t.written_as == "Q8_0") {
        let (before, after) =
            (model.weights[&tensor.name].to_f32(), again.weights[&tensor.name].to_f32());
        let pairs = || before.iter().zip(&after).map(|(a, b)| (a - b).abs());
        assert_eq!(tensor.drift.max(), pairs().fold(0.0, f32::max), "{}", tensor.name);
        let norm =
            |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let relative = norm(&mut pairs()) / norm(&mut before.iter().copied());
        assert!((tensor.drift.relative() - relative).abs() < 1e-9, "{}", tensor.name);
        assert!(relative > 0.0 && relative < 0.01);
        rounded += 1;
    }
    assert!(rounded > 3);
    // Brain floats have three bits less than halves, and say so.
    let brain = gguf(&model, &path, GgufFormat::BF16, &silent()).unwrap();
    let half = gguf(&model, &path, GgufFormat::F16, &silent()).unwrap();
    let drift = |report: &Report| {
        let name = "model.embed_tokens.weight";
        report.tensors.iter().find(|t| t.name == name).unwrap().drift.relative()
    };
    assert!(drift(&brain) > 4.0 * drift(&half) && drift(&half) > 0.0);
}

#[test]
fn dense_folders_hold_what_the_layouts_say() {
    let folder = tempfile::tempdir().unwrap();
    let model = compressed();
    let any = AnyModel::from(&model);
    let exported = dense(&any, folder.path(), Dtype::F32, &silent()).unwrap();
    let again = import::open(folder.path()).unwrap();
    for (name, weight) in &model.weights {
        assert_eq!(again.weights[name].to_f32(), weight.to_f32(), "{name}");
    }
    // A head that is the embedding matrix is not written twice.
    assert!(!again.weights.contains_key("lm_head.weight"));
    let file = crate::formats::safetensors::open(&folder.path().join("model.safetensors")).unwrap();
    assert_eq!(file.tensors.len(), model.weights.len());
    assert_eq!(exported.report.tensors.len(), model.weights.len());
    let bytes: u64 = exported.report.tensors.iter().map(|t| t.bytes).sum();
    assert_eq!(bytes, 4 * model.parameters());
    assert!(exported.report.warnings.is_empty());

    // Rounded values are those that the report speaks of.
    let exported = dense(&any, folder.path(), Dtype::BF16, &silent()).unwrap();
    let again = import::open(folder.path()).unwrap();
    for tensor in &exported.report.tensors {
        let (before, after) =
            (model.weights[&tensor.name].to_f32(), again.weights[&tensor.name].to_f32());
        let worst = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert_eq!(tensor.drift.max(), worst, "{}", tensor.name);
    }

    let mut odd = tiny("qwen2");
    odd["intermediate_size"] = json!([64, 32, 96]);
    odd["mlp_bias"] = json!(true);
    let odd = AnyModel::from(&random::model(odd, 1).unwrap());
    let warnings = dense(&odd, folder.path(), Dtype::F16, &silent()).unwrap().report.warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
}

#[test]
fn nothing_stays_of_what_is_cancelled() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let folder = tempfile::tempdir().unwrap();
    let model = compressed();
    let cancelled = Arc::new(AtomicBool::new(true));
    let progress = Progress::new(Arc::new(|_, _| {}), Arc::clone(&cancelled));
    let path = folder.path().join("model.gguf");
    let error = gguf(&model, &path, GgufFormat::F16, &progress).unwrap_err();
    assert_eq!(error.reason(), Reason::Cancelled);
    let error = dense(&AnyModel::from(&model), folder.path(), Dtype::F16, &progress).unwrap_err();
    assert_eq!(error.reason(), Reason::Cancelled);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    cancelled.store(false, Ordering::Relaxed);
    gguf(&model, &path, GgufFormat::F16, &progress).unwrap();
}
