//! What a step costs, counted: multiply-accumulates, and bytes that must be read.

use serde::Serialize;

use crate::error::Result;
use crate::eval::counts::stored;
use crate::models::Model;
use crate::models::decoder::Config;
use crate::models::decoder::plan::CacheFormat;

/// Costs of the linear weights of a decoder for one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Costs {
    /// Multiply-accumulates of the linears inside the blocks; zeros count only where the layout stores them.
    pub block_products: u64,
    /// Multiply-accumulates of the head, for a token whose logits are wanted.
    pub head_products: u64,
    /// Bytes of the linears inside the blocks.
    pub block_bytes: u64,
    /// Bytes of the head.
    pub head_bytes: u64,
}

impl Costs {
    pub fn of(model: &Model) -> Result<Self> {
        let config = model.decoder()?;
        let (mut block_products, mut block_bytes) = (0, 0);
        for layer in 0..config.layers.len() {
            for name in config.linears(layer).iter().flatten() {
                let weight = model.weight(name)?;
                block_products += stored(weight);
                block_bytes += weight.bytes();
            }
        }
        let head = model.weight(config.head_name())?;
        Ok(Self {
            block_products,
            head_products: stored(head),
            block_bytes,
            head_bytes: head.bytes(),
        })
    }

    /// Bytes of weights that a decoding step reads, whatever the number of its sequences.
    pub fn bytes(&self) -> u64 {
        self.block_bytes + self.head_bytes
    }

    /// Operations (a product and a sum are two) of a forward of `tokens` of which `wanted` get logits.
    pub fn operations(&self, tokens: usize, wanted: usize) -> u64 {
        2 * (self.block_products * tokens as u64 + self.head_products * wanted as u64)
    }
}

/// Positions that `count` queries from position `first` on see, summed over queries and layers.
fn seen(config: &Config, first: usize, count: usize) -> u64 {
    (0..config.layers.len())
        .map(|layer| {
            let window = config.layer_window(layer).unwrap_or(usize::MAX);
            (first..first + count).map(|p| (p + 1).min(window) as u64).sum::<u64>()
        })
        .sum()
}

/// Operations of attention for `count` queries from position `first` on: scores and weighted values over
/// the positions that each sees.
pub fn attention_operations(config: &Config, first: usize, count: usize) -> u64 {
    4 * config.query_channels() as u64 * seen(config, first, count)
}

/// Bytes of keys and values that these queries, one by one, read.
pub fn cache_bytes(config: &Config, format: CacheFormat, first: usize, count: usize) -> u64 {
    // A scale beside each head's numbers, where they are rounded to bytes.
    let head = config.head_dim as u64;
    let head = match format {
        CacheFormat::F32 => 4 * head,
        CacheFormat::F16 => 2 * head,
        CacheFormat::Q8 => head + 4,
    };
    2 * head * config.kv_heads as u64 * seen(config, first, count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn linears_by_hand() {
        // Hidden 32, queries 4 * 16 = 64, keys 2 * 16 = 32, intermediate 80, vocabulary 96, 3 blocks:
        // q 64*32, k and v 32*32 each, o 32*64, gate and up 80*32 each, down 32*80.
        let model = random::model(random::tiny("llama"), 1).expect("a model");
        let costs = Costs::of(&model).expect("costs");
        let block = 2048 + 2 * 1024 + 2048 + 3 * 2560;
        assert_eq!(block, 13_824);
        assert_eq!(costs.block_products, 3 * 13_824);
        assert_eq!(costs.head_products, 96 * 32);
        assert_eq!(costs.block_bytes, 4 * 3 * 13_824);
        assert_eq!(costs.bytes(), 4 * (3 * 13_824 + 3072));
        assert_eq!(costs.operations(10, 1), 2 * (414_720 + 3072));
    }

    #[test]
    fn attention_by_hand() {
        // Three global layers; queries at 0, 1, 2 see 1 + 2 + 3 = 6 positions each layer.
        let llama = random::model(random::tiny("llama"), 1).expect("a model");
        let config = llama.decoder().expect("a decoder");
        assert_eq!(seen(config, 0, 3), 18);
        assert_eq!(attention_operations(config, 0, 3), 4 * 64 * 18);
        // A query at 9 sees ten positions; keys and values have 32 channels of 4 bytes.
        assert_eq!(cache_bytes(config, CacheFormat::F32, 9, 1), 2 * 4 * 32 * 30);
        assert_eq!(cache_bytes(config, CacheFormat::F16, 9, 1), 2 * 2 * 32 * 30);
        // Gemma's local layers (every one but each second) see five positions at most.
        let gemma = random::model(random::tiny("gemma3_text"), 1).expect("a model");
        let config = gemma.decoder().expect("a decoder");
        assert_eq!(seen(config, 9, 1), 2 * 5 + 2 * 10);
    }
}
