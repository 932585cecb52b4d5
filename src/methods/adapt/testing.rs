//! Models for the methods' tests, and what every method must do.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rand::Rng;

use super::gradients::{Collector, Pass};
use super::module::{self, Module};
use super::moments::{self, SecondMoments};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Setup, uniform};
use crate::calibrate::Windows;
use crate::error::Result;
use crate::methods::compress::round_to_nearest;
use crate::models::{AnyModel, Model, decoder, encoder};
use crate::nn::dtype::Dtype;
use crate::nn::tuning::Tuning;
use crate::nn::weight::{Dense, Grouped, GroupedSpec, Weight, product};
use crate::progress::Progress;
use crate::proto::v1::{self, AdapterOptions, CordaNormalisation};
use crate::seed::Stream;
use crate::train::optimizer::{Optimizer, Rule, Sgd};
use crate::train::parameters::{Gradients, Parameters};

/// Options of rank `r` on all linears.
pub fn all_linear(r: u32) -> AdapterOptions {
    AdapterOptions { r: Some(r), targets: vec!["all-linear".into()], ..Default::default() }
}

/// Methods whose adapters sit on linears, with options that suit the tiny models.
pub fn low_rank_methods() -> Vec<Box<dyn Adapt>> {
    let adapter = Some(all_linear(3));
    let context = Some(v1::Calibration { dataset: "datasets/t".into(), ..Default::default() });
    vec![
        Box::new(v1::Lora { adapter: adapter.clone(), ..Default::default() }),
        Box::new(v1::Adalora { adapter: adapter.clone(), target_r: Some(2), ..Default::default() }),
        Box::new(v1::Dora { adapter: adapter.clone() }),
        Box::new(v1::Pissa { adapter: adapter.clone() }),
        Box::new(v1::LoraXs { adapter: adapter.clone() }),
        Box::new(v1::Loldu { adapter: adapter.clone(), ..Default::default() }),
        Box::new(v1::Nola { adapter: adapter.clone(), basis_a: Some(4), ..Default::default() }),
        Box::new(v1::Sora { adapter: adapter.clone(), ..Default::default() }),
        Box::new(v1::Corda { adapter, context, mode: 1, ..Default::default() }),
    ]
}

/// Gradient descent with weight decay.
pub fn descent(decay: f64) -> Optimizer {
    Optimizer::new(Rule::Sgd(Sgd { momentum: 0.0, nesterov: false }), decay, false)
}

/// Gradient descent.
pub fn plain_descent() -> Optimizer {
    descent(0.0)
}

/// Adds noise to all trained tensors.
fn disturb(tuned: &Tuned, size: f32) {
    for (name, parameter) in tuned.parameters() {
        let var = &parameter.var;
        let mut values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let noise = uniform(&mut Stream::root(77).child(&name).rng(), values.len(), size);
        values.iter_mut().zip(noise).for_each(|(v, n)| *v += n);
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
    }
}

fn inputs(cols: usize, rows: usize) -> Tensor {
    let values = uniform(&mut Stream::root(5).child(&cols.to_string()).rng(), rows * cols, 1.0);
    Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
}

/// A tiny random model.
pub struct Case {
    model: AnyModel,
    shapes: Shapes,
    /// The model again, where it is a decoder.
    decoder: Option<Model>,
}

impl Case {
    pub fn decoder() -> Self {
        Self::of(decoder::random::model(decoder::random::tiny("llama"), 11).unwrap().into())
    }

    pub fn encoder() -> Self {
        Self::of(encoder::random::model(encoder::random::tiny(), 12).unwrap().into())
    }

    /// A decoder whose linears have 4-bit groups.
    pub fn quantised() -> Self {
        let mut model = decoder::random::model(decoder::random::tiny("llama"), 11).unwrap();
        let spec = GroupedSpec { bits: 4, group: 16, symmetric: false };
        for (_, weight) in model.weights.iter_mut().filter(|(name, _)| name.contains("_proj")) {
            let shape = [weight.rows(), weight.cols()];
            let codes = round_to_nearest::quantise(&weight.to_f32(), shape[1], spec);
            let packed =
                Grouped::pack(shape, spec, &codes.codes, &codes.scales, &codes.zeros).unwrap();
            *weight = Arc::new(Weight::Grouped(packed));
        }
        Self::of(model.into())
    }

    /// The tiny decoder with these weights.
    pub fn with(weights: BTreeMap<String, Arc<Weight>>) -> Self {
        let model = decoder::random::model(decoder::random::tiny("llama"), 11).unwrap();
        Self::of(Model { weights, ..model }.into())
    }

