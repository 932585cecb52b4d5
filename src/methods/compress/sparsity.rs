//! The options that all pruning methods share, read and checked.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::methods::scope;
use crate::models::ModelInfo;
use crate::nn::weight::ValueFormat;
use crate::proto::v1::{self, ValueType};

use super::store;

/// How many weights go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    /// This share of a part of the matrix; the method says of which part, and rounds down.
    Share(f64),
    /// `n` of each `m` consecutive inputs of a row.
    NOfM { n: usize, m: usize },
}

impl Amount {
    /// Weights pruned of `elements`, a part that is compared as a whole.
    pub fn of(self, elements: usize) -> usize {
        match self {
            Self::Share(share) => (share * elements as f64).floor() as usize,
            Self::NOfM { n, m } => elements / m * n,
        }
    }

    /// Zeros and group length as the sparse layout wants them for a hint.
    pub fn hint(self) -> Option<(u8, u8)> {
        match self {
            Self::Share(_) => None,
            Self::NOfM { n, m } => Some((n as u8, m as u8)),
        }
    }
}

/// Checked options of a pruning.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparsity {
    pub amount: Amount,
    pub values: ValueFormat,
    scope: Vec<String>,
}

impl Sparsity {
    /// Fills in what is absent.
    pub fn resolve(options: &mut Option<v1::Sparsity>) {
        let options = options.get_or_insert_default();
        if options.pattern.is_empty() {
            options.pattern = "unstructured".into();
        }
        if options.pattern == "unstructured" {
            options.share.get_or_insert(0.5);
        }
        if options.scope.is_empty() {
            options.scope = vec!["*".into()];
        }
        if options.values == ValueType::Unspecified as i32 {
            options.values = ValueType::F16 as i32;
        }
    }

    /// Reads and checks the options of a message. Errors name `sparsity.<option>`.
    pub fn read(options: Option<&v1::Sparsity>) -> Result<Self> {
        let mut options = options.cloned();
        Self::resolve(&mut options);
        let options = options.unwrap_or_default();
        let amount = match (options.pattern.as_str(), options.share) {
            ("unstructured", share) => {
                let share = share.unwrap_or_default();
                if !(0.0..1.0).contains(&share) {
                    return Err(Error::option(
                        "sparsity.share",
                        format!("{share} is outside [0, 1); 0.5 prunes half of the weights"),
                    ));
                }
                Amount::Share(share)
            }
            (_, Some(_)) => {
                return Err(Error::option(
                    "sparsity.share",
                    "the pattern already says the share; leave one of the two out",
                ));
            }
            (pattern, None) => n_of_m(pattern)?,
        };
        let values = match ValueType::try_from(options.values) {
            Ok(ValueType::Unspecified | ValueType::F16) => ValueFormat::F16,
            Ok(ValueType::F32) => ValueFormat::F32,
            Ok(ValueType::Bf16) => ValueFormat::BF16,
            Err(_) => {
                return Err(Error::option(
                    "sparsity.values",
                    format!("{} is no number of ValueType", options.values),
                ));
            }
        };
        Ok(Self { amount, values, scope: options.scope })
    }

    /// Names in scope.
    pub fn names(&self, family: &crate::models::Family) -> Result<BTreeSet<String>> {
        let names = scope::names(family, &self.scope).map_err(|e| e.within("sparsity"))?;
        Ok(names.into_iter().collect())
    }

    /// Checks the options against a model, and puts what the pruned tensors will be into its info.
    /// `zeros` gives the zeros of a `[rows, cols]` matrix.
    pub fn check(
        &self,
        model: &ModelInfo,
        zeros: &dyn Fn(usize, usize) -> usize,
    ) -> Result<ModelInfo> {
        let mut after = model.clone();
        for name in self.names(&model.family)? {
            let (tensor, [rows, cols]) = store::matrix(model, &name)?;
            store::refuse_quantised(tensor, &name, "prune")?;
            if let Amount::NOfM { m, .. } = self.amount
                && !cols.is_multiple_of(m)
            {
                return Err(Error::option(
                    "sparsity.pattern",
                    format!("the {cols} inputs of '{name}' are not a multiple of {m}"),
                ));
            }
            let zeros = zeros(rows, cols).max(store::known_zeros(tensor));
            if zeros + rows > rows * cols {
                return Err(Error::option(
                    "sparsity.share",
                    format!(
                        "{zeros} zeros in '{name}' ({rows} x {cols}) leave rows without a weight; \
                         lower the share"
                    ),
                ));
            }
            let new = store::pruned_info([rows, cols], zeros, self.values, self.amount.hint());
            after.tensors.insert(name, new);
        }
        Ok(after)
    }
}

