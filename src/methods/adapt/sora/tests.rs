use super::super::shapes::testing::minilm;
use super::super::testing::{self, Case, Toy, all_linear};
use super::super::{cut, export};
use super::*;
use crate::formats::peft::Use;
use crate::formats::peft::contents::Contents;

#[test]
fn thresholding_worked_out_by_hand() {
    let xi = 0.5;
    let points = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0].map(|n: f32| n * xi);
    let exact = points.map(|g| proximal(g, xi, SoraProximal::Exact));
    assert_eq!(exact, [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    assert_eq!(proximal(0.75, xi, SoraProximal::Exact), 0.25);
    assert_eq!(proximal(0.75, xi, SoraProximal::Official), 0.0);
    assert_eq!(proximal(1.5, xi, SoraProximal::Official), 1.0);
    assert_eq!(proximal(0.3, 0.0, SoraProximal::Official), 0.3);
}

#[test]
fn thresholds_of_the_stages() {
    let of =
        |growth, xi| thresholds(xi, &Schedule { growth, max: 8.0, stages: 4, target_keep: None });
    assert_eq!(of(SoraGrowth::Linear, 2.0), [2.0, 4.0, 6.0, 8.0]);
    for (got, want) in of(SoraGrowth::ExpLinear, 1.0).iter().zip([1.0, 2.0, 4.0, 8.0]) {
        assert!((got - want).abs() < 1e-12);
    }
    let log = of(SoraGrowth::LogLinear, 0.0);
    assert!(log[0].abs() < 1e-12 && (log[3] - 8.0).abs() < 1e-12);
    assert!((log[1].exp() - 1.0 - (8f64.exp() - 1.0) / 3.0).abs() < 1e-9);
    let mut gates = Gates {
        modules: Vec::new(),
        l1: 0.0,
        kind: SoraProximal::Exact,
        stages: vec![1.0, 2.0, 3.0],
        target_keep: None,
        stopped: None,
        open: 1.0,
        xi: 1.0,
    };
    let place = |step| Place { step, total: 9, rate: 0.0 };
    let all: Vec<f64> = (1..=9).map(|s| gates.stages[gates.stage(place(s))]).collect();
    assert_eq!(all, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]);
    let saved = |stopped: f32| {
        let state = Tensor::new(&[stopped, 0.5], &Device::Cpu).unwrap();
        [("gates".to_owned(), state)].into()
    };
    let mut optimizer = testing::plain_descent();
    gates.restore(saved(1.0), &mut Parameters::new(), &mut optimizer).unwrap();
    assert_eq!((gates.stage(place(9)), gates.metrics()["kept_ranks"]), (1, 0.5));
    assert_eq!(gates.save().unwrap()["gates"].to_vec1::<f32>().unwrap(), [1.0, 0.5]);
    gates.restore(saved(-1.0), &mut Parameters::new(), &mut optimizer).unwrap();
    assert_eq!(gates.stage(place(9)), 2);
}

#[test]
fn the_shared_contract_and_the_cut() {
    let method = v1::Sora { adapter: Some(all_linear(4)), ..Default::default() };
    let case = Case::decoder();
    case.equals_base(&case.start(&method), 0.0);
    case.contract(&method, &["lora_A", "lora_B", GATES]);
    let count = v1::Sora::default().check(&minilm()).unwrap().parameters;
    assert_eq!(count, 16 * 41_472 + 16 * 36);

    // Some gates closed, all gates of one module.
    let tuned = case.start(&method);
    case.disturb(&tuned, 0.3);
    for (i, module) in tuned.modules.values().enumerate() {
        let Core::Diagonal(Part::Trained(gates)) = &module.core else { panic!("gates") };
        let open: [f32; 4] = match i {
            0 => [0.0; 4],
            _ => std::array::from_fn(|j| if (i + j) % 3 == 0 { 0.0 } else { 0.5 + j as f32 }),
        };
        gates.set(&Tensor::new(&open, &Device::Cpu).unwrap()).unwrap();
    }
    let (kept, all) = cut::kept(&tuned).unwrap();
    assert_eq!(all, 84);
    let gated = case.outputs(&tuned);
    let ranks: BTreeMap<String, usize> = tuned
        .modules
        .iter()
        .map(|(name, m)| {
            let Core::Diagonal(core) = &m.core else { panic!("gates") };
            (name.clone(), core.values().unwrap().iter().filter(|g| **g != 0.0).count())
        })
        .collect();
    let tuned = method.finish(tuned).unwrap();
    assert_eq!(tuned.modules.len(), 20);
    assert_eq!(tuned.modules.values().map(|m| m.rank).sum::<usize>(), kept);
    for (name, module) in &tuned.modules {
        assert_eq!(module.rank, ranks[name]);
        // alpha' = s r' keeps the scale.
        assert_eq!(module.scale, 4.0);
    }
    for (got, want) in case.outputs(&tuned).iter().zip(&gated) {
        assert!((got - want).abs() < 1e-4, "{got} is not {want}");
    }
    let sides = |m: &Module| m.rank * (m.shape[0] + m.shape[1]);
    let want: usize = tuned.modules.values().map(sides).sum();
    assert_eq!(tuned.count(), want as u64);
}