    fn of(model: AnyModel) -> Self {
        let shapes = Shapes::of(&model).unwrap();
        let decoder = model.clone().decoder().ok();
        Self { model, shapes, decoder }
    }

    pub fn of_decoder(model: Model) -> Self {
        Self::of(model.into())
    }

    pub fn model(&self) -> &AnyModel {
        &self.model
    }

    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    pub fn decoder_model(&self) -> &Model {
        self.decoder.as_ref().expect("a decoder")
    }

    pub fn weights(&self) -> &BTreeMap<String, Arc<Weight>> {
        self.model.weights()
    }

    pub fn stored(&self, name: &str) -> &Arc<Weight> {
        &self.weights()[name]
    }

    pub fn linears(&self) -> Vec<(String, Arc<Weight>)> {
        let names = self.shapes.linears.iter().map(|(name, _)| name.clone());
        names.map(|name| (name.clone(), self.stored(&name).clone())).collect()
    }

    pub fn some_linear(&self) -> (&str, &Arc<Weight>) {
        let find = |name: &&String| name.contains("q_proj") || name.contains("query");
        let name = self.shapes.linears.iter().map(|(name, _)| name).filter(find).nth(1).unwrap();
        (name, self.stored(name))
    }

    pub fn inputs(&self, linear: &str, rows: usize) -> Tensor {
        inputs(self.stored(linear).cols(), rows)
    }

    pub fn with_moments(&self, run: impl FnOnce(&mut dyn SecondMoments)) {
        let tokens: Vec<u32> = (0..96).map(|i| (i * 31 + i * i * 7 + 5) % 96).collect();
        let windows = Windows { tokens, length: 12, warnings: Vec::new() };
        let progress = Progress::silent();
        let mut collector = moments::Collector {
            model: self.decoder_model(),
            windows: &windows,
            normalisation: CordaNormalisation::SampleMax,
            progress: &progress,
        };
        run(&mut collector);
    }

    pub fn start(&self, method: &dyn Adapt) -> Tuned {
        self.try_start(method).unwrap()
    }

    pub fn try_start(&self, method: &dyn Adapt) -> Result<Tuned> {
        self.start_seeded(method, 1)
    }

    pub fn start_seeded(&self, method: &dyn Adapt, seed: u64) -> Result<Tuned> {
        let mut started = None;
        let progress = Progress::silent();
        let mut setup = Setup {
            weights: self.weights(),
            shapes: &self.shapes,
            random: Stream::root(seed),
            progress: &progress,
            first_rate: 1e-3,
            gradients: None,
            moments: None,
        };
        match method.needs()? {
            super::Needs::Moments(_) => self.with_moments(|source| {
                let setup = &mut Setup {
                    moments: Some(source),
                    gradients: None,
                    random: setup.random.clone(),
                    ..setup
                };
                started = Some(method.start(setup));
            }),
            _ => started = Some(method.start(&mut setup)),
        }
        started.expect("started")
    }

    pub fn disturb(&self, tuned: &Tuned, size: f32) {
        disturb(tuned, size);
    }

    /// Outputs of all linears for some inputs, one after the other.
    pub fn outputs(&self, tuned: &Tuned) -> Vec<f32> {
        let each = self.linears().into_iter().flat_map(|(name, stored)| {
            let x = self.inputs(&name, 4);
            let y = tuned.linear(&name, &x, &stored).unwrap();
            let y = y.unwrap_or_else(|| product(&x, &stored).unwrap());
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        });
        each.collect()
    }

    /// Every output is the base's, but for `tolerance`.
    pub fn equals_base(&self, tuned: &Tuned, tolerance: f32) {
        let base = self.outputs(&Tuned::default());
        for (got, want) in self.outputs(tuned).iter().zip(base) {
            assert!((got - want).abs() <= tolerance, "{got} is not {want}");
        }
    }

