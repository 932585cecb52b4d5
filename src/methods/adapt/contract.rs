//! The contract of methods that tune: what every registered one must do, on tiny random models of each of its
//! families, through the real loop. A new method takes part without a line here but its count.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::export::{self, About};
use super::gradients::Collector;
use super::learner::Learner;
use super::module::{Core, Factor, Part, Start};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Needs, Setup, merge, moments, native, registry};
use crate::calibrate::Windows;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Reason, Result};
use crate::formats::peft;
use crate::formats::peft::contents::Contents;
use crate::methods::compress::round_to_nearest;
use crate::methods::docs;
use crate::models::{AnyModel, decoder, encoder};
use crate::nn::ops::{Network as _, Pool, Precision, Run as Pass, Sequences, Tape};
use crate::nn::tuning::{Frozen, Tuning};
use crate::nn::weight::{Grouped, GroupedSpec, Weight};
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;
use crate::train::head;
use crate::train::hooks::{Hooks, Plain};
use crate::train::network::Network;
use crate::train::parameters::Parameters;
use crate::train::run::{Needs as Memory, Run};
use crate::train::settings::Settings;

const RANK: u64 = 3;
const BASIS: u64 = 5;
const STEPS: u64 = 6;

/// A method with options that suit tiny models.
fn adaptation(method: &str) -> v1::Adaptation {
    let adapter = json!({ "r": RANK, "targets": ["all-linear"], "dropout": 0.1 });
    let options = match method {
        "full" | "head_only" | "bitfit" => json!({}),
        "adalora" => json!({
            "adapter": adapter, "target_r": 2, "initial_steps": 1, "final_steps": 1,
        }),
        // Without its first step, which is the only thing that keeps its start from being the base.
        "lora_sb" => json!({
            "adapter": adapter, "init_samples": 4, "init_batch": 2, "keep_first_step": false,
        }),
        // What the default asks for closes all gates within so few updates.
        "sora" => json!({ "adapter": adapter, "xi": 0.02 }),
        "nola" => json!({ "adapter": adapter, "basis_a": BASIS, "basis_b": BASIS }),
        "corda" => json!({
            "adapter": adapter, "mode": "CORDA_MODE_KNOWLEDGE_PRESERVED",
            "context": { "dataset": "datasets/t" },
        }),
        _ => json!({ "adapter": adapter }),
    };
    let given = serde_json::from_value(json!({ method: options })).expect("an adaptation");
    registry::resolve(&given)
}

/// Trained numbers by the formula of the method's paper.
fn count(method: &str, shapes: &Shapes) -> u64 {
    let of_linears = |each: &dyn Fn(u64, u64) -> u64| -> u64 {
        shapes.linears.iter().map(|(_, [out, inn])| each(*out as u64, *inn as u64)).sum()
    };
    let of_tensors = |chosen: &dyn Fn(&str) -> bool| -> u64 {
        shapes.tensors.keys().filter(|name| chosen(name)).map(|name| shapes.elements(name)).sum()
    };
    match method {
        "lora" | "qlora" | "pissa" | "corda" => of_linears(&|out, inn| RANK * (out + inn)),
        "adalora" | "sora" => of_linears(&|out, inn| RANK * (out + inn) + RANK),
        "dora" => of_linears(&|out, inn| RANK * (out + inn) + out),
        "lora_xs" | "lora_sb" => of_linears(&|_, _| RANK * RANK),
        "loldu" => of_linears(&|_, _| RANK),
        "nola" => of_linears(&|_, _| 2 * BASIS),
        "full" => of_tensors(&|_| true),
        "bitfit" => of_tensors(&|name| name.ends_with(".bias")),
        "head_only" => 0,
        other => panic!("say here what {other} trains"),
    }
}

/// A tiny model, and records to learn.
struct World {
    model: AnyModel,
    shapes: Shapes,
    records: Vec<Sequence>,
}

