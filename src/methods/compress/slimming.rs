//! Removing channels of feed-forward networks: what structured methods share.
//!
//! Channel `j` of a block is row `j` of the weights that lead into its feed-forward network (gate and up, or up
//! alone) and column `j` of the one that leads out. What is removed is gone: the matrices become narrower and
//! the configuration holds the width of each block.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{check_finite, store};
use crate::calibrate::walk;
use crate::error::{Error, Reason, Result};
use crate::methods::Outcome;
use crate::models::{Family, Model, ModelInfo};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, ValueFormat, Weight};
use crate::progress::Progress;
use crate::proto::v1::ValueType;

/// Share that is removed when nothing is said.
pub const RATIO: f64 = 0.2;
/// Multiple that widths become when nothing is said.
pub const ROUND_TO: u32 = 32;

/// Checked options that all structured methods have.
#[derive(Debug, Clone, PartialEq)]
pub struct Slim {
    /// Share of the channels that goes, in [0, 0.9).
    pub ratio: f64,
    /// Widths are multiples of this.
    pub unit: usize,
    pub values: ValueFormat,
}

impl Slim {
    /// Reads the options of a message.
    pub fn read(ratio: Option<f64>, round_to: Option<u32>, values: i32) -> Result<Self> {
        let ratio = ratio.unwrap_or(RATIO);
        if !(0.0..0.9).contains(&ratio) {
            let problem = format!("{ratio} is outside [0, 0.9); {RATIO} is usual");
            return Err(Error::option("ratio", problem));
        }
        let round_to = round_to.unwrap_or(ROUND_TO);
        if round_to > 4096 {
            let problem = format!("{round_to} is outside 0 to 4096; {ROUND_TO} is usual");
            return Err(Error::option("round_to", problem));
        }
        let values = match ValueType::try_from(values) {
            Ok(ValueType::Unspecified | ValueType::F16) => ValueFormat::F16,
            Ok(ValueType::F32) => ValueFormat::F32,
            Ok(ValueType::Bf16) => ValueFormat::BF16,
            Err(_) => {
                let problem = format!("{values} is no number of ValueType");
                return Err(Error::option("values", problem));
            }
        };
        Ok(Self { ratio, unit: round_to.max(1) as usize, values })
    }

    /// Writes defaults out.
    pub fn resolve(ratio: &mut Option<f64>, round_to: &mut Option<u32>, values: &mut i32) {
        ratio.get_or_insert(RATIO);
        round_to.get_or_insert(ROUND_TO);
        if *values == ValueType::Unspecified as i32 {
            *values = ValueType::F16.into();
        }
    }

    /// Whether nothing goes.
    pub fn nothing(&self) -> bool {
        self.ratio == 0.0
    }

