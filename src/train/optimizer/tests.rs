//! The optimisers on tensors.

use candle_core::{Device, Tensor, Var};

use super::*;

fn parameter(values: &[f32], rate: f64, decay: bool) -> Parameter {
    let tensor = Tensor::new(values, &Device::Cpu).unwrap();
    Parameter { var: Var::from_tensor(&tensor).unwrap(), rate, decay }
}

fn values(parameter: &Parameter) -> Vec<f32> {
    parameter.var.to_vec1().unwrap()
}

fn gradient(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

const SGD: Rule = Rule::Sgd(Sgd { momentum: 0.0, nesterov: false });

#[test]
fn only_tensors_with_gradients_move_and_are_remembered() {
    let parameters = Parameters::from([
        ("a".to_owned(), parameter(&[1.0, 1.0], 1.0, true)),
        ("b".to_owned(), parameter(&[1.0], 1.0, true)),
    ]);
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.1, false);
    let gradients = Gradients::from([("a".to_owned(), gradient(&[1.0, -1.0]))]);
    optimizer.update(&parameters, &gradients, 0.5).unwrap();
    assert_eq!(values(&parameters["b"]), [1.0]);
    assert_eq!(optimizer.states().keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(optimizer.states()["a"].updates, 1);
    assert!((values(&parameters["a"])[0] - 0.45).abs() < 1e-6);
    assert!((values(&parameters["a"])[1] - 1.45).abs() < 1e-6);
    assert_eq!(optimizer.moments("a").len(), 2);
    assert!(optimizer.moments("b").is_empty());
    let unknown = Gradients::from([("c".to_owned(), gradient(&[1.0]))]);
    assert!(optimizer.update(&parameters, &unknown, 0.5).is_err());
    let misshapen = Gradients::from([("b".to_owned(), gradient(&[1.0, 2.0]))]);
    assert!(optimizer.update(&parameters, &misshapen, 0.5).is_err());
}

#[test]
fn rates_and_decay_are_the_parameters_own() {
    let parameters = Parameters::from([
        ("a".to_owned(), parameter(&[1.0], 2.0, false)),
        ("b".to_owned(), parameter(&[1.0], 1.0, true)),
    ]);
    let mut optimizer = Optimizer::new(SGD, 0.5, false);
    let both = ["a", "b"].map(|name| (name.to_owned(), gradient(&[1.0])));
    optimizer.update(&parameters, &Gradients::from(both), 0.25).unwrap();
    assert_eq!(values(&parameters["a"]), [0.5]);
    assert_eq!(values(&parameters["b"]), [1.0 - 0.125 - 0.25]);
    assert_eq!((optimizer.bytes(100), optimizer.states()["a"].moments.len()), (0, 0));
}

#[test]
fn held_elements_stay_and_forget() {
    let parameters = Parameters::from([("a".to_owned(), parameter(&[1.0, 1.0], 1.0, true))]);
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.1, false);
    let gradients = Gradients::from([("a".to_owned(), gradient(&[1.0, 1.0]))]);
    optimizer.update(&parameters, &gradients, 0.1).unwrap();
    let before = values(&parameters["a"]);
    optimizer.hold("a", Some(vec![true, false]));
    optimizer.update(&parameters, &gradients, 0.1).unwrap();
    let after = values(&parameters["a"]);
    assert_eq!(before[0], after[0]);
    assert!(after[1] < before[1]);
    let moments = optimizer.moments("a");
    assert_eq!((moments[0][0], moments[1][0]), (0.0, 0.0));
    assert!(moments[0][1] > 0.0);
    optimizer.hold("a", None);
    optimizer.update(&parameters, &gradients, 0.1).unwrap();
    assert!(values(&parameters["a"])[0] < after[0]);
    optimizer.hold("a", Some(vec![true]));
    assert!(optimizer.update(&parameters, &gradients, 0.1).is_err());
}

