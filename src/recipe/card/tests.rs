use serde_json::json;

use super::*;

fn wanda() -> v1::Step {
    let sparsity = v1::Sparsity { pattern: "2:4".into(), ..Default::default() };
    let calibration = v1::Calibration { dataset: "datasets/words".into(), ..Default::default() };
    let method = v1::Wanda { sparsity: Some(sparsity), calibration: Some(calibration) };
    v1::Step { method: Some(v1::step::Method::Wanda(method)) }
}

fn ancestors() -> Vec<Ancestor> {
    let record = json!({
        "total": { "zeros": 512, "elements": 1024 }, "warnings": ["rows of 3 | stay"],
    });
    vec![
        Ancestor {
            name: "models/m/versions/1".into(),
            digest: "sha256:aa".into(),
            lineage: v1::Lineage { source: "hf:some/model".into(), ..Default::default() },
            step: None,
        },
        Ancestor {
            name: "models/m/versions/2".into(),
            digest: "sha256:bb".into(),
            lineage: v1::Lineage {
                parent: "models/m/versions/1".into(),
                parent_digest: "sha256:aa".into(),
                step: Some(wanda()),
                seed: 7,
                data_digests: vec!["sha256:dd".into()],
                code_version: "1.2.3".into(),
                threads: 4,
                record: Some(serde_json::from_value(record).unwrap()),
                ..Default::default()
            },
            step: None,
        },
    ]
}