    /// What every method with adapters on linears promises. `kinds`: the ends of the names of what is
    /// trained of each.
    pub fn contract(&self, method: &dyn Adapt, kinds: &[&str]) {
        let name = method.card().name;
        let cost = method.check(&self.shapes).unwrap();
        let tuned = self.start(method);
        assert_eq!(tuned.count(), cost.parameters, "{name}: the count is what was said");
        for module in tuned.modules.values() {
            let found: Vec<&str> = module.trained().iter().map(|(kind, _)| *kind).collect();
            assert_eq!(found, kinds, "{name}");
        }
        assert_eq!(
            tuned.values().unwrap(),
            self.start(method).values().unwrap(),
            "{name}: the same seed gives the same start"
        );
        self.disturb(&tuned, 0.1);
        for (linear, module) in &tuned.modules {
            self.merged_is_unmerged(name, module);
            self.gradients(name, &tuned, linear);
        }
        // What is frozen stays as it is: only what is trained was disturbed.
        let before = self.outputs(&tuned);
        let finished = method.finish(tuned).unwrap();
        for (got, want) in self.outputs(&finished).iter().zip(&before) {
            assert!((got - want).abs() <= 1e-4 * want.abs().max(1.0), "{name}: {got}, {want}");
        }
    }

    fn merged_is_unmerged(&self, name: &str, module: &Module) {
        let stored = self.stored(&module.linear);
        let x = self.inputs(&module.linear, 6);
        let unmerged = module.forward(&x, stored, None).unwrap();
        let merged = Tensor::from_vec(module.merged(stored).unwrap(), stored.shape(), &Device::Cpu);
        let merged = module::whole(&x, &merged.unwrap()).unwrap();
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (got, want) in flat(unmerged).iter().zip(flat(merged)) {
            assert!((got - want).abs() <= 1e-4 * want.abs().max(1.0), "{name}: {got}, {want}");
        }
        // Three dimensions are as good as two.
        let batch = x.reshape((2, 3, ())).unwrap();
        let y = module.forward(&batch, stored, None).unwrap();
        assert_eq!(y.dims(), [2, 3, stored.rows()]);
    }

    /// Gradients go to what is trained, and are those of differences.
    fn gradients(&self, name: &str, tuned: &Tuned, linear: &str) {
        let (module, stored) = (&tuned.modules[linear], self.stored(linear));
        let x = self.inputs(linear, 3);
        let weights = inputs(stored.rows(), 3);
        let loss = || {
            let y = tuned.linear(linear, &x, stored).unwrap().unwrap();
            (y * &weights).unwrap().sum_all().unwrap()
        };
        let gradients = loss().backward().unwrap();
        for (kind, var) in module.trained() {
            let Some(got) = gradients.get(var) else { panic!("{name}: {kind} has no gradient") };
            // DoRA's norm is held, so differences are no measure of its factors.
            if module.magnitude.is_some() && kind != "lora_magnitude_vector" {
                continue;
            }
            let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let original = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let at = got.len() / 3;
            let set = |values: Vec<f32>| {
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
            };
            let moved = |by: f32| {
                let mut values = original.clone();
                values[at] += by;
                set(values);
                f64::from(loss().to_scalar::<f32>().unwrap())
            };
            let want = (moved(0.05) - moved(-0.05)) / 0.1;
            set(original.clone());
            let got = f64::from(got[at]);
            assert!(
                (got - want).abs() < 2e-3 * want.abs().max(1.0),
                "{name} {kind}: {got}, {want}"
            );
        }
    }
}

/// Two linears with a nonlinearity between them, and losses against a teacher: small enough to work with
/// full gradients.
pub struct Toy {
    pub weights: BTreeMap<String, Arc<Weight>>,
    pub shapes: Shapes,
    seed: u64,
}

const IN: usize = 20;
const MIDDLE: usize = 24;
const OUT: usize = 10;

impl Toy {
    pub fn new(seed: u64) -> Self {
        let linears = vec![
            ("toy.layers.0.q_proj.weight".to_owned(), [MIDDLE, IN]),
            ("toy.layers.0.v_proj.weight".to_owned(), [OUT, MIDDLE]),
        ];
        let weights = linears
            .iter()
            .map(|(name, shape)| {
                let rng = &mut Stream::root(seed).child(name).rng();
                let values = uniform(rng, shape[0] * shape[1], (3.0 / shape[1] as f32).sqrt());
                let dense = Dense::from_f32(shape.to_vec(), &values, Dtype::F32).unwrap();
                (name.clone(), Arc::new(Weight::Dense(dense)))
            })
            .collect();
        let tensors = linears.iter().map(|(n, s)| (n.clone(), s.to_vec())).collect();
        let shapes = Shapes { family: "toy", linears, tensors, usual: &["q_proj", "v_proj"] };
        Self { weights, shapes, seed }
    }

    pub fn names(&self) -> Vec<String> {
        self.shapes.linears.iter().map(|(name, _)| name.clone()).collect()
    }

