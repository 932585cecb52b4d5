use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::formats::safetensors;
use crate::models::Model;
use crate::models::decoder::random::{self, tiny};
use crate::models::encoder;
use crate::models::export::{GgufFormat, gguf};
use crate::nn::weight::{Dense, Ggml, GgmlType, Grouped, GroupedSpec, Sparse};

fn spec(bits: u8, group: usize, symmetric: bool) -> GroupedSpec {
    GroupedSpec { bits, group, symmetric }
}

fn grouped(weight: &Weight, spec: GroupedSpec) -> Weight {
    let (rows, cols) = (weight.rows(), weight.cols());
    let values = weight.to_f32();
    let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
    for group in values.chunks_exact(spec.group) {
        let (scale, zero) = spec.fit(group);
        codes.extend(group.iter().map(|v| spec.code(*v, scale, zero)));
        scales.push(scale);
        zeros.push(zero);
    }
    Weight::Grouped(Grouped::pack([rows, cols], spec, &codes, &scales, &zeros).unwrap())
}

/// Two values of four, in each group others.
fn halved(weight: &Weight) -> Weight {
    let mut values = weight.to_f32();
    for (i, group) in values.chunks_exact_mut(4).enumerate() {
        group[i % 4] = 0.0;
        group[(i + 1 + i / 4 % 3) % 4] = 0.0;
    }
    // One group keeps one value, one none.
    values[..6].fill(0.0);
    let shape = [weight.rows(), weight.cols()];
    let format = crate::nn::weight::ValueFormat::F16;
    Weight::Sparse(Sparse::from_dense(shape, &values, format, Some((2, 4))).unwrap())
}

fn model(change: impl Fn(&str, &Weight) -> Option<Weight>) -> Model {
    let mut model = random::model(tiny("llama"), 3).unwrap();
    for (name, weight) in &mut model.weights {
        if name.contains("_proj.")
            && let Some(new) = change(name, weight)
        {
            *weight = Arc::new(new);
        }
    }
    model
}

fn export(model: &Model, dtype: Dtype) -> Result<(tempfile::TempDir, Report)> {
    let folder = tempfile::tempdir().unwrap();
    let model = AnyModel::from(model);
    let exported = compressed_tensors(&model, folder.path(), dtype, &Progress::silent())?;
    assert!(exported.files.iter().all(|f| f.is_file()), "{:?}", exported.files);
    let sizes: u64 = exported.report.tensors.iter().map(|t| t.bytes).sum();
    let file = folder.path().join("model.safetensors");
    let read = safetensors::open(&file).unwrap().tensors;
    assert_eq!(sizes, read.values().map(|t| t.data.len() as u64).sum::<u64>());
    Ok((folder, exported.report))
}

fn settings(folder: &tempfile::TempDir) -> Value {
    let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["quantization_config"].clone()
}

/// Values of a packed matrix, read by the rules of the library.
fn unpack(folder: &tempfile::TempDir, module: &str, bits: usize, group: usize) -> Vec<f32> {
    let file = safetensors::open(&folder.path().join("model.safetensors")).unwrap();
    let tensor = |suffix: &str| file.tensors.get(&format!("{module}.{suffix}"));
    let words = |suffix: &str| -> Option<(Vec<usize>, Vec<u32>)> {
        let tensor = tensor(suffix)?;
        assert_eq!(tensor.dtype, Dtype::I32, "{suffix}");
        let words = tensor.data.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
        Some((tensor.shape.clone(), words.collect()))
    };
    let shape = tensor("weight_shape").unwrap();
    assert_eq!((shape.dtype, &shape.shape[..]), (Dtype::I64, &[2][..]));
    let sizes = shape.data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b) as usize);
    let [rows, cols] = sizes.collect::<Vec<_>>()[..] else { panic!() };
    let scale = tensor("weight_scale").unwrap();
    assert_eq!(scale.shape, [rows, cols / group]);
    let scales = Dense::new(scale.shape.clone(), scale.dtype, scale.data.clone()).unwrap();
    let scales = Weight::Dense(scales).to_f32();
    let (packed_shape, packed) = words("weight_packed").unwrap();
    let zeros = words("weight_zero_point");
    let (mask, per) = ((1 << bits) - 1, 32 / bits);
    assert_eq!(packed_shape, [rows, cols.div_ceil(per)]);
    let mut values = Vec::new();
    for row in 0..rows {
        for col in 0..cols {
            let word = packed[row * packed_shape[1] + col / per];
            let code = (word >> (col % per * bits) & mask) as i32;
            let zero = match &zeros {
                None => 1 << (bits - 1),
                Some((shape, zeros)) => {
                    assert_eq!(*shape, [rows.div_ceil(per), cols / group]);
                    let word = zeros[row / per * shape[1] + col / group];
                    (word >> (row % per * bits) & mask) as i32
                }
            };
            values.push((code - zero) as f32 * scales[row * (cols / group) + col / group]);
        }
    }
    values
}

