//! Both forwards against each other, gradients against differences, and what configurations are refused.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use serde_json::{Value, json};

use super::graph::{Graph, Pairs};
use super::plan::{Inputs, Plan, patches};
use super::prompts::{Prompts, Texts};
use super::{Config, Model, Side, TEMPERATURE, random};
use crate::data::captions::Captions;
use crate::data::images::Images;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Reason, Result};
use crate::kernels::training::contrast::normalised;
use crate::nn::ops::{Pool, Tape};
use crate::nn::tuning::{Frozen, Tuning};
use crate::nn::weight::{Sparse, ValueFormat, Weight};
use crate::seed::Stream;

/// Variables in the place of tensors.
#[derive(Clone)]
struct Trained(BTreeMap<String, Var>);

impl Tuning for Trained {
    fn linear(&self, _: &str, _: &Tensor, _: &Arc<Weight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.0.get(name).map(|var| var.as_tensor().clone()))
    }
}

fn tiny() -> Value {
    json!({
        "model_type": "two_tower", "image_size": 8, "num_channels": 2, "patch_size": 4, "vocab_size": 256,
        "image_hidden_size": 16, "image_layers": 2, "image_heads": 2, "text_hidden_size": 12,
        "text_layers": 3, "text_heads": 3, "text_intermediate_size": 20, "embedding_size": 6,
        "max_position_embeddings": 9, "image_mean": 0.3, "image_std": 0.4,
    })
}

fn model() -> Model {
    let mut model = random::model(tiny(), &Stream::root(4)).unwrap();
    // Norms and biases that do something.
    let names: Vec<String> = model.weights.keys().cloned().collect();
    for (i, name) in names.iter().enumerate() {
        let weight = &model.weights[name];
        if weight.shape().len() == 1 && name != TEMPERATURE {
            let shift = |(j, v): (usize, f32)| v + ((i * 31 + j * 7) % 11) as f32 / 40.0 - 0.12;
            let values: Vec<f32> = weight.to_f32().into_iter().enumerate().map(shift).collect();
            let shape = weight.shape().to_vec();
            let new =
                crate::nn::weight::Dense::from_f32(shape, &values, crate::nn::dtype::Dtype::F32);
            model.weights.insert(name.clone(), Arc::new(Weight::Dense(new.unwrap())));
        }
    }
    model
}

fn pixels(count: usize) -> Vec<u8> {
    (0..count * 128).map(|i| ((i * 37 + i / 128 * 91) % 256) as u8).collect()
}

fn texts() -> Texts {
    let all: [&[u32]; 3] = [&[5, 9, 200, 3], &[255], &[1, 1, 2, 3, 5, 8, 13, 21, 34]];
    Texts::of(all)
}

