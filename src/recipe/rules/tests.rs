use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::data::records::Kind as Records;
use crate::methods::catalogue::neighbours;
use crate::methods::catalogue::testing::{reference, step};
use crate::models::random;
use crate::recipe::{check_steps, file};

fn steps(recipe: Value) -> Vec<v1::Step> {
    serde_json::from_value(recipe).unwrap()
}

/// Rules that warn of a recipe over the reference model, with their fields.
fn warned(recipe: Value) -> Vec<(String, String)> {
    warned_of(recipe, &reference())
}

fn warned_of(recipe: Value, model: &AnyInfo) -> Vec<(String, String)> {
    let plan = check_steps(&steps(recipe), model).unwrap();
    plan.warnings.into_iter().map(|w| (w.rule, w.field)).collect()
}

fn refused(recipe: Value) -> (String, String) {
    let error = check_steps(&steps(recipe), &reference()).err().expect("refused");
    assert_eq!(error.reason(), Reason::InvalidRecipe, "{error}");
    let field = error.violations().first().map(|v| v.field.clone()).unwrap_or_default();
    (field, error.message().to_owned())
}

#[test]
fn what_composes_is_what_a_recipe_may_hold() {
    let model = reference();
    let of = |family: &str| -> Vec<_> {
        catalogue::all()
            .into_iter()
            .filter(|(card, entry)| entry.verb != "adapt" && card.families.contains(&family))
            .collect()
    };
    for (card, entry) in of("decoder") {
        let (_, before) = neighbours(card, entry);
        for (_, next) in of("decoder") {
            let checked = check_steps(&[step(entry.name), step(next.name)], &model);
            let composes = before.contains(&next.name);
            let pair = format!("{}, then {}", entry.name, next.name);
            assert_eq!(checked.is_ok(), composes, "{pair}: {:?}", checked.err());
        }
        for name in card.followed_by {
            assert!(before.contains(name), "{} is followed by {name}", card.name);
        }
    }
    let net = random::info(json!({ "model_type": "mobilenet_v1", "num_labels": 4 })).unwrap();
    for (card, entry) in of("vision") {
        let (_, before) = neighbours(card, entry);
        for (_, next) in of("vision") {
            let checked = check_steps(&[step(entry.name), step(next.name)], &net);
            let pair = format!("{}, then {}", entry.name, next.name);
            assert_eq!(checked.is_ok(), before.contains(&next.name), "{pair}");
        }
    }
}

#[test]
fn normal_floats_are_not_changed_again() {
    let (field, message) = refused(json!([{ "normal_float": {} }, { "magnitude": {} }]));
    assert_eq!(field, "steps[1].magnitude");
    assert!(message.contains("steps[0].normal_float") && message.contains("first"), "{message}");
    for second in ["wanda", "sparsegpt", "mag_sp", "low_rank", "gptq", "lrec", "awq"] {
        let recipe = vec![step("normal_float"), step(second)];
        let error = check_steps(&recipe, &reference()).err().expect(second);
        assert_eq!(error.reason(), Reason::InvalidRecipe, "{second}: {error}");
    }
    // Other weights than those that were rounded.
    check_steps(
        &steps(json!([
            { "normal_float": { "scope": ["*.self_attn.*"] } },
            { "magnitude": { "sparsity": { "scope": ["*.mlp.*"] } } },
        ])),
        &reference(),
    )
    .unwrap();
    // The same of a version that came out of another recipe.
    let mut model = reference();
    for (name, tensor) in &mut model.tensors {
        if name.contains("_proj") {
            tensor.record = Record::Nf4 { shape: [tensor.shape[0], tensor.shape[1]] };
        }
    }
    let error = check_steps(&[step("wanda")], &model).err().expect("refused");
    assert_eq!(error.violations()[0].field, "steps[0].wanda");
    assert!(error.message().contains("version before"), "{error}");
}

#[test]
fn what_a_step_would_undo_is_refused() {
    let (field, message) = refused(json!([{ "wanda": {} }, { "dsnot": {} }]));
    assert_eq!(field, "steps[1].dsnot");
    assert!(message.contains("`initial`"), "{message}");
    check_steps(&[step("wanda_sp"), step("dsnot"), step("gptq")], &reference()).unwrap();
    let (field, message) = refused(json!([{ "group_sparse": {} }, { "dsnot": {} }]));
    assert_eq!(field, "steps[1].dsnot");
    assert!(message.contains("`initial`"), "{message}");
    // Groups of 8-bit values were rounded; others may lose more of their weights.
    let groups = |values: &str| json!({ "group_sparse": { "values": values } });
    for second in ["magnitude", "wanda", "sparsegpt", "gptq"] {
        let (_, message) = refused(json!([groups("GROUP_SPARSE_VALUES_INT8"), { second: {} }]));
        assert!(message.contains("quantised it"), "{second}: {message}");
        check_steps(
            &steps(json!([groups("GROUP_SPARSE_VALUES_BF16"), { second: {} }])),
            &reference(),
        )
        .unwrap();
    }
    let net = random::info(json!({ "model_type": "mobilenet_v1", "num_labels": 4 })).unwrap();
    let error = check_steps(&[step("train"), step("initialise")], &net).err().expect("refused");
    assert_eq!(error.violations()[0].field, "steps[1].initialise");
    assert!(error.message().contains("drawn anew"), "{error}");
    check_steps(&[step("initialise"), step("train")], &net).unwrap();
}