    fn forward(&self, tuned: &Tuned, x: &Tensor) -> Tensor {
        let linear = |name: &String, x: &Tensor| {
            let stored = &self.weights[name];
            let y = tuned.linear(name, x, stored).unwrap();
            y.unwrap_or_else(|| product(x, stored).unwrap())
        };
        let [first, second] = [0, 1].map(|i| self.shapes.linears[i].0.clone());
        linear(&second, &linear(&first, x).tanh().unwrap())
    }

    /// The batch of a pass: inputs, and what a teacher near the base makes of them.
    fn batch(&self, pass: usize) -> (Tensor, Tensor) {
        let mut rng = Stream::root(self.seed).child(&format!("pass {pass}")).rng();
        // Inputs lie near a few directions, as hidden states do.
        let directions =
            uniform(&mut Stream::root(self.seed).child("directions").rng(), 3 * IN, 1.0);
        let rows = 16;
        let mut x = uniform(&mut rng, rows * IN, 0.1);
        for row in x.chunks_mut(IN) {
            for direction in directions.chunks(IN) {
                let by = 2.0 * rng.random::<f32>() - 0.5;
                row.iter_mut().zip(direction).for_each(|(x, d)| *x += by * d);
            }
        }
        let x = Tensor::from_vec(x, (rows, IN), &Device::Cpu).unwrap();
        let shift = uniform(&mut Stream::root(self.seed).child("shift").rng(), OUT, 1.0);
        let base = self.forward(&Tuned::default(), &x);
        let shift = Tensor::from_vec(shift, OUT, &Device::Cpu).unwrap();
        (x, base.broadcast_add(&shift).unwrap())
    }

    fn loss(&self, pass: usize, tuned: &Tuned) -> Tensor {
        let (x, want) = self.batch(pass);
        (self.forward(tuned, &x) - want.detach()).unwrap().sqr().unwrap().mean_all().unwrap()
    }

    pub fn gradients(
        &self,
        pass: usize,
        tuned: &Tuned,
        parameters: &Parameters,
    ) -> Result<Gradients> {
        let store = self.loss(pass, tuned).backward()?;
        let found = parameters.iter().filter_map(|(name, parameter)| {
            store.get(&parameter.var).map(|gradient| (name.clone(), gradient.clone()))
        });
        Ok(found.collect())
    }

    /// Sum of the gradient of a weight of the base over the first passes.
    pub fn sum(&self, name: &str, passes: usize) -> Vec<f32> {
        self.sum_over(name, 0..passes)
    }

    /// The same over passes that no start sees.
    pub fn held_out(&self, name: &str) -> Vec<f32> {
        self.sum_over(name, 100..104)
    }

    fn sum_over(&self, name: &str, passes: std::ops::Range<usize>) -> Vec<f32> {
        let mut tuned = Tuned::default();
        tuned.add_whole([name.to_owned()].iter(), &self.weights).unwrap();
        let mut sum = Vec::new();
        for pass in passes {
            let gradients = self.gradients(pass, &tuned, &tuned.parameters()).unwrap();
            let gradient = gradients[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            sum.resize(gradient.len(), 0.0);
            sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
        }
        sum
    }

    pub fn start(&self, method: &dyn Adapt, passes: usize) -> Tuned {
        let mut pass = |i: usize, tuned: &Tuned| self.gradients(i, tuned, &tuned.parameters());
        self.start_of(method, passes, &mut pass).unwrap()
    }

    pub fn start_with(&self, method: &dyn Adapt, pass: &mut Pass<'_>) -> Result<Tuned> {
        self.start_of(method, 1, pass)
    }

    fn start_of(&self, method: &dyn Adapt, passes: usize, pass: &mut Pass<'_>) -> Result<Tuned> {
        let progress = Progress::silent();
        let mut collector =
            Collector { weights: &self.weights, passes, pass, elements: 1, progress: &progress };
        method.start(&mut Setup {
            weights: &self.weights,
            shapes: &self.shapes,
            random: Stream::root(self.seed),
            progress: &progress,
            first_rate: 1e-3,
            gradients: Some(&mut collector),
            moments: None,
        })
    }

    pub fn disturb(&self, tuned: &Tuned, size: f32) {
        disturb(tuned, size);
    }

    pub fn merged(&self, tuned: &Tuned, name: &str) -> Vec<f32> {
        tuned.modules[name].merged(&self.weights[name]).unwrap()
    }

    pub fn outputs(&self, tuned: &Tuned) -> Vec<f32> {
        let y = self.forward(tuned, &self.batch(0).0);
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    }
}