#[test]
fn codes_come_back_as_the_values_they_were() {
    for (bits, wide) in [(2, 4), (3, 4), (4, 4), (8, 8)] {
        for symmetric in [true, false] {
            let model = model(|_, w| Some(grouped(w, spec(bits, 16, symmetric))));
            let (folder, report) = export(&model, Dtype::F16).unwrap();
            for (name, weight) in model.weights.iter().filter(|(n, _)| n.contains("_proj.")) {
                let values = unpack(&folder, module(name), wide, 16);
                assert_eq!(values, weight.to_f32(), "{name} {bits} {symmetric}");
            }
            let packed: Vec<_> = report.tensors.iter().filter(|t| t.carried).collect();
            assert_eq!(packed.len(), 7 * 3);
            assert!(packed.iter().all(|t| t.drift.max() == 0.0));
            let settings = settings(&folder);
            let weights = &settings["config_groups"]["group_0"]["weights"];
            assert_eq!(weights["num_bits"], wide);
            assert_eq!(weights["symmetric"], symmetric);
            assert_eq!(weights["group_size"], 16);
            assert_eq!(settings["ignore"], json!(["lm_head"]));
            assert_eq!(settings["config_groups"]["group_0"]["targets"], json!(["Linear"]));
            let warned = |text: &str| report.warnings.iter().any(|w| w.contains(text));
            assert!(warned("groups of [16]"), "{:?}", report.warnings);
            assert_eq!(warned("zero points"), !symmetric, "{:?}", report.warnings);
        }
    }
}

#[test]
fn words_by_hand() {
    // Rows of 12 codes leave half a word, 3 rows most of one.
    let codes: Vec<u8> = (0..36).map(|i| i % 16).collect();
    let grid = Grouped::pack([3, 12], spec(4, 12, false), &codes, &[1.0; 3], &[1, 2, 15]).unwrap();
    let weight = Weight::Grouped(grid);
    let grid = Grid::of(&weight).unwrap();
    let scheme = packed::Scheme::of(&grid);
    assert!(scheme.channel);
    let part = |part| {
        let mut out = Vec::new();
        let progress = Progress::silent();
        let mut drift = Drift::default();
        packed::put(&grid, &scheme, part, Dtype::F16, &mut out, &mut drift, &progress).unwrap();
        out
    };
    let row = part(packed::Part::Codes)[..8].to_vec();
    assert_eq!(row, [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0x00, 0x00]);
    assert_eq!(part(packed::Part::Zeros), [0x21, 0x0f, 0x00, 0x00]);
    assert_eq!(part(packed::Part::Scales), [0x00, 0x3c, 0x00, 0x3c, 0x00, 0x3c]);
    assert_eq!(part(packed::Part::Shape)[..9], [3, 0, 0, 0, 0, 0, 0, 0, 12]);
}

#[test]
fn several_schemes_are_named_module_by_module() {
    let model = model(|name, w| match name.rsplit('.').nth(1)? {
        "q_proj" => Some(grouped(w, spec(8, w.cols(), true))),
        "o_proj" => Some(grouped(w, spec(8, 16, true))),
        "gate_proj" | "up_proj" => Some(grouped(w, spec(4, w.cols(), true))),
        "v_proj" => {
            let shape = [w.rows(), w.cols()];
            Some(Weight::Ggml(Ggml::quantize(shape, GgmlType::Q4_0, &w.to_f32()).unwrap()))
        }
        _ => None,
    });
    let (folder, report) = export(&model, Dtype::F32).unwrap();
    let settings = settings(&folder);
    let groups = settings["config_groups"].as_object().unwrap();
    assert_eq!(groups.len(), 3);
    let part = |group: &str, key: &str| groups[group]["weights"][key].clone();
    assert_eq!(part("group_0", "num_bits"), 4);
    assert_eq!(part("group_0", "strategy"), "channel");
    assert_eq!(part("group_0", "group_size"), Value::Null);
    assert_eq!(part("group_1", "num_bits"), 8);
    assert_eq!(part("group_1", "strategy"), "group");
    assert_eq!(part("group_1", "group_size"), 16);
    let targets = groups["group_0"]["targets"].as_array().unwrap();
    // Rows of 32 are one group, also those of blocks.
    assert_eq!(targets.len(), 9);
    assert!(targets.contains(&json!("model.layers.1.self_attn.v_proj")));
    let ignored = settings["ignore"].as_array().unwrap();
    assert!(ignored.contains(&json!("model.layers.0.self_attn.k_proj")));
    assert!(ignored.contains(&json!("lm_head")));
    // Queries, keys and values are written in three ways.
    assert!(report.warnings.iter().any(|w| w.contains("q_proj and its neighbours")));
    assert!(!report.warnings.iter().any(|w| w.contains("gate_proj")));
    let name = "model.layers.2.self_attn.v_proj";
    let stored = model.weights[&format!("{name}.weight")].to_f32();
    assert_eq!(unpack(&folder, name, 4, 32), stored);
}