fn near(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn the_graph_equals_the_plan_in_every_layout() {
    let mut model = model();
    for pruned in [false, true] {
        if pruned {
            for name in
                ["image.blocks.1.feed_forward.up.weight", "text.blocks.0.attention.key.weight"]
            {
                let weight = &model.weights[name];
                let mut values = weight.to_f32();
                values.iter_mut().step_by(2).for_each(|v| *v = 0.0);
                let shape = [weight.rows(), weight.cols()];
                let sparse = Sparse::from_dense(shape, &values, ValueFormat::F32, None).unwrap();
                model.weights.insert(name.to_owned(), Arc::new(Weight::Sparse(sparse)));
            }
        }
        let plan = Plan::new(&model.family, &model.weights).unwrap();
        let graph = Graph::new(&model).unwrap();
        let pool = Pool::default();
        let tape = Tape::forgetful(&pool);
        let pixels = pixels(3);
        let mut rows = pool.take(pixels.len());
        patches(&model.family, &pixels, &mut rows);
        let slow = graph.images(&tape, &Frozen, rows).unwrap();
        near(&normalised(&slow.read(), 6), &plan.images(&pixels).unwrap());
        let texts = texts();
        let slow = graph.texts(&tape, &Frozen, &texts).unwrap();
        near(&slow.read(), &plan.embed(Side::Text, &Inputs::Texts(&texts)).unwrap());
        let each: Vec<Vec<u32>> =
            texts.ranges.iter().map(|r| texts.tokens[r.clone()].to_vec()).collect();
        near(&normalised(&slow.read(), 6), &plan.texts(&each).unwrap());
    }
}

#[test]
fn patches_by_hand() {
    let config = Config::from_hugging_face(&tiny()).unwrap();
    let image: Vec<u8> = (0..128).collect();
    let mut rows = vec![0.0; 128];
    patches(&config, &image, &mut rows);
    let value = |byte: f32| (byte / 255.0 - 0.3) / 0.4;
    // The second patch begins at the fifth pixel of two channels, its second row eight pixels on.
    for (at, byte) in [(0, 0.0), (7, 7.0), (8, 16.0), (32, 8.0), (40, 24.0), (64, 64.0)] {
        assert!((rows[at] - value(byte)).abs() < 1e-5, "{at}: {} {byte}", rows[at]);
    }
}

#[test]
fn gradients_of_the_loss_are_differences() {
    let model = model();
    let graph = Graph::new(&model).unwrap();
    let var = |values: Vec<f32>, weight: &Weight| {
        Var::from_vec(values, weight.shape(), &Device::Cpu).unwrap()
    };
    let all = model.weights.iter().map(|(name, w)| (name.clone(), var(w.to_f32(), w)));
    let trained = Trained(all.collect());
    let (pixels, texts) = (pixels(4), texts());
    let captions: Arc<[u32]> = [0, 2, 1, 0].into();
    let classes = [0, 1, 1, 0];
    let pool = Pool::default();
    let loss = |trained: &Trained, gradients: Option<&mut BTreeMap<String, Tensor>>| -> f64 {
        let tape = Tape::new(&pool);
        let mut rows = pool.take(pixels.len());
        patches(&model.family, &pixels, &mut rows);
        let pairs = Pairs { patches: rows, texts: &texts, captions: &captions, classes: &classes };
        let loss = graph.loss(&tape, trained, pairs).unwrap();
        if let Some(gradients) = gradients {
            let names: HashMap<_, _> =
                trained.0.iter().map(|(name, var)| (var.id(), (&name[..], var))).collect();
            let mut one = pool.take(1);
            one[0] = 1.0;
            let taken = tape.backward(&loss.value, one.into()).unwrap();
            taken.collect(&names, gradients).unwrap();
        }
        loss.sums.loss
    };
    let mut gradients = BTreeMap::new();
    loss(&trained, Some(&mut gradients));
    assert_eq!(gradients.len(), model.weights.len(), "every tensor has a gradient");
    for (name, weight) in &model.weights {
        let slopes = gradients[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // The element that matters most.
        let order = |a: &usize, b: &usize| slopes[*a].abs().total_cmp(&slopes[*b].abs());
        let at = (0..slopes.len()).max_by(order).unwrap();
        let side = |by: f32| {
            let mut values = weight.to_f32();
            values[at] += by;
            let mut moved = trained.clone();
            moved.0.insert(name.clone(), var(values, weight));
            loss(&moved, None)
        };
        let step = 4e-3;
        let slope = (side(step) - side(-step)) / f64::from(2.0 * step);
        let found = f64::from(slopes[at]);
        let room = 2e-3 + 0.03 * found.abs();
        assert!((slope - found).abs() < room, "{name}[{at}]: {slope} {found}");
    }
}

#[test]
fn captions_become_tokens_once() {
    let mut model = model();
    let captions = Captions {
        names: ["ab", "c"].map(str::to_owned).to_vec(),
        templates: ["{}!", "a {}"].map(str::to_owned).to_vec(),
    };
    let images = Images {
        height: 8,
        width: 8,
        channels: 2,
        pixels: pixels(2),
        classes: vec![0, 1],
        captions,
    };
    assert_eq!(Prompts::of(&model, &images).unwrap_err().reason(), Reason::ModelUnsuitable);
    model.tokenizer = Some(Arc::new(Tokenizer::bytes().unwrap()));
    let prompts = Prompts::of(&model, &images).unwrap();
    assert_eq!((prompts.classes(), prompts.each, prompts.all().len()), (2, 2, 4));
    assert_eq!(prompts.all()[1], "a ab".bytes().map(u32::from).collect::<Vec<_>>());
    let (texts, at) = prompts.pick(&[2, 0, 2, 1]).unwrap();
    assert_eq!(&at[..], [0, 1, 0, 2]);
    assert_eq!(texts.tokens, b"c!ab!a ab".map(u32::from));
    assert_eq!(&texts.ranges[..], [0..2, 2..5, 5..9]);
    assert!(prompts.pick(&[4]).is_err());
    let refused = |change: &dyn Fn(&mut Images)| {
        let mut images = images.clone();
        change(&mut images);
        Prompts::of(&model, &images).unwrap_err().reason()
    };
    let unsuitable = Reason::DatasetUnsuitable;
    assert_eq!(refused(&|i| i.captions = Captions::default()), unsuitable);
    assert_eq!(refused(&|i| i.classes[0] = 2), unsuitable);
    assert_eq!(refused(&|i| i.channels = 1), unsuitable);
    assert_eq!(refused(&|i| i.captions.templates[0] = "ten tokens{}".into()), unsuitable);
    assert_eq!(
        refused(&|i| i.captions = Captions { names: vec![String::new(); 2], templates: vec![] }),
        unsuitable
    );
}

#[test]
fn sizes_are_those_that_were_asked_for() {
    let config =
        Config::from_hugging_face(&json!({ "model_type": "two_tower", "vocab_size": 256 }));
    let config = config.unwrap();
    let count = |side: &str| -> usize {
        let own = config.tensors().into_iter().filter(|(name, _)| name.starts_with(side));
        own.map(|(_, shape)| shape.iter().product::<usize>()).sum()
    };
    // About a million and a half, and a million.
    assert!((1_500_000..1_600_000).contains(&count("image.")), "{}", count("image."));
    assert!((1_000_000..1_100_000).contains(&count("text.")), "{}", count("text."));
    let mut half = tiny();
    half["width"] = json!(0.5);
    let half = Config::from_hugging_face(&half).unwrap();
    assert_eq!((half.image.hidden, half.image.intermediate), (8, 32));
    assert_eq!((half.text.hidden, half.text.intermediate), (6, 10));
}

#[test]
fn hostile_configurations_are_refused_by_key() {
    for (key, value) in [
        ("model_type", json!("clip")),
        ("image_size", json!(0)),
        ("image_size", json!(9)),
        ("image_size", json!(1 << 20)),
        ("patch_size", json!(3)),
        ("patch_size", json!(-1)),
        ("num_channels", json!(1.5)),
        ("vocab_size", json!(null)),
        ("vocab_size", json!(u64::MAX)),
        ("image_hidden_size", json!(17)),
        ("image_hidden_size", json!(1e30)),
        ("text_hidden_size", json!("12")),
        ("image_heads", json!(5)),
        ("text_heads", json!(0)),
        ("text_layers", json!(257)),
        ("image_layers", json!([])),
        ("text_intermediate_size", json!(1 << 30)),
        ("embedding_size", json!(0)),
        ("max_position_embeddings", json!(5000)),
        ("layer_norm_eps", json!(0)),
        ("image_std", json!(0)),
        ("image_mean", json!("grey")),
        ("width", json!(0)),
    ] {
        let mut config = tiny();
        config[key] = value.clone();
        let error = Config::from_hugging_face(&config).unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{key} = {value}: {error}");
    }
    // Many small patches would take all memory, and so would the widest of all.
    let mut many = tiny();
    (many["image_size"], many["patch_size"]) = (json!(1024), json!(1));
    assert!(Config::from_hugging_face(&many).unwrap_err().message().contains("patches"));
    let huge = json!({
        "model_type": "two_tower", "vocab_size": 1 << 24, "text_hidden_size": 1 << 14,
        "image_hidden_size": 1 << 14, "image_layers": 256, "text_layers": 256,
    });
    assert!(Config::from_hugging_face(&huge).unwrap_err().message().contains("2^40"));
}

#[test]
fn a_version_and_an_export_come_back_as_they_were() {
    use crate::models::{AnyModel, export, import, package};
    use crate::nn::dtype::Dtype;
    use crate::progress::Progress;

    let mut model = model();
    model.tokenizer = Some(Arc::new(Tokenizer::bytes().unwrap()));
    let name = "image.blocks.0.feed_forward.up.weight";
    let weight = &model.weights[name];
    let mut values = weight.to_f32();
    values.iter_mut().skip(1).step_by(3).for_each(|v| *v = 0.0);
    let shape = [weight.rows(), weight.cols()];
    let sparse = Sparse::from_dense(shape, &values, ValueFormat::F32, None).unwrap();
    model.weights.insert(name.to_owned(), Arc::new(Weight::Sparse(sparse)));
    let any = AnyModel::from(model);
    assert_eq!((any.family(), any.architecture()), ("two_tower", "two_tower"));
    assert!(any.clone().walked().is_err() && any.clone().encoder().is_err());

    let same = |read: &AnyModel, layouts: bool| {
        let (AnyModel::TwoTower(read), AnyModel::TwoTower(written)) = (read, &any) else {
            panic!("no towers");
        };
        assert_eq!(read.family, written.family);
        assert!(read.tokenizer.is_some());
        for (name, weight) in any.weights() {
            assert_eq!(read.weights[name].to_f32(), weight.to_f32(), "{name}");
            assert!(!layouts || read.weights[name].record() == weight.record(), "{name}");
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let names = package::write_any(&any, &json!({}), folder.path()).unwrap();
    let files = names.iter().map(|name| (name.clone(), folder.path().join(name))).collect();
    same(&package::read_any(&files).unwrap(), true);
    let info = package::read_any_info(&files).unwrap();
    assert_eq!((info.family.name(), info.bytes()), ("two_tower", any.bytes()));
    let folder = tempfile::tempdir().unwrap();
    export::dense(&any, folder.path(), Dtype::F32, &Progress::silent()).unwrap();
    same(&import::open_any(folder.path()).unwrap(), false);
}