    /// Checks the options against a model; gives what it will be. Where `uneven` widths come out they are not
    /// known before: two blocks stand in for that, so that a later step that needs more than multiples of the
    /// unit is refused before work starts.
    pub fn check(&self, model: &ModelInfo, uneven: bool, biases: bool) -> Result<ModelInfo> {
        let mut full = Vec::new();
        for block in 0..walk::of(&model.family).blocks() {
            let parts = Parts::of(&model.family, block)?;
            for name in parts.into.iter().chain([&parts.out]) {
                let (tensor, _) = store::matrix(model, name)?;
                store::refuse_quantised(tensor, name, "prune")?;
            }
            let (_, [_, wide]) = store::matrix(model, &parts.out)?;
            if !self.nothing() {
                if wide < self.unit {
                    let problem =
                        format!("{} is more than the {wide} channels of block {block}", self.unit);
                    return Err(Error::option("round_to", problem));
                }
                if (1.0 - self.ratio) * (wide as f64) < self.unit as f64 {
                    let problem = format!(
                        "{} leaves block {block} fewer than the {} channels of round_to",
                        self.ratio, self.unit
                    );
                    return Err(Error::option("ratio", problem));
                }
            }
            full.push(wide);
        }
        if self.nothing() {
            return Ok(model.clone());
        }
        let wanted: Vec<f64> = full.iter().map(|w| *w as f64 * (1.0 - self.ratio)).collect();
        let mut widths = widths(&wanted, &full, self.unit, total(&full, self));
        if uneven
            && let [first, .., last] = widths.as_mut_slice()
            && *last > self.unit
            && *first + self.unit <= full[0]
        {
            (*first, *last) = (*first + self.unit, *last - self.unit);
        }
        let mut after = model.clone();
        set_widths(&mut after.family, &widths);
        if biases {
            add_biases(&mut after.family);
        }
        for (block, wide) in widths.iter().enumerate() {
            let parts = Parts::of(&model.family, block)?;
            for name in parts.into.iter().chain([&parts.out]) {
                let (tensor, [rows, cols]) = store::matrix(model, name)?;
                let shape = if *name == parts.out { [rows, *wide] } else { [*wide, cols] };
                let share = (shape[0] * shape[1]) as f64 / (rows * cols) as f64;
                let zeros = (store::known_zeros(tensor) as f64 * share) as usize;
                after
                    .tensors
                    .insert(name.clone(), store::pruned_info(shape, zeros, self.values, None));
                let bias = bias_name(name);
                let length = if *name == parts.out { rows } else { *wide };
                if biases || model.tensors.contains_key(&bias) {
                    after.tensors.insert(bias, vector_info(length));
                }
            }
        }
        Ok(after)
    }
}

fn vector_info(length: usize) -> crate::models::TensorInfo {
    crate::models::TensorInfo {
        record: crate::nn::weight::Record::Dense { shape: vec![length] },
        shape: vec![length],
        bytes: 4 * length as u64,
    }
}

/// The weights of a block's feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// Gate and up, or up alone: a row for each channel.
    pub into: Vec<String>,
    /// A column for each channel.
    pub out: String,
}

impl Parts {
    /// The last two inputs of a block are those of its feed-forward network.
    pub fn of(family: &Family, block: usize) -> Result<Self> {
        let mut groups = walk::of(family).linears(block).into_iter().rev();
        match (groups.next().as_deref(), groups.next()) {
            (Some([out]), Some(into)) if !into.is_empty() => Ok(Self { into, out: out.clone() }),
            _ => Err(Error::new(
                Reason::ModelUnsuitable,
                format!("block {block} has no feed-forward network whose channels could go"),
            )),
        }
    }
}

/// Channels of the feed-forward network of each block.
pub fn full(model: &Model) -> Result<Vec<usize>> {
    let blocks = walk::of(&model.family).blocks();
    (0..blocks).map(|b| Ok(model.weight(&Parts::of(&model.family, b)?.out)?.cols())).collect()
}

/// Channels that stay in all.
pub fn total(full: &[usize], slim: &Slim) -> usize {
    let all: usize = full.iter().sum();
    let units = ((1.0 - slim.ratio) * all as f64 / slim.unit as f64).round() as usize;
    let most: usize = full.iter().map(|w| w / slim.unit).sum();
    units.clamp(full.len().min(most), most) * slim.unit
}

/// Whole widths near the wanted ones: multiples of `unit`, at least one and at most what there is, `total` in
/// all. What rounding is off by goes where rounding was off most.
pub fn widths(wanted: &[f64], full: &[usize], unit: usize, total: usize) -> Vec<usize> {
    let most = |b: usize| (full[b] / unit).max(1) * unit;
    let mut widths: Vec<usize> = wanted
        .iter()
        .enumerate()
        .map(|(b, w)| {
            let units = ((w.max(0.0) + unit as f64 / 2.0) / unit as f64).floor() as usize;
            (units * unit).clamp(unit, most(b))
        })
        .collect();
    loop {
        let sum: usize = widths.iter().sum();
        let lack = |b: &usize| wanted[*b] - widths[*b] as f64;
        let order = |a: &usize, b: &usize| lack(a).total_cmp(&lack(b));
        let found = match sum.cmp(&total) {
            std::cmp::Ordering::Equal => break,
            std::cmp::Ordering::Less => (0..widths.len())
                .filter(|b| widths[*b] + unit <= most(*b))
                .max_by(|a, b| order(a, b).then(b.cmp(a)))
                .map(|b| (b, widths[b] + unit)),
            std::cmp::Ordering::Greater => (0..widths.len())
                .filter(|b| widths[*b] > unit)
                .min_by(|a, b| order(a, b).then(a.cmp(b)))
                .map(|b| (b, widths[b] - unit)),
        };
        // Without room there is nothing to give or take.
        let Some((block, width)) = found else { break };
        widths[block] = width;
    }
    widths
}

