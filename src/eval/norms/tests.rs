use super::*;
use crate::models::decoder::random;

const LENGTH: usize = 24;

fn tokens(sequences: usize) -> Vec<u32> {
    (0..sequences * LENGTH).map(|i| ((i * 29 + i / 7 * 13 + 5) % 96) as u32).collect()
}

fn model(architecture: &str) -> Model {
    random::model(random::tiny(architecture), 5).unwrap()
}

fn adapter(model: &Model, on: impl Fn(&str) -> bool) -> Arc<Adapter> {
    Arc::new(random::adapter(model.decoder().unwrap(), 4, 0.5, 7, on).unwrap())
}

fn report(model: &Model, adapter: Option<&Arc<Adapter>>, tokens: &[u32]) -> v1::NormReport {
    let with = adapter.map(|adapter| With { name: "adapters/a", adapter });
    let factoring = Factoring { max_features: Some(200), ..Factoring::default() };
    of_tokens(model, with, (&factoring, LENGTH), tokens, &Progress::silent()).unwrap()
}

fn near(a: f64, b: f64, within: f64) -> bool {
    (a - b).abs() <= within * b.abs().max(1.0)
}

#[test]
fn every_head_is_measured_and_sizes_belong_together() {
    let model = model("llama");
    let report = report(&model, None, &tokens(3));
    assert_eq!(report.heads.len(), 3 * 4);
    assert_eq!((report.sequences, report.tokens), (3, LENGTH as i64));
    assert!(near(report.threshold, (LENGTH as f64).ln().sqrt(), 1e-12));
    for (i, head) in report.heads.iter().enumerate() {
        assert_eq!((head.layer, head.head), (i as i64 / 4, i as i64 % 4));
        // Turning raises an entry by a factor of sqrt 2 at most; the scale is 1 / sqrt(16).
        assert!(head.turned_query <= head.query * 2.0_f64.sqrt() * 1.0001);
        let gamma = 2.0 * head.turned_query.max(head.turned_key);
        assert!(near(head.partial_gamma, gamma, 1e-6), "{head:?}");
        assert!(head.full_gamma >= head.partial_gamma);
        assert!(near(head.margin, gamma / report.threshold, 1e-6));
        assert!(head.largest_score <= gamma * gamma * 1.0001);
        assert!(head.usual_score <= head.largest_score && head.usual_score > 0.0);
        assert!(head.effective_rank >= 1.0 && head.effective_rank <= LENGTH as f64);
        assert_eq!((head.adapter_query, head.adapter_key), (0.0, 0.0));
        assert_ne!(head.verdict(), NormVerdict::Unspecified);
        assert!(!head.reason.is_empty());
    }
    let counted: usize = verdicts(&report.heads).values().sum();
    assert_eq!(counted, 12);
    assert!(!report.hint.is_empty() && report.base_heads.is_empty());
}

#[test]
fn the_order_of_sequences_does_not_matter() {
    let model = model("qwen3");
    let given = tokens(3);
    let turned: Vec<u32> = given.chunks(LENGTH).rev().flatten().copied().collect();
    let (a, b) = (report(&model, None, &given), report(&model, None, &turned));
    for (a, b) in a.heads.iter().zip(&b.heads) {
        assert_eq!((a.degree, a.verdict), (b.degree, b.verdict));
        for (a, b) in [
            (a.partial_gamma, b.partial_gamma),
            (a.composed, b.composed),
            (a.usual_score, b.usual_score),
            (a.effective_rank, b.effective_rank),
        ] {
            assert!(near(a, b, 1e-5), "{a} is not {b}");
        }
    }
}

#[test]
fn what_an_adapter_adds_is_told_and_merging_it_changes_nothing() {
    let model = model("llama");
    let adapter = adapter(&model, |name| name.contains("q_proj") || name.contains("k_proj"));
    let with = report(&model, Some(&adapter), &tokens(2));
    assert!(with.warnings.is_empty());
    let mut merged = model.clone();
    for (name, factors) in &adapter.linears {
        let mut values = merged.weight(name).unwrap().to_f32();
        factors.add_to(1.0, &mut values);
        let shape = factors.shape().to_vec();
        let dense =
            crate::nn::weight::Dense::from_f32(shape, &values, crate::nn::dtype::Dtype::F32);
        merged.weights.insert(name.clone(), Arc::new(Weight::Dense(dense.unwrap())));
    }
    let merged = report(&merged, None, &tokens(2));
    for ((with, merged), base) in with.heads.iter().zip(&merged.heads).zip(&with.base_heads) {
        assert!(with.adapter_query > 0.0 && with.adapter_key > 0.0);
        assert!(near(with.partial_gamma, merged.partial_gamma, 1e-4));
        assert!(near(with.full_gamma, merged.full_gamma, 1e-4));
        assert_ne!(with.partial_gamma, base.partial_gamma);
        // Keys are adapted: the larger of both counts.
        assert!(near(with.margin, with.full_gamma / merged.partial_gamma * merged.margin, 1e-4));
        assert_eq!(base.adapter_query, 0.0);
    }
}

