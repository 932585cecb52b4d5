//! The loop with a model small enough to follow.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor, Var};
use rand::Rng;

use super::super::batch::{Batch, NO_LABEL, Targets};
use super::super::checkpoint::LIFE;
use super::super::parameters::Parameter;
use super::*;

/// `w[l]` is to become a tenth of the token before label `l`: the loss is `(w[l] - t / 10)^2 / 2`. In
/// training some labels are left out at random, as dropout does.
#[derive(Default)]
struct Toy {
    drop: bool,
    calls: u64,
    /// Losses and gradients from this call on are not finite.
    broken: Option<(u64, Broken)>,
    /// Losses that validations give instead.
    script: Vec<f64>,
    /// Raised by this call.
    cancel: Option<(u64, Arc<AtomicBool>)>,
    fail: Option<u64>,
}

#[derive(Clone, Copy, PartialEq)]
enum Broken {
    Loss,
    Gradient,
}

impl Toy {
    fn sums(&self, batch: &Batch, parameters: &Parameters, drop: bool) -> (LossSums, Vec<f32>) {
        let w: Vec<f32> = parameters["w"].var.to_vec1().unwrap();
        let mut random = batch.random.child("dropout").rng();
        let (mut sums, mut gradient) = (LossSums::default(), vec![0f32; w.len()]);
        let Targets::Next(labels) = &batch.targets else { panic!("another target") };
        for (place, label) in labels.iter().enumerate().filter(|(_, l)| **l != NO_LABEL) {
            let keep = if drop { f32::from(u8::from(random.random_bool(0.7))) } else { 1.0 };
            let off = w[*label as usize] - batch.tokens[place] as f32 / 10.0;
            sums.loss += f64::from(keep * off * off / 2.0);
            sums.count += 1;
            gradient[*label as usize] += keep * off;
        }
        (sums, gradient)
    }
}

impl LossAndGradients for Toy {
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        self.calls += 1;
        if let Some((call, flag)) = &self.cancel
            && *call == self.calls
        {
            flag.store(true, Ordering::Relaxed);
        }
        if self.fail == Some(self.calls) {
            return Err(Error::internal("killed"));
        }
        let (mut sums, mut gradient) = self.sums(batch, parameters, self.drop);
        match self.broken {
            Some((call, Broken::Loss)) if self.calls >= call => sums.loss = f64::NAN,
            Some((call, Broken::Gradient)) if self.calls >= call => gradient[1] = f32::INFINITY,
            _ => {}
        }
        let gradient = Tensor::new(gradient.as_slice(), &Device::Cpu)?;
        Ok((sums, Gradients::from([("w".to_owned(), gradient)])))
    }

    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums> {
        let (mut sums, _) = self.sums(batch, parameters, false);
        if !self.script.is_empty() {
            sums.loss = self.script.remove(0) * sums.count as f64;
        }
        Ok(sums)
    }
}

/// Remembers a moving value, and adds a penalty that depends on it.
struct Remember(f32);

impl Hooks for Remember {
    fn penalty(&mut self, _: Place, parameters: &Parameters) -> Result<Option<(f64, Gradients)>> {
        let w = parameters["w"].var.as_tensor();
        let gradient = w.affine(f64::from(self.0) * 1e-3, 0.0)?;
        Ok(Some((0.0, Gradients::from([("w".to_owned(), gradient)]))))
    }

    fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
        self.0 = self.0 * 0.9 + updated.gradients["w"].abs()?.max_all()?.to_scalar::<f32>()?;
        Ok(())
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        BTreeMap::from([("pull".to_owned(), f64::from(self.0))])
    }

    fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::from([("pull".to_owned(), Tensor::new(&[self.0], &Device::Cpu)?)]))
    }

    fn restore(
        &mut self,
        saved: BTreeMap<String, Tensor>,
        _: &mut Parameters,
        _: &mut Optimizer,
    ) -> Result<()> {
        self.0 = saved["pull"].to_vec1::<f32>()?[0];
        Ok(())
    }
}

fn zeros(elements: usize) -> Parameters {
    let var = Var::from_vec(vec![0f32; elements], elements, &Device::Cpu).unwrap();
    Parameters::from([("w".to_owned(), Parameter { var, rate: 1.0, decay: true })])
}

fn values(parameters: &Parameters) -> Vec<f32> {
    parameters["w"].var.to_vec1().unwrap()
}