impl World {
    /// With linears in groups of 4 bits, where they are to be quantised.
    fn new(family: &str, quantised: bool) -> Self {
        let decodes = family != encoder::FAMILY;
        let mut model: AnyModel = match decodes {
            true => decoder::random::model(decoder::random::tiny("llama"), 11).unwrap().into(),
            false => encoder::random::model(encoder::random::tiny(), 12).unwrap().into(),
        };
        let shapes = Shapes::of(&model).unwrap();
        let linears = shapes.linears.iter().filter(|_| quantised);
        for (name, shape) in linears {
            let weights = match &mut model {
                AnyModel::Decoder(model) => &mut model.weights,
                AnyModel::Encoder(model) => &mut model.weights,
                _ => panic!("a family that is tuned"),
            };
            let weight = weights.get_mut(name).unwrap();
            let spec = GroupedSpec { bits: 4, group: 16, symmetric: false };
            let codes = round_to_nearest::quantise(&weight.to_f32(), shape[1], spec);
            let packed =
                Grouped::pack(*shape, spec, &codes.codes, &codes.scales, &codes.zeros).unwrap();
            *weight = Arc::new(Weight::Grouped(packed));
        }
        let record = |i: u32| {
            let tokens: Vec<u32> = (0..12).map(|j| (i * 17 + j * j + 3) % 96).collect();
            let target = match decodes {
                true => Target::Next((0..12).map(|j| j > 1).collect()),
                false => Target::Class(i % 3),
            };
            Sequence { tokens, target, line: u64::from(i) + 1 }
        };
        let records = (0..8).map(record).collect();
        Self { model, shapes, records }
    }

    fn head(&self, seed: u64) -> Parameters {
        match &self.model {
            AnyModel::Encoder(model) => {
                let random = Stream::root(seed).child("head");
                head::head(3, model.family.hidden, 1.0, &random).unwrap()
            }
            _ => Parameters::new(),
        }
    }

    fn network(&self) -> Network<'_> {
        Network::new(&self.model, Precision::F32, false).unwrap()
    }

    fn start(&self, method: &dyn Adapt, seed: u64) -> Tuned {
        let progress = Progress::silent();
        let mut setup = Setup {
            weights: self.model.weights(),
            shapes: &self.shapes,
            random: Stream::root(seed),
            progress: &progress,
            first_rate: 1e-3,
            gradients: None,
            moments: None,
        };
        match method.needs().unwrap() {
            Needs::Nothing => method.start(&mut setup).unwrap(),
            Needs::Gradients { samples, batch } => {
                let (network, head) = (self.network(), self.head(seed));
                let mut pass = |i: usize, tuned: &Tuned| {
                    let records: Vec<_> = self.records.iter().skip(i * batch).take(batch).collect();
                    let mut parameters = tuned.parameters();
                    parameters.extend(head.clone());
                    Ok(network.pass(tuned).loss_and_gradients(&records, &parameters)?.1)
                };
                let mut collector = Collector {
                    weights: self.model.weights(),
                    passes: samples / batch,
                    pass: &mut pass,
                    elements: 1 << 20,
                    progress: &progress,
                };
                setup.gradients = Some(&mut collector);
                method.start(&mut setup).unwrap()
            }
            Needs::Moments(asked) => {
                let AnyModel::Decoder(model) = &self.model else { panic!("moments of decoders") };
                let tokens = (0..96u32).map(|i| (i * 31 + i * i * 7 + 5) % 96).collect();
                let windows = Windows { tokens, length: 12, warnings: Vec::new() };
                let normalisation = asked.normalisation;
                let mut collector = moments::Collector {
                    model,
                    windows: &windows,
                    normalisation,
                    progress: &progress,
                };
                setup.moments = Some(&mut collector);
                method.start(&mut setup).unwrap()
            }
        }
    }

    /// Trains for some updates; a run of the same folder goes on.
    fn train(
        &self,
        method: &dyn Adapt,
        seed: u64,
        folder: &Path,
        progress: &Progress,
    ) -> Result<(Tuned, Parameters)> {
        let training: v1::Training = serde_json::from_value(json!({
            "steps": STEPS, "batch_size": 3, "learning_rate": 0.02, "warmup_share": 0.0,
            "weight_decay": 0.01, "checkpoint_every": 2,
        }))
        .unwrap();
        let settings = Settings::read(&training, 1e-3).unwrap();
        let (tuned, head, network) = (self.start(method, seed), self.head(seed), self.network());
        let mut parameters = tuned.parameters();
        parameters.extend(head.clone());
        let mut hooks: Box<dyn Hooks> =
            method.hooks(&tuned, STEPS)?.unwrap_or_else(|| Box::new(Plain));
        let run = Run {
            settings: &settings,
            training: &self.records,
            validation: &[],
            padding: 0,
            masking: None,
            random: Stream::root(seed),
            folder,
            progress,
            needs: Memory { weights: self.model.bytes(), activations: &|_| 0 },
        };
        let mut learner = Learner::new(network.pass(&tuned), &tuned);
        run.train(&mut learner, &mut parameters, hooks.as_mut())?;
        drop(learner);
        Ok((tuned, head))
    }

    /// What a tuned model says: logits, or the scores of its head.
    fn outputs(&self, tuning: &dyn Tuning, head: &Parameters) -> Vec<f32> {
        outputs(&self.model, &self.records, tuning, head)
    }
}