fn set(parameters: &Parameters, name: &str, values: &[f32]) {
    let var = &parameters[name].var;
    var.set(&Tensor::from_vec(values.to_vec(), var.shape(), &Device::Cpu).unwrap()).unwrap();
}

#[test]
fn closed_gates_get_no_gradient_and_do_not_decay() {
    let toy = Toy::new(4);
    let method = v1::Sora { adapter: Some(all_linear(3)), ..Default::default() };
    let tuned = toy.start(&method, 1);
    toy.disturb(&tuned, 0.3);
    let mut parameters = tuned.parameters();
    let path = module(&toy.names()[0]).to_owned();
    let [a, b, g] = ["lora_A", "lora_B", GATES].map(|kind| format!("{path}.{kind}"));
    set(&parameters, &g, &[1.0, 0.0, -2.0]);
    let gradients = toy.gradients(0, &tuned, &parameters).unwrap();
    let of = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let row = of(&gradients[&a]);
    let width = row.len() / 3;
    assert!(row[width..2 * width].iter().all(|v| *v == 0.0));
    assert!(row[..width].iter().any(|v| *v != 0.0));
    assert!(of(&gradients[&b]).chunks(3).all(|row| row[1] == 0.0));
    let mut hooks = method.hooks(&tuned, 10).unwrap().unwrap();
    let place = Place { step: 1, total: 10, rate: 0.5 };
    assert!(hooks.penalty(place, &parameters).unwrap().is_none());
    let mut optimizer = testing::descent(0.2);
    let updated = Updated {
        place,
        parameters: &mut parameters,
        gradients: &gradients,
        optimizer: &mut optimizer,
    };
    hooks.after_step(updated).unwrap();
    // xi = 2 / 10.
    for (got, want) in values(&parameters, &g).unwrap().iter().zip([0.8, 0.0, -1.8]) {
        assert!((got - want).abs() < 1e-6);
    }
    let (a_before, b_before) = (values(&parameters, &a).unwrap(), values(&parameters, &b).unwrap());
    let zeros = gradients.iter().map(|(n, g)| (n.clone(), g.zeros_like().unwrap())).collect();
    optimizer.update(&parameters, &zeros, 0.5).unwrap();
    let (a_after, b_after) = (values(&parameters, &a).unwrap(), values(&parameters, &b).unwrap());
    assert_eq!(a_after[width..2 * width], a_before[width..2 * width]);
    // The open rows decay by 0.5 * 0.2.
    assert!((a_after[0] - 0.9 * a_before[0]).abs() < 1e-6);
    for (after, before) in b_after.chunks(3).zip(b_before.chunks(3)) {
        assert_eq!(after[1], before[1]);
        assert!((after[2] - 0.9 * before[2]).abs() < 1e-6);
    }
}

