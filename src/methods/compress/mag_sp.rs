//! Structured magnitude pruning, a yardstick: of every block the same share of feed-forward channels goes, those
//! with the shortest columns in the weight that leads out, `||W_down[:, j]||`.

use serde_json::json;

use super::slimming::{self, Parts, Slim};
use super::{check_finite, cost};
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "mag_sp",
    title: "Structured magnitude",
    verb: "compress",
    summary: "Removes the same share of feed-forward channels from each block, those with the shortest \
              outgoing weights.",
    paper: "Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626, by \
            channels",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &["dsnot", "gptq", "round_to_nearest", "sparsegpt", "wanda"],
};

impl Method for v1::MagSp {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Slim::resolve(&mut self.ratio, &mut self.round_to, &mut self.values);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn seeded(&self) -> bool {
        false
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        let after = slim.check(model, false, false)?;
        Ok((cost::alone(model, &after), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        let before = model.info();
        let full = slimming::full(&model)?;
        let wanted: Vec<f64> = full.iter().map(|w| *w as f64 * (1.0 - slim.ratio)).collect();
        let widths = match slim.nothing() {
            true => full.clone(),
            false => slimming::widths(&wanted, &full, slim.unit, slimming::total(&full, &slim)),
        };
        let mut kept = Vec::with_capacity(full.len());
        for (block, width) in widths.iter().enumerate() {
            cx.progress.report(0.5 * block as f64 / full.len() as f64, "scoring channels")?;
            let name = Parts::of(&model.family, block)?.out;
            let weight = model.weight(&name)?;
            let values = weight.to_f32();
            check_finite(&name, &values)?;
            let squares = slimming::column_sums(&values, weight.cols(), |w| w * w);
            kept.push(slimming::best(&squares, *width));
        }
        let progress = cx.progress.part(0.5, 1.0);
        let model = slimming::slim(model, &kept, None, slim.values, &progress)?;
        Ok(slimming::outcome((model, &before), &kept, json!({}), 0, Vec::new()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::methods::compress::folding::testing::tiny;
    use crate::methods::compress::testing;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Ggml, GgmlType, Weight};
    use crate::proto::v1::ValueType;

    fn options(ratio: f64) -> v1::MagSp {
        let values = ValueType::F32.into();
        v1::MagSp { ratio: Some(ratio), round_to: Some(16), values }
    }

    #[test]
    fn the_longest_columns_of_each_block_stay() {
        let mut model = tiny("llama");
        // One weight in each column, 1 to 96 in some order; those of block 1 a hundred times larger, which is
        // nothing to the others.
        let length = |block: usize, j: usize| ((j * 7 + block * 13) % 96 + 1) as f32;
        for block in 0..3 {
            let mut values = vec![0.0; 32 * 96];
            for j in 0..96 {
                let sign = if j % 2 == 0 { 1.0 } else { -1.0 };
                let scale = if block == 1 { 100.0 } else { 1.0 };
                values[j % 32 * 96 + j] = sign * scale * length(block, j);
            }
            let name = Parts::of(&model.family, block).expect("parts").out;
            let dense = Dense::from_f32(vec![32, 96], &values, Dtype::F32).expect("dense");
            model.weights.insert(name, Arc::new(Weight::Dense(dense)));
        }
        let made = testing::apply(&options(0.5), &model).expect("removes");
        assert_eq!(made.record["widths"], json!([48, 48, 48]));
        for block in 0..3 {
            let want: Vec<usize> = (0..96).filter(|j| length(block, *j) > 48.0).collect();
            assert_eq!(made.record["kept_channels"][block], json!(want), "block {block}");
        }
    }

    #[test]
    fn blocks_of_a_file_are_decoded_first() {
        let mut model = tiny("llama");
        for (name, weight) in &mut model.weights {
            if name.contains(".mlp.") {
                let (shape, values) = ([weight.rows(), weight.cols()], weight.to_f32());
                let blocks = Ggml::quantize(shape, GgmlType::Q8_0, &values).expect("blocks");
                *weight = Arc::new(Weight::Ggml(blocks));
            }
        }
        let made = testing::apply(&options(0.5), &model).expect("removes");
        let parts = Parts::of(&model.family, 2).expect("parts");
        let kept: Vec<usize> =
            serde_json::from_value(made.record["kept_channels"][2].clone()).expect("channels");
        assert_eq!(kept.len(), 48);
        for name in &parts.into {
            let before = model.weights[name].to_f32();
            let rows: Vec<f32> =
                kept.iter().flat_map(|j| before[j * 32..(j + 1) * 32].to_vec()).collect();
            assert_eq!(made.model.weights[name].to_f32(), rows, "{name}");
        }
        let before = model.weights[&parts.out].to_f32();
        let columns: Vec<f32> =
            before.chunks(96).flat_map(|row| kept.iter().map(|j| row[*j])).collect();
        assert_eq!(made.model.weights[&parts.out].to_f32(), columns);
    }
}
