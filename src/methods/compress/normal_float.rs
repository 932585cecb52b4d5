//! Rounding to 4-bit normal floats (Dettmers et al. 2023, "QLoRA: efficient finetuning of quantized LLMs",
//! arXiv 2305.14314, section 3): levels at the quantiles of a normal distribution, one size for 64 elements,
//! the sizes in 8 bits. Needs no text. Zeros stay zeros, but are stored like all else.

use super::{alone, cost, store};
use crate::error::{Error, Reason, Result};
use crate::methods::{Card, Estimate, Method, Outcome, StepContext, scope};
use crate::models::{Family, Model, ModelInfo, TensorInfo};
use crate::nn::weight::{Nf4, Record, Weight};
use crate::proto::v1;

static CARD: Card = Card {
    name: "normal_float",
    title: "4-bit normal floats",
    verb: "compress",
    summary: "Rounds each weight to the nearest of 16 quantiles of a normal distribution (NF4); blocks of 64 \
              with 8-bit sizes.",
    paper: "QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Names in scope.
fn names(options: &v1::NormalFloat, family: &Family) -> Result<std::collections::BTreeSet<String>> {
    let mut scope = options.scope.clone();
    if scope.is_empty() {
        scope = vec!["*".into()];
    }
    Ok(scope::names(family, &scope)?.into_iter().collect())
}

impl Method for v1::NormalFloat {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        if self.scope.is_empty() {
            self.scope = vec!["*".into()];
        }
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn seeded(&self) -> bool {
        false
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let mut after = model.clone();
        for name in names(self, &model.family)? {
            let (tensor, shape) = store::matrix(model, &name)?;
            store::refuse_quantised(tensor, &name, "quantise")?;
            if let Record::Nf4 { .. } = tensor.record {
                return Err(Error::new(
                    Reason::InvalidRecipe,
                    format!(
                        "cannot quantise '{name}': it is in normal floats already; leave it out"
                    ),
                ));
            }
            let bytes = Nf4::expected(shape);
            let record = Record::Nf4 { shape };
            after.tensors.insert(name, TensorInfo { record, shape: shape.to_vec(), bytes });
        }
        Ok((cost::alone(model, &after), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let names = names(self, &model.family)?;
        alone(cx, model, &names, &|_, weights, cols| {
            Ok(Weight::Nf4(Nf4::round([weights.len() / cols, cols], weights)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn plans_say_the_bytes_and_what_is_quantised_stays() {
        let model = random::model(random::tiny("llama"), 3).unwrap();
        let (_, after) = v1::NormalFloat::default().check(&model.info()).unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        let made = Nf4::round([64, 32], &model.weight(name).unwrap().to_f32()).unwrap();
        assert_eq!(after.tensors[name].bytes, made.bytes());
        assert_eq!(after.tensors[name].record, made.record());
        // 2048 elements: 1024 bytes of codes, 32 sizes, a step and a mean.
        assert_eq!(made.bytes(), 1024 + 32 + 8);
        let error = v1::NormalFloat::default().check(&after).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidRecipe);
        let only = v1::NormalFloat { scope: vec!["*.q_proj.*".into()] };
        let (_, changed) = only.check(&model.info()).unwrap();
        assert_eq!(changed.tensors[name].record, made.record());
        let up = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(changed.tensors[up].record, model.info().tensors[up].record);
        let none = v1::NormalFloat { scope: vec!["nothing".into()] };
        assert_eq!(none.check(&model.info()).unwrap_err().violations()[0].field, "scope");
    }
}