#[test]
fn what_low_rank_left_dense_may_be_changed() {
    // Of 512 components 312 stay: factors are smaller only for matrices that are longer than wide.
    let cut = |drop: u32| json!({ "low_rank": { "drop": drop } });
    let pruned = |scope: &str| json!({ "magnitude": { "sparsity": { "scope": [scope] } } });
    check_steps(&steps(json!([cut(200), pruned("*.self_attn.*")])), &reference()).unwrap();
    let (_, message) = refused(json!([cut(200), pruned("*.mlp.*")]));
    assert!(message.contains("a product of two matrices"), "{message}");
    check_steps(&steps(json!([cut(1), pruned("*")])), &reference()).unwrap();
}

#[test]
fn zeros_without_a_kernel_are_no_latency() {
    let wanda = catalogue::entry("compress", "wanda").unwrap();
    let message = no_latency(0.5, wanda, false).expect("a warning");
    assert!(message.contains("50 %") && message.contains("70 %"), "{message}");
    for (share, kernel) in [(0.5, true), (0.7, false), (0.9, false), (0.0, false)] {
        assert_eq!(no_latency(share, wanda, kernel), None, "{share} {kernel}");
    }
    let resolved = |json: Value| registry::resolve(&steps(json!([json]))[0]);
    let share = |json: Value| unstructured(&resolved(json));
    assert_eq!(share(json!({ "wanda": {} })), Some(("sparsity.share", 0.5)));
    assert_eq!(share(json!({ "wanda": { "sparsity": { "pattern": "2:4" } } })), None);
    assert_eq!(share(json!({ "ecoflap": { "share": 0.6 } })), Some(("share", 0.6)));
    assert_eq!(share(json!({ "gradual": {} })), Some(("final_sparsity", 0.9)));
    assert_eq!(share(json!({ "flap": { "ratio": 0.5 } })), None);
    // What the plan says is what this machine has.
    let kernel = crate::kernels::sparse::moves_bitmaps();
    let found = warned(json!([{ "magnitude": {} }]));
    let place = ("no_latency".to_owned(), "steps[0].magnitude.sparsity.share".to_owned());
    assert_eq!(found.contains(&place), !kernel, "{found:?}");
    assert!(!warned(json!([{ "magnitude": { "sparsity": { "share": 0.8 } } }])).contains(&place));
}

#[test]
fn steps_that_change_nothing_or_lose_zeros_warn() {
    let undone = |recipe: Value| -> Vec<String> {
        let found = warned(recipe).into_iter().filter(|(rule, _)| rule == "undone");
        found.map(|(_, field)| field).collect()
    };
    let share = |share: f64| json!({ "magnitude": { "sparsity": { "share": share } } });
    assert_eq!(undone(json!([share(0.6), share(0.5)])), ["steps[1].magnitude"]);
    assert!(undone(json!([share(0.5), share(0.6)])).is_empty());
    // Channels after zeros.
    let narrow = json!({ "mag_sp": { "ratio": 0.25, "round_to": 128 } });
    assert_eq!(undone(json!([share(0.6), narrow])), ["steps[1].mag_sp"]);
    assert!(undone(json!([narrow, share(0.6)])).is_empty());
    // Zeros in whose place a step puts values.
    assert_eq!(
        undone(json!([{ "wanda": {} }, { "low_rank": { "drop": 300 } }])),
        ["steps[1].low_rank"]
    );
    assert_eq!(
        undone(json!([{ "wanda": {} }, { "low_rank": { "drop": 1 } }])),
        ["steps[1].low_rank"]
    );
    assert_eq!(undone(json!([{ "wanda": {} }, { "lrec": {} }])), ["steps[1].lrec"]);
    assert!(undone(json!([{ "wanda": {} }, { "gptq": {} }])).is_empty());
    // Zeros that are too few for a layout of their own.
    let train = json!({ "train": { "training": { "dataset": "datasets/d", "steps": 10 } } });
    assert_eq!(undone(json!([share(0.02), train])), ["steps[1].train"]);
    assert!(undone(json!([share(0.6), train])).is_empty());
}

