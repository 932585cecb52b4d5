use serde_json::json;

use super::super::export::About;
use super::super::testing::{Case, all_linear, low_rank_methods};
use super::super::{Adapt, merge, native};
use super::*;
use crate::models::decoder::plan::adapters::Mix;
use crate::models::decoder::plan::{Cache, Chunk, Decoder};
use crate::models::encoder::plan::adapters::Mix as EncoderMix;
use crate::models::encoder::plan::{Encoder, Input};
use crate::models::{Model, decoder::random, encoder::Pooling, encoder::random as readers};
use crate::nn::dtype::Dtype;
use crate::nn::weight::Dense;
use crate::progress::Progress;

fn paths(folder: &Path) -> BTreeMap<String, PathBuf> {
    let held = FILES.iter().filter(|name| folder.join(name).is_file());
    held.map(|name| ((*name).to_owned(), folder.join(name))).collect()
}

fn text(length: usize, seed: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * 37 + seed * 11 + i * i) % 96) as u32).collect()
}

fn merged(case: &Case, tuned: &Tuned, by: f32) -> AnyModel {
    let merged =
        merge::merge_weighted(tuned, by, case.weights(), false, &Progress::silent()).unwrap();
    let mut model = case.model().clone();
    match &mut model {
        AnyModel::Decoder(model) => model.weights.extend(merged.weights),
        AnyModel::Encoder(model) => model.weights.extend(merged.weights),
        _ => panic!("a family that is tuned"),
    }
    model
}

/// The merged model with the products rounded as a decoder holds them, which are those of the merged model but
/// for that.
fn served(case: &Case, tuned: &Tuned, by: f32) -> Model {
    let mut model = decoder_of(&merged(case, tuned, by));
    let changes = changes(tuned, case.weights()).unwrap();
    for (name, product) in &changes.products {
        let ([rows, cols], base) = (product.shape, case.weights()[name].to_f32());
        let gains = changes.gains.get(name).map_or(vec![0.0; rows], |g| g.to_vec());
        let sum = |round: fn(f32) -> f32| -> Vec<f32> {
            let mut sum = base.clone();
            for (row, sum) in sum.chunks_mut(cols).enumerate() {
                sum.iter_mut().for_each(|v| *v *= 1.0 + by * gains[row]);
                for r in 0..product.rank {
                    let b = by * product.scale * round(product.b[row * product.rank + r]);
                    let a = product.a[r * cols..].iter().take(cols);
                    sum.iter_mut().zip(a).for_each(|(s, a)| *s += b * round(*a));
                }
            }
            sum
        };
        for (got, want) in sum(|v| v).iter().zip(model.weights[name].to_f32()) {
            assert!((got - want).abs() < 1e-5, "{name}: {got} is not {want}");
        }
        let rounded = sum(|v| half::bf16::from_f32(v).to_f32());
        let dense = Dense::from_f32(vec![rows, cols], &rounded, Dtype::F32).unwrap();
        model.weights.insert(name.clone(), Arc::new(Weight::Dense(dense)));
    }
    model
}

fn logits(decoder: &mut Decoder, texts: &[Vec<u32>], mixes: &[Mix]) -> Vec<Vec<f32>> {
    let config = decoder.config().clone();
    let mut caches: Vec<Cache> = texts.iter().map(|t| Cache::new(&config, t.len())).collect();
    let mut chunks: Vec<Chunk<'_>> = texts
        .iter()
        .zip(&mut caches)
        .enumerate()
        // Also with logits of the last tokens alone.
        .map(|(i, (tokens, cache))| Chunk { tokens, cache, logits: i % 2..tokens.len() })
        .collect();
    let mut all = decoder.forward_with(&mut chunks, mixes).unwrap();
    let mut split = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let (own, rest) = all.split_at((text.len() - i % 2) * 96);
        split.push(own.to_vec());
        all = rest;
    }
    split
}

#[track_caller]
fn near(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < 1e-4, "{what}: {got} is not {want}");
    }
}

