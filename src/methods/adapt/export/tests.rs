use super::super::testing;
use super::super::testing::{Case, all_linear};
use super::*;
use crate::formats::peft::{self as files, Use};
use crate::models::decoder::random;
use crate::proto::v1;

fn about<'a>(case: &'a Case, heads: &'a BTreeMap<String, Plain>) -> About<'a> {
    About { shapes: case.shapes(), base: "base", task: "CAUSAL_LM", inside: "", heads }
}

fn read(folder: &Folder) -> Contents {
    Contents::parse(&folder.config, &folder.tensors, Use::Keep).unwrap()
}

#[test]
fn what_is_written_is_read_as_the_same_function_and_written_the_same() {
    for method in testing::low_rank_methods() {
        let case = Case::decoder();
        let tuned = case.start(method.as_ref());
        case.disturb(&tuned, 0.1);
        let (name, want) = (method.card().name, case.outputs(&tuned));
        let none = BTreeMap::new();
        let folder = peft(&tuned, &about(&case, &none)).unwrap();
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        folder.write(one.path()).unwrap();
        let again = Folder::read(one.path()).unwrap();
        again.write(two.path()).unwrap();
        for file in [files::CONFIG, files::WEIGHTS] {
            let bytes = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(file));
            assert_eq!(bytes(&one).unwrap(), bytes(&two).unwrap(), "{name}: {file}");
        }
        let contents = read(&again);
        let (loaded, heads) = load(&contents, "", case.shapes(), case.weights()).unwrap();
        assert!(heads.is_empty());
        for (got, want) in case.outputs(&loaded).iter().zip(&want) {
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{name}: {got}, {want}");
        }
        // From what was loaded, the same files again.
        let once_more = peft(&loaded, &about(&case, &none)).unwrap();
        assert_eq!(once_more.config, folder.config, "{name}");
        for (tensor, was) in &folder.tensors {
            assert_eq!(once_more.tensors[tensor].data, was.data, "{name}: {tensor}");
        }
        let dora = tuned.modules.values().any(|m| m.magnitude.is_some());
        assert_eq!(served(&tuned).is_err(), dora, "{name}");
        if !dora {
            let ours = served(&tuned).unwrap();
            assert_eq!(files::read(one.path()).unwrap(), ours, "{name}");
        }
    }
}

#[test]
fn adalora_files_say_the_same() {
    for method in testing::low_rank_methods() {
        let (case, name) = (Case::decoder(), method.card().name);
        let tuned = case.start(method.as_ref());
        case.disturb(&tuned, 0.1);
        let tuned = method.finish(tuned).unwrap();
        let none = BTreeMap::new();
        let folder = adalora(&tuned, &about(&case, &none));
        if name == "dora" {
            assert_eq!(folder.unwrap_err().reason(), Reason::Unsupported);
            continue;
        }
        let folder = folder.unwrap();
        let contents = read(&folder);
        assert_eq!(contents.kind, crate::formats::peft::Kind::AdaLora);
        let (loaded, _) = load(&contents, "", case.shapes(), case.weights()).unwrap();
        for (got, want) in case.outputs(&loaded).iter().zip(case.outputs(&tuned)) {
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{name}: {got}, {want}");
        }
        for (path, entry) in &contents.modules {
            for r in 0..entry.rank {
                let column = entry.b.iter().skip(r).step_by(entry.rank);
                let length: f32 = column.map(|b| b * b).sum::<f32>().sqrt();
                assert!((length - 1.0).abs() < 1e-5, "{name}: {path} has length {length}");
            }
        }
        // As what serves, from the bytes.
        let served = files::parse(&folder.config, &folder.file()).unwrap();
        assert_eq!(served.linears.len(), tuned.modules.len(), "{name}");
    }
}

#[test]
fn names_ranks_and_alphas_are_those_that_peft_reads() {
    let case = Case::decoder();
    let options = v1::AdapterOptions {
        alpha: Some(6.0),
        layers: vec![0, 2],
        targets: vec!["q_proj".into(), "v_proj".into()],
        rank_pattern: [("layers.2.self_attn.q_proj".to_owned(), 4)].into(),
        alpha_pattern: [("v_proj".to_owned(), 1.5)].into(),
        ..all_linear(3)
    };
    let tuned = case.start(&v1::Lora { adapter: Some(options), ..Default::default() });
    let none = BTreeMap::new();
    let folder = peft(&tuned, &about(&case, &none)).unwrap();
    let config: Value = serde_json::from_slice(&folder.config).unwrap();
    assert_eq!(config["r"], 3);
    let q2 = "model.layers.2.self_attn.q_proj";
    assert_eq!(config["rank_pattern"], json!({ q2: 4 }));
    // Two have alpha 6, two 1.5; the smaller is the default.
    assert_eq!(config["lora_alpha"], json!(1.5));
    assert_eq!(config["alpha_pattern"][q2], 6);
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 4);
    assert!(folder.tensors.contains_key(&format!("base_model.model.{q2}.lora_A.weight")));
    let all = case.start(&v1::Lora { adapter: Some(all_linear(2)), ..Default::default() });
    let folder = peft(&all, &about(&case, &none)).unwrap();
    let config: Value = serde_json::from_slice(&folder.config).unwrap();
    let short = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(config["target_modules"], json!(short));
    assert_eq!(config["lora_alpha"], 2);
    let text = String::from_utf8(folder.config).unwrap();
    assert!(
        text.starts_with("{\n  \"alpha_pattern\": {},\n  \"base_model_name_or_path\": \"base\",")
    );
}

