//! DSnoT (Zhang et al. 2023, "Dynamic sparse no training: training-free fine-tuning for sparse LLMs", arXiv
//! 2310.08915).
//!
//! Block by block, right after a linear got its mask, pruned weights come back and kept ones go until the
//! expected output is that of the dense weights ([`regrow`] has the exchange). Only the mask moves. The order
//! of growing is `|W m| / v^p` (equation 5), that of pruning Wanda's score (equation 6), whatever the mask came
//! from; with n:m the partner is the weight of the group with the lowest initial score.
//!
//! Decided here: sums are over 2048 tokens whatever the calibration; all linears are refined unless asked
//! otherwise; exchanges stop before the error would grow (the published loop bounces until it meets the
//! threshold, which is `threshold`); an exchange that ends at exactly zero turns no sign; a pruned weight
//! whose whole group changed sides is passed over. A start from magnitude is that of `magnitude` (compared
//! over the tensor; the published program compares within rows once it exchanges), one from SparseGPT compares
//! its score within rows, on the dense weights.
//!
//! The exchange believes the means, and needs text for them: of SmolLM2-135M with 70 % of the weights gone, the
//! perplexity of Wanda's mask went from 726 to 896 with 2 sequences of 256 tokens and from 654 to 509 with 16
//! (2044 predictions of WikiText-2), while the expected error fell to 6 % both times. What attention gives is
//! alike along a sequence, so there few sequences are few samples: refined alone it lost each time, the
//! feed-forward networks alone gained with 2 sequences already (711).

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::json;

use super::hessian::Factor;
use super::mask::Mask;
use super::named_choice::choice;
use super::regrow::{self, Change, Rules, Seen, Stop};
use super::sparsity::{Amount, Sparsity};
use super::{calibrated, cost, magnitude, options, prune_each, seeded, wanda};
use crate::calibrate;
use crate::calibrate::walk::{self, Site};
use crate::error::{Error, Result};
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Family, Model, ModelInfo};
use crate::progress::Metrics;
use crate::proto::v1::{self, DsnotInitial, DsnotModules, DsnotStop};

static CARD: Card = Card {
    name: "dsnot",
    title: "DSnoT",
    verb: "compress",
    summary: "Exchanges pruned and kept weights until the expected output is the dense one; no weight \
              is changed.",
    paper: "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, arXiv 2310.08915",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &["gptq", "round_to_nearest"],
};

const MAX_CYCLES: u32 = 50;
const THRESHOLD: f64 = 0.1;
const VAR_POWER: f64 = 1.0;

/// Checked options.
pub(super) struct Settings {
    initial: DsnotInitial,
    modules: DsnotModules,
    rules: Rules,
    var_power: f64,
    damp: f64,
    gram: bool,
}

impl Settings {
    /// What the message asks for; the amount says whether there is a pattern.
    pub(super) fn read(options: &v1::Dsnot, amount: Amount) -> Result<Self> {
        let max_cycles = options.max_cycles.unwrap_or(MAX_CYCLES);
        if max_cycles > 100_000 {
            let problem = format!("{max_cycles} is outside 0 to 100000; {MAX_CYCLES} is usual");
            return Err(Error::option("max_cycles", problem));
        }
        let threshold = options.threshold.unwrap_or(THRESHOLD);
        if !(threshold >= 0.0 && threshold.is_finite()) {
            let problem =
                format!("{threshold} is no finite number from 0 on; {THRESHOLD} is usual");
            return Err(Error::option("threshold", problem));
        }
        let var_power = options.var_power.unwrap_or(VAR_POWER);
        if !(0.0..=8.0).contains(&var_power) {
            let problem = format!("{var_power} is outside 0 to 8; {VAR_POWER} is usual");
            return Err(Error::option("var_power", problem));
        }
        let stop = match choice!(DsnotStop, "stop", options.stop, NoIncrease)? {
            DsnotStop::Unspecified | DsnotStop::NoIncrease => Stop::NoIncrease,
            DsnotStop::Threshold => Stop::Threshold,
            DsnotStop::Sign => Stop::Sign,
        };
        let group = match amount {
            Amount::Share(_) => None,
            Amount::NOfM { m, .. } => Some(m),
        };
        let initial = choice!(DsnotInitial, "initial", options.initial, Wanda)?;
        Ok(Self {
            initial,
            modules: choice!(DsnotModules, "modules", options.modules, All)?,
            rules: Rules { max_cycles: max_cycles as usize, threshold, stop, group },
            var_power,
            damp: options::damp(options.damp)?,
            gram: options.output_error || initial == DsnotInitial::Sparsegpt,
        })
    }