/// Methods whose results are more than products, with what each needs of a base.
fn more_than_products() -> Vec<(&'static str, Box<dyn Adapt>)> {
    let biases = v1::AdapterOptions { bias: v1::AdapterBias::All as i32, ..all_linear(3) };
    let norms = v1::AdapterOptions {
        modules_to_save: vec![
            "model.norm".into(),
            "input_layernorm".into(),
            "post_attention_layernorm".into(),
            "self_attn.q_norm".into(),
            "self_attn.k_norm".into(),
            "pre_feedforward_layernorm".into(),
            "post_feedforward_layernorm".into(),
        ],
        ..all_linear(2)
    };
    vec![
        ("dora", Box::new(v1::Dora { adapter: Some(all_linear(3)) })),
        ("dora with biases", Box::new(v1::Dora { adapter: Some(biases) })),
        ("norms", Box::new(v1::Lora { adapter: Some(norms), ..Default::default() })),
        ("bitfit", Box::new(v1::BitFit::default())),
        ("lora", Box::new(v1::Lora { adapter: Some(all_linear(4)), ..Default::default() })),
    ]
}

/// Starts a method, without the modules that this base does not have.
fn start(case: &Case, mut method: Box<dyn Adapt>, name: &str) -> Option<Tuned> {
    if name == "norms" {
        let mut options = v1::AdapterOptions { ..all_linear(2) };
        options.modules_to_save = ["norm", "input_layernorm", "post_attention_layernorm", "q_norm"]
            .into_iter()
            .chain(["k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm"])
            .filter(|module| !case.shapes().saved(module).is_empty())
            .map(str::to_owned)
            .collect();
        method = Box::new(v1::Lora { adapter: Some(options), ..Default::default() });
    }
    let tuned = case.try_start(method.as_ref()).ok()?;
    case.disturb(&tuned, 0.1);
    Some(tuned)
}

#[test]
fn batches_of_all_kinds_equal_merged_models() {
    for architecture in ["llama", "qwen2", "qwen3", "gemma3_text"] {
        let case = Case::of_decoder(random::model(random::tiny(architecture), 13).unwrap());
        let mut kinds = Vec::new();
        for (name, method) in more_than_products() {
            let Some(tuned) = start(&case, method, name) else { continue };
            let stored = Stored { tuned, head: None, adaptation: None };
            let Ready::Decoder(fitted) = stored.serving(name, case.model()).unwrap() else {
                panic!("a decoder's")
            };
            assert!(fitted.bytes() > 0);
            kinds.push((name, stored.tuned, Arc::new(fitted)));
        }
        assert!(kinds.len() >= 3, "{architecture}");
        let mut decoder = Decoder::new(&decoder_of(case.model())).unwrap();
        for round in 0..3 {
            // One text without adapters, then one for each kind, whole or in part.
            let weights = [1.0, 0.5, -1.0];
            let texts: Vec<_> =
                (0..=kinds.len()).map(|i| text(2 + (i * 3 + round) % 7, i)).collect();
            let mut mixes = vec![Mix::default()];
            mixes.extend(kinds.iter().map(|(_, _, f)| Mix::new([(f.clone(), weights[round])])));
            let got = logits(&mut decoder, &texts, &mixes);
            for (i, got) in got.iter().enumerate() {
                let (name, whole) = match i.checked_sub(1) {
                    None => ("none", decoder_of(case.model())),
                    Some(kind) => {
                        let (name, tuned, _) = &kinds[kind];
                        (*name, served(&case, tuned, weights[round]))
                    }
                };
                let mut other = Decoder::new(&whole).unwrap();
                let shown = vec![texts[i].clone(); i % 2 + 1];
                let want = logits(&mut other, &shown, &[]);
                near(got, &want[i % 2], &format!("{architecture}, {name}, {round}"));
            }
        }
    }
}

fn decoder_of(model: &AnyModel) -> Model {
    model.clone().decoder().unwrap()
}