#[test]
fn the_penalty_and_its_gradient() {
    let toy = Toy::new(4);
    let method = v1::Sora {
        adapter: Some(all_linear(2)),
        l1: Some(6.0),
        xi: Some(9.0),
        ..Default::default()
    };
    let tuned = toy.start(&method, 1);
    let mut parameters = tuned.parameters();
    for path in toy.names().iter().map(|n| module(n)) {
        set(&parameters, &format!("{path}.{GATES}"), &[0.5, -1.0]);
    }
    let mut hooks = method.hooks(&tuned, 10).unwrap().unwrap();
    let place = Place { step: 3, total: 10, rate: 0.1 };
    let (added, gradients) = hooks.penalty(place, &parameters).unwrap().unwrap();
    // 6 / 4 gates * (2 * 1.5).
    assert!((added - 4.5).abs() < 1e-6, "{added}");
    let pushed: Vec<f32> = gradients.values().next().unwrap().to_vec1().unwrap();
    assert_eq!(pushed, [1.5, -1.5]);
    let updated = Updated {
        place,
        parameters: &mut parameters,
        gradients: &gradients,
        optimizer: &mut testing::plain_descent(),
    };
    let error = hooks.after_step(updated).unwrap_err();
    assert!(error.message().contains("xi = 9") && error.message().contains("step 3"), "{error}");
}

/// With gates that are ones and stay, and no threshold, this is LoRA.
#[test]
fn without_a_threshold_it_is_lora() {
    let toy = Toy::new(12);
    let adapter = v1::AdapterOptions { alpha: Some(4.0), ..all_linear(3) };
    let sora = v1::Sora {
        adapter: Some(adapter.clone()),
        xi: Some(0.0),
        gates: SoraGates::Ones as i32,
        ..Default::default()
    };
    let lora = v1::Lora { adapter: Some(adapter), ..Default::default() };
    let (gated, plain) = (toy.start(&sora, 1), toy.start(&lora, 1));
    let mut hooks = sora.hooks(&gated, 5).unwrap().unwrap();
    let mut optimizers = [testing::plain_descent(), testing::plain_descent()];
    for step in 1..=5 {
        for (tuned, optimizer) in [&gated, &plain].into_iter().zip(&mut optimizers) {
            let mut parameters = tuned.parameters();
            let mut gradients = toy.gradients(0, tuned, &parameters).unwrap();
            gradients.retain(|name, _| !name.ends_with(GATES));
            optimizer.update(&parameters, &gradients, 0.1).unwrap();
            if std::ptr::eq(tuned, &raw const gated) {
                let place = Place { step, total: 5, rate: 0.1 };
                let parameters = &mut parameters;
                let gradients = &gradients;
                hooks.after_step(Updated { place, parameters, gradients, optimizer }).unwrap();
            }
        }
    }
    let (gated, plain) = (gated.values().unwrap(), plain.values().unwrap());
    for (name, want) in &plain {
        for (got, want) in gated[name].iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{name}");
        }
    }
}

#[test]
fn bad_options_name_their_field() {
    let schedule = |s: v1::SoraSchedule| v1::Sora { schedule: Some(s), ..Default::default() };
    let good = v1::SoraSchedule { growth: 1, xi_max: 1.0, stages: 3, target_keep: None };
    for (options, field) in [
        (v1::Sora { xi: Some(-1.0), ..Default::default() }, "xi"),
        (v1::Sora { l1: Some(f64::NAN), ..Default::default() }, "l1"),
        (v1::Sora { gate_rate: Some(0.0), ..Default::default() }, "gate_rate"),
        (v1::Sora { proximal: 5, ..Default::default() }, "proximal"),
        (schedule(v1::SoraSchedule { stages: 1, ..good }), "schedule.stages"),
        (v1::Sora { xi: Some(2.0), ..schedule(good) }, "schedule.xi_max"),
        (schedule(v1::SoraSchedule { growth: 3, ..good }), "xi"),
        (schedule(v1::SoraSchedule { target_keep: Some(1.5), ..good }), "schedule.target_keep"),
    ] {
        let error = options.check(&minilm()).unwrap_err();
        assert_eq!(error.violations()[0].field, field, "{error}");
    }
}

/// Some gates of a decoder open, all of the first module closed; gives those that are open by module.
fn some_open(tuned: &Tuned) -> BTreeMap<String, usize> {
    let mut kept = BTreeMap::new();
    for (i, (name, module)) in tuned.modules.iter().enumerate() {
        let Core::Diagonal(Part::Trained(gates)) = &module.core else { panic!("gates") };
        let open: [f32; 4] = match i {
            0 => [0.0; 4],
            _ => std::array::from_fn(|j| if (i + j) % 3 == 0 { 0.0 } else { 0.5 - j as f32 }),
        };
        gates.set(&Tensor::new(&open, &Device::Cpu).unwrap()).unwrap();
        kept.insert(name.clone(), open.iter().filter(|g| **g != 0.0).count());
    }
    kept
}

