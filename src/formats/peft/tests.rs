//! Small folders as PEFT writes them, good and bad.

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;

/// A safetensors file of f32 tensors.
fn file(tensors: &[(&str, &[usize], &[f32])]) -> safetensors::File {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert((*name).to_owned(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    safetensors::File::parse(Bytes::from(bytes)).unwrap()
}

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// Rank 2 on a `[3, 2]` weight.
fn pair() -> safetensors::File {
    file(&[
        (&format!("{Q}.lora_A.weight"), &[2, 2], &[1.0, 2.0, 3.0, 4.0]),
        (&format!("{Q}.lora_B.weight"), &[3, 2], &[1.0, 0.0, 0.0, 1.0, 0.5, 0.5]),
    ])
}

fn settings(change: Value) -> Vec<u8> {
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj"], "inference_mode": true, "fan_in_fan_out": false,
        "modules_to_save": null, "use_dora": false, "rank_pattern": {}, "layers_pattern": null,
        "init_lora_weights": true, "lora_dropout": 0.1, "some_new_setting": 3,
    });
    for (key, value) in change.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string().into_bytes()
}

fn refused(config: &[u8], file: &safetensors::File, reason: Reason, word: &str) {
    let error = parse(config, file).unwrap_err();
    assert_eq!(error.reason(), reason, "{error}");
    assert!(error.message().contains(word), "{error} does not say {word}");
    assert!(error.message().len() < 600);
}

#[test]
fn factors_and_scales_are_read() {
    let scale = |change: Value| {
        let adapter = parse(&settings(change), &pair()).unwrap();
        let (name, factors) = adapter.linears.iter().next().unwrap();
        assert_eq!(name, "model.layers.0.self_attn.q_proj.weight");
        assert_eq!((factors.shape(), factors.rank()), ([3, 2], 2));
        // B A = [[1, 2], [3, 4], [2, 3]], worked out by hand.
        let mut weight = [0.0; 6];
        factors.add_to(1.0 / factors.scale(), &mut weight);
        for (got, want) in weight.iter().zip([1.0, 2.0, 3.0, 4.0, 2.0, 3.0]) {
            assert!((got - want).abs() < 1e-6, "{got} is not {want}");
        }
        factors.scale()
    };
    assert_eq!(scale(json!({})), 4.0);
    assert_eq!(scale(json!({ "use_rslora": true })), 8.0 / 2.0_f32.sqrt());
    assert_eq!(scale(json!({ "lora_alpha": null })), 4.0);
    assert_eq!(scale(json!({ "alpha_pattern": { "q_proj": 2 } })), 1.0);
    assert_eq!(scale(json!({ "alpha_pattern": { "proj": 2 } })), 4.0);
    assert_eq!(scale(json!({ "alpha_pattern": { "^model.layers.0.self_attn.q_proj": 6 } })), 3.0);
    assert_eq!(scale(json!({ "alpha_pattern": { "^self_attn.q_proj": 6 } })), 4.0);
    // The first of the file that matches, not the first of the alphabet.
    let first = br#"{"peft_type": "LORA", "r": 7, "lora_alpha": 8,
        "rank_pattern": {"self_attn.q_proj": 2, "q_proj": 5}, "alpha_pattern": null}"#;
    assert_eq!(parse(first, &pair()).unwrap().linears.len(), 1);
    let order = br#"{"peft_type": "LORA", "r": 2, "alpha_pattern": {"q_proj": 2, "0.self_attn.q_proj": 4}}"#;
    assert_eq!(parse(order, &pair()).unwrap().linears.values().next().unwrap().scale(), 1.0);
}