#[test]
fn several_adapters_of_one_request_add_up() {
    let case = Case::of_decoder(random::model(random::tiny("qwen2"), 14).unwrap());
    let mut parts = Vec::new();
    let mut all: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for ((name, method), by) in more_than_products().into_iter().zip([0.5, -0.25, 1.0, 2.0]) {
        let Some(tuned) = start(&case, method, name) else { continue };
        for (tensor, weight) in served(&case, &tuned, by).weights {
            let base = case.weights()[&tensor].to_f32();
            let sum = all.entry(tensor).or_insert_with(|| base.clone());
            sum.iter_mut().zip(weight.to_f32()).zip(base).for_each(|((s, w), b)| *s += w - b);
        }
        let stored = Stored { tuned, head: None, adaptation: None };
        let Ready::Decoder(fitted) = stored.serving(name, case.model()).unwrap() else {
            panic!("a decoder's")
        };
        parts.push((Arc::new(fitted), by));
    }
    let mut whole = decoder_of(case.model());
    for (tensor, values) in all {
        let shape = whole.weights[&tensor].shape().to_vec();
        let dense = Dense::from_f32(shape, &values, Dtype::F32);
        whole.weights.insert(tensor, Arc::new(Weight::Dense(dense.unwrap())));
    }
    let texts = [text(9, 3)];
    let got =
        logits(&mut Decoder::new(&decoder_of(case.model())).unwrap(), &texts, &[Mix::new(parts)]);
    near(&got[0], &logits(&mut Decoder::new(&whole).unwrap(), &texts, &[])[0], "a sum");
}

#[test]
fn encoders_with_adapters_equal_merged_models() {
    let case = Case::encoder();
    let AnyModel::Encoder(base) = case.model().clone() else { panic!("an encoder") };
    let saved = v1::AdapterOptions {
        modules_to_save: vec!["LayerNorm".into()],
        bias: v1::AdapterBias::All as i32,
        ..all_linear(2)
    };
    let methods: Vec<(&str, Box<dyn Adapt>)> = vec![
        ("lora", Box::new(v1::Lora { adapter: Some(all_linear(3)), ..Default::default() })),
        ("dora", Box::new(v1::Dora { adapter: Some(all_linear(2)) })),
        ("bitfit", Box::new(v1::BitFit::default())),
        ("norms", Box::new(v1::Dora { adapter: Some(saved) })),
    ];
    let mut kinds = Vec::new();
    for (name, method) in methods {
        let tuned = case.start(method.as_ref());
        case.disturb(&tuned, 0.1);
        let stored = Stored { tuned, head: None, adaptation: None };
        let Ready::Encoder { fitted, head: None } = stored.serving(name, case.model()).unwrap()
        else {
            panic!("an encoder's")
        };
        kinds.push((stored.tuned, Arc::new(fitted.unwrap())));
    }
    // Enough rows for groups on several threads and more than a piece of the wide states.
    let texts: Vec<Vec<u32>> = (0..40).map(|i| text(1 + (i * 29) % 64, i)).collect();
    let inputs: Vec<Input<'_>> =
        texts.iter().map(|tokens| Input { tokens, pooling: Pooling::Mean }).collect();
    let weight = |i: usize| [1.0, -0.5, 2.0][i % 3];
    let mixes: Vec<EncoderMix> = (0..39)
        .map(|i| match i % 5 {
            0 => EncoderMix::default(),
            kind => EncoderMix::new([(kinds[kind - 1].1.clone(), weight(i))]),
        })
        .collect();
    let mut encoder = Encoder::new(&base).unwrap();
    let mut got = vec![Vec::new(); texts.len()];
    encoder.run(&inputs, &mixes, &mut |i, states| got[i] = states.to_vec()).unwrap();
    for (i, got) in got.iter().enumerate() {
        let model = match i % 5 {
            kind if kind > 0 && i < 39 => merged(&case, &kinds[kind - 1].0, weight(i)),
            _ => case.model().clone(),
        };
        let AnyModel::Encoder(model) = model else { panic!("an encoder") };
        let mut want = Vec::new();
        let mut other = Encoder::new(&model).unwrap();
        other.run(&inputs[i..=i], &[], &mut |_, states| want = states.to_vec()).unwrap();
        near(got, &want, &format!("text {i}"));
    }
    // An adapter of a wider encoder is refused before anything runs.
    let mut wide = readers::tiny();
    wide["hidden_size"] = json!(64);
    let wide = readers::model(wide, 1).unwrap();
    let error = Encoder::new(&wide).unwrap().run(&inputs[..2], &mixes[..2], &mut |_, _| {});
    assert_eq!(error.unwrap_err().reason(), Reason::ModelUnsuitable);
}

