//! Exact costs of a token: multiplications and bytes read.

use super::metrics;
use crate::calibrate::walk;
use crate::error::Result;
use crate::models::Model;
use crate::nn::weight::Weight;
use crate::proto::v1;

/// `multiply_accumulates` and `bytes_per_token` of one token in decode, over the linear weights inside
/// the blocks and the head. Attention over the context is not counted: it is the same for every layout.
pub fn measure(model: &Model) -> Result<Vec<v1::Measurement>> {
    let walk = walk::of(&model.family);
    let mut names: Vec<String> =
        (0..walk.blocks()).flat_map(|b| walk.linears(b).into_iter().flatten()).collect();
    names.push(model.decoder()?.head_name().to_owned());
    let (mut products, mut bytes) = (0, 0);
    for name in names {
        let weight = model.weight(&name)?;
        products += stored(weight);
        bytes += weight.bytes();
    }
    let protocol = "one token, linear weights inside the blocks and the head";
    Ok(vec![
        metrics::MULTIPLY_ACCUMULATES
            .measured(products as f64, format!("{protocol}, elements that the layout stores")),
        metrics::BYTES_PER_TOKEN.measured(bytes as f64, protocol),
    ])
}

/// Elements that a layout multiplies: zeros are skipped only where it leaves them out.
pub fn stored(weight: &Weight) -> u64 {
    let elements = (weight.rows() * weight.cols()) as u64;
    match weight {
        Weight::Sparse(_) => elements - weight.zeros(),
        Weight::RowGroups(weight) => weight.stored(),
        Weight::Factored(weight) => weight.stored(),
        Weight::Sum(sum) => stored(sum.base()) + sum.correction().stored(),
        _ => elements,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn a_token_multiplies_every_stored_element_once() {
        let model = random::model(random::tiny("llama"), 1).expect("a model");
        let config = model.decoder().expect("a decoder");
        let found = measure(&model).expect("counts");
        let linears: u64 = (0..config.layers.len())
            .flat_map(|b| config.linears(b).into_iter().flatten())
            .map(|n| model.weights[&n].shape().iter().product::<usize>() as u64)
            .sum();
        let expected = linears + (config.vocab * config.hidden) as u64;
        assert_eq!(found[0].value, expected as f64);
        assert_eq!(found[0].metric, "multiply_accumulates");
        assert!(found[1].value > 0.0);
    }
}
