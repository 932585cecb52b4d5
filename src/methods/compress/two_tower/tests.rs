//! What scores and shares of two towers promise, on tiny models.

use serde_json::{Value, json};

use super::*;
use crate::calibrate;
use crate::data::captions::Captions;
use crate::data::images::Images;
use crate::data::records::Source;
use crate::data::tokenizer::Tokenizer;
use crate::methods::compress::sparsity::Amount;
use crate::methods::compress::wanda;
use crate::methods::{Datasets, registry};
use crate::models::random;
use crate::models::two_tower::plan::Plan;
use crate::nn::dtype::Dtype;
use crate::nn::weight::Dense;
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;

/// Eight by eight images of a bar in one of four places, with captions.
struct Bars;

impl Datasets for Bars {
    fn source(&self, name: &str) -> Result<Source> {
        Err(Error::not_found(name, "there are images alone"))
    }

    fn images(&self, _: &str) -> Result<Images> {
        let classes: Vec<u8> = (0..40).map(|i| i % 4).collect();
        let pixels = classes.iter().enumerate().flat_map(|(i, class)| {
            (0..64).map(move |p| {
                let bar = p % 8 / 2 == usize::from(*class);
                if bar { 200 } else { ((i * 7 + p * 3) % 40) as u8 }
            })
        });
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect();
        let captions = Captions {
            names: words(&["first", "second", "third", "fourth"]),
            templates: words(&["the {} bar", "{}", "bar: {}"]),
        };
        let pixels = pixels.collect();
        Ok(Images { height: 8, width: 8, channels: 1, pixels, classes, captions })
    }
}

/// Towers of different widths: blocks of 3072 and of 1040 weights.
fn model() -> AnyModel {
    let config = json!({
        "model_type": "two_tower", "image_size": 8, "patch_size": 4, "vocab_size": 256, "embedding_size": 8,
        "image_hidden_size": 16, "image_layers": 2, "image_heads": 2, "text_hidden_size": 10,
        "text_layers": 3, "text_heads": 2, "text_intermediate_size": 32, "max_position_embeddings": 24,
    });
    let mut model = random::model(config, &Stream::root(1)).expect("a model");
    model.set_tokenizer(Some(Arc::new(Tokenizer::bytes().expect("bytes"))));
    model
}

fn run(step: Value, model: &AnyModel, seed: u64) -> Result<AnyOutcome> {
    let step: v1::Step = serde_json::from_value(step).expect("a step");
    let step = registry::resolve(&step);
    let scratch = tempfile::tempdir()?;
    let no_texts = |name: &str| Err(Error::not_found(name, "there are no texts"));
    let mut cx = StepContext {
        random: Stream::root(seed).child("step 0"),
        progress: &Progress::silent(),
        texts: &no_texts,
        calibrations: &calibrate::Shared::default(),
        digest: "towers",
        scratch: scratch.path().to_owned(),
    };
    let mut learning = Learning::new(&Bars, scratch.path().join("kept"));
    let method = registry::method(&step)?;
    method.check_any(&model.info())?;
    method.apply_any(&mut cx, &mut learning, model.clone())
}

fn ecoflap(options: Value) -> Value {
    let mut all = json!({
        "share": 0.6, "max_share": 0.8, "n_data": 16, "batch": 8, "values": "VALUE_TYPE_F32",
        "calibration": { "dataset": "datasets/bars", "sequences": 24 },
    });
    for (key, value) in options.as_object().expect("an object") {
        all[key] = value.clone();
    }
    json!({ "ecoflap": all })
}

fn rows(outcome: &AnyOutcome) -> Vec<(String, f64, u64, u64)> {
    let rows = outcome.record["ecoflap"]["groups"].as_array().expect("groups");
    let row = |row: &Value| {
        let whole = |key: &str| row[key].as_u64().expect("a count");
        let name = row["group"].as_str().expect("a name").to_owned();
        (name, row["score"].as_f64().expect("a score"), whole("kept"), whole("elements"))
    };
    rows.iter().map(row).collect()
}

/// Zeros of the weights whose names begin so.
fn zeros(model: &AnyModel, prefix: &str) -> u64 {
    let own = model.weights().iter().filter(|(name, w)| {
        name.starts_with(prefix) && name.contains(".blocks.") && w.shape().len() == 2
    });
    own.map(|(_, w)| w.to_f32().iter().filter(|v| **v == 0.0).count() as u64).sum()
}