fn report(perplexity: f64) -> v1::EvaluationReport {
    v1::EvaluationReport {
        measurements: vec![v1::Measurement {
            metric: "perplexity".into(),
            value: perplexity,
            protocol: "512 tokens a window".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn exported() -> v1::ExportReport {
    let tensor = |name: &str, stored: &str, written: &str, carried, far| v1::ExportedTensor {
        name: name.into(),
        stored_as: stored.into(),
        written_as: written.into(),
        size_bytes: 2048,
        carried,
        max_difference: far,
        relative_difference: 2.0 * far,
    };
    v1::ExportReport {
        format: v1::ExportFormat::Gguf.into(),
        tensors: vec![
            tensor("a", "F32", "F16", false, 0.001),
            tensor("b", "4 bits in groups of 32", "Q5_0", true, 0.0),
            tensor("c", "F32", "F16", false, 0.002),
        ],
        warnings: vec!["mind <this>".into()],
    }
}

fn version() -> v1::ModelVersion {
    v1::ModelVersion {
        name: "models/m/versions/2".into(),
        digest: "sha256:bb".into(),
        family: "decoder".into(),
        architecture: "llama".into(),
        parameter_count: 1234,
        weight_bytes: 5000,
        layout_bytes: [("sparse".to_owned(), 4000), ("dense".to_owned(), 1000)].into(),
        ..Default::default()
    }
}

fn with<T>(change: impl FnOnce(&mut Card<'_>) -> T) -> String {
    let (version, ancestors, export) = (version(), ancestors(), exported());
    let measured = Measured {
        report: report(20.0),
        before: Some(report(15.5)),
        datasets: vec![("datasets/held-out".into(), "sha256:ee".into())],
    };
    let labels = BTreeMap::from([("license".to_owned(), "apache-2.0".to_owned())]);
    let mut card = Card {
        version: &version,
        display_name: "A *small* one",
        labels: &labels,
        ancestors: &ancestors,
        measured: &[measured],
        format: v1::ExportFormat::Gguf,
        export: Some(&export),
        file: "m.gguf",
    };
    change(&mut card);
    text(&card)
}

#[test]
fn a_card_says_where_a_version_comes_from_and_what_was_measured() {
    let text = with(|_| ());
    assert_eq!(text, with(|_| ()), "the same facts, the same text");
    let head = "---\nbase_model: \"some/model\"\nlicense: \"apache-2.0\"\n\
                pipeline_tag: \"text-generation\"\ntags:\n- \"planish\"\n- \"decoder\"\n- \"llama\"\n\
                - \"gguf\"\n- \"wanda\"\n---\n";
    assert!(text.starts_with(head), "{text}");
    for line in [
        "A \\*small\\* one",
        "1. `models/m/versions/1`: imported from `hf:some/model`",
        "2. `models/m/versions/2`: Wanda (`wanda`)",
        "   - step 1 of its recipe, seed 7",
        "   - 512 of 1024 elements in scope are 0 (50.0 %)",
        "   - planish 1.2.3, 4 threads",
        "         \"pattern\": \"2:4\"",
        "| `datasets/words` | `sha256:dd` | made `models/m/versions/2` |",
        "| `datasets/held-out` | `sha256:ee` | measured |",
        "| metric | value | before the recipe | measured with |",
        "| perplexity | 20.000 | 15.500 | 512 tokens a window |",
        "| 4 bits in groups of 32 | Q5\\_0 | carried over | 1 | 2.05 kB |",
        "| F32 | F16 | written from its values | 2 | 4.10 kB |",
        "| by layout | dense 1.00 kB, sparse 4.00 kB |",
        "- `models/m/versions/2`: rows of 3 \\| stay",
        "- this export: mind \\<this\\>",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing from\n{text}");
    }
    // The tensor that moved most comes first.
    assert!(text.find("| `c` |").unwrap() < text.find("| `a` |").unwrap());
    assert!(!text.contains("| `b` |"));
    assert!(text.contains("planish models import m.gguf"));
}

#[test]
fn what_is_not_known_is_said() {
    let nothing = BTreeMap::new();
    let text = with(|card| {
        card.measured = &[];
        card.format = v1::ExportFormat::Native;
        card.export = None;
        card.display_name = "";
        card.ancestors = &card.ancestors[1..];
    });
    assert!(text.contains("Nothing was measured"));
    assert!(text.contains("What came before is not stored any more."));
    assert!(text.contains("layouts kept"));
    assert!(!text.contains("base_model"));
    let (version, ancestors) = (version(), ancestors());
    let card = Card {
        version: &version,
        display_name: "",
        labels: &nothing,
        ancestors: &ancestors,
        measured: &[],
        format: v1::ExportFormat::HuggingFace,
        export: None,
        file: "",
    };
    let text = super::text(&card);
    assert!(text.contains("not known; that of the model it was made from applies"));
    assert!(!text.contains("license:"));
    assert!(text.contains("library_name: \"transformers\""));
}

#[test]
fn a_base_is_named_as_the_hub_knows_it() {
    for (source, name) in [
        ("hf:some/model", "some/model"),
        ("hf:some/model@main", "some/model"),
        ("hf:some/model@refs/pr/3", "some/model"),
        ("hf:some/model/files/m.gguf", "some/model"),
        ("hf:some/model/m.gguf@1a2b", "some/model"),
    ] {
        let mut chain = ancestors();
        chain[0].lineage.source = source.into();
        let version = version();
        let nothing = BTreeMap::new();
        let card = Card {
            version: &version,
            display_name: "",
            labels: &nothing,
            ancestors: &chain,
            measured: &[],
            format: v1::ExportFormat::HuggingFace,
            export: None,
            file: "",
        };
        let head = format!("---\nbase_model: \"{name}\"\n");
        assert!(super::text(&card).starts_with(&head), "{source}");
    }
}

#[test]
fn transformers_is_named_where_it_loads_what_is_packed() {
    let packed = |kind: &str, family: &str| {
        let mut export = exported();
        export.tensors[1].written_as = format!("4 bits in groups of 32{kind}, packed");
        let version = v1::ModelVersion { family: family.into(), ..version() };
        let nothing = BTreeMap::new();
        let card = Card {
            version: &version,
            display_name: "",
            labels: &nothing,
            ancestors: &[],
            measured: &[],
            format: v1::ExportFormat::CompressedTensors,
            export: Some(&export),
            file: "",
        };
        let text = super::text(&card);
        assert!(text.contains("library_name: \"transformers\""), "{text}");
        assert!(!text.contains("sentence-transformers"), "{text}");
        text
    };
    assert!(packed(", symmetric", "decoder").contains("AutoModelForCausalLM"));
    assert!(packed(", symmetric", "encoder").contains("AutoModel.from_pretrained"));
    for family in ["decoder", "encoder"] {
        let text = packed("", family);
        assert!(!text.contains("from_pretrained"), "{text}");
        assert_eq!(text.contains("vllm serve"), family == "decoder");
    }
}

#[test]
fn hostile_texts_stay_text() {
    let labels = BTreeMap::from([
        ("license".to_owned(), "mit\n---\nevil: true".to_owned()),
        ("language".to_owned(), "\"de\"".to_owned()),
    ]);
    let mut chain = ancestors();
    chain[0].lineage.source = "hf:a/b\n# title `x`".into();
    let (version, export) = (version(), exported());
    let card = Card {
        version: &version,
        display_name: "x\n# not a title",
        labels: &labels,
        ancestors: &chain,
        measured: &[],
        format: v1::ExportFormat::HuggingFace,
        export: Some(&export),
        file: "",
    };
    let text = super::text(&card);
    assert_eq!(text.lines().filter(|l| *l == "---").count(), 2, "{text}");
    assert_eq!(text.lines().filter(|l| l.starts_with("# ")).count(), 1, "{text}");
    assert!(text.contains("language: \"\\\"de\\\"\""));
    assert!(!text.lines().any(|l| l.starts_with("evil")));

    // A place on the server's disk is nobody else's business.
    let mut local = chain.clone();
    local[0].lineage.source = "/srv/secret/model".into();
    let card = Card { ancestors: &local, ..card };
    assert!(!super::text(&card).contains("secret"));
}
