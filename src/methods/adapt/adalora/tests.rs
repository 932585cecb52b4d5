use super::super::cut::kept;
use super::super::shapes::testing::smollm2;
use super::super::testing::{self, Case, Toy, all_linear};
use super::*;

#[test]
fn the_shared_contract_and_counts() {
    let method =
        v1::Adalora { adapter: Some(all_linear(4)), target_r: Some(2), ..Default::default() };
    let case = Case::decoder();
    let tuned = case.start(&method);
    case.equals_base(&tuned, 0.0);
    assert_eq!(tuned.modules.values().next().unwrap().scale, 4.0 / 4.00001);
    case.contract(&method, &["lora_A", "lora_B", "lora_E"]);
    let count = v1::Adalora::default().check(&smollm2()).unwrap().parameters;
    assert_eq!(count, 12 * 57_600 + 12 * 60);
    let bad = v1::Adalora { target_r: Some(13), ..Default::default() };
    assert_eq!(bad.check(&smollm2()).unwrap_err().violations()[0].field, "target_r");
    let bad = v1::Adalora { beta2: Some(1.0), ..Default::default() };
    assert_eq!(bad.check(&smollm2()).unwrap_err().violations()[0].field, "beta2");
}

#[test]
fn the_budget_falls_as_a_cube() {
    let budget = Budget { first: 24, last: 8, initial: 10, fin: 10, interval: 1, steps: 60 };
    assert_eq!(budget.at(10), Allot::Nothing);
    // Half way: 8 + 16 / 8.
    assert_eq!(budget.at(30), Allot::Choose(10));
    assert_eq!(budget.at(50), Allot::Choose(8));
    assert_eq!(budget.at(51), Allot::Keep);
    let sparse = Budget { interval: 7, ..budget };
    assert_eq!((sparse.at(29), sparse.at(50)), (Allot::Nothing, Allot::Choose(8)));
    assert!(matches!(sparse.at(28), Allot::Choose(_)));
    let counts: Vec<u64> = (11..=50)
        .map(|t| match budget.at(t) {
            Allot::Choose(count) => count,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(counts.is_sorted_by(|a, b| a >= b));
}

#[test]
fn orthogonality_worked_out_by_hand_and_by_differences() {
    let p = from_rows(&[2.0, 0.0], 1, 2);
    // |2 * 2 - 1| = 3 and its slope 2 * 2.
    let (norm, gradient) = orthogonality(&p);
    assert!((norm - 3.0).abs() < 1e-12 && (gradient[(0, 0)] - 4.0).abs() < 1e-12);
    let toy = Toy::new(3);
    let method =
        v1::Adalora { adapter: Some(all_linear(3)), target_r: Some(1), ..Default::default() };
    let tuned = toy.start(&method, 1);
    toy.disturb(&tuned, 0.5);
    let parameters = tuned.parameters();
    let mut hooks = method.hooks(&tuned, 100).unwrap().unwrap();
    let place = Place { step: 1, total: 100, rate: 0.0 };
    let (_, gradients) = hooks.penalty(place, &parameters).unwrap().unwrap();
    assert_eq!(gradients.len(), 4);
    for (name, gradient) in &gradients {
        let var = &parameters[name].var;
        let original = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut loss = |by: f32| {
            let mut values = original.clone();
            values[1] += by;
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
            hooks.penalty(place, &parameters).unwrap().unwrap().0
        };
        let want = (loss(1e-2) - loss(-1e-2)) / 2e-2;
        loss(0.0);
        let got = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()[1];
        assert!((f64::from(got) - want).abs() < 1e-3, "{name}: {got} is not {want}");
    }
}

#[test]
fn as_many_triplets_as_the_budget_says_and_they_can_come_back() {
    let toy = Toy::new(6);
    let method = v1::Adalora {
        adapter: Some(all_linear(4)),
        target_r: Some(2),
        initial_steps: Some(2),
        final_steps: Some(3),
        ..Default::default()
    };
    let tuned = toy.start(&method, 1);
    toy.disturb(&tuned, 0.3);
    let mut parameters = tuned.parameters();
    let mut hooks = method.hooks(&tuned, 12).unwrap().unwrap();
    let mut optimizer = testing::plain_descent();
    let budget = Budget { first: 8, last: 4, initial: 2, fin: 3, interval: 1, steps: 12 };
    let mut closed: Vec<Vec<bool>> = Vec::new();
    for step in 1..=12 {
        let place = Place { step, total: 12, rate: 0.1 };
        let mut gradients = toy.gradients(step as usize % 3, &tuned, &parameters).unwrap();
        let (_, more) = hooks.penalty(place, &parameters).unwrap().unwrap();
        for (name, more) in more {
            let sum = (&gradients[&name] + more).unwrap();
            gradients.insert(name, sum);
        }
        optimizer.update(&parameters, &gradients, 0.1).unwrap();
        let updated = Updated {
            place,
            parameters: &mut parameters,
            gradients: &gradients,
            optimizer: &mut optimizer,
        };
        hooks.after_step(updated).unwrap();
        let (open, _) = kept(&tuned).unwrap();
        match budget.at(step) {
            Allot::Nothing => assert_eq!(open, 8),
            Allot::Choose(count) => assert_eq!(open as u64, count, "step {step}"),
            Allot::Keep => assert_eq!(open, 4),
        }
        assert_eq!(hooks.metrics()["active_ranks"], open as f64);
        let e = tuned.values().unwrap();
        let e = e.iter().filter(|(name, _)| name.ends_with("lora_E"));
        closed.push(e.flat_map(|(_, v)| v.iter().map(|v| *v == 0.0)).collect());
        // Exact resume: what is saved is all there is.
        let state = hooks.save().unwrap();
        let count = state.len();
        hooks = method.hooks(&tuned, 12).unwrap().unwrap();
        hooks.restore(state, &mut parameters, &mut optimizer).unwrap();
        assert_eq!(hooks.save().unwrap().len(), count);
    }
    assert_eq!(closed[8], closed[11], "the last choice stays");
    let a = format!("{}.lora_A", module(&toy.names()[0]));
    assert!(tuned.values().unwrap()[&a].iter().all(|v| *v != 0.0), "A and B stay");
    let before = toy.outputs(&tuned);
    let tuned = method.finish(tuned).unwrap();
    assert_eq!(tuned.modules.values().map(|m| m.rank).sum::<usize>(), 4);
    for (got, want) in toy.outputs(&tuned).iter().zip(before) {
        assert!((got - want).abs() < 1e-5);
    }
    let stranger = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    let state = [("kept/none".to_owned(), stranger)].into();
    assert!(hooks.restore(state, &mut parameters, &mut optimizer).is_err());
}

#[test]
fn steps_that_leave_no_room_are_refused() {
    let toy = Toy::new(6);
    let method = v1::Adalora {
        adapter: Some(all_linear(4)),
        initial_steps: Some(6),
        final_steps: Some(6),
        ..Default::default()
    };
    let tuned = toy.start(&method, 1);
    assert!(method.hooks(&tuned, 12).is_err());
    assert!(method.hooks(&tuned, 13).is_ok());
}

#[test]
fn factors_start_small_and_what_stands_between_at_zero() {
    let method =
        v1::Adalora { adapter: Some(all_linear(4)), target_r: Some(2), ..Default::default() };
    let values = Case::decoder().start(&method).values().unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for (name, values) in &values {
        if name.ends_with("lora_E") {
            assert!(values.iter().all(|e| *e == 0.0), "{name}");
        } else {
            sum += values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            count += values.len();
        }
    }
    let deviation = (sum / f64::from(u32::try_from(count).unwrap())).sqrt();
    assert!((deviation / 0.02 - 1.0).abs() < 0.05, "{deviation}");
}

/// Half of the mean, over both factors of all modules, of the norm (not its square).
#[test]
fn the_penalty_worked_out_by_hand() {
    let toy = Toy::new(3);
    let method =
        v1::Adalora { adapter: Some(all_linear(3)), target_r: Some(1), ..Default::default() };
    let tuned = toy.start(&method, 1);
    let parameters = tuned.parameters();
    let first = format!("{}.lora_A", module(&toy.names()[0]));
    for (name, parameter) in &parameters {
        let var = &parameter.var;
        let mut values = vec![0f32; var.elem_count()];
        if *name == first {
            // 2 I and zeros: A A^T - I = 3 I.
            let cols = values.len() / 3;
            (0..3).for_each(|i| values[i * cols + i] = 2.0);
        }
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    let mut hooks = method.hooks(&tuned, 100).unwrap().unwrap();
    let place = Place { step: 1, total: 100, rate: 0.0 };
    let (loss, gradients) = hooks.penalty(place, &parameters).unwrap().unwrap();
    // Norms of 3 I and three times of -I: 0.5 (3 + 1 + 1 + 1) sqrt 3 / 4.
    let root = 3_f64.sqrt();
    assert!((loss - 0.75 * root).abs() < 1e-6, "{loss}");
    // 0.5 / 4 times 2 (3 I) (2 I) / (3 sqrt 3).
    let got = gradients[&first].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!((f64::from(got[0]) - 0.5 / root).abs() < 1e-6, "{}", got[0]);
    assert_eq!(got[1], 0.0);
    let others = gradients.iter().filter(|(name, _)| **name != first);
    for (name, gradient) in others {
        let values = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|g| *g == 0.0), "{name}");
    }
}

/// Two modules, of ranks 2 and 1, of which two triplets stay; betas of 0.85.
#[test]
fn scores_worked_out_by_hand_and_triplets_that_come_back() {
    let shapes: [(&str, &[usize]); 6] = [
        ("m.lora_E", &[2]),
        ("m.lora_A", &[2, 2]),
        ("m.lora_B", &[3, 2]),
        ("n.lora_E", &[1]),
        ("n.lora_A", &[1, 2]),
        ("n.lora_B", &[3, 1]),
    ];
    let tensor =
        |shape: &[usize], values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let mut parameters = Parameters::new();
    for (name, shape) in shapes {
        let ones = tensor(shape, vec![1.0; shape.iter().product()]);
        let var = candle_core::Var::from_tensor(&ones).unwrap();
        let parameter = crate::train::parameters::Parameter { var, rate: 1.0, decay: true };
        parameters.insert(name.to_owned(), parameter);
    }
    let set = |parameters: &Parameters, name: &str, values: &[f32]| {
        let var = &parameters[name].var;
        var.set(&tensor(var.dims(), values.to_vec())).unwrap();
    };
    let gradients = |given: &[(&str, &[f32])]| -> Gradients {
        let of = |(name, shape): (&str, &[usize])| {
            let own = given.iter().find(|(given, _)| *given == name);
            let zeros = vec![0.0; shape.iter().product()];
            let values = own.map_or(zeros, |(_, values)| values.to_vec());
            (name.to_owned(), tensor(shape, values))
        };
        shapes.into_iter().map(of).collect()
    };
    let mut allocator = Allocator {
        modules: vec![("m".to_owned(), 2), ("n".to_owned(), 1)],
        budget: Budget { first: 2, last: 2, initial: 0, fin: 10, interval: 1, steps: 100 },
        betas: [0.85; 2],
        weight: 0.5,
        seen: BTreeMap::new(),
        kept: BTreeMap::new(),
    };
    let mut optimizer = testing::plain_descent();
    let mut after = |allocator: &mut Allocator,
                     parameters: &mut Parameters,
                     step: u64,
                     gradients: &Gradients| {
        let place = Place { step, total: 100, rate: 0.1 };
        let optimizer = &mut optimizer;
        let updated = Updated { place, parameters, gradients, optimizer };
        allocator.after_step(updated).unwrap();
    };
    let near = |got: Vec<f64>, want: &[f64]| {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{got} is not {want}");
        }
    };

    // |p g|: E 6 and 1; A 2 in row 0; B 4 in column 1 of three rows. Means are 0.15 of that, spreads
    // 0.15 of what is 0.85 away.
    set(&parameters, "m.lora_E", &[2.0, 1.0]);
    let first = gradients(&[
        ("m.lora_E", &[3.0, -1.0]),
        ("m.lora_A", &[2.0, 0.0, 0.0, 0.0]),
        ("m.lora_B", &[0.0, 4.0, 0.0, 0.0, 0.0, 0.0]),
    ]);
    after(&mut allocator, &mut parameters, 1, &first);
    let e = [0.9 * 0.765, 0.15 * 0.1275];
    let row = 0.3 * 0.255 / 2.0;
    let column = 0.6 * 0.51 / 3.0;
    near(allocator.scores("m", 2), &[e[0] + row, e[1] + column]);
    near(allocator.scores("n", 1), &[0.0]);
    let e_of = |parameters: &Parameters, name: &str| -> Vec<f32> {
        parameters[name].var.to_vec1().unwrap()
    };
    assert_eq!(e_of(&parameters, "m.lora_E"), [2.0, 1.0]);
    assert_eq!(e_of(&parameters, "n.lora_E"), [0.0], "ranked over the whole model");
    let b = parameters["n.lora_B"].var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(b, [1.0; 3], "only the entry of E is emptied");

    // The optimiser moved the entry that was emptied, and now it matters.
    set(&parameters, "n.lora_E", &[0.5]);
    after(&mut allocator, &mut parameters, 2, &gradients(&[("n.lora_E", &[100.0])]));
    near(allocator.scores("n", 1), &[7.5 * 6.375]);
    // What has no gradient: means and spreads of E 0.765 and 0.1275, of A 0.255, of B 0.51.
    let want = [0.765 * 0.765 + 0.255 * 0.255 / 2.0, 0.1275 * 0.1275 + 0.51 * 0.51 / 3.0];
    near(allocator.scores("m", 2), &want);
    assert_eq!(e_of(&parameters, "n.lora_E"), [0.5], "it came back");
    assert_eq!(e_of(&parameters, "m.lora_E"), [2.0, 0.0]);

    // From the end of the fall on nothing is learnt of importance, and the last choice stays.
    let before = allocator.scores("m", 2);
    let large = gradients(&[("m.lora_E", &[0.0, 1e6])]);
    set(&parameters, "m.lora_E", &[2.0, 9.0]);
    after(&mut allocator, &mut parameters, 90, &large);
    set(&parameters, "m.lora_E", &[2.0, 9.0]);
    after(&mut allocator, &mut parameters, 91, &large);
    assert_eq!(allocator.scores("m", 2), before);
    assert_eq!(e_of(&parameters, "m.lora_E"), [2.0, 0.0]);
}