fn text(tokens: &[u32]) -> Sequence {
    let counts = (0..tokens.len()).map(|i| i > 0).collect();
    Sequence { tokens: tokens.to_vec(), target: Target::Next(counts), line: 1 }
}

fn texts(count: u32) -> Vec<Sequence> {
    (0..count)
        .map(|i| text(&[i % 7, 1 + i % 5, 3 + i % 3, i % 11, 2][..2 + (i % 4) as usize]))
        .collect()
}

struct Case {
    training: v1::Training,
    data: Vec<Sequence>,
    validation: Vec<Sequence>,
    seed: u64,
    folder: tempfile::TempDir,
    progress: Progress,
}

impl Case {
    fn new(change: impl Fn(&mut v1::Training)) -> Self {
        let mut training = v1::Training {
            batch_size: Some(2),
            warmup_steps: Some(1),
            learning_rate: Some(0.1),
            memory_bytes: Some(1 << 40),
            ..Default::default()
        };
        change(&mut training);
        Self {
            training,
            data: texts(12),
            validation: Vec::new(),
            seed: 1,
            folder: tempfile::tempdir().unwrap(),
            progress: Progress::silent(),
        }
    }

    fn run(
        &self,
        model: &mut Toy,
        parameters: &mut Parameters,
        hooks: &mut dyn Hooks,
    ) -> Result<v1::TrainingReport> {
        let settings = Settings::read(&self.training, 1.0)?;
        self.with(&settings).train(model, parameters, hooks)
    }

    fn with<'a>(&'a self, settings: &'a Settings) -> Run<'a> {
        Run {
            settings,
            training: &self.data,
            validation: &self.validation,
            padding: 0,
            masking: None,
            random: Stream::root(self.seed),
            folder: self.folder.path(),
            progress: &self.progress,
            needs: Needs { weights: 1000, activations: &|tokens| tokens as u64 * 10 },
        }
    }

    fn plain(&self) -> (Vec<f32>, v1::TrainingReport) {
        let mut parameters = zeros(12);
        let report =
            self.run(&mut Toy::default(), &mut parameters, &mut super::super::hooks::Plain);
        (values(&parameters), report.unwrap())
    }
}

fn sgd(training: &mut v1::Training) {
    training.optimizer = Some(v1::training::Optimizer::Sgd(v1::Sgd::default()));
    training.schedule = v1::LearningRateSchedule::Constant.into();
    training.clip_norm = Some(0.0);
}

fn validation(change: impl Fn(&mut v1::TrainingValidation)) -> Option<v1::TrainingValidation> {
    let mut validation =
        v1::TrainingValidation { dataset: "datasets/v".into(), ..Default::default() };
    change(&mut validation);
    Some(validation)
}

#[test]
fn batches_of_an_update_are_one_batch_and_the_mean_is_over_all_tokens() {
    let moved = |batch_size: u32, accumulation: u32| {
        let mut case = Case::new(|t| {
            sgd(t);
            t.steps = Some(1);
            t.batch_size = Some(batch_size);
            t.accumulation = Some(accumulation);
        });
        // Three labels 1 after tokens 10, and one label 2 after token 10.
        case.data = vec![text(&[10, 1]), text(&[10, 2])];
        case.data[0] = Sequence {
            tokens: vec![10, 1, 10, 1, 10, 1],
            target: Target::Next(vec![false, true, false, true, false, true]),
            line: 1,
        };
        case.plain().0
    };
    let whole = moved(2, 1);
    // Gradients -1 each: -3/4 and -1/4, not -1/2 and -1/2; times 0.1.
    assert!((whole[1] - 0.075).abs() < 1e-7 && (whole[2] - 0.025).abs() < 1e-7, "{whole:?}");
    assert_eq!(moved(1, 2), whole);
}

#[test]
fn training_learns_and_says_how_it_went() {
    let mut case = Case::new(|t| {
        t.epochs = Some(20.0);
        t.validation = validation(|_| ());
    });
    case.validation = texts(5);
    let (_, report) = case.plain();
    assert_eq!((report.steps, report.planned_steps, report.epochs), (120, 120, 20.0));
    assert_eq!(report.end(), v1::TrainingEnd::Completed);
    assert_eq!((report.trained_parameters, report.points.len()), (12, 120));
    // Before training, and after each epoch.
    assert_eq!(report.validations.len(), 21);
    assert_eq!((report.validations[0].step, report.validations[1].step), (0, 6));
    assert!(report.validations[20].loss < report.validations[0].loss / 2.0);
    assert_eq!(report.tokens, 20 * case.data.iter().map(|s| s.tokens.len() as i64).sum::<i64>());
    assert!(report.tokens_per_second > 0.0 && report.seconds > 0.0);
    assert!(report.validations.iter().all(|point| point.accuracy.is_none()));
    assert!(report.warnings.is_empty());
    // 1000 of weights; 12 numbers with gradient and two moments; 2 rows of 5 tokens at most.
    assert_eq!(report.estimated_memory_bytes, 1000 + 12 * 16 + 2 * 5 * 10);
}