fn outputs(
    model: &AnyModel,
    records: &[Sequence],
    tuning: &dyn Tuning,
    head: &Parameters,
) -> Vec<f32> {
    match model {
        AnyModel::Encoder(_) => {
            let network = Network::new(model, Precision::F32, false).unwrap();
            network.pass(tuning).scores(&records.iter().collect::<Vec<_>>(), head).unwrap()
        }
        AnyModel::Decoder(model) => {
            let ids = &records[0].tokens;
            let tape = Tape::forgetful(&Pool::default());
            let sequences = Sequences::of([ids.len()]);
            let run =
                Pass { tape: &tape, tuning, sequences: &sequences, training: false, read: true };
            let graph = decoder::graph::Graph::new(model, Precision::F32).unwrap();
            let hidden = graph.through(&run, graph.start(&run, ids).unwrap()).unwrap();
            let normed = graph.normed(&run, &hidden).unwrap();
            graph.logits(&run, &normed).unwrap().read().to_vec()
        }
        _ => panic!("a family that is tuned"),
    }
}

/// Runs a check for every method and each family that it tunes here.
fn each(check: impl Fn(&str, &dyn Adapt, &v1::Adaptation, &World)) {
    let families = ["decoder", encoder::FAMILY];
    let worlds = [false, true]
        .map(|quantised| families.map(|family| (family, World::new(family, quantised))));
    for name in docs::adaptations() {
        let adaptation = adaptation(&name);
        let method = registry::method(&adaptation).unwrap();
        let mut checked = 0;
        // QLoRA is for quantised bases only.
        for (family, world) in &worlds[usize::from(name == "qlora")] {
            // The tiny Llama has no biases, and no head but its own.
            let nothing = *family == "decoder" && matches!(&*name, "bitfit" | "head_only");
            if method.card().families.contains(family) && !nothing {
                check(&format!("{name} of a {family}"), method, &adaptation, world);
                checked += 1;
            }
        }
        assert!(checked > 0, "{name} was not checked");
    }
}

fn near(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= tolerance, "{what}: {got} is not {want}");
    }
}

fn values(parameters: &Parameters) -> BTreeMap<String, Vec<f32>> {
    let flat = |p: &crate::train::parameters::Parameter| p.var.flatten_all().unwrap().to_vec1();
    parameters.iter().map(|(name, p)| (name.clone(), flat(p).unwrap())).collect()
}

