//! CFSP (Wang et al. 2024, "CFSP: an efficient structured pruning framework for LLMs with coarse-to-fine
//! activation information", arXiv 2409.13199).
//!
//! Coarse: a block keeps more channels of its feed-forward network the more it turns the states, measured in one
//! pass through the whole model; fine: the channels of a block that stay are those with the largest weights and
//! activations ([`coarse_fine`] has both formulas). The channels are really removed. Afterwards low-rank factors
//! on all linears may be trained, of a rank that follows the importance of the block, and merged ([`ig_lora`]).
//!
//! Decided here: the published fine score divides every column by its own sum before the mean over that column,
//! so the weights cancel (`activation` is that); `row_relative` divides by the sums of rows, which is what
//! relative importance means. The total is exact, where the published code leaves what rounding makes of it.
//! How ranks follow importance is inferred from the paper's text; its code does not hold that part.

use serde_json::json;

use super::coarse_fine::{self, Budget, Weights};
use super::ffn_walk::{self, Block, Moved};
use super::ig_lora::{self, Recovery};
use super::named_choice::choice;
use super::slimming::{self, Slim};
use super::{cost, seeded};
use crate::calibrate;
use crate::error::{Error, Result};
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1::{self, CfspCoarse, CfspFine};

static CARD: Card = Card {
    name: "cfsp",
    title: "CFSP",
    verb: "compress",
    summary: "Removes feed-forward channels, more where a block turns the states less; may train \
              low-rank factors afterwards.",
    paper: "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation \
            Information, arXiv 2409.13199",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &["dsnot", "gptq", "round_to_nearest", "sparsegpt", "wanda"],
};

struct Settings {
    slim: Slim,
    a: f64,
    powers: (f64, f64),
    coarse: CfspCoarse,
    fine: CfspFine,
    calibration: calibrate::Options,
    recovery: Option<Recovery>,
}

impl Settings {
    fn read(options: &v1::Cfsp) -> Result<Self> {
        let slim = Slim::read(options.ratio, options.round_to, options.values)?;
        let a = options.a.unwrap_or(1.0);
        if !(-100.0..=100.0).contains(&a) {
            return Err(Error::option("a", format!("{a} is outside -100 to 100; 1 is usual")));
        }
        let power = |name: &str, value: Option<f64>| {
            let value = value.unwrap_or(1.0);
            match (0.0..=8.0).contains(&value) {
                true => Ok(value),
                false => Err(Error::option(name, format!("{value} is outside 0 to 8; 1 is usual"))),
            }
        };
        let calibration = calibrate::Options::read(options.calibration.as_ref())?;
        let recovery = options.recover.as_ref().map(|r| Recovery::read(r, &calibration));
        Ok(Self {
            slim,
            a,
            powers: (power("b", options.b)?, power("c", options.c)?),
            coarse: choice!(CfspCoarse, "coarse", options.coarse, Angular)?,
            fine: choice!(CfspFine, "fine", options.fine, RowRelative)?,
            calibration,
            recovery: recovery.transpose().map_err(|e| e.within("recover"))?,
        })
    }

    fn moved(&self, moved: &Moved) -> f64 {
        match self.coarse {
            CfspCoarse::Unspecified | CfspCoarse::Angular => moved.angular,
            CfspCoarse::Cosine => moved.cosine,
            CfspCoarse::Mse => moved.mse,
            CfspCoarse::Mae => moved.mae,
            CfspCoarse::Uniform => 0.0,
        }
    }