#[test]
fn adapters_that_change_nothing_or_no_attention_are_seen_through() {
    let model = model("llama");
    let config = model.decoder().unwrap();
    // Nothing is added where a factor is zero.
    let zero = random::adapter(config, 2, 0.0, 3, |name| name.contains("q_proj")).unwrap();
    let found = report(&model, Some(&Arc::new(zero)), &tokens(1));
    for (head, base) in found.heads.iter().zip(&found.base_heads) {
        assert_eq!(head.adapter_query, 0.0);
        assert_eq!((head.partial_gamma, head.margin), (base.partial_gamma, base.margin));
    }
    let other = adapter(&model, |name| name.contains("mlp"));
    let found = report(&model, Some(&other), &tokens(1));
    assert!(found.warnings[0].contains("no matrix of queries"), "{:?}", found.warnings);
    assert_eq!(found.heads[0].partial_gamma, found.base_heads[0].partial_gamma);
    assert_ne!(found.heads[4].partial_gamma, found.base_heads[4].partial_gamma);
}

#[test]
fn windows_and_caps_are_no_matter_for_the_rule() {
    let found = report(&model("gemma3_text"), None, &tokens(1));
    assert!(found.heads.iter().all(|head| head.verdict() == NormVerdict::NotApplicable));
    assert!(found.heads[0].reason.contains("capped"));
    let found = report(&model("mistral"), None, &tokens(1));
    assert!(found.heads[0].reason.contains("window"));
    assert!(found.heads.iter().all(|head| head.degree.is_none()));
}

fn layer<'a>(rows: &'a [Vec<f32>; 3], shape: &'a Attention) -> Layer<'a> {
    let whole = std::slice::from_ref(&(0..4));
    Layer {
        index: 0,
        shape,
        sequences: whole,
        input: &rows[0],
        hidden: 3,
        raw: [&rows[1], &rows[2]],
        turned: [&rows[1], &rows[2]],
        matrix: &[1.0, 0.0, 2.0, 0.0, -1.0, 0.5],
        added: [None, None],
        keys_trained: false,
    }
}

#[test]
fn sizes_scale_with_the_inputs() {
    let shape = Attention {
        heads: 1,
        kv_heads: 1,
        dim: 2,
        scale: 0.5,
        softcap: None,
        causal: true,
        window: None,
    };
    let rows = [
        vec![0.5, -0.25, 1.5, 0.0, 0.5, 0.25, -2.0, 0.5, 0.0, 1.0, 1.0, 1.0],
        vec![1.0, -0.5, 0.25, 0.75, -1.25, 0.5, 0.125, 0.0],
        vec![0.5, 0.5, -0.75, 1.0, 0.25, 0.25, 1.5, -0.5],
    ];
    let twice = rows.each_ref().map(|rows| rows.iter().map(|v| 2.0 * v).collect::<Vec<f32>>());
    let usual = Factoring::default();
    let once = layer(&rows, &shape).heads(&usual).unwrap().remove(0);
    let found = layer(&twice, &shape).heads(&usual).unwrap().remove(0);
    // By hand: q [-1.25, 0.5] times the matrix is [-1.25, -0.5, -2.25].
    assert_eq!((once.query, once.key, once.input, once.composed), (1.25, 1.5, 2.0, 2.25));
    // Scale 1/2 and 2 channels: entries are as they are.
    assert_eq!((once.partial_gamma, once.full_gamma), (1.5, 2.25));
    for (found, once) in [
        (found.query, once.query),
        (found.composed, once.composed),
        (found.partial_gamma, once.partial_gamma),
        (found.full_gamma, once.full_gamma),
        (found.margin, once.margin),
    ] {
        assert_eq!(found, 2.0 * once);
    }
    assert_eq!(found.largest_score, 4.0 * once.largest_score);
    let mut broken = rows.clone();
    broken[1][3] = f32::INFINITY;
    let error = layer(&broken, &shape).heads(&usual).unwrap_err();
    assert_eq!(error.reason(), Reason::NonFinite);
}