#[test]
fn moments_can_be_replaced() {
    let parameters = Parameters::from([("a".to_owned(), parameter(&[1.0, 1.0], 1.0, false))]);
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, false);
    assert!(optimizer.set_moment("a", 0, &[0.0, 0.0]).is_err());
    let gradients = Gradients::from([("a".to_owned(), gradient(&[1.0, 1.0]))]);
    optimizer.update(&parameters, &gradients, 0.1).unwrap();
    optimizer.set_moment("a", 1, &[4.0, 9.0]).unwrap();
    assert_eq!(optimizer.moments("a")[1], [4.0, 9.0]);
    assert!(optimizer.set_moment("a", 2, &[0.0, 0.0]).is_err());
    optimizer.forget("a");
    assert!(optimizer.moments("a").is_empty());
}

/// `sum of c_i (p_i - 1)^2 / 2` with curvatures over two decades, and gradients that change with each
/// update as those of batches do.
fn descend(eight_bit: bool, elements: usize, updates: u64) -> (Vec<f32>, u64) {
    let start: Vec<f32> = (0..elements).map(|i| ((i * 7919) % 1000) as f32 / 250.0 - 1.0).collect();
    let parameters = Parameters::from([("a".to_owned(), parameter(&start, 1.0, false))]);
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, eight_bit);
    for t in 0..updates {
        let noise = |i: usize| ((i as u64 * 31 + t * 17) % 13) as f32 / 60.0 - 0.1;
        let curvature = |i: usize| 10f32.powi(-((i % 3) as i32));
        let gradient: Vec<f32> = values(&parameters["a"])
            .iter()
            .enumerate()
            .map(|(i, p)| curvature(i) * (p - 1.0 + noise(i)))
            .collect();
        let tensor = Tensor::new(gradient.as_slice(), &Device::Cpu).unwrap();
        let gradients = Gradients::from([("a".to_owned(), tensor)]);
        optimizer.update(&parameters, &gradients, 0.02).unwrap();
    }
    let moments = &optimizer.states()["a"].moments;
    let bytes = moments.iter().map(|moment| match moment {
        Moment::Full(values) => values.len() as u64 * 4,
        Moment::Blocks { codes, scales, .. } => codes.len() as u64 + scales.len() as u64 * 4,
    });
    let bytes = bytes.sum();
    assert_eq!(optimizer.bytes(elements), bytes);
    (values(&parameters["a"]), bytes)
}

#[test]
fn eight_bit_moments_go_where_f32_moments_go() {
    let (full, full_bytes) = descend(false, 6000, 300);
    let (small, small_bytes) = descend(true, 6000, 300);
    let distance = |values: &[f32]| {
        let squares = values.iter().map(|p| f64::from(p - 1.0).powi(2));
        (squares.sum::<f64>() / values.len() as f64).sqrt()
    };
    // It begins at 1.5 or so.
    assert!(
        distance(&full) < 0.2 && distance(&small) < 0.2,
        "{} {}",
        distance(&full),
        distance(&small)
    );
    let apart = full.iter().zip(&small).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    let apart = (apart / full.len() as f64).sqrt();
    assert!(apart < 0.05, "{apart}");
    assert_eq!(full_bytes, 6000 * 8);
    assert_eq!(small_bytes, 2 * (6000 + 24 * 4));
}

#[test]
fn what_was_remembered_is_taken_up_only_by_its_kind() {
    let large = parameter(&vec![1.0; 5000], 1.0, true);
    let state = |eight_bit: bool, moments: usize| State {
        updates: 3,
        moments: (0..moments).map(|i| Moment::zeros(5000, i == 0, eight_bit)).collect(),
    };
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, true);
    optimizer.restore("a", &large, state(true, 2)).unwrap();
    assert_eq!(optimizer.states()["a"].updates, 3);
    assert!(optimizer.restore("a", &large, state(false, 2)).is_err());
    assert!(optimizer.restore("a", &large, state(true, 1)).is_err());
    assert!(optimizer.restore("a", &parameter(&[1.0], 1.0, true), state(true, 2)).is_err());
}

#[test]
fn threads_do_not_change_the_numbers() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let (there, _) = pool.install(|| descend(true, 2 * RUN + 100, 5));
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (here, _) = one.install(|| descend(true, 2 * RUN + 100, 5));
    assert!(there == here);
}