/// Everything of the modules that is kept and not trained.
fn frozen(tuned: &Tuned) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for (linear, module) in &tuned.modules {
        let mut put = |what: &str, values: Vec<f32>| {
            all.insert(format!("{linear} {what}"), values);
        };
        let fixed = |part: &Part| match part {
            Part::Fixed(_) => Some(part.values().unwrap()),
            Part::Trained(_) => None,
        };
        for (what, factor) in [("a", &module.a), ("b", &module.b)] {
            if let Factor::Plain(part) = factor
                && let Some(values) = fixed(part)
            {
                put(what, values);
            }
        }
        if let Core::Matrix(part) | Core::Diagonal(part) = &module.core
            && let Some(values) = fixed(part)
        {
            put("core", values);
        }
        let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        match &module.start {
            Some(Start::Factors { a, b }) => {
                put("start a", flat(a));
                put("start b", flat(b));
            }
            Some(Start::Diagonal(start)) => put("start", flat(start)),
            None => {}
        }
    }
    all
}

fn trained(world: &World, method: &dyn Adapt, seed: u64) -> (Tuned, Parameters) {
    let folder = tempfile::tempdir().unwrap();
    world.train(method, seed, folder.path(), &Progress::silent()).unwrap()
}

#[test]
fn counts_are_those_of_the_papers() {
    each(|name, method, _, world| {
        let want = count(method.card().name, &world.shapes);
        assert_eq!(method.check(&world.shapes).unwrap().parameters, want, "{name}");
        assert_eq!(world.start(method, 1).count(), want, "{name}");
    });
}

#[test]
fn a_start_is_the_base_and_so_is_what_is_switched_off() {
    each(|name, method, _, world| {
        let head = world.head(1);
        let base = world.outputs(&Frozen, &head);
        let started = world.outputs(&world.start(method, 1), &head);
        // LoRA-XS starts beside the base.
        let tolerance = if method.card().name == "lora_xs" { 1e-3 } else { 1e-4 };
        near(&started, &base, tolerance, name);
        let before: Vec<Vec<f32>> = world.model.weights().values().map(|w| w.to_f32()).collect();
        let (tuned, trained_head) = trained(world, method, 1);
        let learnt = world.outputs(&tuned, &trained_head);
        assert!(learnt.iter().zip(&base).any(|(a, b)| (a - b).abs() > 1e-3), "{name}");
        let after: Vec<Vec<f32>> = world.model.weights().values().map(|w| w.to_f32()).collect();
        assert!(before == after, "{name}: the base was touched");
        assert_eq!(world.outputs(&Frozen, &head), base, "{name}: switched off");
    });
}