#[test]
fn brain_floats_round_the_scales_and_say_so() {
    let model = model(|_, w| Some(grouped(w, spec(4, 16, false))));
    let (folder, report) = export(&model, Dtype::BF16).unwrap();
    let name = "model.layers.0.mlp.up_proj";
    let stored = model.weights[&format!("{name}.weight")].to_f32();
    let written = unpack(&folder, name, 4, 16);
    let worst = stored.iter().zip(&written).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let report = report.tensors.iter().find(|t| module(&t.name) == name).unwrap();
    assert!(worst > 0.0);
    assert_eq!(report.drift.max(), worst);
    // Half a unit in the last of 8 bits.
    assert!(report.drift.relative() < 1.0 / 256.0);
}

#[test]
fn two_of_four_come_back() {
    let model = model(|_, w| Some(halved(w)));
    let (folder, report) = export(&model, Dtype::F16).unwrap();
    let file = safetensors::open(&folder.path().join("model.safetensors")).unwrap();
    for (name, weight) in model.weights.iter().filter(|(n, _)| n.contains("_proj.")) {
        let part = |suffix: &str| &file.tensors[&format!("{}.{suffix}", module(name))];
        let (rows, cols) = (weight.rows(), weight.cols());
        assert_eq!((part("shape").dtype, &part("shape").shape[..]), (Dtype::I64, &[2, 1][..]));
        assert_eq!(part("compressed").shape, [rows, cols / 2]);
        assert_eq!(part("bitmask").shape, [rows, cols / 8]);
        let kept = part("compressed");
        let kept = Dense::new(kept.shape.clone(), kept.dtype, kept.data.clone()).unwrap();
        let mut kept = Weight::Dense(kept).to_f32().into_iter();
        let bits = &part("bitmask").data;
        let values: Vec<f32> = (0..rows * cols)
            .map(|i| if bits[i / 8] >> (i % 8) & 1 == 1 { kept.next().unwrap() } else { 0.0 })
            .collect();
        assert_eq!(kept.next(), None);
        assert_eq!(values, weight.to_f32(), "{name}");
        assert!(!file.tensors.contains_key(name));
    }
    let settings = settings(&folder);
    assert_eq!(settings["sparsity_config"]["format"], "sparse-24-bitmask");
    assert_eq!(settings["sparsity_config"]["sparsity_structure"], "2:4");
    assert_eq!(settings["sparsity_config"]["ignore"], json!(["lm_head"]));
    assert!(report.warnings[0].contains("0.14"));
    assert!(report.tensors.iter().filter(|t| t.carried).all(|t| t.drift.max() == 0.0));
    assert!(report.tensors.iter().any(|t| t.carried));
    let rounded = export(&model, Dtype::BF16).unwrap().1;
    assert!(rounded.tensors.iter().all(|t| !t.carried), "bf16 rounds values of f16");
    let dense = self::model(|_, w| {
        let values = halved(w).to_f32();
        Some(Weight::Dense(Dense::from_f32(w.shape().to_vec(), &values, Dtype::F16).unwrap()))
    });
    let found = export(&dense, Dtype::F16).unwrap().1;
    assert!(found.tensors.iter().any(|t| t.written_as.starts_with("2 of 4")));
    assert!(found.tensors.iter().all(|t| !t.carried), "dense matrices are not carried over");
}

#[test]
fn what_the_form_cannot_hold_is_refused_with_a_way_out() {
    let refused = |model: Model| {
        let error = export(&model, Dtype::F16).err().unwrap();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        error.message().to_owned()
    };
    let message = refused(model(|_, _| None));
    assert!(
        message.contains("there are: F32") && message.contains("form hugging_face"),
        "{message}"
    );
    let mut narrow = tiny("llama");
    narrow["intermediate_size"] = json!([64, 32, 96]);
    let message = refused(random::model(narrow, 1).unwrap());
    assert!(message.contains("differ in width") && !message.contains("gguf"), "{message}");
    let mut biased = tiny("qwen2");
    biased["mlp_bias"] = json!(true);
    let message = refused(random::model(biased, 1).unwrap());
    assert!(message.contains("mlp_bias of qwen2"), "{message}");
    let error = export(&model(|_, w| Some(halved(w))), Dtype::U8).err().unwrap();
    assert_eq!(error.violations()[0].field, "type");
}