#[test]
fn the_seed_decides_the_bits() {
    let run = |seed: u64| {
        let case = Case { seed, ..Case::new(|t| t.epochs = Some(3.0)) };
        let mut parameters = zeros(12);
        let mut model = Toy { drop: true, ..Default::default() };
        case.run(&mut model, &mut parameters, &mut Remember(0.0)).unwrap();
        values(&parameters)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

/// A run with everything that has a state.
fn stateful() -> Case {
    let mut case = Case::new(|t| {
        t.epochs = Some(1.5);
        t.accumulation = Some(2);
        t.packing = true;
        t.max_length = Some(6);
        t.ema_decay = Some(0.8);
        t.checkpoint_every = Some(1);
        t.optimizer = Some(v1::training::Optimizer::Adamw(v1::AdamW {
            eight_bit: true,
            ..Default::default()
        }));
        t.validation = validation(|v| (v.every_steps, v.patience) = (Some(2), Some(50)));
    });
    case.data = texts(20);
    case.validation = texts(4);
    case
}

/// What must not depend on interruptions.
fn numbers(report: v1::TrainingReport) -> v1::TrainingReport {
    v1::TrainingReport {
        seconds: 0.0,
        step_seconds: 0.0,
        tokens_per_second: 0.0,
        resident_memory_bytes: 0,
        ..report
    }
}

#[test]
fn a_run_that_is_killed_at_any_write_ends_with_the_same_bits() {
    let train = |case: &Case, life: Option<u32>| {
        let mut parameters = zeros(4100);
        let mut model = Toy { drop: true, ..Default::default() };
        LIFE.set(life);
        let report = case.run(&mut model, &mut parameters, &mut Remember(0.0));
        LIFE.set(None);
        report.map(|report| (values(&parameters), numbers(report)))
    };
    let whole = train(&stateful(), None).unwrap();
    assert!(whole.1.steps >= 5, "{} updates", whole.1.steps);
    let mut kills = 0;
    loop {
        let case = stateful();
        match train(&case, Some(kills)) {
            Ok(undisturbed) => {
                assert!(undisturbed == whole);
                break;
            }
            Err(error) => assert_eq!(error.message(), "killed"),
        }
        let resumed = train(&case, None).unwrap();
        assert!(resumed == whole, "killed after {kills} actions");
        kills += 1;
    }
    assert!(kills > 40, "{kills}");
}

#[test]
fn a_run_that_is_killed_at_any_batch_ends_with_the_same_bits() {
    let train = |case: &Case, fail: Option<u64>| {
        let mut parameters = zeros(4100);
        let mut model = Toy { drop: true, fail, ..Default::default() };
        let report = case.run(&mut model, &mut parameters, &mut Remember(0.0));
        report.map(|report| (values(&parameters), numbers(report), model.calls))
    };
    let whole = train(&stateful(), None).unwrap();
    for call in 1..=whole.2 {
        let case = stateful();
        assert!(train(&case, Some(call)).is_err());
        let resumed = train(&case, None).unwrap();
        assert!((resumed.0, resumed.1) == (whole.0.clone(), whole.1.clone()), "batch {call}");
        // Not from the start: at most one batch of the update that was cut off is done again.
        assert!(resumed.2 + call - 1 <= whole.2 + 1, "batch {call}: {}", resumed.2);
    }
}

#[test]
fn a_checkpoint_is_taken_up_by_its_own_run_only() {
    let case = stateful();
    let mut model = Toy { fail: Some(5), ..Default::default() };
    assert!(case.run(&mut model, &mut zeros(12), &mut Remember(0.0)).is_err());
    let refused = |case: &Case| {
        let error = case.run(&mut Toy::default(), &mut zeros(12), &mut Remember(0.0)).unwrap_err();
        assert!(error.message().contains("other options, data"), "{error}");
    };
    let other = |change: &dyn Fn(&mut Case)| {
        let mut other = stateful();
        other.folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(case.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, other.folder.path().join(path.file_name().unwrap())).unwrap();
        }
        change(&mut other);
        other
    };
    refused(&other(&|case| case.seed = 2));
    refused(&other(&|case| case.training.learning_rate = Some(0.2)));
    refused(&other(&|case| case.data[0].tokens[0] += 1));
    other(&|case| case.training.checkpoint_every = Some(3))
        .run(&mut Toy::default(), &mut zeros(12), &mut Remember(0.0))
        .unwrap();
    let damaged = other(&|_| ());
    std::fs::write(damaged.folder.path().join("last.safetensors"), b"x").unwrap();
    let error = damaged.run(&mut Toy::default(), &mut zeros(12), &mut Remember(0.0)).unwrap_err();
    assert_eq!(error.reason(), Reason::MalformedFile);
}

#[test]
fn a_run_stops_when_it_gets_no_better_and_keeps_the_best() {
    let scripted = |keep_last: bool| {
        let mut case = Case::new(|t| {
            sgd(t);
            t.epochs = Some(9.0);
            t.validation = validation(|v| {
                (v.every_steps, v.patience, v.min_delta) = (Some(1), Some(2), Some(0.1));
                v.keep_last = keep_last;
            });
        });
        case.validation = texts(1);
        let mut parameters = zeros(12);
        // 2.95 is not lower enough than 3.
        let script = vec![9.0, 5.0, 3.0, 3.5, 2.95, 1.0];
        let mut model = Toy { script, ..Default::default() };
        let report = case.run(&mut model, &mut parameters, &mut super::super::hooks::Plain);
        (report.unwrap(), values(&parameters))
    };
    let (report, best) = scripted(false);
    assert_eq!(report.end(), v1::TrainingEnd::StoppedEarly);
    assert_eq!((report.steps, report.kept_step), (4, 2));
    let after = |steps: u32| {
        Case::new(|t| {
            sgd(t);
            t.steps = Some(steps);
        })
        .plain()
        .0
    };
    assert_eq!(best, after(2));
    let (report, last) = scripted(true);
    assert_eq!((report.steps, report.kept_step), (4, 4));
    assert_eq!(last, after(4));
}

#[test]
fn a_run_that_only_gets_worse_says_so() {
    let mut case = Case::new(|t| {
        t.epochs = Some(1.0);
        t.validation = validation(|_| ());
    });
    case.validation = texts(1);
    let mut model = Toy { script: vec![1.0, 2.0], ..Default::default() };
    let report = case.run(&mut model, &mut zeros(12), &mut super::super::hooks::Plain).unwrap();
    assert!(report.warnings[0].contains("never fell below"), "{:?}", report.warnings);
}

#[test]
fn an_average_is_what_is_kept() {
    let case = Case::new(|t| {
        sgd(t);
        t.steps = Some(3);
        t.ema_decay = Some(0.5);
    });
    let (kept, _) = case.plain();
    let after = |steps| {
        Case::new(|t| {
            sgd(t);
            t.steps = Some(steps);
        })
        .plain()
        .0
    };
    let (one, two, three) = (after(1), after(2), after(3));
    // From zeros: 1/2 of the last, 1/4 and 1/8 of those before.
    for i in 0..12 {
        let wanted = three[i] / 2.0 + two[i] / 4.0 + one[i] / 8.0;
        assert!((kept[i] - wanted).abs() < 1e-6, "{i}: {} {wanted}", kept[i]);
    }
}

#[test]
fn gradients_are_limited_before_the_update() {
    let moved = |clip: f64| {
        let case = Case::new(|t| {
            sgd(t);
            t.steps = Some(1);
            t.clip_norm = Some(clip);
        });
        let w = case.plain().0;
        w.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    };
    let free = moved(0.0);
    assert!(free > 0.002, "{free}");
    assert!((moved(0.01) - 0.001).abs() < 1e-9);
    assert_eq!(moved(1e3), free);
}

#[test]
fn numbers_that_are_not_finite_end_the_run_and_the_checkpoint_stays() {
    for (broken, what) in [(Broken::Loss, "the loss is not"), (Broken::Gradient, "gradient of 'w'")]
    {
        let case = Case::new(|t| {
            t.epochs = Some(2.0);
            t.checkpoint_every = Some(2);
        });
        // One batch an update, and the sixth update fails.
        let mut model = Toy { broken: Some((6, broken)), ..Default::default() };
        let error = case.run(&mut model, &mut zeros(12), &mut Remember(0.0)).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        for part in [
            "update 6 of 12",
            what,
            "lower learning_rate",
            "clip_norm",
            "checkpoint is of update 4",
        ] {
            assert!(error.message().contains(part), "{part}: {error}");
        }
        // What was good can be had, and gone on from.
        let settings = Settings::read(&case.training, 1.0).unwrap();
        let good = zeros(12);
        assert_eq!(case.with(&settings).last_good(&good).unwrap(), Some(4));
        assert!(values(&good).iter().all(|w| w.is_finite()) && values(&good) != values(&zeros(12)));
        let mut parameters = zeros(12);
        case.run(&mut Toy::default(), &mut parameters, &mut Remember(0.0)).unwrap();
        let whole = Case::new(|t| t.epochs = Some(2.0));
        let mut wanted = zeros(12);
        whole.run(&mut Toy::default(), &mut wanted, &mut Remember(0.0)).unwrap();
        // Options differ in what does not change numbers only.
        assert_eq!(values(&parameters), values(&wanted));
    }
}

/// Lets a number of updates in a row pass.
struct Patient {
    most: u32,
    in_a_row: u32,
    skipped: u32,
}

impl Hooks for Patient {
    fn skip(&mut self, _: Place) -> bool {
        self.in_a_row += 1;
        self.skipped += u32::from(self.in_a_row < self.most);
        self.in_a_row < self.most
    }

    fn after_step(&mut self, _: Updated<'_>) -> Result<()> {
        self.in_a_row = 0;
        Ok(())
    }
}

#[test]
fn hooks_may_let_updates_pass_that_are_not_finite() {
    for broken in [Broken::Loss, Broken::Gradient] {
        let case = Case::new(|t| t.epochs = Some(2.0));
        // The first five of twelve updates are as they would be; the others leave the parameters alone.
        let mut model = Toy { broken: Some((6, broken)), ..Default::default() };
        let mut hooks = Patient { most: 8, in_a_row: 0, skipped: 0 };
        let mut parameters = zeros(12);
        let report = case.run(&mut model, &mut parameters, &mut hooks).unwrap();
        assert_eq!((report.steps, hooks.skipped), (12, 7));
        let mut wanted = zeros(12);
        let cut = Case::new(|t| t.epochs = Some(2.0));
        let mut five = Toy { fail: Some(6), ..Default::default() };
        cut.run(&mut five, &mut wanted, &mut super::super::hooks::Plain).unwrap_err();
        assert_eq!(values(&parameters), values(&wanted));

        let case = Case::new(|t| t.epochs = Some(2.0));
        let mut model = Toy { broken: Some((6, broken)), ..Default::default() };
        let mut hooks = Patient { most: 4, in_a_row: 0, skipped: 0 };
        let error = case.run(&mut model, &mut zeros(12), &mut hooks).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains("update 9 of 12"), "{error}");
    }
}