    /// Scores of a block's channels.
    fn scores(&self, model: &Model, block: &Block, sequences: usize) -> Result<Vec<f64>> {
        let weight = model.weight(&block.parts.out)?;
        let (rows, cols) = (weight.rows().max(1) as f64, weight.cols());
        let squares = block.channels.squares();
        let acts: Vec<f64> = squares.iter().map(|s| (s / sequences.max(1) as f64).sqrt()).collect();
        Ok(match self.fine {
            CfspFine::Activation => coarse_fine::activation(&acts, self.powers.1),
            CfspFine::Wanda => {
                let sums = slimming::column_sums(&weight.to_f32(), cols, f64::abs);
                sums.iter().zip(&acts).map(|(s, a)| s / rows * a).collect()
            }
            CfspFine::Magnitude => slimming::column_sums(&weight.to_f32(), cols, |w| w * w),
            CfspFine::Unspecified | CfspFine::RowRelative => {
                let into: Vec<Vec<f32>> = block
                    .parts
                    .into
                    .iter()
                    .map(|name| Ok(model.weight(name)?.to_f32()))
                    .collect::<Result<_>>()?;
                let down = weight.to_f32();
                let into = into.iter().map(Vec::as_slice).collect();
                let weights = Weights { down: &down, into, wide: cols };
                coarse_fine::row_relative(&weights, &acts, self.powers)
            }
        })
    }
}