/// The `count` highest scores, by rising index; equal scores by the lower index.
pub fn best(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Channels by block when the highest scores of all blocks stay: the scores of each block are taken relative
/// to their mean and spread.
pub fn across_blocks(scores: &[Vec<f64>], slim: &Slim) -> Vec<Vec<usize>> {
    let relative: Vec<Vec<f64>> = scores.iter().map(|s| standardised(s)).collect();
    let full: Vec<usize> = scores.iter().map(Vec::len).collect();
    let total = total(&full, slim);
    let mut all: Vec<(usize, f64)> =
        relative.iter().enumerate().flat_map(|(b, s)| s.iter().map(move |s| (b, *s))).collect();
    // Stable: equal scores by block and channel.
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut wanted = vec![0.0; scores.len()];
    all.iter().take(total).for_each(|(b, _)| wanted[*b] += 1.0);
    let widths = widths(&wanted, &full, slim.unit, total);
    scores.iter().zip(widths).map(|(s, width)| best(s, width)).collect()
}

/// `(s - mean) / deviation`; zeros where all are the same.
fn standardised(scores: &[f64]) -> Vec<f64> {
    let n = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let spread = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
    scores.iter().map(|s| if spread > 0.0 { (s - mean) / spread } else { 0.0 }).collect()
}

/// The length of each column of the weight that leads out.
pub fn column_sums(weight: &[f32], cols: usize, of: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut sums = vec![0.0; cols];
    for row in weight.chunks(cols) {
        sums.iter_mut().zip(row).for_each(|(s, w)| *s += of(f64::from(*w)));
    }
    sums
}

/// Keeps the channels of `kept` (rising indices by block); `added` is added to the bias of what leads out of
/// each block.
pub fn slim(
    mut model: Model,
    kept: &[Vec<usize>],
    added: Option<&[Vec<f32>]>,
    values: ValueFormat,
    progress: &Progress,
) -> Result<Model> {
    let family = model.family.clone();
    let vector = |values: &[f32]| -> Result<Arc<Weight>> {
        let dense = Dense::from_f32(vec![values.len()], values, Dtype::F32)?;
        Ok(Arc::new(Weight::Dense(dense)))
    };
    for (block, kept) in kept.iter().enumerate() {
        progress.report(block as f64 / family_blocks(&family) as f64, "removing channels")?;
        let parts = Parts::of(&family, block)?;
        let wide = model.weight(&parts.out)?.cols();
        let whole = kept.len() == wide;
        for name in &parts.into {
            let stored = Arc::clone(model.weight(name)?);
            let bias = bias_name(name);
            if !whole {
                let before = stored.to_f32();
                check_finite(name, &before)?;
                let cols = stored.cols();
                let rows = kept.iter().flat_map(|j| &before[j * cols..(j + 1) * cols]);
                let rows: Vec<f32> = rows.copied().collect();
                let new = store::pruned(name, [kept.len(), cols], &rows, values, None)?;
                model.weights.insert(name.clone(), Arc::new(new));
                if let Some(old) = model.weights.get(&bias) {
                    let old = old.to_f32();
                    let new: Vec<f32> = kept.iter().map(|j| old[*j]).collect();
                    model.weights.insert(bias.clone(), vector(&new)?);
                }
            }
            if added.is_some() && !model.weights.contains_key(&bias) {
                model.weights.insert(bias, vector(&vec![0.0; kept.len()])?);
            }
        }
        let stored = Arc::clone(model.weight(&parts.out)?);
        if !whole {
            let before = stored.to_f32();
            check_finite(&parts.out, &before)?;
            let columns: Vec<f32> =
                before.chunks(wide).flat_map(|row| kept.iter().map(|j| row[*j])).collect();
            let shape = [stored.rows(), kept.len()];
            let new = store::pruned(&parts.out, shape, &columns, values, None)?;
            model.weights.insert(parts.out.clone(), Arc::new(new));
        }
        if let Some(added) = added.and_then(|added| added.get(block)) {
            let bias = bias_name(&parts.out);
            let mut sum = match model.weights.get(&bias) {
                Some(old) => old.to_f32(),
                None => vec![0.0; stored.rows()],
            };
            sum.iter_mut().zip(added).for_each(|(s, a)| *s += a);
            model.weights.insert(bias, vector(&sum)?);
        }
    }
    let widths: Vec<usize> = kept.iter().map(Vec::len).collect();
    set_widths(&mut model.family, &widths);
    let mut said = |key: &str, value: Value| {
        if let Some(config) = model.config.as_object_mut() {
            config.insert(key.to_owned(), value);
        }
    };
    let equal = widths.windows(2).all(|pair| pair[0] == pair[1]);
    said("intermediate_size", if equal { json!(widths.first()) } else { json!(widths) });
    if added.is_some() && matches!(model.family, Family::Decoder(_)) {
        said("mlp_bias", json!(true));
        add_biases(&mut model.family);
    }
    progress.report(1.0, "channels removed")?;
    Ok(model)
}

fn family_blocks(family: &Family) -> usize {
    walk::of(family).blocks().max(1)
}

fn set_widths(family: &mut Family, widths: &[usize]) {
    match family {
        Family::Decoder(config) => config.set_widths(widths),
        Family::Encoder(config) => config.set_widths(widths),
    }
}

/// Encoders have biases anyway.
fn add_biases(family: &mut Family) {
    if let Family::Decoder(config) = family {
        config.mlp_bias = true;
    }
}

/// `a.b.bias` of `a.b.weight`.
pub fn bias_name(weight: &str) -> String {
    format!("{}.bias", weight.trim_end_matches(".weight"))
}

/// What a structured step says of itself.
pub fn outcome(
    (model, before): (Model, &ModelInfo),
    kept: &[Vec<usize>],
    facts: Value,
    calibration_tokens: u64,
    mut warnings: Vec<String>,
) -> Outcome {
    let elements = |info: &ModelInfo| -> u64 {
        info.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum()
    };
    let after = model.info();
    if let Family::Encoder(_) = &model.family {
        warnings.push(
            "the feed-forward networks have no gate: a channel is a row of one matrix and a column of \
             another"
                .to_owned(),
        );
    }
    let record = json!({
        "widths": kept.iter().map(Vec::len).collect::<Vec<_>>(),
        "kept_channels": kept,
        "parameters_before": elements(before),
        "parameters_after": elements(&after),
        "bytes_before": before.bytes(),
        "bytes_after": after.bytes(),
        "calibration_tokens": calibration_tokens,
        "facts": facts,
        "warnings": warnings,
    });
    Outcome { model, record, calibration_tokens, zero_share: 0.0, warnings }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::compress::folding;
    use crate::models::decoder::plan::{Cache, Chunk, Decoder};
    use crate::models::decoder::random;

    fn slim_of(ratio: f64, unit: usize) -> Slim {
        Slim { ratio, unit, values: ValueFormat::F32 }
    }

    #[test]
    fn widths_are_multiples_with_an_exact_total() {
        // 10.4, 20.6 and 29 in units of 8: 8, 24, 32 is 64; 56 takes back where rounding gave most.
        let full = [40, 40, 40];
        assert_eq!(widths(&[10.4, 20.6, 29.0], &full, 8, 64), [8, 24, 32]);
        assert_eq!(widths(&[10.4, 20.6, 29.0], &full, 8, 56), [8, 16, 32]);
        assert_eq!(widths(&[10.4, 20.6, 29.0], &full, 8, 72), [16, 24, 32]);
        assert_eq!(widths(&[0.0, 100.0], &[40, 40], 8, 48), [8, 40]);
        // No more than there is, and no endless search.
        assert_eq!(widths(&[40.0, 40.0], &[40, 40], 8, 1000), [40, 40]);
        assert_eq!(widths(&[1.0], &[40], 8, 0), [8]);
        assert_eq!(total(&[1536; 30], &slim_of(0.5, 32)), 768 * 30);
        assert_eq!(total(&[100; 3], &slim_of(0.2, 32)), 256);
    }

    #[test]
    fn the_best_stay_and_blocks_are_compared_by_spread() {
        assert_eq!(best(&[1.0, 3.0, 3.0, 2.0], 2), [1, 2]);
        assert_eq!(best(&[3.0, 1.0, 3.0, 3.0], 2), [0, 2]);
        // The same pattern a thousand times larger is the same.
        let scores = [vec![1.0, 2.0, 3.0, 4.0], vec![1000.0, 2000.0, 3000.0, 4000.0]];
        let kept = across_blocks(&scores, &slim_of(0.5, 1));
        assert_eq!(kept, [vec![2, 3], vec![2, 3]]);
        // A block with one that sticks out: it stays, and the others of its block lie below.
        let scores = [vec![0.0, 0.0, 0.0, 9.0], vec![1.0, 2.0, 3.0, 4.0]];
        assert_eq!(across_blocks(&scores, &slim_of(0.5, 1)), [vec![3], vec![1, 2, 3]]);
    }

    fn logits(model: &Model) -> Vec<f32> {
        let tokens: Vec<u32> = (0..20).map(|i| (i * 31 + 5) % 96).collect();
        let mut decoder = Decoder::new(model).expect("a decoder");
        let mut cache = Cache::new(decoder.config(), 20);
        let mut chunks = [Chunk { tokens: &tokens, cache: &mut cache, logits: 0..20 }];
        decoder.forward(&mut chunks).expect("runs").to_vec()
    }

    #[test]
    fn removed_channels_are_as_good_as_zero() {
        for architecture in ["llama", "gemma3_text"] {
            let model = random::model(random::tiny(architecture), 3).expect("a model");
            let blocks = full(&model).expect("blocks").len();
            let kept: Vec<Vec<usize>> =
                (0..blocks).map(|b| (0..80).filter(|j| (j * 7 + b) % 5 < 3).collect()).collect();
            let narrow = slim(model.clone(), &kept, None, ValueFormat::F32, &Progress::silent());
            let narrow = narrow.expect("slims");
            let mut zeroed = model.clone();
            for (block, kept) in kept.iter().enumerate() {
                let parts = Parts::of(&model.family, block).expect("parts");
                let weight = model.weight(&parts.out).expect("there");
                let mut values = weight.to_f32();
                for (i, value) in values.iter_mut().enumerate() {
                    if !kept.contains(&(i % 80)) {
                        *value = 0.0;
                    }
                }
                let shape = weight.shape().to_vec();
                let dense = Dense::from_f32(shape, &values, Dtype::F32).expect("dense");
                zeroed.weights.insert(parts.out, Arc::new(Weight::Dense(dense)));
                assert_eq!(
                    narrow
                        .weight(&Parts::of(&model.family, block).expect("parts").into[0])
                        .expect("there")
                        .rows(),
                    kept.len()
                );
            }
            for (a, b) in logits(&narrow).iter().zip(logits(&zeroed)) {
                assert!((a - b).abs() < 1e-5, "{architecture}: {a} {b}");
            }
            // What is kept whole is the same weight.
            let all: Vec<Vec<usize>> = vec![(0..80).collect(); blocks];
            let same = slim(model.clone(), &all, None, ValueFormat::F16, &Progress::silent());
            let same = same.expect("slims");
            for (name, weight) in &model.weights {
                assert!(Arc::ptr_eq(weight, &same.weights[name]), "{name}");
            }
        }
    }

    #[test]
    fn bad_options_are_named() {
        let field = |error: Option<Error>| error.expect("refused").violations()[0].field.clone();
        for bad in [-0.1, 0.9, f64::NAN] {
            assert_eq!(field(Slim::read(Some(bad), None, 0).err()), "ratio");
        }
        assert_eq!(field(Slim::read(None, Some(5000), 0).err()), "round_to");
        assert_eq!(field(Slim::read(None, None, 9).err()), "values");
        let info = random::model(random::tiny("llama"), 3).expect("a model").info();
        assert_eq!(field(slim_of(0.5, 96).check(&info, false, false).err()), "round_to");
        assert_eq!(field(slim_of(0.7, 32).check(&info, false, false).err()), "ratio");
    }

    #[test]
    fn encoders_lose_channels_with_their_biases() {
        let model = folding::testing::tiny("bert");
        let kept: Vec<Vec<usize>> =
            (0..3).map(|b| (0..96).filter(|j| (j * 5 + b) % 4 != 0).collect()).collect();
        let narrow = slim(model.clone(), &kept, None, ValueFormat::F32, &Progress::silent());
        let narrow = narrow.expect("slims");
        let mut zeroed = model.clone();
        for (block, kept) in kept.iter().enumerate() {
            let parts = Parts::of(&model.family, block).expect("parts");
            let mut values = model.weights[&parts.out].to_f32();
            let gone = |i: usize| !kept.contains(&(i % 96));
            values.iter_mut().enumerate().filter(|(i, _)| gone(*i)).for_each(|(_, v)| *v = 0.0);
            let dense = Dense::from_f32(vec![32, 96], &values, Dtype::F32).expect("dense");
            zeroed.weights.insert(parts.out, Arc::new(Weight::Dense(dense)));
            let bias = bias_name(&parts.into[0]);
            assert_eq!(narrow.weights[&bias].shape(), [kept.len()]);
        }
        let (got, want) = (folding::testing::logits(&narrow), folding::testing::logits(&zeroed));
        for (a, b) in got.iter().zip(&want) {
            assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "{a} {b}");
        }
        assert_ne!(want, folding::testing::logits(&model));
    }

    #[test]
    fn what_is_added_comes_out_of_the_block() {
        let added: Vec<Vec<f32>> = (0..3)
            .map(|b| (0..32).map(|i| ((i * 3 + b) % 7) as f32 / 10.0 - 0.3).collect())
            .collect();
        let kept: Vec<Vec<usize>> = vec![(0..64).collect(); 3];
        let slimmed = |model: &Model, added: Option<&[Vec<f32>]>| {
            let progress = Progress::silent();
            slim(model.clone(), &kept, added, ValueFormat::F32, &progress).expect("slims")
        };
        let model = folding::testing::tiny("llama");
        let (plain, biased) = (slimmed(&model, None), slimmed(&model, Some(&added)));
        assert_eq!(biased.config["mlp_bias"], json!(true));
        assert!(plain.config.get("mlp_bias").is_none_or(|said| *said == json!(false)));
        let states = |model: &Model| {
            let tokens: Vec<u32> = (0..12).map(|i| (i * 29 + 7) % 96).collect();
            let walk = walk::of(&model.family);
            let mut hidden = vec![0.0; tokens.len() * walk.width()];
            walk.embed(&model.weights, &tokens, &mut hidden).expect("embeds");
            let block = walk.block(&model.weights, 0).expect("a block");
            block.forward(&mut hidden, tokens.len(), None);
            hidden
        };
        let (before, after) = (states(&plain), states(&biased));
        for (i, (before, after)) in before.iter().zip(&after).enumerate() {
            assert!((after - before - added[0][i % 32]).abs() < 1e-5, "{i}: {before} {after}");
        }
        // Encoders have a bias there: the two are added up.
        let model = folding::testing::tiny("bert");
        let name = bias_name(&Parts::of(&model.family, 1).expect("parts").out);
        let made = slimmed(&model, Some(&added)).weights[&name].to_f32();
        let old = model.weights[&name].to_f32();
        assert!(made.iter().zip(&old).zip(&added[1]).all(|((m, o), a)| *m == o + a));
    }
}