fn n_of_m(pattern: &str) -> Result<Amount> {
    let bad = || {
        Error::option(
            "sparsity.pattern",
            format!(
                "'{pattern}' is neither 'unstructured' nor n:m with 0 < n < m <= 32 (n zeros in each m \
                 consecutive inputs)"
            ),
        )
    };
    let (n, m) = pattern.split_once(':').ok_or_else(bad)?;
    match (n.parse::<u8>(), m.parse::<u8>()) {
        (Ok(n), Ok(m)) if 0 < n && n < m && m <= 32 => {
            Ok(Amount::NOfM { n: n.into(), m: m.into() })
        }
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    fn read(share: Option<f64>, pattern: &str) -> Result<Sparsity> {
        let pattern = pattern.to_owned();
        Sparsity::read(Some(&v1::Sparsity { share, pattern, ..Default::default() }))
    }

    #[test]
    fn amounts_round_down() {
        assert_eq!(Amount::Share(0.5).of(7), 3);
        assert_eq!(Amount::NOfM { n: 2, m: 4 }.of(64), 32);
        assert_eq!(Amount::NOfM { n: 1, m: 4 }.of(64), 16);
    }

    #[test]
    fn defaults_are_half_unstructured_in_f16() {
        let sparsity = Sparsity::read(None).expect("defaults");
        assert_eq!(sparsity.amount, Amount::Share(0.5));
        assert_eq!(sparsity.values, ValueFormat::F16);
        assert_eq!(read(None, "2:4").expect("pattern").amount, Amount::NOfM { n: 2, m: 4 });
    }

    #[test]
    fn bad_options_are_named() {
        for share in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            let error = read(Some(share), "").unwrap_err();
            assert_eq!(error.violations()[0].field, "sparsity.share");
            assert_eq!(error.reason(), Reason::InvalidOption);
        }
        for pattern in ["0:4", "4:4", "5:4", "1:33", "2:", ":4", "2:4:8", "-1:4", "half"] {
            let error = read(None, pattern).unwrap_err();
            assert_eq!(error.violations()[0].field, "sparsity.pattern", "{pattern}");
        }
        assert_eq!(read(Some(0.5), "2:4").unwrap_err().violations()[0].field, "sparsity.share");
        let error = Sparsity::read(Some(&v1::Sparsity { values: 7, ..Default::default() }));
        assert_eq!(error.unwrap_err().violations()[0].field, "sparsity.values");
    }

    #[test]
    fn what_would_empty_rows_or_break_groups_names_the_tensor() {
        use crate::models::decoder::random;
        let info = random::model(random::tiny("llama"), 1).expect("a model").info();
        let check = |share: Option<f64>, pattern: &str| {
            let read = read(share, pattern).expect("read");
            read.check(&info, &|rows, cols| read.amount.of(rows * cols)).map(|_| ())
        };
        // 2534 of the 32 x 80 weights leave fewer than one a row; of 80 x 32 weights 2508 do.
        for (share, name) in [(0.99, "mlp.down_proj.weight"), (0.98, "mlp.gate_proj.weight")] {
            let error = check(Some(share), "").unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidOption);
            assert_eq!(error.violations()[0].field, "sparsity.share");
            assert!(error.message().contains(&format!("'model.layers.0.{name}'")), "{error}");
        }
        assert!(check(Some(0.96), "").is_ok());
        for (pattern, name) in [("2:7", "mlp.down_proj.weight"), ("2:5", "mlp.gate_proj.weight")] {
            let error = check(None, pattern).unwrap_err();
            assert_eq!(error.violations()[0].field, "sparsity.pattern");
            assert!(error.message().contains(&format!("'model.layers.0.{name}'")), "{error}");
        }
        assert!(check(None, "1:16").is_ok());
    }
}