#[test]
fn a_trained_tensor_that_is_not_finite_is_named() {
    struct Spoil;
    impl Hooks for Spoil {
        fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
            tensors::change(&updated.parameters["w"].var, |w| w[3] = f32::NAN)
        }
    }
    let case = Case::new(|t| t.checkpoint_every = Some(1));
    let error = case.run(&mut Toy::default(), &mut zeros(12), &mut Spoil).unwrap_err();
    assert!(error.message().contains("update 1 of 6: 'w' is not finite"), "{error}");
    assert!(!case.folder.path().join("last.safetensors").exists());
    let case = Case::new(|_| ());
    let error = case.run(&mut Toy::default(), &mut zeros(12), &mut Spoil).unwrap_err();
    assert!(error.message().contains("update 2 of 6: 'w' is not finite"), "{error}");
}

#[test]
fn cancelling_stops_between_batches_and_leaves_no_half_files() {
    let flag = Arc::new(AtomicBool::new(false));
    let mut case = Case::new(|t| {
        t.epochs = Some(5.0);
        t.accumulation = Some(3);
        t.checkpoint_every = Some(1);
    });
    case.progress = Progress::new(Arc::new(|_, _| {}), flag.clone());
    let mut model = Toy { cancel: Some((4, flag)), ..Default::default() };
    let error = case.run(&mut model, &mut zeros(12), &mut Remember(0.0)).unwrap_err();
    assert_eq!((error.reason(), model.calls), (Reason::Cancelled, 4));
    let files: Vec<_> = std::fs::read_dir(case.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files, ["last.safetensors"]);
}