#[test]
fn what_is_not_served_is_refused_with_its_reason() {
    const NOT: Reason = Reason::UnsupportedFormat;
    for (change, word) in [
        (json!({ "peft_type": "IA3" }), "IA3"),
        (json!({ "bias": "lora_only" }), "bias"),
        (json!({ "use_dora": true }), "DoRA"),
        (json!({ "modules_to_save": ["lm_head"] }), "modules_to_save"),
        (json!({ "fan_in_fan_out": true }), "transposed"),
        (json!({ "lora_bias": true }), "lora_bias"),
        (json!({ "init_lora_weights": "pissa_niter_4" }), "pissa"),
        (json!({ "alora_invocation_tokens": [1, 2] }), "alora"),
        (json!({ "layer_replication": [[0, 4]] }), "layer_replication"),
        (json!({ "rank_pattern": { "(?=x)q_proj": 4 } }), "rank_pattern"),
        (json!({ "rank_pattern": { "(a{1000}){1000}": 4 } }), "rank_pattern"),
    ] {
        refused(&settings(change), &pair(), NOT, word);
    }
    for (name, word) in [
        (format!("{Q}.lora_magnitude_vector"), "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A".to_owned(), "embedding"),
        (format!("{Q}.lora_B.bias"), "bias"),
        ("base_model.model.lm_head.weight".to_owned(), "lm_head"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(), "base_model.model."),
    ] {
        refused(&settings(json!({})), &file(&[(&name, &[1], &[1.0])]), NOT, word);
    }
}

#[test]
fn keys_of_patterns_are_regular_expressions_as_in_peft() {
    // What PEFT 0.21 finds for `re.match(rf"(.*\\.)?({key})$", "model.layers.0.self_attn.q_proj")`.
    for (key, matches) in [
        ("layers\\.[0-3]\\..*q_proj", true),
        ("layers\\.[1-3]\\..*q_proj", false),
        ("(q|v)_proj", true),
        ("^model\\.layers\\.\\d+\\.self_attn\\.q_proj$", true),
        ("^layers.*", false),
        ("k_proj|q_proj", true),
        ("q_pro", false),
    ] {
        let found = parse(&settings(json!({ "alpha_pattern": { key: 2 } })), &pair()).unwrap();
        let scale = found.linears.values().next().unwrap().scale();
        assert_eq!(scale, if matches { 1.0 } else { 4.0 }, "{key}");
        let (good, other) = if matches { (2, 7) } else { (7, 2) };
        let ranks = json!({ "r": other, "rank_pattern": { key: good } });
        assert!(parse(&settings(ranks), &pair()).is_ok(), "{key}");
    }
    let many: serde_json::Map<String, serde_json::Value> =
        (0..300).map(|i| (format!("[ab]{i}"), json!(2))).collect();
    let many = settings(json!({ "rank_pattern": many }));
    refused(&many, &pair(), Reason::MalformedFile, "256");
}

#[test]
fn lies_are_refused() {
    const BAD: Reason = Reason::MalformedFile;
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let good = settings(json!({}));
    let ones = [1.0; 16];
    for (a_shape, b_shape, word) in [
        (&[2, 2][..], &[3, 3][..], "shapes"),
        (&[4], &[3, 2], "dimensions"),
        (&[2, 2], &[3, 2, 1], "dimensions"),
        (&[0, 2], &[3, 0], "rank"),
        (&[2, 0], &[3, 2], "rank"),
        (&[3, 2], &[3, 3], "rank 3"),
    ] {
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        let (x, y) = (&ones[..size(a_shape)], &ones[..size(b_shape)]);
        refused(&good, &file(&[(&a, a_shape, x), (&b, b_shape, y)]), BAD, word);
    }
    refused(&good, &file(&[(&a, &[2, 2], &ones[..4])]), BAD, "lora_B");
    refused(&good, &file(&[]), BAD, "no factors");
    for value in [f32::NAN, f32::INFINITY, f32::MAX] {
        let bad = file(&[(&a, &[2, 2], &[value; 4]), (&b, &[3, 2], &ones[..6])]);
        refused(&good, &bad, BAD, "finite");
    }
    let deep = [b"{\"x\":".repeat(100_000), b"1".to_vec()].concat();
    for config in [
        &b""[..],
        b"[]",
        b"{}",
        b"{\"peft_type\": 3}",
        b"{\"peft_type\": \"LORA\", \"r\": -2}",
        b"{\"peft_type\": \"LORA\", \"r\": 2.5}",
        b"{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 1e999}",
        b"{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 1e300}",
        b"{\"peft_type\": \"LORA\", \"r\": 2, \"rank_pattern\": [1]}",
        &deep,
    ] {
        let error = parse(config, &pair()).unwrap_err();
        assert_eq!(error.reason(), BAD, "{error}");
    }
}