    /// Zeros of a `[rows, cols]` matrix.
    fn zeros(&self, amount: Amount, rows: usize, cols: usize) -> usize {
        match self.initial {
            DsnotInitial::Magnitude => amount.of(rows * cols),
            _ => rows * amount.of(cols),
        }
    }

    /// Whether weights of a block that belong to this input are refined. The last two inputs of a block are
    /// those of its feed-forward network.
    fn refines(&self, family: &Family, site: &Site<'_>) -> bool {
        let groups = walk::of(family).linears(site.block);
        let attention = groups.len().saturating_sub(2);
        let place = groups.iter().position(|g| site.names.iter().any(|n| g.iter().any(|m| m == n)));
        let in_attention = place.is_some_and(|place| place < attention);
        match self.modules {
            DsnotModules::Unspecified | DsnotModules::All => true,
            DsnotModules::Attention => in_attention,
            DsnotModules::Mlp => !in_attention,
        }
    }
}

/// What was done to a weight.
pub(super) struct Done {
    pub mask: Mask,
    /// Absent for a weight that was not refined.
    pub changes: Option<Vec<Change>>,
    /// Errors of the outputs squared, before and after, over those of the dense ones; where there is a Gram
    /// matrix.
    pub output: Option<[f64; 2]>,
    /// Time that the exchange took.
    pub seconds: f64,
}

/// The refined masks of a site's weights, each pruned by its share.
pub(super) fn masks(
    site: &Site<'_>,
    settings: &Settings,
    refines: bool,
    amounts: &[Amount],
    sequences: usize,
) -> Result<(Vec<Done>, usize)> {
    let norms = site.inputs.norms();
    let cols = norms.len();
    let diagonal: Vec<f32> = match (settings.initial, site.inputs.gram()) {
        (DsnotInitial::Sparsegpt, Some(gram)) => {
            let order: Vec<usize> = (0..cols).collect();
            let name = site.names.first().copied().unwrap_or_default();
            let factor = Factor::new(gram, sequences, settings.damp, &order, name)?;
            (0..cols).map(|j| factor.diagonal(j)).collect()
        }
        _ => Vec::new(),
    };
    let initial = settings.initial;
    let score = |w: f32, j: usize| match initial {
        DsnotInitial::Magnitude => w.abs(),
        DsnotInitial::Sparsegpt => (w / diagonal[j]).powi(2),
        DsnotInitial::Wanda | DsnotInitial::Unspecified => w.abs() * norms[j],
    };
    let seen = Seen::new(site.inputs, settings.var_power);
    let mut all = Vec::with_capacity(site.dense.len());
    for (weights, amount) in site.dense.iter().zip(amounts) {
        let mut mask = match (initial, *amount) {
            (DsnotInitial::Magnitude, amount) => magnitude::mask(weights, cols, amount),
            (DsnotInitial::Sparsegpt, Amount::Share(_)) => {
                Mask::smallest_of_rows(weights, cols, amount.of(cols), score)
            }
            (DsnotInitial::Sparsegpt, Amount::NOfM { n, m }) => {
                Mask::n_of_m(weights, cols, (n, m), score)
            }
            (_, amount) => wanda::mask(weights, &norms, amount),
        };
        let error = |mask: &Mask| {
            site.inputs.gram().map(|gram| {
                let mut lost = weights.clone();
                lost.iter_mut()
                    .zip(mask.pruned())
                    .for_each(|(w, p)| *w = if *p { *w } else { 0.0 });
                gram.energy(&lost) / gram.energy(weights).max(f64::MIN_POSITIVE)
            })
        };
        let before = error(&mask);
        let start = Instant::now();
        let changes =
            refines.then(|| regrow::refine(weights, &mut mask, &seen, &settings.rules, score));
        let seconds = start.elapsed().as_secs_f64();
        let output = match before {
            Some(before) => error(&mask).map(|after| [before, after]),
            None => None,
        };
        all.push(Done { mask, changes, output, seconds });
    }
    Ok((all, if refines { seen.constant } else { 0 }))
}