#[test]
fn too_much_memory_is_refused_before_anything_is_done() {
    let case = Case::new(|t| {
        t.memory_bytes = Some(1291);
        t.accumulation = Some(1);
    });
    let mut model = Toy::default();
    let error = case.run(&mut model, &mut zeros(12), &mut Remember(0.0)).unwrap_err();
    assert_eq!((error.reason(), model.calls), (Reason::LimitReached, 0));
    assert_eq!(std::fs::read_dir(case.folder.path()).unwrap().count(), 0);
    let case = Case::new(|t| t.memory_bytes = Some(1292));
    case.run(&mut model, &mut zeros(12), &mut Remember(0.0)).unwrap();
}

#[test]
fn records_of_another_kind_are_refused() {
    let mut case = Case::new(|_| ());
    case.data.push(Sequence { tokens: vec![1, 2], target: Target::Class(0), line: 13 });
    let error = case.run(&mut Toy::default(), &mut zeros(12), &mut Remember(0.0)).unwrap_err();
    assert!(error.message().starts_with("line 13"), "{error}");
    let mut case = Case::new(|_| ());
    case.validation = vec![Sequence { tokens: vec![1, 2], target: Target::Value(0.5), line: 3 }];
    let error = case.run(&mut Toy::default(), &mut zeros(12), &mut Remember(0.0)).unwrap_err();
    assert!(error.message().starts_with("validation: line 3"), "{error}");
    let masked = Case::new(|t| t.objective = v1::TrainingObjective::MaskedLm.into());
    let error = masked.run(&mut Toy::default(), &mut zeros(12), &mut Remember(0.0)).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
}