#[test]
fn the_cut_is_the_gated_model_to_the_bit_and_its_files_say_the_ranks() {
    let adapter = v1::AdapterOptions { alpha: Some(4.0), ..all_linear(4) };
    let method = v1::Sora { adapter: Some(adapter), ..Default::default() };
    let case = Case::decoder();
    let tuned = case.start(&method);
    case.disturb(&tuned, 0.05);
    let kept = some_open(&tuned);
    let first = tuned.modules.keys().next().unwrap().clone();
    let gated = case.outputs(&tuned);
    let parts: BTreeMap<String, _> = tuned
        .modules
        .iter()
        .map(|(name, module)| (name.clone(), module.low_rank().unwrap()))
        .collect();
    let cut = method.finish(tuned).unwrap();
    assert!(!cut.modules.contains_key(&first) && cut.modules.len() == 20);
    for (name, module) in &cut.modules {
        assert_eq!(module.rank, kept[name], "{name}");
        assert_eq!(module.low_rank().unwrap(), parts[name], "{name}");
    }
    for (got, want) in case.outputs(&cut).iter().zip(&gated) {
        assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "{got} is not {want}");
    }

    let none = BTreeMap::new();
    let about = export::About {
        shapes: case.shapes(),
        base: "base",
        task: "CAUSAL_LM",
        inside: "",
        heads: &none,
    };
    let files = export::peft(&cut, &about).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&files.config).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let targets: Vec<String> =
        config["target_modules"].as_array().unwrap().iter().map(text).collect();
    assert!(targets.len() == 20 && !targets.contains(&module(&first).to_owned()));
    let usual = config["r"].as_u64().unwrap();
    let usual_alpha = config["lora_alpha"].as_f64().unwrap();
    for (name, rank) in kept.iter().filter(|(name, _)| **name != first) {
        let path = module(name);
        let written = config["rank_pattern"][path].as_u64().unwrap_or(usual);
        assert_eq!(written, *rank as u64, "{name}");
        // The scale is 1, so alpha is the rank.
        let alpha = config["alpha_pattern"][path].as_f64().unwrap_or(usual_alpha);
        assert!((alpha - *rank as f64).abs() < 1e-9, "{name}: {alpha}");
    }
    let contents = Contents::parse(&files.config, &files.tensors, Use::Keep).unwrap();
    let (loaded, _) = export::load(&contents, "", case.shapes(), case.weights()).unwrap();
    for (name, module) in &loaded.modules {
        assert_eq!((module.rank, module.scale), (kept[name], 1.0), "{name}");
    }
    for (got, want) in case.outputs(&loaded).iter().zip(&gated) {
        assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{got} is not {want}");
    }
}

/// The toy's two modules with gates that are given, and what happens after a step.
struct Gated {
    tuned: Tuned,
    parameters: Parameters,
    hooks: Box<dyn Hooks>,
    optimizer: Optimizer,
    gates: [String; 2],
}

impl Gated {
    fn new(method: &v1::Sora, steps: u64) -> Self {
        let toy = Toy::new(4);
        let tuned = toy.start(method, 1);
        let hooks = method.hooks(&tuned, steps).unwrap().unwrap();
        let gates = [0, 1].map(|i| format!("{}.{GATES}", module(&toy.names()[i])));
        let parameters = tuned.parameters();
        Self { tuned, parameters, hooks, optimizer: testing::plain_descent(), gates }
    }

    fn after(&mut self, step: u64, total: u64) {
        let gradients = Gradients::new();
        let updated = Updated {
            place: Place { step, total, rate: 0.1 },
            parameters: &mut self.parameters,
            gradients: &gradients,
            optimizer: &mut self.optimizer,
        };
        self.hooks.after_step(updated).unwrap();
    }
}