/// Sums over the rows of all refined weights.
#[derive(Default)]
pub(super) struct Account {
    weights: BTreeMap<String, serde_json::Value>,
    rows: usize,
    swaps: usize,
    most: usize,
    before: f64,
    after: f64,
    constant: usize,
}

impl Account {
    pub(super) fn add(&mut self, name: &str, done: &Done) {
        let mut entry = json!({});
        if let Some(changes) = &done.changes {
            let sum = |of: &dyn Fn(&Change) -> f64| changes.iter().map(of).sum::<f64>();
            let rows = changes.len().max(1) as f64;
            let most = changes.iter().map(|c| c.swaps).max().unwrap_or_default();
            let (before, after) = (sum(&|c| c.before.abs()), sum(&|c| c.after.abs()));
            let swaps = changes.iter().map(|c| c.swaps).sum::<usize>();
            self.rows += changes.len();
            self.swaps += swaps;
            self.most = self.most.max(most);
            self.before += before;
            self.after += after;
            entry = json!({
                "swaps_per_row": swaps as f64 / rows,
                "most_swaps": most,
                "expected_error_before": before / rows,
                "expected_error_after": after / rows,
            });
        }
        if let Some([before, after]) = done.output {
            entry["output_error_before"] = json!(before.sqrt());
            entry["output_error_after"] = json!(after.sqrt());
        }
        self.weights.insert(name.to_owned(), entry);
    }

    pub(super) fn constant(&mut self, count: usize) {
        self.constant += count;
    }

    /// Expected error that is left, as a share.
    pub(super) fn left(&self) -> f64 {
        if self.before > 0.0 { self.after / self.before } else { 1.0 }
    }

    /// Puts the account into the record of an outcome.
    pub(super) fn put(self, outcome: &mut Outcome) {
        if self.rows > 0 && self.before == 0.0 {
            outcome.warnings.push(
                "no input has a mean on the calibration text, so no error is expected and nothing was \
                 exchanged"
                    .to_owned(),
            );
        }
        let rows = self.rows.max(1) as f64;
        outcome.record["dsnot"] = json!({
            "rows": self.rows,
            "swaps_per_row": self.swaps as f64 / rows,
            "most_swaps": self.most,
            "expected_error_before": self.before / rows,
            "expected_error_after": self.after / rows,
            "constant_inputs": self.constant,
            "tensors": self.weights,
        });
    }
}