#[test]
fn blocks_of_a_file_are_not_rounded_without_a_word() {
    let rules = |model: &AnyInfo, name: &str| -> Vec<String> {
        let found = check_steps(&[step(name)], model).unwrap().warnings.into_iter();
        found.map(|warning| warning.rule).filter(|rule| rule != "no_latency").collect()
    };
    let mut model = reference();
    assert!(rules(&model, "round_to_nearest").is_empty());
    assert!(!quantised(&model));
    for (name, tensor) in &mut model.tensors {
        if name.contains("_proj") {
            let shape = [tensor.shape[0], tensor.shape[1]];
            let r#type = crate::nn::weight::GgmlType::Q4_1;
            tensor.record = Record::Ggml { shape, r#type };
            tensor.bytes = (shape[0] * shape[1] / 32 * 20) as u64;
        }
    }
    assert!(quantised(&model));
    assert_eq!(rules(&model, "round_to_nearest"), ["requantised"]);
    assert_eq!(rules(&model, "magnitude"), ["grows"]);
    let eight = json!([{ "round_to_nearest": { "grid": { "bits": 8 } } }]);
    let found = warned_of(eight, &model);
    assert!(found.contains(&("grows".into(), "steps[0].round_to_nearest".into())), "{found:?}");
}

#[test]
fn data_of_one_task_and_data_that_is_measured_on_warn() {
    let recipe: v1::Recipe = serde_json::from_value(json!({
        "steps": [
            { "gradual": { "training": { "dataset": "datasets/talk" } } },
            { "gptq": { "calibration": { "dataset": "datasets/text" } } },
            { "round_to_nearest": {} },
        ],
        "evaluation": { "dataset": "datasets/text" },
    }))
    .unwrap();
    let kinds = |talk: Records| {
        BTreeMap::from([
            ("datasets/talk".to_owned(), talk),
            ("datasets/text".to_owned(), Records::Text),
        ])
    };
    let rules = |recipe: &v1::Recipe, talk| -> Vec<(String, String)> {
        of_data(recipe, &kinds(talk)).into_iter().map(|w| (w.rule, w.field)).collect()
    };
    let measured = ("measured_on".to_owned(), "steps[1].gptq".to_owned());
    let task = ("one_task".to_owned(), "steps[0].gradual".to_owned());
    assert_eq!(rules(&recipe, Records::Chat), [task, measured.clone()]);
    assert_eq!(rules(&recipe, Records::Text), [measured]);
    let elsewhere = v1::Recipe { evaluation: None, ..recipe };
    assert!(rules(&elsewhere, Records::Text).is_empty());
}

#[test]
fn adapters_of_what_is_rounded_or_narrowed_are_named() {
    let of = |name: &str, adapters: &[&str]| {
        let recipe = v1::Recipe { steps: vec![step(name)], ..Default::default() };
        let adapters: Vec<String> = adapters.iter().map(|&a| a.to_owned()).collect();
        of_adapters(&recipe, &adapters)
    };
    let found = of("gptq", &["adapters/a"]).expect("a warning");
    assert_eq!((found.rule.as_str(), found.field.as_str()), ("adapters", "steps[0].gptq"));
    assert!(found.message.contains("adapters/a") && found.message.contains("merge"));
    let found = of("initialise", &["adapters/a"]).expect("a warning");
    assert!(found.message.contains("drawn anew") && !found.message.contains("merge"));
    let five = ["adapters/a", "adapters/b", "adapters/c", "adapters/d", "adapters/e"];
    let found = of("mag_sp", &five).expect("a warning");
    assert!(found.message.contains("will not fit") && found.message.contains("and 2 more"));
    assert!(of("magnitude", &["adapters/a"]).is_none());
    assert!(of("gptq", &[]).is_none());
}

/// Recipes of this repository are not refused by a rule.
#[test]
fn recipes_of_the_repository_keep_the_order() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut read = 0;
    for folder in ["recipes", "recipes/reference", "recipes/compare"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let all: Vec<Vec<v1::Step>> = if folder.ends_with("compare") {
                let found: v1::Comparison = file::read(&path).unwrap();
                crate::recipe::compare::check_counts(&found).unwrap();
                found.arms.into_iter().map(|arm| arm.steps).collect()
            } else {
                let found: v1::Recipe = file::read(&path).unwrap();
                vec![found.steps]
            };
            for steps in all {
                let entries: Vec<_> = steps
                    .iter()
                    .map(|step| {
                        let card = registry::method(step).unwrap().card();
                        catalogue::entry(card.verb, card.name).unwrap()
                    })
                    .collect();
                for pair in entries.windows(2) {
                    assert_eq!(pair[1].conflict(pair[0]), None, "{}", path.display());
                }
                read += usize::from(!steps.is_empty());
            }
        }
    }
    assert!(read > 30, "{read} recipes were read");
}