#[test]
fn whole_matrices_are_to_be_merged() {
    for case in [Case::decoder(), Case::encoder()] {
        let tuned = case.start(&v1::FullTuning::default());
        case.disturb(&tuned, 0.01);
        let folder = tempfile::tempdir().unwrap();
        let lora = v1::Adaptation::default();
        native::write(&tuned, &lora, "sha256:base", folder.path()).unwrap();
        let read = |base| Stored::read(&paths(folder.path()), base, case.model(), case.shapes());
        let stored = read(Base::Any).unwrap();
        assert_eq!(stored.method(), v1::AdapterMethod::Tensors);
        let error = stored.serving("d", case.model()).unwrap_err();
        assert_eq!(error.reason(), Reason::Unsupported);
        assert!(error.message().contains("planish adapters merge"), "{error}");
        assert_eq!(read(Base::Own("sha256:other")).unwrap_err().reason(), Reason::ModelUnsuitable);
        check_mergeable(&stored.tuned, case.model()).unwrap();
        let model = merged(&case, &stored.tuned, 1.0);
        for (name, var) in &tuned.whole {
            let want = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(model.weights()[name].to_f32(), want, "{name}");
        }
    }
}

#[test]
fn a_head_travels_with_its_labels() {
    let case = Case::encoder();
    let tuned = case.start(&v1::Lora { adapter: Some(all_linear(2)), ..Default::default() });
    case.disturb(&tuned, 0.1);
    let labels = ["O".to_owned(), "PER".to_owned()];
    let heads: BTreeMap<String, Plain> = [
        (HEAD_WEIGHT.to_owned(), Plain::new(&[2, 32], (0..64).map(|i| i as f32).collect())),
        (HEAD_BIAS.to_owned(), Plain::new(&[2], vec![0.5, -0.5])),
    ]
    .into();
    let about = About {
        shapes: case.shapes(),
        base: "base",
        task: "TOKEN_CLS",
        inside: INSIDE,
        heads: &heads,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    export::peft(&tuned, &about).unwrap().write(path).unwrap();
    let read =
        |model: &AnyModel, shapes: &Shapes| Stored::read(&paths(path), Base::Any, model, shapes);
    // Without its own files nobody knows what the head reads.
    let error = read(case.model(), case.shapes()).unwrap_err();
    assert_eq!(error.reason(), Reason::UnsupportedFormat);
    write_head(&heads, (Some(Task::Tagging), &labels), "base", path).unwrap();
    let stored = read(case.model(), case.shapes()).unwrap();
    let head = stored.head.as_ref().unwrap();
    assert_eq!((head.task, &head.labels[..]), (Task::Tagging, &labels[..]));
    assert_eq!(head_tensors(head), heads);
    assert_eq!(stored.method(), v1::AdapterMethod::Head);
    assert_eq!(case.outputs(&stored.tuned), case.outputs(&tuned));
    let other = Case::decoder();
    assert_eq!(read(other.model(), other.shapes()).unwrap_err().reason(), Reason::ModelUnsuitable);
    // A head alone is an adapter, and nothing to merge.
    std::fs::remove_file(path.join(peft::CONFIG)).unwrap();
    let alone = read(case.model(), case.shapes()).unwrap();
    assert!(matches!(
        alone.serving("d", case.model()).unwrap(),
        Ready::Encoder { fitted: None, head: Some(_) }
    ));
    let error = check_mergeable(&alone.tuned, case.model()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    let good = std::fs::read_to_string(path.join(HEAD_CONFIG)).unwrap();
    for (from, to, reason) in [
        ("token_classification", "multi_label", Reason::UnsupportedFormat),
        ("token_classification", "regression", Reason::MalformedFile),
        ("\"PER\"", "\"PER\", \"LOC\"", Reason::MalformedFile),
        ("problem_type", "problem", Reason::MalformedFile),
        ("{", "[", Reason::MalformedFile),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        std::fs::write(path.join(HEAD_CONFIG), bad).unwrap();
        let error = read(case.model(), case.shapes()).unwrap_err();
        assert_eq!(error.reason(), reason, "{from}: {error}");
    }
    std::fs::write(path.join(HEAD_CONFIG), good).unwrap();
    std::fs::write(path.join(HEAD_WEIGHTS), b"no").unwrap();
    assert_eq!(read(case.model(), case.shapes()).unwrap_err().reason(), Reason::MalformedFile);
}

#[test]
fn our_own_files_say_the_same_as_those_of_peft() {
    let case = Case::decoder();
    let none = BTreeMap::new();
    let about =
        About { shapes: case.shapes(), base: "base", task: "CAUSAL_LM", inside: "", heads: &none };
    for method in low_rank_methods() {
        let name = method.card().name;
        let tuned = case.start(method.as_ref());
        case.disturb(&tuned, 0.1);
        let folder = tempfile::tempdir().unwrap();
        export::peft(&tuned, &about).unwrap().write(folder.path()).unwrap();
        let adaptation = v1::Adaptation::default();
        native::write(&tuned, &adaptation, "sha256:base", folder.path()).unwrap();
        let read =
            |base| Stored::read(&paths(folder.path()), base, case.model(), case.shapes()).unwrap();
        let (own, others) = (read(Base::Own("sha256:base")), read(Base::Any));
        assert!(own.adaptation.is_some() && others.adaptation.is_none());
        assert_eq!(case.outputs(&own.tuned), case.outputs(&tuned), "{name}");
        for (a, b) in case.outputs(&own.tuned).iter().zip(case.outputs(&others.tuned)) {
            assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{name}: {a}, {b}");
        }
        let same = own.method() == others.method();
        assert!(same && (own.method() == v1::AdapterMethod::Dora) == (name == "dora"), "{name}");
    }
}

#[test]
fn tensors_that_nobody_changed_and_biases_of_factors() {
    let case = Case::decoder();
    let folder = tempfile::tempdir().unwrap();
    let (name, stored) = case.some_linear();
    let [rows, cols] = [stored.rows(), stored.cols()];
    let path = module(name);
    let key = |end: &str| format!("{}{path}.{end}", peft::PREFIX);
    let embedding = &case.weights()["model.embed_tokens.weight"];
    let write = |embedded: Vec<f32>| {
        let tensors = [
            (key("lora_A.weight"), Plain::new(&[1, cols], vec![0.5; cols])),
            (key("lora_B.weight"), Plain::new(&[rows, 1], vec![0.25; rows])),
            (key("lora_B.bias"), Plain::new(&[rows], (0..rows).map(|i| i as f32).collect())),
            (
                format!("{}model.embed_tokens.weight", peft::PREFIX),
                Plain::new(embedding.shape(), embedded),
            ),
        ];
        let config = json!({
            "peft_type": "LORA", "r": 1, "lora_alpha": 2, "lora_bias": true, "bias": "none",
        });
        let serde_json::Value::Object(config) = config else { panic!("an object") };
        Folder::new(config, tensors.into()).unwrap().write(folder.path()).unwrap();
        Stored::read(&paths(folder.path()), Base::Any, case.model(), case.shapes()).unwrap()
    };
    let read = write(embedding.to_f32());
    let changes = changes(&read.tuned, case.weights()).unwrap();
    // The base has no bias: what serves adds one.
    let bias: Vec<f32> = (0..rows).map(|i| 2.0 * i as f32).collect();
    assert_eq!(changes.tensors.keys().collect::<Vec<_>>(), [&format!("{path}.bias")]);
    assert_eq!(&changes.tensors.values().next().unwrap()[..], bias);
    assert!(read.serving("d", case.model()).is_ok());
    let error = check_mergeable(&read.tuned, case.model()).unwrap_err();
    assert!(error.message().contains("no place"), "{error}");
    // A table that did change is a matrix.
    let mut other = embedding.to_f32();
    other[5] += 1.0;
    let error = write(other).serving("d", case.model()).unwrap_err();
    assert_eq!(error.reason(), Reason::Unsupported);
}

#[test]
fn factors_of_embeddings_serve_and_merge() {
    for (case, table, inside) in [
        (
            Case::of_decoder(random::model(random::tiny("llama"), 15).unwrap()),
            "model.embed_tokens",
            "",
        ),
        (
            Case::of_decoder(random::model(random::tiny("gemma3_text"), 15).unwrap()),
            "model.embed_tokens",
            "",
        ),
        (Case::encoder(), "embeddings.word_embeddings", INSIDE),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let key = |end: &str| format!("{}{inside}{table}.{end}", peft::PREFIX);
        let draw = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * step) % 13) as f32 / 32.0 - 0.2).collect()
        };
        let write = |a: [usize; 2], b: [usize; 2]| {
            let tensors = [
                (key("lora_embedding_A"), Plain::new(&a, draw(a[0] * a[1], 5))),
                (key("lora_embedding_B"), Plain::new(&b, draw(b[0] * b[1], 7))),
            ];
            let config = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 3 });
            let serde_json::Value::Object(config) = config else { panic!("an object") };
            Folder::new(config, tensors.into()).unwrap().write(folder.path()).unwrap();
            Stored::read(&paths(folder.path()), Base::Any, case.model(), case.shapes())
        };
        let stored = write([2, 96], [32, 2]).unwrap();
        // Row 7 of the table by hand: 1.5 * B A[.., 7].
        let (a, b) = (draw(192, 5), draw(64, 7));
        let model = merged(&case, &stored.tuned, 1.0);
        let name = format!("{table}.weight");
        let (base, sum) = (case.weights()[&name].to_f32(), model.weights()[&name].to_f32());
        for channel in 0..32 {
            let want = 1.5 * (b[channel * 2] * a[7] + b[channel * 2 + 1] * a[96 + 7]);
            let at = 7 * 32 + channel;
            assert!((sum[at] - base[at] - want).abs() < 1e-6);
        }
        match (stored.serving("d", case.model()).unwrap(), &model) {
            (Ready::Decoder(fitted), AnyModel::Decoder(whole)) => {
                let mixes = [Mix::default(), Mix::new([(Arc::new(fitted), 1.0)])];
                let texts = [text(6, 1), text(9, 2)];
                let mut decoder = Decoder::new(&decoder_of(case.model())).unwrap();
                let got = logits(&mut decoder, &texts, &mixes);
                // One table for both: the merged model would make other logits of its states.
                let mut whole = whole.clone();
                let tied = whole.decoder().unwrap().tied;
                let merging = check_mergeable(&stored.tuned, case.model());
                assert_eq!(merging.is_err(), tied);
                if tied {
                    whole.config["tie_word_embeddings"] = json!(false);
                    let config = decoder::Config::from_hugging_face(&whole.config).unwrap();
                    whole.family = crate::models::Family::Decoder(config);
                    let head = case.weights()[&name].clone();
                    whole.weights.insert("lm_head.weight".into(), head);
                }
                let want = logits(&mut Decoder::new(&whole).unwrap(), &texts, &[]);
                near(&got[1], &want[1], "with a table");
                assert_eq!(got[0], logits(&mut decoder, &texts, &[])[0]);
            }
            (Ready::Encoder { fitted: Some(fitted), .. }, AnyModel::Encoder(whole)) => {
                let AnyModel::Encoder(base) = case.model() else { panic!("an encoder") };
                let texts = [text(6, 1), text(9, 2)];
                let inputs = [0, 1].map(|i| Input { tokens: &texts[i], pooling: Pooling::Cls });
                let mixes = [EncoderMix::default(), EncoderMix::new([(Arc::new(fitted), 1.0)])];
                let run = |model, mixes: &[EncoderMix]| {
                    let mut all = vec![Vec::new(); 2];
                    let see = &mut |i: usize, states: &[f32]| all[i] = states.to_vec();
                    Encoder::new(model).unwrap().run(&inputs, mixes, see).unwrap();
                    all
                };
                let got = run(base, &mixes);
                near(&got[1], &run(whole, &[])[1], "with a table");
                near(&got[0], &run(base, &[])[0], "without");
            }
            _ => panic!("of one family"),
        }
        for (a, b, reason) in [
            ([2, 95], [32, 2], Reason::ModelUnsuitable),
            ([2, 96], [31, 2], Reason::ModelUnsuitable),
            ([2, 96], [32, 3], Reason::MalformedFile),
            ([3, 96], [32, 3], Reason::MalformedFile),
        ] {
            assert_eq!(write(a, b).unwrap_err().reason(), reason, "{a:?} {b:?}");
        }
    }
}