#[test]
fn shares_of_open_gates_are_counted_and_closed_ones_open_again() {
    let method = v1::Sora { adapter: Some(all_linear(3)), xi: Some(0.25), ..Default::default() };
    let mut toy = Gated::new(&method, 10);
    let [one, two] = toy.gates.clone();
    set(&toy.parameters, &one, &[1.0, 0.25, -0.75]);
    set(&toy.parameters, &two, &[0.125, 0.0, -0.5]);
    toy.after(1, 10);
    assert_eq!(values(&toy.parameters, &one).unwrap(), [0.75, 0.0, -0.5]);
    assert_eq!(values(&toy.parameters, &two).unwrap(), [0.0, 0.0, -0.25]);
    assert_eq!(toy.hooks.metrics()["kept_ranks"], 0.5);
    assert_eq!(cut::kept(&toy.tuned).unwrap(), (3, 6));
    // A gate is not held: a step of more than the threshold opens it.
    let push = Tensor::new(&[0f32, -10.0, 0.0], &Device::Cpu).unwrap();
    let gradients = [(one.clone(), push)].into();
    toy.optimizer.update(&toy.parameters, &gradients, 0.1).unwrap();
    toy.after(2, 10);
    assert_eq!(values(&toy.parameters, &one).unwrap(), [0.5, 0.75, -0.25]);
    assert_eq!(toy.hooks.metrics()["threshold"], 0.25);
}

#[test]
fn the_threshold_rises_until_few_enough_are_left() {
    let schedule = v1::SoraSchedule {
        growth: SoraGrowth::Linear as i32,
        xi_max: 1.0,
        stages: 3,
        target_keep: Some(0.5),
    };
    let method = v1::Sora {
        adapter: Some(all_linear(3)),
        xi: Some(0.0),
        schedule: Some(schedule),
        ..Default::default()
    };
    let mut toy = Gated::new(&method, 9);
    let gates = toy.gates.clone();
    for gate in &gates {
        set(&toy.parameters, gate, &[0.4, 0.4, 9.0]);
    }
    let mut seen = Vec::new();
    for step in 1..=9 {
        toy.after(step, 9);
        let metrics = toy.hooks.metrics();
        seen.push((metrics["threshold"], metrics["kept_ranks"]));
    }
    // Nothing happens at 0; 0.5 leaves a third, which is less than a half: 1 never comes.
    assert!(seen[..3].iter().all(|s| *s == (0.0, 1.0)), "{seen:?}");
    assert!(seen[3..].iter().all(|s| *s == (0.5, 1.0 / 3.0)), "{seen:?}");
    assert_eq!(values(&toy.parameters, &gates[0]).unwrap(), [0.0, 0.0, 6.0]);
    // Where it starts at two over the updates, it does not fall from there.
    let fall = v1::Sora { xi: None, ..method };
    assert!(fall.hooks(&toy.tuned, 2).is_ok());
    let error = fall.hooks(&toy.tuned, 1).err().expect("refused");
    assert_eq!(error.violations()[0].field, "schedule.xi_max");
}

#[test]
fn gates_have_a_rate_of_their_own_and_never_decay() {
    let method =
        v1::Sora { adapter: Some(all_linear(3)), gate_rate: Some(0.25), ..Default::default() };
    let tuned = Toy::new(4).start(&method, 1);
    for (name, parameter) in tuned.parameters() {
        let gate = name.ends_with(GATES);
        assert_eq!(parameter.rate, if gate { 0.25 } else { 1.0 }, "{name}");
        assert_eq!(parameter.decay, !gate, "{name}");
    }
    // Gates are normal where nothing is said.
    let many = v1::Sora { adapter: Some(all_linear(20)), ..Default::default() };
    let tuned = Case::decoder().start(&many);
    let gates: Vec<f32> = tuned
        .values()
        .unwrap()
        .into_iter()
        .filter(|(name, _)| name.ends_with(GATES))
        .flat_map(|(_, gates)| gates)
        .collect();
    assert_eq!(gates.len(), 21 * 20);
    let square = gates.iter().map(|g| g * g).sum::<f32>() / 420.0;
    assert!((square - 1.0).abs() < 0.35, "{square}");
    let zero = v1::Sora { adapter: Some(all_linear(0)), ..Default::default() };
    assert_eq!(zero.check(&minilm()).unwrap_err().violations()[0].field, "adapter.r");
}
