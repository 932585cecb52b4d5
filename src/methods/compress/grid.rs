//! The options and results that all grid quantisers share.

use std::collections::BTreeSet;

use super::store;
use crate::error::{Error, Result};
use crate::methods::scope;
use crate::models::{Family, ModelInfo};
use crate::nn::weight::GroupedSpec;
use crate::proto::v1;

/// Checked options of a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    pub spec: GroupedSpec,
    scope: Vec<String>,
}

impl Grid {
    /// Fills in what is absent.
    pub fn resolve(options: &mut Option<v1::Grid>) {
        let options = options.get_or_insert_default();
        options.bits.get_or_insert(4);
        options.group_size.get_or_insert(64);
        options.symmetric.get_or_insert(false);
        if options.scope.is_empty() {
            options.scope = vec!["*".into()];
        }
    }

    /// Reads and checks the options of a message. Errors name `grid.<option>`.
    pub fn read(options: Option<&v1::Grid>) -> Result<Self> {
        let mut options = options.cloned();
        Self::resolve(&mut options);
        let options = options.unwrap_or_default();
        let bits = options.bits.unwrap_or_default();
        if ![2, 3, 4, 8].contains(&bits) {
            return Err(Error::option("grid.bits", format!("{bits} is none of 2, 3, 4 and 8")));
        }
        let group = options.group_size.unwrap_or_default() as usize;
        if group == 0 {
            return Err(Error::option("grid.group_size", "a group has at least one input"));
        }
        let spec = GroupedSpec {
            bits: bits as u8,
            group,
            symmetric: options.symmetric.unwrap_or_default(),
        };
        Ok(Self { spec, scope: options.scope })
    }

    /// Names in scope.
    pub fn names(&self, family: &Family) -> Result<BTreeSet<String>> {
        let names = scope::names(family, &self.scope).map_err(|e| e.within("grid"))?;
        Ok(names.into_iter().collect())
    }

    /// Checks the options against a model, and puts what the tensors will be into its info.
    pub fn check(&self, model: &ModelInfo) -> Result<ModelInfo> {
        let mut after = model.clone();
        for name in self.names(&model.family)? {
            let (tensor, [rows, cols]) = store::matrix(model, &name)?;
            store::refuse_quantised(tensor, &name, "quantise")?;
            self.spec.check(cols).map_err(|e| {
                Error::option("grid.group_size", format!("{} ('{name}')", e.message()))
            })?;
            let new = store::quantised_info([rows, cols], tensor, self.spec);
            after.tensors.insert(name, new);
        }
        Ok(after)
    }
}

/// A matrix on its grid: codes `[rows, cols]`, scales and zeros `[rows, cols / group]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub zeros: Vec<u8>,
}

impl Codes {
    /// Room for a `[rows, cols]` matrix.
    pub fn new(rows: usize, cols: usize, spec: GroupedSpec) -> Self {
        let groups = rows * cols / spec.group;
        Self { codes: vec![0; rows * cols], scales: vec![0.0; groups], zeros: vec![0; groups] }
    }

    /// The numbers the codes stand for.
    pub fn values(&self, spec: GroupedSpec) -> Vec<f32> {
        let grids = self.scales.iter().zip(&self.zeros);
        let groups = self.codes.chunks(spec.group).zip(grids);
        groups.flat_map(|(codes, (s, z))| codes.iter().map(|c| value(*c, *s, *z))).collect()
    }
}

/// The number that a code stands for.
pub fn value(code: u8, scale: f32, zero: u8) -> f32 {
    (f32::from(code) - f32::from(zero)) * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_options_are_named() {
        let bits = |bits| v1::Grid { bits: Some(bits), ..Default::default() };
        for bad in [0, 1, 5, 16, 260] {
            let error = Grid::read(Some(&bits(bad))).unwrap_err();
            assert_eq!(error.violations()[0].field, "grid.bits");
        }
        let error = Grid::read(Some(&v1::Grid { group_size: Some(0), ..Default::default() }));
        assert_eq!(error.unwrap_err().violations()[0].field, "grid.group_size");
        let spec = Grid::read(None).expect("defaults").spec;
        assert_eq!((spec.bits, spec.group, spec.symmetric), (4, 64, false));
    }
}