impl Method for v1::Cfsp {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Slim::resolve(&mut self.ratio, &mut self.round_to, &mut self.values);
        for power in [&mut self.a, &mut self.b, &mut self.c] {
            power.get_or_insert(1.0);
        }
        if self.coarse == CfspCoarse::Unspecified as i32 {
            self.coarse = CfspCoarse::Angular.into();
        }
        if self.fine == CfspFine::Unspecified as i32 {
            self.fine = CfspFine::RowRelative.into();
        }
        calibrate::Options::resolve(&mut self.calibration);
        if let Some(recover) = &mut self.recover {
            let dataset = self.calibration.as_ref().map(|c| c.dataset.as_str());
            Recovery::resolve(recover, dataset.unwrap_or_default());
        }
    }

    fn datasets(&self) -> Vec<&str> {
        let recover = self.recover.iter().map(|r| r.dataset.as_str());
        self.calibration.iter().map(|c| c.dataset.as_str()).chain(recover).collect()
    }

    fn seeded(&self) -> bool {
        // The factors start at random.
        self.recover.is_some() || (seeded(self.calibration.as_ref()) && self.ratio != Some(0.0))
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let settings = Settings::read(self)?;
        settings.calibration.check(model)?;
        let uneven = settings.coarse != CfspCoarse::Uniform;
        let mut after = settings.slim.check(model, uneven, false)?;
        let mut estimate = cost::calibrated(model, &after, &settings.calibration, false);
        if let Some(recovery) = &settings.recovery {
            let further = recovery
                .check(&mut after, settings.slim.values)
                .map_err(|e| e.within("recover"))?;
            estimate.seconds += further.seconds;
            estimate.memory_bytes = estimate.memory_bytes.max(further.memory_bytes);
            estimate.calibration_tokens += further.calibration_tokens;
            estimate.weight_bytes = after.bytes();
        }
        Ok((estimate, after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let settings = Settings::read(self)?;
        let Settings { slim, .. } = &settings;
        let before = model.info();
        // With a recovery that takes the larger part of the time.
        let end = if settings.recovery.is_some() { 0.3 } else { 1.0 };
        let seeing = cx.progress.part(0.0, 0.9 * end);
        let seen = ffn_walk::collect(cx, &model, &settings.calibration, &seeing)?;
        let mut warnings = seen.warnings.clone();
        let moved: Vec<f64> = seen.blocks.iter().map(|b| settings.moved(&b.moved)).collect();
        let Budget { importance, keep } = coarse_fine::budget(&moved, settings.a, slim.ratio);
        if settings.coarse != CfspCoarse::Uniform
            && importance.windows(2).all(|pair| pair[0] == pair[1])
        {
            warnings.push("all blocks do the same to the states: all keep the same share".into());
        }
        let full = slimming::full(&model)?;
        let kept: Vec<Vec<usize>> = if slim.nothing() {
            full.iter().map(|w| (0..*w).collect()).collect()
        } else {
            let wanted: Vec<f64> = keep.iter().zip(&full).map(|(k, w)| k * *w as f64).collect();
            let total = slimming::total(&full, slim);
            let widths = slimming::widths(&wanted, &full, slim.unit, total);
            let blocks = seen.blocks.iter().zip(widths);
            blocks
                .map(|(block, width)| {
                    cx.progress.check()?;
                    let scores = settings.scores(&model, block, seen.sequences)?;
                    Ok(slimming::best(&scores, width))
                })
                .collect::<Result<_>>()?
        };
        let mut facts = json!({
            "moved": moved,
            "importance": importance,
            "keep": keep,
        });
        let mut tokens = settings.calibration.tokens();
        let texts = match &settings.recovery {
            Some(recovery) => Some(recovery.texts(cx, &model)?),
            None => None,
        };
        let slimming_part = cx.progress.part(0.9 * end, end);
        let mut model = slimming::slim(model, &kept, None, slim.values, &slimming_part)?;
        if let (Some(recovery), Some(texts)) = (&settings.recovery, texts) {
            let progress = cx.progress.part(end, 1.0);
            let found = ig_lora::recover(
                cx,
                model,
                &importance,
                (recovery, &texts),
                slim.values,
                &progress,
            )?;
            model = found.model;
            facts["recovery"] = found.record;
            tokens += found.tokens;
        }
        Ok(slimming::outcome((model, &before), &kept, facts, tokens, warnings))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::methods::compress::folding::testing::tiny;
    use crate::methods::compress::testing;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};

    #[test]
    fn bad_options_are_named() {
        let field = |options: v1::Cfsp| -> String {
            let error = Settings::read(&options).err().expect("refused");
            error.violations()[0].field.clone()
        };
        let plain = v1::Cfsp::default;
        assert_eq!(field(v1::Cfsp { ratio: Some(0.9), ..plain() }), "ratio");
        assert_eq!(field(v1::Cfsp { a: Some(f64::NAN), ..plain() }), "a");
        assert_eq!(field(v1::Cfsp { b: Some(-1.0), ..plain() }), "b");
        assert_eq!(field(v1::Cfsp { c: Some(9.0), ..plain() }), "c");
        assert_eq!(field(v1::Cfsp { coarse: 9, ..plain() }), "coarse");
        assert_eq!(field(v1::Cfsp { fine: 9, ..plain() }), "fine");
        let recover = |recovery| field(v1::Cfsp { recover: Some(recovery), ..plain() });
        let usual = v1::Recovery::default;
        assert_eq!(recover(v1::Recovery { steps: Some(0), ..usual() }), "recover.steps");
        assert_eq!(recover(v1::Recovery { rank_mean: Some(0), ..usual() }), "recover.rank_mean");
        assert_eq!(recover(v1::Recovery { rank_min: Some(9), ..usual() }), "recover.rank_min");
        assert_eq!(recover(v1::Recovery { scale: Some(0.0), ..usual() }), "recover.scale");
        let rate = v1::Recovery { learning_rate: Some(-1.0), ..usual() };
        assert_eq!(recover(rate), "recover.learning_rate");
        assert_eq!(recover(v1::Recovery { batch_size: Some(0), ..usual() }), "recover.batch_size");
        let length = v1::Recovery { sequence_length: Some(1), ..usual() };
        assert_eq!(recover(length), "recover.sequence_length");
        let dataset = v1::Recovery { dataset: "text".into(), ..usual() };
        assert_eq!(recover(dataset), "recover.dataset");
    }

    fn options(ratio: f64) -> v1::Cfsp {
        let calibration =
            v1::Calibration { sequences: Some(4), sequence_length: Some(16), ..Default::default() };
        v1::Cfsp {
            ratio: Some(ratio),
            round_to: Some(16),
            values: v1::ValueType::F32.into(),
            calibration: Some(calibration),
            ..Default::default()
        }
    }

    fn read<T: serde::de::DeserializeOwned>(value: &serde_json::Value) -> T {
        serde_json::from_value(value.clone()).expect("as it was written")
    }

    #[test]
    fn whatever_tells_blocks_and_channels_apart_the_total_is_as_asked_for() {
        let coarse = [
            CfspCoarse::Angular,
            CfspCoarse::Cosine,
            CfspCoarse::Mse,
            CfspCoarse::Mae,
            CfspCoarse::Uniform,
        ];
        let fine =
            [CfspFine::RowRelative, CfspFine::Activation, CfspFine::Wanda, CfspFine::Magnitude];
        for architecture in ["llama", "gemma3_text", "bert"] {
            let model = tiny(architecture);
            for (i, coarse) in coarse.into_iter().enumerate() {
                let options =
                    v1::Cfsp { coarse: coarse.into(), fine: fine[i % 4].into(), ..options(0.4) };
                let made = testing::apply(&options, &model).expect("removes");
                let what = format!("{architecture}, {coarse:?}");
                let widths: Vec<usize> = read(&made.record["widths"]);
                // 0.6 of 96 channels a block, in units of 16.
                let units = (0.6 * 96.0 * widths.len() as f64 / 16.0).round() as usize;
                assert_eq!(widths.iter().sum::<usize>(), 16 * units, "{what}");
                let fits = |w: &usize| w.is_multiple_of(16) && (16..=96).contains(w);
                assert!(widths.iter().all(fits), "{what}: {widths:?}");
                let keep: Vec<f64> = read(&made.record["facts"]["keep"]);
                let mean = keep.iter().sum::<f64>() / keep.len() as f64;
                assert!((mean - 0.6).abs() < 1e-6 && keep.iter().all(|k| *k < 1.0), "{what}");
                if coarse == CfspCoarse::Uniform {
                    assert!(widths.iter().max() <= widths.iter().min().map(|w| w + 16).as_ref());
                    assert!(keep.iter().all(|k| (k - 0.6).abs() < 1e-12));
                }
                let kept: Vec<Vec<usize>> = read(&made.record["kept_channels"]);
                for (kept, width) in kept.iter().zip(&widths) {
                    assert_eq!(kept.len(), *width);
                    assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
                    assert!(kept.iter().all(|j| *j < 96));
                }
                let without_gate = made.warnings.iter().any(|w| w.contains("have no gate"));
                assert_eq!(without_gate, architecture == "bert");
            }
        }
    }

    #[test]
    fn all_is_measured_before_anything_goes() {
        let model = tiny("llama");
        let moved = |ratio: f64| -> Vec<f64> {
            read(&testing::apply(&options(ratio), &model).expect("runs").record["facts"]["moved"])
        };
        assert_eq!(moved(0.0), moved(0.8));
        let mut resolved = v1::Cfsp::default();
        resolved.resolve();
        assert_eq!((resolved.ratio, resolved.round_to), (Some(0.2), Some(32)));
    }

    #[test]
    fn blocks_that_do_nothing_keep_the_same_share_and_it_is_said() {
        let mut model = tiny("llama");
        for (name, weight) in &mut model.weights {
            if name.contains("o_proj") || name.contains("down_proj") {
                let shape = weight.shape().to_vec();
                let none = vec![0.0; shape.iter().product()];
                let dense = Dense::from_f32(shape, &none, Dtype::F32).expect("dense");
                *weight = Arc::new(Weight::Dense(dense));
            }
        }
        let said = |options: v1::Cfsp| {
            let made = testing::apply(&options, &model).expect("removes");
            assert_eq!(made.record["widths"], json!([48, 48, 48]));
            made.warnings.iter().any(|w| w.contains("all keep the same share"))
        };
        assert!(said(options(0.5)));
        assert!(!said(v1::Cfsp { coarse: CfspCoarse::Uniform.into(), ..options(0.5) }));
    }
}
