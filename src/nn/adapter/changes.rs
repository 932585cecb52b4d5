//! All that an adapter changes of one version's weights, in f32, as what serves takes it.
//!
//! `y' = (1 + g) (W x) + scale B A x + b + t`: products of low rank, gains on the rows of a weight (DoRA),
//! and what is added to small tensors (biases, norms). Each part is a difference, so the parts of several
//! adapters, each times its weight, add up.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Reason, Result};

/// What is added to one linear weight `[out, in]`: `scale * b a`.
#[derive(Debug, Clone, PartialEq)]
pub struct Product {
    pub shape: [usize; 2],
    pub rank: usize,
    /// `[rank, in]`
    pub a: Vec<f32>,
    /// `[out, rank]`
    pub b: Vec<f32>,
    pub scale: f32,
}

/// The parts of an adapter, by the names of what they change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// By the names of weights.
    pub products: BTreeMap<String, Product>,
    /// By the names of weights: by how much the rows of `W x` grow, 0 for not at all; `[out]`.
    pub gains: BTreeMap<String, Arc<[f32]>>,
    /// By the names of small tensors: what is added to their elements. A bias that the base lacks is one of
    /// zeros.
    pub tensors: BTreeMap<String, Arc<[f32]>>,
}

impl Changes {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.products.is_empty() && self.gains.is_empty() && self.tensors.is_empty()
    }

    /// Number of elements.
    pub fn parameters(&self) -> u64 {
        let products = self.products.values().map(|p| p.a.len() + p.b.len());
        let others = self.gains.values().chain(self.tensors.values()).map(|v| v.len());
        products.chain(others).map(|n| n as u64).sum()
    }

    /// Refuses parts that are not finite.
    ///
    /// # Errors
    /// NON_FINITE, naming the part.
    pub fn check(&self) -> Result<()> {
        let finite = |values: &[f32]| values.iter().all(|v| v.is_finite());
        let product = |p: &Product| finite(&p.a) && finite(&p.b) && p.scale.is_finite();
        let bad = self.products.iter().filter(|(_, p)| !product(p)).map(|(name, _)| name);
        let others = self.gains.iter().chain(&self.tensors);
        match bad.chain(others.filter(|(_, v)| !finite(v)).map(|(name, _)| name)).next() {
            None => Ok(()),
            Some(name) => Err(Error::new(
                Reason::NonFinite,
                format!(
                    "what the adapter changes of '{name}' is not finite; the adapter or its base is \
                     broken, train it anew with a smaller learning rate"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_and_must_be_finite() {
        let mut changes = Changes::default();
        assert!(changes.is_empty() && changes.check().is_ok());
        let (a, b) = (vec![1.0; 6], vec![1.0; 4]);
        let product = Product { shape: [2, 3], rank: 2, a, b, scale: 1.0 };
        changes.products.insert("w".into(), product);
        changes.gains.insert("w".into(), [0.5, 0.0].into());
        changes.tensors.insert("b".into(), [1.0, 2.0, 3.0].into());
        assert!(!changes.is_empty());
        assert_eq!(changes.parameters(), 15);
        changes.check().unwrap();
        changes.tensors.insert("b".into(), [1.0, f32::NAN].into());
        let error = changes.check().unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains("'b'"), "{error}");
    }
}
