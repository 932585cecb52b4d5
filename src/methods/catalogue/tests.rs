use std::collections::BTreeSet;

use super::testing::{reference, step};
use super::*;

#[test]
fn every_method_has_one_entry_and_every_entry_a_method() {
    let mut cards = registry::cards();
    cards.extend(adapt::registry::cards());
    let key = |verb: &str, name: &str| format!("{verb}/{name}");
    let methods: BTreeSet<_> = cards.iter().map(|card| key(card.verb, card.name)).collect();
    let listed: Vec<_> = entries().map(|entry| key(entry.verb, entry.name)).collect();
    let entries: BTreeSet<_> = listed.iter().cloned().collect();
    assert_eq!(entries, methods);
    assert_eq!(listed.len(), entries.len(), "an entry is there twice");
    assert_eq!(all().len(), methods.len());
    assert_eq!(verbs(), ["adapt", "compress", "train"]);
}

#[test]
fn entries_are_whole_and_name_what_exists() {
    let kernels = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
    let families: BTreeSet<_> = entries().map(|entry| entry.family.word()).collect();
    let names: BTreeSet<_> = entries().map(|entry| entry.name).collect();
    for word in Family::WORDS {
        assert!(families.contains(word), "no method is of the family {word}");
    }
    for (card, entry) in all() {
        let name = entry.name;
        assert!(!entry.sub.is_empty() && !entry.changes.is_empty(), "{name}");
        let slug = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(!entry.seed_paper.is_empty() && entry.seed_paper.chars().all(slug), "{name}");
        if !entry.kernel.is_empty() {
            let (file, folder) = (format!("{}.rs", entry.kernel), entry.kernel);
            assert!(
                kernels.join(&file).exists() || kernels.join(folder).exists(),
                "{name}: {file}"
            );
        }
        if entry.speeds_up.contains(&Gain::Prefill) || entry.speeds_up.contains(&Gain::Decode) {
            assert!(!entry.kernel.is_empty(), "{name} is faster by no kernel");
        }
        assert_eq!(entry.gains() == [NOTHING], entry.speeds_up.is_empty(), "{name}");
        let calibrates = matches!(entry.data, DataNeed::Calibration(_));
        if entry.verb == "compress" && entry.data.word() != "train" {
            assert_eq!(calibrates, card.needs_calibration, "{name}");
        }
        for conflict in entry.conflicts {
            let known = names.contains(conflict.after) || families.contains(conflict.after);
            assert!(known && !conflict.why.is_empty(), "{name} after {}", conflict.after);
        }
        assert!(entry.cost.seconds(1 << 20, 1 << 10) > 0.0, "{name}");
        assert!(entry.cost.peak_bytes(1 << 20, 0) >= 2e6, "{name}");
    }
}

#[test]
fn costs_and_tokens_are_near_those_of_plans() {
    let model = reference();
    let parameters: u64 =
        model.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    for entry in entries().filter(|entry| entry.verb == "compress") {
        let step = step(entry.name);
        let (expected, _) = registry::method(&step)
            .and_then(|method| method.check_any(&model))
            .unwrap_or_else(|e| panic!("{}: {e}", entry.name));
        assert_eq!(entry.data.tokens(), expected.calibration_tokens, "{}", entry.name);
        let near = |name: &str, got: f64, wanted: f64, factor: f64| {
            let ratio = got / wanted;
            assert!(ratio > 1.0 / factor && ratio < factor, "{}: {name} {ratio}", entry.name);
        };
        let tokens = entry.data.tokens();
        near("seconds", entry.cost.seconds(parameters, tokens), expected.seconds, 5.0);
        let memory = expected.memory_bytes as f64;
        near("bytes", entry.cost.peak_bytes(parameters, tokens), memory, 4.0);
    }
}

#[test]
fn neighbours_are_told_from_both_sides() {
    let find = |name: &str| all().into_iter().find(|(card, _)| card.name == name).unwrap();
    let names = |name: &str| {
        let (card, entry) = find(name);
        neighbours(card, entry)
    };
    let (after, before) = names("gptq");
    assert!(after.contains(&"wanda") && after.contains(&"train") && !after.contains(&"awq"));
    assert!(before.contains(&"qlora") && !before.contains(&"wanda"));
    let (after, before) = names("lora");
    assert!(after.contains(&"gptq") && after.contains(&"low_rank") && before.is_empty());
    for (card, entry) in all().into_iter().filter(|(_, entry)| entry.verb != "adapt") {
        for next in neighbours(card, entry).1 {
            assert!(names(next).0.contains(&card.name), "{} before {next}", card.name);
        }
    }
}

#[test]
fn a_cost_is_a_sum_of_two_products() {
    let cost = Cost {
        parameter: 1e-6,
        parameter_token: 1e-9,
        parameter_bytes: 3.0,
        token_bytes: 10.0,
        basis: Basis::Reasoned,
    };
    assert!((cost.seconds(1_000_000, 0) - 1.0).abs() < 1e-9);
    assert!((cost.seconds(1_000_000, 1000) - 2.0).abs() < 1e-9);
    assert_eq!(cost.peak_bytes(100, 5), 350.0);
    assert_eq!((DataNeed::Labels.tokens(), DataNeed::Train(7).tokens()), (0, 7));
}