const ALL: u64 = 2 * 3072 + 3 * 1040;

#[test]
fn totals_are_exact_and_floors_and_caps_hold() {
    let model = model();
    for options in [
        json!({}),
        json!({ "group": "ECOFLAP_GROUP_LAYER" }),
        json!({ "aggregate": "ECOFLAP_AGGREGATE_AVERAGE", "separate_noise": true }),
        json!({ "score": "ECOFLAP_SCORE_FIRST" }),
        json!({ "score": "ECOFLAP_SCORE_FISHER", "local": "LOCAL_PRUNER_MAGNITUDE" }),
        json!({ "compare_scores": true }),
        json!({ "score": "ECOFLAP_SCORE_UNIFORM" }),
    ] {
        let outcome = run(ecoflap(options.clone()), &model, 3).expect("pruned");
        let kept = (0.4 * ALL as f64 + 1e-6).floor() as u64;
        assert_eq!(zeros(&outcome.model, ""), ALL - kept, "{options}");
        assert_eq!(outcome.record["total"]["zeros"], ALL - kept);
        let rows = rows(&outcome);
        assert_eq!(rows.iter().map(|row| row.2).sum::<u64>(), kept);
        for (name, score, kept, elements) in &rows {
            let least = (0.2 * *elements as f64).floor() as u64;
            assert!(least.saturating_sub(1) <= *kept && kept <= elements, "{name}: {kept}");
            assert!(*score > 0.0, "{name}");
        }
        let layers = options["group"] == "ECOFLAP_GROUP_LAYER";
        assert_eq!(rows.len(), if layers { 5 * 6 } else { 5 });
        if !layers {
            assert_eq!((rows[1].0.as_str(), rows[4].0.as_str()), ("image block 1", "text block 2"));
        }
        // The rest of the model is as it was, and what is stored is sparse.
        for (name, weight) in outcome.model.weights() {
            let pruned = name.contains(".blocks.") && weight.shape().len() == 2;
            if !pruned {
                assert_eq!(weight.to_f32(), model.weights()[name].to_f32(), "{name}");
            }
        }
        // Kept weights were not changed.
        let name = "image.blocks.0.feed_forward.down.weight";
        let (new, old) = (&outcome.model.weights()[name], model.weights()[name].to_f32());
        assert!(new.to_f32().iter().zip(&old).all(|(n, o)| *n == 0.0 || n == o));
        assert!(matches!(**new, Weight::Sparse(_)));
    }
}

#[test]
fn equal_scores_are_uniform_wanda() {
    let model = model();
    // Of 16, 64, 10 and 32 inputs half are whole numbers.
    let options = json!({ "score": "ECOFLAP_SCORE_UNIFORM", "share": 0.5, "max_share": 0.5 });
    let outcome = run(ecoflap(options), &model, 3).expect("pruned");
    for (name, weight) in outcome.model.weights() {
        if name.contains(".blocks.") && weight.shape().len() == 2 {
            for row in weight.to_f32().chunks(weight.cols()) {
                let zeros = row.iter().filter(|v| **v == 0.0).count();
                assert_eq!(zeros, weight.cols() / 2, "{name}");
            }
        }
    }
    // The mask is Wanda's where rows have equally many zeros.
    let values: Vec<f32> = (0..48).map(|i| ((i * 29 % 48) as f32 - 23.5) / 7.0).collect();
    let norms = [1.0, 0.2, 3.0, 0.7, 1.1, 2.0, 0.1, 0.9];
    let wanted = wanda::mask(&values, &norms, Amount::Share(0.5));
    assert_eq!(wanda_mask(&values, &norms, 24), wanted);
    let uneven = wanda_mask(&values, &norms, 26);
    assert_eq!(uneven.count(), 26);
    assert!(uneven.row_counts().iter().all(|n| (4..=5).contains(n)));
}