#[test]
fn whole_modules_biases_and_heads() {
    let case = Case::encoder();
    let options = v1::AdapterOptions {
        targets: vec!["query".into()],
        modules_to_save: vec!["embeddings.LayerNorm".into()],
        bias: v1::AdapterBias::LoraOnly as i32,
        ..all_linear(2)
    };
    let tuned = case.start(&v1::Lora { adapter: Some(options), ..Default::default() });
    let heads: BTreeMap<String, Plain> =
        [("classifier.weight".to_owned(), Plain::new(&[2, 32], vec![0.5; 64]))].into();
    let about = About { task: "SEQ_CLS", inside: "bert.", heads: &heads, ..about(&case, &heads) };
    let folder = peft(&tuned, &about).unwrap();
    let config: Value = serde_json::from_slice(&folder.config).unwrap();
    assert_eq!(config["bias"], "lora_only");
    assert_eq!(config["modules_to_save"], json!(["bert.embeddings.LayerNorm", "classifier"]));
    let query = "base_model.model.bert.encoder.layer.0.attention.self.query";
    for name in [
        format!("{query}.lora_A.weight"),
        format!("{query}.bias"),
        "base_model.model.bert.embeddings.LayerNorm.weight".to_owned(),
        "base_model.model.classifier.weight".to_owned(),
    ] {
        assert!(folder.tensors.contains_key(&name), "{name}");
    }
    let contents = read(&folder);
    let (loaded, found) = load(&contents, "bert.", case.shapes(), case.weights()).unwrap();
    assert_eq!(found, heads);
    assert_eq!(loaded.values().unwrap(), tuned.values().unwrap());
    // Not to be served so.
    let error = files::parse(&folder.config, &folder.file()).unwrap_err();
    assert_eq!(error.reason(), Reason::UnsupportedFormat);
    assert!(served(&tuned).is_err());
}

#[test]
fn adapters_of_other_models_are_refused() {
    let (ours, theirs) = (Case::decoder(), Case::encoder());
    let method = v1::Lora { adapter: Some(all_linear(2)), ..Default::default() };
    let none = BTreeMap::new();
    let folder = peft(&ours.start(&method), &about(&ours, &none)).unwrap();
    let contents = read(&folder);
    let error = load(&contents, "", theirs.shapes(), theirs.weights()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    let empty = peft(&Tuned::default(), &about(&ours, &none)).unwrap_err();
    assert_eq!(empty.reason(), Reason::Unsupported);
}

#[test]
fn adapters_of_another_width_say_what_was_wanted() {
    let ours = Case::decoder();
    let mut config = random::tiny("llama");
    config["intermediate_size"] = json!(96);
    let theirs = Case::of_decoder(random::model(config, 1).unwrap());
    let method = v1::Lora { adapter: Some(all_linear(2)), ..Default::default() };
    let none = BTreeMap::new();
    let folder = peft(&theirs.start(&method), &about(&theirs, &none)).unwrap();
    let error = load(&read(&folder), "", ours.shapes(), ours.weights()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    for part in ["model.layers.0.mlp.down_proj.weight", "[32, 80]", "[32, 96]"] {
        assert!(error.message().contains(part), "{error} lacks {part}");
    }
}

#[test]
fn names_of_special_parts_and_the_mark_of_the_format() {
    let case = Case::decoder();
    let none = BTreeMap::new();
    let q = "model.layers.0.self_attn.q_proj";
    let settings = |folder: &Folder| -> Value { serde_json::from_slice(&folder.config).unwrap() };
    let dora = case.start(&v1::Dora { adapter: Some(all_linear(2)) });
    let folder = peft(&dora, &about(&case, &none)).unwrap();
    assert_eq!(folder.metadata["format"], "pt");
    let magnitude = format!("base_model.model.{q}.lora_magnitude_vector");
    assert_eq!(folder.tensors[&magnitude].shape, [64], "a name without .weight");
    assert_eq!(settings(&folder)["use_dora"], true);
    let lora = case.start(&v1::Lora { adapter: Some(all_linear(2)), ..Default::default() });
    let folder = adalora(&lora, &about(&case, &none)).unwrap();
    for (end, shape) in [("lora_A", [2, 32]), ("lora_B", [64, 2]), ("lora_E", [2, 1])] {
        let name = format!("base_model.model.{q}.{end}");
        assert_eq!(folder.tensors[&name].shape, shape, "{name}");
    }
    let config = settings(&folder);
    assert_eq!(config["rank_pattern"][format!("{q}.lora_E")], json!([true, true]));
    assert_eq!((&config["peft_type"], &config["init_r"]), (&json!("ADALORA"), &json!(2)));
}