#[test]
fn folders_without_their_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let reason = || read(folder.path()).unwrap_err();
    assert!(reason().message().contains(CONFIG));
    std::fs::write(folder.path().join(CONFIG), settings(json!({}))).unwrap();
    std::fs::write(folder.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
    assert_eq!(reason().reason(), Reason::SourceUnavailable);
    assert!(reason().message().contains("pickle"));
    std::fs::write(folder.path().join(WEIGHTS), b"not a file").unwrap();
    assert_eq!(reason().reason(), Reason::MalformedFile);
}

#[test]
fn parts_are_found_under_the_names_of_all_versions() {
    let (a, b) = (format!("{Q}.lora_A.weight"), format!("{Q}.lora_B.weight"));
    let (a_values, b_values) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 1.0, 0.5, 0.5]);
    // The matrix of LoRA-XS: R A = [[3, 4], [2, 4]], so B R A = [[3, 4], [2, 4], [2.5, 4]].
    for end in ["lora_latent_mapping.weight", "default_lora_latent_mapping.weight"] {
        let r = format!("{Q}.{end}");
        let tensors = file(&[
            (&a, &[2, 2], &a_values),
            (&b, &[3, 2], &b_values),
            (&r, &[2, 2], &[0.0, 1.0, 2.0, 0.0]),
        ]);
        let adapter = parse(&settings(json!({})), &tensors).unwrap();
        let factors = adapter.linears.values().next().unwrap();
        let mut weight = [0.0; 6];
        factors.add_to(1.0 / factors.scale(), &mut weight);
        for (got, want) in weight.iter().zip([3.0, 4.0, 2.0, 4.0, 2.5, 4.0]) {
            assert!((got - want).abs() < 1e-6, "{end}: {got} is not {want}");
        }
    }
    // Magnitudes of DoRA, with and without the ending of the others.
    for end in ["lora_magnitude_vector", "lora_magnitude_vector.weight"] {
        let m = format!("{Q}.{end}");
        let tensors = file(&[
            (&a, &[2, 2], &a_values),
            (&b, &[3, 2], &b_values),
            (&m, &[3], &[1.0, 2.0, 3.0]),
        ]);
        let dora = settings(json!({ "use_dora": true }));
        let contents = Contents::parse(&dora, &tensors.tensors, Use::Keep).unwrap();
        let entry = contents.modules.values().next().unwrap();
        assert_eq!(entry.magnitude.as_deref(), Some(&[1.0, 2.0, 3.0][..]), "{end}");
    }
    // AdaLoRA's names have no ending, and its scale is alpha over the first rank and a little.
    let names = ["lora_A", "lora_B", "lora_E"].map(|end| format!("{Q}.{end}"));
    let tensors = file(&[
        (&names[0], &[2, 2], &a_values),
        (&names[1], &[3, 2], &b_values),
        (&names[2], &[2, 1], &[2.0, -1.0]),
    ]);
    let left = json!({ "model.layers.0.self_attn.q_proj.lora_E": [true, true, false] });
    let config = settings(json!({
        "peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6, "rank_pattern": left,
    }));
    let contents = Contents::parse(&config, &tensors.tensors, Use::Serve).unwrap();
    let entry = contents.modules.values().next().unwrap();
    assert!((entry.scale - 6.0 / 3.00001).abs() < 1e-12, "{}", entry.scale);
    // B diag(E).
    assert_eq!(entry.folded(), [2.0, 0.0, 0.0, -1.0, 1.0, -0.5]);
}