#[test]
fn only_what_is_promised_has_gradients_and_moves() {
    each(|name, method, _, world| {
        let (tuned, head) = (world.start(method, 1), world.head(1));
        let mut parameters = tuned.parameters();
        parameters.extend(head.clone());
        let network = world.network();
        let records: Vec<_> = world.records.iter().collect();
        let (_, found) = network.pass(&tuned).loss_and_gradients(&records, &parameters).unwrap();
        assert!(!found.is_empty(), "{name}");
        for gradient in found.keys() {
            assert!(parameters.contains_key(gradient), "{name}: {gradient} is not trained");
        }
        for (linear, module) in &tuned.modules {
            let path = super::shapes::module(linear);
            let any = module.trained().iter().any(|(kind, _)| {
                let found = found.get(&format!("{path}.{kind}"));
                let values = found.map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                values.is_some_and(|values| values.iter().any(|v| *v != 0.0))
            });
            assert!(any, "{name}: {linear} cannot learn");
        }
        let (before, fixed) = (values(&parameters), frozen(&tuned));
        let (after, head) = trained(world, method, 1);
        assert!(frozen(&after) == fixed, "{name}: what is frozen moved");
        let mut parameters = after.parameters();
        parameters.extend(head);
        let moved = values(&parameters);
        assert_eq!(moved.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "{name}");
        assert!(moved != before, "{name} learnt nothing");
    });
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_does_not() {
    each(|name, method, _, world| {
        let all = |seed: u64| {
            let (tuned, head) = trained(world, method, seed);
            (tuned.values().unwrap(), values(&head))
        };
        let first = all(1);
        assert!(first == all(1), "{name}");
        assert!(first != all(2), "{name}");
    });
}

#[test]
fn merged_is_unmerged() {
    each(|name, method, _, world| {
        let (tuned, head) = trained(world, method, 1);
        let tuned = method.finish(tuned).unwrap();
        let weights = world.model.weights();
        let mut all = vec![tuned.dense(weights, &Progress::silent()).unwrap()];
        match merge::merge(&tuned, weights, false, &Progress::silent()) {
            Ok(merged) => all.push(merged.weights),
            // Codes would be rounded again.
            Err(error) => {
                assert_eq!(method.card().name, "qlora", "{error}");
                assert_eq!(error.reason(), Reason::ModelUnsuitable);
            }
        }
        let got = world.outputs(&tuned, &head);
        for changed in all {
            let mut whole = world.model.clone();
            match &mut whole {
                AnyModel::Decoder(model) => model.weights.extend(changed),
                AnyModel::Encoder(model) => model.weights.extend(changed),
                _ => panic!("a family that is tuned"),
            }
            near(&outputs(&whole, &world.records, &Frozen, &head), &got, 1e-4, name);
        }
    });
}

#[test]
fn what_is_saved_is_what_is_loaded() {
    each(|name, method, adaptation, world| {
        let (tuned, head) = trained(world, method, 1);
        let tuned = method.finish(tuned).unwrap();
        let got = world.outputs(&tuned, &head);
        let (shapes, weights) = (&world.shapes, world.model.weights());
        let folder = tempfile::tempdir().unwrap();
        native::write(&tuned, adaptation, "digest", folder.path()).unwrap();
        let read = native::read(folder.path(), "digest", shapes, weights).unwrap();
        assert_eq!(read.adaptation, *adaptation, "{name}");
        // Diagonals are stored as what they add, which rounds.
        near(&world.outputs(&read.tuned, &head), &got, 1e-5, name);
        let again = tempfile::tempdir().unwrap();
        native::write(&read.tuned, adaptation, "digest", again.path()).unwrap();
        for file in [native::HEADER, native::TENSORS] {
            let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert!(bytes(folder.path()) == bytes(again.path()), "{name}: {file}");
        }
        if tuned.modules.is_empty() {
            return;
        }
        let none = BTreeMap::new();
        let about = About { shapes, base: "b", task: "CAUSAL_LM", inside: "", heads: &none };
        export::peft(&tuned, &about).unwrap().write(folder.path()).unwrap();
        let files = peft::Folder::read(folder.path()).unwrap();
        let contents = Contents::parse(&files.config, &files.tensors, peft::Use::Keep).unwrap();
        let (loaded, _) = export::load(&contents, "", shapes, weights).unwrap();
        near(&world.outputs(&loaded, &head), &got, 1e-4, name);
    });
}

#[test]
fn a_run_that_was_cut_off_ends_with_the_same_bits() {
    each(|name, method, _, world| {
        let (calm, calm_head) = trained(world, method, 1);
        let folder = tempfile::tempdir().unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let flag = cut.clone();
        let sink = move |_: f64, message: &str| {
            if message.starts_with("training: update 3 ") {
                flag.store(true, Ordering::Relaxed);
            }
        };
        let progress = Progress::new(Arc::new(sink), cut);
        let stopped = world.train(method, 1, folder.path(), &progress).map(|_| ()).unwrap_err();
        assert_eq!(stopped.reason(), Reason::Cancelled, "{name}");
        let (again, head) = world.train(method, 1, folder.path(), &Progress::silent()).unwrap();
        assert!(again.values().unwrap() == calm.values().unwrap(), "{name}");
        assert!(values(&head) == values(&calm_head), "{name}");
    });
}

#[test]
fn bad_options_are_refused_by_name() {
    let bad = [
        ("adapter.r", json!(0)),
        ("adapter.alpha", json!(-1.0)),
        ("adapter.dropout", json!(1.0)),
        ("adapter.targets", json!(["no_such_linear"])),
        ("adapter.rank_pattern", json!({ "(": 2 })),
    ];
    let world = World::new("decoder", false);
    for name in docs::adaptations() {
        let options = docs::options(&name);
        for (path, value) in bad.iter().filter(|(p, _)| options.iter().any(|o| o.name == *p)) {
            let mut json: Value = serde_json::to_value(adaptation(&name)).unwrap();
            let key = json.as_object().unwrap().keys().next().unwrap().clone();
            json[&key]["adapter"][path.trim_start_matches("adapter.")] = value.clone();
            let wrong: v1::Adaptation = serde_json::from_value(json).unwrap();
            let method = registry::method(&wrong).unwrap();
            let error = method.check(&world.shapes).err();
            let error = error.unwrap_or_else(|| panic!("{name} takes {path} = {value}"));
            let field = error.violations().first().map(|v| v.field.clone()).unwrap_or_default();
            assert!(field.starts_with("adapter."), "{name} {path}: {error} ({field})");
        }
    }
}

/// Gradients of a quantised weight are taken through what its codes stand for; the codes stay.
#[test]
fn lora_sb_starts_over_a_quantised_base() {
    let world = World::new("decoder", true);
    let adaptation = adaptation("lora_sb");
    let method = registry::method(&adaptation).unwrap();
    let bytes = |model: &AnyModel| -> Vec<Vec<u8>> {
        let parts = model.weights().values().flat_map(|w| w.parts());
        parts.map(|part| part.data.to_vec()).collect()
    };
    let (before, none) = (bytes(&world.model), Parameters::new());
    let base = world.outputs(&Frozen, &none);
    let started = world.start(method, 1);
    near(&world.outputs(&started, &none), &base, 1e-4, "the start");
    for module in started.modules.values() {
        let ([rows, _], rank) = (module.shape, module.rank);
        let b = module.b.values().unwrap();
        for (i, j) in (0..rank).flat_map(|i| (0..rank).map(move |j| (i, j))) {
            let dot: f32 = (0..rows).map(|r| b[r * rank + i] * b[r * rank + j]).sum();
            let want = if i == j { 1.0 } else { 0.0 };
            assert!((dot - want).abs() < 1e-5, "{}: {dot}", module.linear);
        }
    }
    let (learnt, _) = trained(&world, method, 1);
    let moved = world.outputs(&learnt, &none);
    assert!(moved.iter().zip(&base).any(|(a, b)| (a - b).abs() > 1e-3), "nothing was learnt");
    assert!(bytes(&world.model) == before, "the base was touched");
}

/// A threshold that closes every gate ends the run; the checkpoint before, which has open gates, stays.
#[test]
fn a_threshold_that_closes_all_gates_leaves_the_last_checkpoint() {
    let world = World::new("decoder", false);
    let adaptation: v1::Adaptation = serde_json::from_value(json!({ "sora": {
        "adapter": { "r": RANK, "targets": ["all-linear"] },
        "gates": "SORA_GATES_ONES", "xi": 0.35, "gate_rate": 1e-3,
    } }))
    .unwrap();
    let adaptation = registry::resolve(&adaptation);
    let method = registry::method(&adaptation).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let files = || -> BTreeMap<std::path::PathBuf, Vec<u8>> {
        let entries = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    };
    // 1, 0.65, 0.3, 0: steps of the optimiser hardly matter. Checkpoints come every second update.
    let fails = || {
        let found = world.train(method, 1, folder.path(), &Progress::silent()).map(|_| ());
        let error = found.unwrap_err();
        assert_eq!(error.reason(), Reason::NumericFailure);
        for part in ["xi = 0.35", "step 3"] {
            assert!(error.message().contains(part), "{error} lacks {part}");
        }
    };
    fails();
    let kept = files();
    assert!(!kept.is_empty(), "there is no checkpoint");
    // It is of update 2 and can be gone on from, which ends the same way.
    fails();
    assert_eq!(files(), kept);
}