#[test]
fn nothing_stays_of_what_is_cancelled() {
    use std::sync::atomic::AtomicBool;
    let folder = tempfile::tempdir().unwrap();
    let model = AnyModel::from(&model(|_, w| Some(grouped(w, spec(4, 16, true)))));
    let progress = Progress::new(Arc::new(|_, _| {}), Arc::new(AtomicBool::new(true)));
    let error = compressed_tensors(&model, folder.path(), Dtype::F16, &progress).unwrap_err();
    assert_eq!(error.reason(), Reason::Cancelled);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn encoders_name_their_modules() {
    let mut model = encoder::random::model(encoder::random::tiny(), 5).unwrap();
    for (name, weight) in &mut model.weights {
        if name.ends_with("query.weight") || name.ends_with("dense.weight") {
            *weight = Arc::new(grouped(weight, spec(4, weight.cols(), true)));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let any = AnyModel::from(&model);
    compressed_tensors(&any, folder.path(), Dtype::F16, &Progress::silent()).unwrap();
    assert!(folder.path().join("modules.json").is_file());
    let settings = settings(&folder);
    let groups = settings["config_groups"].as_object().unwrap();
    let all: Vec<_> = groups.values().flat_map(|g| g["targets"].as_array().unwrap()).collect();
    assert!(all.contains(&&json!("encoder.layer.0.attention.self.query")));
    assert!(!all.contains(&&json!("Linear")));
    assert!(settings["ignore"].as_array().unwrap().iter().all(|m| m != "lm_head"));
}

/// Folders for `benches/peers/compressed_tensors.py`, where somebody names a place for them; what they must
/// hold is tested above.
#[test]
fn files_for_the_peer() {
    let kept = std::env::var_os("PLANISH_COMPRESSED_OUT");
    let own = tempfile::tempdir().unwrap();
    let out = kept.as_ref().map_or(own.path(), Path::new);
    let on =
        |bits, group, symmetric| model(move |_, w| Some(grouped(w, spec(bits, group, symmetric))));
    let pruned = model(|_, w| {
        let halved = halved(w).to_f32();
        let spec = spec(4, 16, false);
        let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        for group in halved.chunks_exact(16) {
            let (scale, zero) = spec.fit(group);
            codes.extend(group.iter().map(|v| spec.code(*v, scale, zero)));
            scales.push(scale);
            zeros.push(zero);
        }
        let mask: Vec<bool> = halved.iter().map(|v| *v != 0.0).collect();
        let shape = [w.rows(), w.cols()];
        let sparse = Sparse::from_codes(shape, &mask, spec, &codes, &scales, &zeros, Some((2, 4)));
        Some(Weight::Sparse(sparse.unwrap()))
    });
    let mixed = |symmetric| {
        model(move |name, w| match name.contains("mlp") {
            true => Some(grouped(w, spec(8, w.cols(), true))),
            false if name.contains(".1.") => None,
            false => Some(grouped(w, spec(4, 32, symmetric))),
        })
    };
    let halves = || model(|_, w| Some(halved(w)));
    for (name, model, dtype) in [
        ("four-bits", on(4, 16, true), Dtype::F16),
        ("four-bits-zeros", on(4, 16, false), Dtype::F16),
        ("four-bits-f32", on(4, 16, false), Dtype::F32),
        ("four-bits-bf16", on(4, 16, false), Dtype::BF16),
        ("three-bits-zeros", on(3, 16, false), Dtype::F16),
        ("eight-bits", on(8, 16, true), Dtype::F16),
        ("eight-bits-zeros", on(8, 16, false), Dtype::F32),
        ("pruned-codes", pruned, Dtype::F16),
        ("mixed", mixed(true), Dtype::F16),
        ("mixed-zeros", mixed(false), Dtype::F16),
        ("two-of-four", halves(), Dtype::F16),
        ("two-of-four-bf16", halves(), Dtype::BF16),
    ] {
        let decoder = model;
        let model = AnyModel::from(&decoder);
        let [packed, plain] = ["packed", "dense"].map(|kind| out.join(name).join(kind));
        let silent = Progress::silent();
        let written = compressed_tensors(&model, &packed, dtype, &silent).unwrap().report;
        let carried = written.tensors.iter().filter(|t| t.carried);
        // BF16 rounds the values that F16 held.
        let rounded = name == "two-of-four-bf16";
        assert_eq!(carried.count() >= 9, !rounded, "{name}");
        hugging_face::dense(&model, &plain, Dtype::F32, &silent).unwrap();
        let file = out.join(name).join("model.gguf");
        let written = gguf(&decoder, &file, GgufFormat::F32, &silent).unwrap();
        assert!(written.tensors.iter().all(|t| t.drift.max() == 0.0), "{name}");
    }
}