#[test]
fn the_numbers_are_told_on_the_way() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let messages = Arc::new(Mutex::new(Vec::new()));
    let (told, said) = (seen.clone(), messages.clone());
    let mut case = Case::new(|t| {
        t.epochs = Some(1.0);
        t.validation = validation(|v| v.every_steps = Some(3));
    });
    case.validation = texts(3);
    let sink = move |_: f64, message: &str| said.lock().unwrap().push(message.to_owned());
    case.progress = Progress::new(Arc::new(sink), Arc::default())
        .with_metrics(Arc::new(move |metrics| told.lock().unwrap().push(metrics.clone())));
    let mut parameters = zeros(12);
    case.run(&mut Toy::default(), &mut parameters, &mut Remember(0.0)).unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 8);
    assert!(seen[7].is_empty());
    let last = &seen[6];
    for name in [
        "step",
        "steps",
        "loss",
        "validation_loss",
        "learning_rate",
        "tokens_per_second",
        "pull",
        "gradient_norm",
    ] {
        assert!(last.contains_key(name), "{name}: {last:?}");
    }
    assert_eq!((last["step"], last["steps"], last["validation_step"]), (6.0, 6.0, 6.0));
    assert_eq!(seen[1]["step"], 1.0);
    assert_eq!(seen[4]["validation_step"], 3.0);
    let messages = messages.lock().unwrap();
    assert_eq!(messages[0], "measuring before training");
    assert_eq!(messages.last().unwrap(), "training: update 6 of 6, epoch 1.00");
}

/// What a hook changes is what the next update starts from.
#[test]
fn hooks_come_in_their_order() {
    struct Order(RefCell<Vec<String>>);
    impl Hooks for Order {
        fn penalty(&mut self, place: Place, _: &Parameters) -> Result<Option<(f64, Gradients)>> {
            self.0.borrow_mut().push(format!("penalty {}", place.step));
            Ok(None)
        }
        fn after_backward(
            &mut self,
            _: Place,
            _: &Parameters,
            gradients: &mut Gradients,
        ) -> Result<()> {
            self.0.borrow_mut().push("backward".into());
            gradients.insert("w".into(), Tensor::new(vec![1f32; 12].as_slice(), &Device::Cpu)?);
            Ok(())
        }
        fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
            self.0.borrow_mut().push(format!("step at {}", updated.place.rate));
            let w = updated.parameters["w"].var.to_vec1::<f32>()?;
            assert!((w[0] + 0.1).abs() < 1e-6, "{w:?}");
            tensors::change(&updated.parameters["w"].var, |w| w.fill(0.0))
        }
    }
    let case = Case::new(|t| {
        sgd(t);
        t.steps = Some(2);
    });
    let mut hooks = Order(RefCell::default());
    case.run(&mut Toy::default(), &mut zeros(12), &mut hooks).unwrap();
    let calls = hooks.0.into_inner();
    let wanted = ["penalty 1", "backward", "step at 0.1", "penalty 2", "backward", "step at 0.1"];
    assert_eq!(calls, wanted);
}