#[test]
fn towers_keep_their_totals_where_asked_and_seeds_decide() {
    let model = model();
    let apart =
        |seed: u64| run(ecoflap(json!({ "per_tower": true })), &model, seed).expect("pruned");
    let outcome = apart(3);
    let kept = |n: u64| (0.4 * n as f64 + 1e-6).floor() as u64;
    assert_eq!(zeros(&outcome.model, "image."), 2 * 3072 - kept(2 * 3072));
    assert_eq!(zeros(&outcome.model, "text."), 3 * 1040 - kept(3 * 1040));
    let together = run(ecoflap(json!({})), &model, 3).expect("pruned");
    assert_ne!(zeros(&together.model, "image."), zeros(&outcome.model, "image."));
    assert_eq!(rows(&outcome), rows(&apart(3)));
    assert_ne!(rows(&outcome), rows(&apart(4)));
    // Scores do not ask what the towers share.
    let scores = |outcome: &AnyOutcome| rows(outcome).into_iter().map(|r| r.1).collect::<Vec<_>>();
    assert_eq!(scores(&outcome), scores(&together));
}

#[test]
fn what_the_loss_does_not_use_has_no_score() {
    let mut model = model();
    // Nothing of the second text block's feed-forward network comes out.
    let silent = "text.blocks.1.feed_forward.down.weight";
    let shape = model.weights()[silent].shape().to_vec();
    let none = Dense::from_f32(shape.clone(), &vec![0.0; shape[0] * shape[1]], Dtype::F32);
    let none = Arc::new(Weight::Dense(none.expect("zeros")));
    model.weights_mut().insert(silent.into(), none);
    let options = json!({ "group": "ECOFLAP_GROUP_LAYER", "max_share": 0.7 });
    let outcome = run(ecoflap(options), &model, 3).expect("pruned");
    for (name, score, ..) in rows(&outcome) {
        let unused = name == "text.blocks.1.feed_forward.up.weight";
        assert_eq!(score == 0.0, unused, "{name}: {score}");
    }
}

#[test]
fn differences_agree_with_gradients() {
    let any = model();
    let AnyModel::TwoTower(model) = &any else { panic!("no towers") };
    let images = Bars.images("").expect("images");
    let prompts = Prompts::of(model, &images).expect("captions");
    let data = Data { config: &model.family, images: &images, prompts: &prompts };
    let outcome = run(ecoflap(json!({ "compare_scores": true })), &any, 3).expect("pruned");
    assert!(outcome.record["ecoflap"]["rank_correlation"].is_number());
    // One weight, one batch: half the step sees the same slope.
    let scores = |eps: f64| {
        let options = json!({
            "scope": ["image.blocks.1.attention.value.weight", "text.blocks.2.feed_forward.up.weight"],
            "n_data": 8, "eps": eps,
        });
        let outcome = run(ecoflap(options), &any, 3).expect("pruned");
        rows(&outcome).into_iter().map(|row| row.1).collect::<Vec<_>>()
    };
    for (a, b) in scores(1e-3).iter().zip(scores(5e-4)) {
        assert!(*a > 0.0 && (a / b - 1.0).abs() < 0.05, "{a} {b}");
    }
    // Pairs are drawn once each, and captions are of their classes.
    let drawn = draw((&images, &prompts), 30, v1::CalibrationSampling::Random, &Stream::root(1));
    let numbers: std::collections::BTreeSet<_> = drawn.iter().map(|(image, _)| *image).collect();
    assert_eq!((drawn.len(), numbers.len()), (30, 30));
    assert_eq!(data.patches(&drawn).len(), 30 * 64);
    assert!(drawn.iter().all(|(image, text)| text / 3 == usize::from(images.classes[*image])));
    let first = draw((&images, &prompts), 50, v1::CalibrationSampling::First, &Stream::root(1));
    assert_eq!((first.len(), &first[..3]), (40, &[(0, 0), (1, 4), (2, 8)][..]));
}

/// Share of images that are nearest to a caption of their class.
fn right(model: &AnyModel) -> f64 {
    let AnyModel::TwoTower(model) = model else { panic!("no towers") };
    let images = Bars.images("").expect("images");
    let prompts = Prompts::of(model, &images).expect("captions");
    let plan = Plan::new(&model.family, &model.weights).expect("a plan");
    let captions = plan.texts(prompts.all()).expect("vectors");
    let vectors = plan.images(&images.pixels).expect("vectors");
    let right = vectors.chunks(8).zip(&images.classes).filter(|(image, class)| {
        let product = |text: &[f32]| -> f32 { text.iter().zip(*image).map(|(a, b)| a * b).sum() };
        let scores: Vec<f32> = captions.chunks(8).map(product).collect();
        let top = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        top.is_some_and(|top| top / prompts.each == usize::from(**class))
    });
    right.count() as f64 / images.len() as f64
}