impl Method for v1::Dsnot {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Sparsity::resolve(&mut self.sparsity);
        calibrate::Options::resolve(&mut self.calibration);
        if self.initial == DsnotInitial::Unspecified as i32 {
            self.initial = DsnotInitial::Wanda.into();
        }
        self.max_cycles.get_or_insert(MAX_CYCLES);
        self.threshold.get_or_insert(THRESHOLD);
        self.var_power.get_or_insert(VAR_POWER);
        if self.modules == DsnotModules::Unspecified as i32 {
            self.modules = DsnotModules::All.into();
        }
        if self.stop == DsnotStop::Unspecified as i32 {
            self.stop = DsnotStop::NoIncrease.into();
        }
        self.damp.get_or_insert(options::DAMP);
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        calibration.check(model)?;
        let settings = Settings::read(self, sparsity.amount)?;
        let zeros = |rows, cols| settings.zeros(sparsity.amount, rows, cols);
        let after = sparsity.check(model, &zeros)?;
        Ok((cost::calibrated(model, &after, &calibration, settings.gram), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        let settings = Settings::read(self, sparsity.amount)?;
        let family = model.family.clone();
        let names = sparsity.names(&family)?;
        let mut account = Account::default();
        // One pass of the text, for comparison: from the first site to the end every block is passed twice,
        // but for the first, whose statistics are in, and the last, which nothing follows.
        let blocks = walk::of(&family).blocks() as f64;
        let (mut start, mut inside, mut refining) = (None, 0.0, 0.0);
        let mut outcome =
            calibrated(cx, model, &names, &calibration, settings.gram, &mut |site, _| {
                let entered = Instant::now();
                start.get_or_insert(entered);
                let refines = settings.refines(&family, site);
                let amounts = vec![sparsity.amount; site.names.len()];
                let (done, constant) =
                    masks(site, &settings, refines, &amounts, calibration.sequences)?;
                refining += done.iter().map(|done| done.seconds).sum::<f64>();
                account.constant(constant);
                let named = site.names.iter().zip(&site.dense).zip(done);
                let made = named
                    .map(|((name, weights), done)| {
                        account.add(name, &done);
                        let cols = site.inputs.cols();
                        prune_each(name, weights, cols, &done.mask, &sparsity)
                    })
                    .collect();
                inside += entered.elapsed().as_secs_f64();
                made
            })?;
        let passes = start.map_or(0.0, |start| start.elapsed().as_secs_f64() - inside);
        let pass = passes * blocks / (2.0 * blocks - 2.0).max(1.0);
        let share = if pass > 0.0 { refining / pass } else { 0.0 };
        cx.progress.measure(Metrics::from([
            ("expected_error_left".to_owned(), account.left()),
            ("refining_share_of_pass".to_owned(), share),
        ]));
        account.put(&mut outcome);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::calibrate::inputs::Inputs;
    use crate::methods::compress::folding::testing::tiny;
    use crate::methods::compress::testing;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};

    fn field(options: &v1::Dsnot) -> String {
        let error = Settings::read(options, Amount::Share(0.5)).err().expect("refused");
        error.violations()[0].field.clone()
    }

    #[test]
    fn bad_options_are_named() {
        let plain = v1::Dsnot::default;
        assert_eq!(field(&v1::Dsnot { max_cycles: Some(100_001), ..plain() }), "max_cycles");
        for bad in [-1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(field(&v1::Dsnot { threshold: Some(bad), ..plain() }), "threshold");
        }
        for bad in [-0.5, 8.5, f64::NAN] {
            assert_eq!(field(&v1::Dsnot { var_power: Some(bad), ..plain() }), "var_power");
        }
        assert_eq!(field(&v1::Dsnot { initial: 9, ..plain() }), "initial");
        assert_eq!(field(&v1::Dsnot { modules: 9, ..plain() }), "modules");
        assert_eq!(field(&v1::Dsnot { stop: 9, ..plain() }), "stop");
        assert_eq!(field(&v1::Dsnot { damp: Some(0.0), ..plain() }), "damp");
    }

    #[test]
    fn counts_of_zeros_are_those_of_the_start() {
        let read = |initial: DsnotInitial| {
            let options = v1::Dsnot { initial: initial.into(), ..Default::default() };
            Settings::read(&options, Amount::Share(0.5)).expect("fine")
        };
        let (wanda, magnitude) = (read(DsnotInitial::Wanda), read(DsnotInitial::Magnitude));
        assert_eq!(wanda.zeros(Amount::Share(0.5), 3, 7), 9);
        assert_eq!(magnitude.zeros(Amount::Share(0.5), 3, 7), 10);
        assert!(!wanda.gram && read(DsnotInitial::Sparsegpt).gram);
    }

    fn calibration() -> Option<v1::Calibration> {
        let (sequences, sequence_length) = (Some(8), Some(24));
        Some(v1::Calibration { sequences, sequence_length, ..Default::default() })
    }

    fn sparsity(share: f64) -> Option<v1::Sparsity> {
        let values = v1::ValueType::F32.into();
        Some(v1::Sparsity { share: Some(share), values, ..Default::default() })
    }

    #[test]
    fn what_is_not_to_be_refined_keeps_the_mask_it_starts_from() {
        let model = tiny("llama");
        let wanda = v1::Wanda { sparsity: sparsity(0.6), calibration: calibration() };
        let wanda = testing::apply(&wanda, &model).expect("prunes").model;
        let first: Vec<String> = walk::of(&model.family).linears(0).concat();
        for (modules, refined) in [
            (DsnotModules::Attention, "self_attn"),
            (DsnotModules::Mlp, "mlp"),
            (DsnotModules::All, "layers"),
        ] {
            let options = v1::Dsnot {
                modules: modules.into(),
                sparsity: sparsity(0.6),
                calibration: calibration(),
                ..Default::default()
            };
            let made = testing::apply(&options, &model).expect("prunes");
            let tensors = made.record["dsnot"]["tensors"].as_object().expect("tensors");
            assert_eq!(tensors.len(), 21);
            for (name, entry) in tensors {
                let swaps = entry.get("swaps_per_row").is_some();
                assert_eq!(swaps, name.contains(refined), "{name} with {modules:?}");
            }
            // The first block sees what Wanda sees.
            let (mut same, mut other) = (0, 0);
            for name in &first {
                let (got, start) =
                    (made.model.weights[name].to_f32(), wanda.weights[name].to_f32());
                assert!(name.contains(refined) || got == start, "{name} with {modules:?}");
                assert_eq!(made.model.weights[name].zeros(), wanda.weights[name].zeros());
                (same, other) =
                    (same + usize::from(got == start), other + usize::from(got != start));
            }
            assert!(other > 0 && (modules == DsnotModules::All || same >= 3), "{same} {other}");
        }
    }

    #[test]
    fn a_start_from_sparsegpt_scores_the_dense_weights() {
        // Uncorrelated inputs of sizes 1, 2, 4 and 5, dampened by a hundredth of the mean square, 0.115: the
        // scores of [4, 3, 2, 1] are 17.8, 37.0, 64.5 and 25.1, those of [1, 2, 3, -4] 1.1, 16.5, 145 and 402.
        let mut inputs = Inputs::new(4, true);
        for (j, size) in [1.0, 2.0, 4.0, 5.0].into_iter().enumerate() {
            let mut row = [0.0; 4];
            row[j] = size;
            inputs.add(&row);
        }
        let start = |initial: DsnotInitial, amount: Amount| {
            let (initial, max_cycles) = (initial.into(), Some(0));
            let options =
                v1::Dsnot { initial, max_cycles, output_error: true, ..Default::default() };
            let settings = Settings::read(&options, amount).expect("fine");
            let dense = vec![vec![4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, -4.0]];
            let (names, weights) = (vec!["w"], Vec::new());
            let site = Site { block: 0, names, weights, dense, inputs: &inputs };
            let (mut done, _) = masks(&site, &settings, true, &[amount], 1).expect("masks");
            let done = done.remove(0);
            let [before, after] = done.output.expect("Gram matrices are there");
            assert_eq!(before, after, "nothing was exchanged");
            (done.mask.pruned().to_vec(), before)
        };
        let want = [true, false, false, true, true, true, false, false];
        for amount in [Amount::Share(0.5), Amount::NOfM { n: 2, m: 4 }] {
            let (mask, error) = start(DsnotInitial::Sparsegpt, amount);
            assert_eq!(mask, want, "{amount:?}");
            // 16 + 25 and 1 + 16 of 141 and 561.
            assert!((error - 58.0 / 702.0).abs() < 1e-6, "{error}");
        }
        let (mask, _) = start(DsnotInitial::Magnitude, Amount::Share(0.5));
        assert_eq!(mask, [false, false, true, true, true, true, false, false]);
    }

    #[test]
    fn inputs_without_a_mean_exchange_nothing_and_it_is_said() {
        let mut model = tiny("llama");
        let none = Dense::from_f32(vec![96, 32], &[0.0; 96 * 32], Dtype::F32).expect("dense");
        let name = "model.embed_tokens.weight".to_owned();
        assert!(model.weights.insert(name, Arc::new(Weight::Dense(none))).is_some());
        let options =
            v1::Dsnot { sparsity: sparsity(0.5), calibration: calibration(), ..Default::default() };
        let made = testing::apply(&options, &model).expect("prunes");
        let account = &made.record["dsnot"];
        assert_eq!(
            (account["most_swaps"].as_u64(), account["rows"].as_u64()),
            (Some(0), Some(1152))
        );
        assert_eq!(account["swaps_per_row"].as_f64(), Some(0.0));
        // Three blocks with inputs of 32, 64, 32 and 96 channels that never vary.
        assert_eq!(account["constant_inputs"].as_u64(), Some(672));
        assert!(made.warnings.iter().any(|w| w.contains("no input has a mean")));
        assert!((made.zero_share - 0.5).abs() < 1e-12);
    }
}