#[test]
fn effective_ranks_by_hand() {
    assert!((effective_rank(&[1.0, 0.0, 0.0, 1.0], 2) - 2.0).abs() < 1e-6);
    assert!((effective_rank(&[0.5, 0.5, 0.5, 0.5], 2) - 1.0).abs() < 1e-6);
    // Singular values squared 1 and 1/4: (5/4)^2 / (17/16).
    assert!((effective_rank(&[1.0, 0.0, 0.0, 0.5], 2) - 25.0 / 17.0).abs() < 1e-6);
}

#[test]
fn bad_options_are_named() {
    let good = v1::NormBounds { dataset: "datasets/d".into(), ..Default::default() };
    assert!(check(&good, 4096).is_ok());
    let field = |change: &dyn Fn(&mut v1::NormBounds)| {
        let mut options = good.clone();
        change(&mut options);
        check(&options, 4096).unwrap_err().violations()[0].field.clone()
    };
    assert_eq!(field(&|o| o.dataset.clear()), "dataset");
    assert_eq!(field(&|o| o.sequences = Some(0)), "sequences");
    assert_eq!(field(&|o| o.sequences = Some(u32::MAX)), "sequences");
    assert_eq!(field(&|o| (o.sequences, o.tokens) = (Some(8), Some(4096))), "sequences");
    assert_eq!(field(&|o| o.tokens = Some(1)), "tokens");
    assert_eq!(field(&|o| o.tokens = Some(4097)), "tokens");
    let bad = v1::FactoredAttention { eps: Some(0.0), ..Default::default() };
    assert_eq!(field(&|o| o.factored = Some(bad)), "factored.eps");
}

#[test]
fn percentiles_of_scores_by_hand() {
    let shape = Attention {
        heads: 1,
        kv_heads: 1,
        dim: 1,
        scale: 0.5,
        softcap: None,
        causal: false,
        window: None,
    };
    // One score of 100 in size, 118 of 1 (its row and its column), the others of 0.01: of 3600 the fourth
    // from the top is the percentile.
    let n = 60;
    let mut queries = vec![0.2_f32; n];
    let mut keys = vec![0.1_f32; n];
    (queries[7], keys[31]) = (20.0, -10.0);
    let input = vec![1.0; n];
    let whole = std::slice::from_ref(&(0..60));
    let layer = Layer {
        index: 0,
        shape: &shape,
        sequences: whole,
        input: &input,
        hidden: 1,
        raw: [&queries, &keys],
        turned: [&queries, &keys],
        matrix: &[1.0],
        added: [None, None],
        keys_trained: false,
    };
    let found = Scores::of(&layer, 0, 0);
    assert_eq!(found.largest, 100.0);
    assert!((found.usual - 1.0).abs() < 1e-6, "{}", found.usual);
}

#[test]
fn sizes_of_the_adapters_part_are_those_of_its_products() {
    // Where the base gives nothing, queries and keys are what the adapter adds.
    let mut model = model("llama");
    for which in ["q_proj", "k_proj"] {
        let name = format!("model.layers.0.self_attn.{which}.weight");
        let shape = model.weights[&name].shape().to_vec();
        let zeros = vec![0.0; shape.iter().product()];
        let dense = crate::nn::weight::Dense::from_f32(shape, &zeros, crate::nn::dtype::Dtype::F32);
        model.weights.insert(name, Arc::new(Weight::Dense(dense.unwrap())));
    }
    let adapter = adapter(&model, |name| name.contains("q_proj") || name.contains("k_proj"));
    let found = report(&model, Some(&adapter), &tokens(1));
    for head in &found.heads[..4] {
        assert!(head.adapter_query > 0.0 && head.adapter_key > 0.0);
        assert!(near(head.adapter_query, head.query, 1e-4), "{head:?}");
        assert!(near(head.adapter_key, head.key, 1e-4), "{head:?}");
    }
    for base in &found.base_heads[..4] {
        assert_eq!((base.query, base.key, base.composed), (0.0, 0.0, 0.0));
    }
}