#[test]
fn towers_learn_and_lose_little_to_a_little_pruning() {
    let base = model();
    let drawn = run(json!({ "initialise": {} }), &base, 5).expect("weights").model;
    assert!(drawn.tokenizer().is_some(), "the tokenizer stays");
    assert!(right(&drawn) < 0.9, "{}", right(&drawn));
    let train = json!({ "train": { "training": {
        "dataset": "datasets/bars", "steps": 80, "batch_size": 16, "learning_rate": 0.005,
    } } });
    let trained = run(train, &drawn, 5).expect("trained").model;
    assert!(right(&trained) > 0.9, "{}", right(&trained));
    let pruned = run(ecoflap(json!({ "share": 0.2, "max_share": 0.3 })), &trained, 5);
    assert!(right(&pruned.expect("pruned").model) > 0.7);
}

#[test]
fn bad_input_is_refused_before_the_work() {
    let model = model();
    let refused = |options: Value, model: &AnyModel| {
        let step: v1::Step = serde_json::from_value(ecoflap(options)).expect("a step");
        let step = registry::resolve(&step);
        let error = registry::method(&step).and_then(|m| m.check_any(&model.info())).err();
        let error = error.expect("refused");
        let field = error.violations().first().map(|v| v.field.clone()).unwrap_or_default();
        (error.reason(), field)
    };
    let invalid = |field: &str| (Reason::InvalidOption, field.to_owned());
    let unsuitable = |field: &str| (Reason::ModelUnsuitable, field.to_owned());
    assert_eq!(refused(json!({ "max_share": 0.5 }), &model), invalid("max_share"));
    assert_eq!(refused(json!({ "max_share": 0.99 }), &model), invalid("max_share"));
    assert_eq!(refused(json!({ "batch": 1 }), &model), invalid("batch"));
    assert_eq!(refused(json!({ "calibration": {} }), &model), invalid("calibration.dataset"));
    for local in ["LOCAL_PRUNER_SPARSEGPT", "LOCAL_PRUNER_DSNOT"] {
        assert_eq!(refused(json!({ "local": local }), &model), unsuitable("local"));
    }
    let (reason, field) = refused(json!({ "scope": ["*.mlp.*"] }), &model);
    assert_eq!((reason, field.as_str()), (Reason::TensorNotFound, "scope"));
    let mut mute = model.clone();
    mute.set_tokenizer(None);
    assert_eq!(refused(json!({}), &mute).0, Reason::ModelUnsuitable);
    // Other families have one tower.
    let llama = crate::models::decoder::random::tiny("llama");
    let llama = crate::models::decoder::random::model(llama, 1).expect("a model");
    let one = refused(json!({ "per_tower": true }), &AnyModel::from(llama));
    assert_eq!(one, unsuitable("per_tower"));
    // Broken weights are named.
    let mut broken = model;
    let name = "text.blocks.0.attention.query.weight";
    let nan = Dense::from_f32(vec![10, 10], &[f32::NAN; 100], Dtype::F32).expect("a weight");
    broken.weights_mut().insert(name.into(), Arc::new(Weight::Dense(nan)));
    let error = run(ecoflap(json!({ "score": "ECOFLAP_SCORE_UNIFORM" })), &broken, 1).err();
    assert_eq!(error.expect("refused").reason(), Reason::NonFinite);
    let error = run(ecoflap(json!({})), &broken, 1).err().expect("refused");
    assert_eq!(error.reason(), Reason::NonFinite);
}

#[test]
fn parts_are_whole_and_sum_up() {
    assert_eq!(apportion(10, &[1, 1, 1]), [4, 3, 3]);
    assert_eq!(apportion(7, &[30, 10, 0]), [5, 2, 0]);
    assert_eq!(apportion(0, &[5]), [0]);
    assert_eq!(apportion(3, &[]), Vec::<u64>::new());
}
