//! How a training computes attention: the options, and hooks that show how large queries and keys become.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use super::hooks::{Hooks, Place, Updated};
use super::optimizer::Optimizer;
use super::parameters::{Gradients, Parameters};
use crate::error::{Error, Result};
use crate::nn::limits::{self, Factoring, MAX_HEAD};
use crate::nn::ops::attend::Choosing;
use crate::proto::v1::{self, training_attention::Gradient};

/// Most features that may be asked for.
const MAX_FEATURES: u32 = 1 << 20;

/// Checked options.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Attention {
    /// Absent for exact attention.
    pub factoring: Option<Factoring>,
    /// Updates between looks at sizes; 0 for none.
    pub watch_every: u64,
}

impl Attention {
    /// Reads the option.
    ///
    /// # Errors
    /// `INVALID_OPTION` that names a field as a path from the training.
    pub fn read(training: &v1::Training) -> Result<Self> {
        let Some(given) = &training.attention else { return Ok(Self::default()) };
        let factoring = match &given.gradient {
            None | Some(Gradient::Exact(_)) => None,
            Some(Gradient::Factored(factored)) => {
                Some(factoring(factored).map_err(|e| e.within("attention.factored"))?)
            }
        };
        let watch_every = match given.watch_every {
            Some(0) => {
                let problem = "0 updates are no distance; leave it out or give 1 or more";
                return Err(Error::option("attention.watch_every", problem));
            }
            every => u64::from(every.unwrap_or_default()),
        };
        Ok(Self { factoring, watch_every })
    }

    /// Whether anything but exact attention without a look is asked for.
    pub fn is_special(&self) -> bool {
        *self != Self::default()
    }

    /// Refuses factored gradients that no head of `dim` channels could get for rows of `length` tokens.
    ///
    /// # Errors
    /// `INVALID_OPTION` that says why.
    pub fn suits(&self, length: usize, dim: usize, causal: bool) -> Result<()> {
        let Some(factoring) = &self.factoring else { return Ok(()) };
        let Err(choice) = limits::affordable(factoring, length, dim, causal) else { return Ok(()) };
        let width = factoring.project.map_or(dim, |p| p.min(dim));
        let problem = match width > MAX_HEAD {
            true => format!(
                "heads of {dim} channels have too many features for rows of {length} tokens; set project_d \
                 to {MAX_HEAD} or less, allow more features, or take exact gradients"
            ),
            false => format!(
                "{}; take longer rows, allow more features, or take exact gradients",
                choice.reason
            ),
        };
        Err(Error::option("attention.factored", problem))
    }

    /// What computes attention so; `None` where nothing special is asked for.
    pub fn choosing(&self) -> Option<Arc<Choosing>> {
        self.is_special().then(|| Arc::new(Choosing::new(self.factoring, self.watch_every)))
    }
}

/// Reads how gradients are factored; fields are named from the message.
///
/// # Errors
/// `INVALID_OPTION`.
pub fn factoring(given: &v1::FactoredAttention) -> Result<Factoring> {
    let usual = Factoring::default();
    let eps = given.eps.unwrap_or(usual.eps);
    if !(eps > 0.0 && eps < 1.0) {
        return Err(Error::option("eps", format!("{eps} is outside (0, 1)")));
    }
    let at_least_one = |field: &str, value: Option<u32>| match value {
        Some(value) if value == 0 || value > MAX_FEATURES => {
            Err(Error::option(field, format!("{value} is outside 1 to {MAX_FEATURES}")))
        }
        value => Ok(value.map(|value| value as usize)),
    };
    Ok(Factoring {
        eps,
        max_features: at_least_one("max_features", given.max_features)?,
        project: at_least_one("project_d", given.project_d)?,
    })
}

/// Writes the defaults out.
pub fn resolve(training: &mut v1::Training) {
    if let Some(Gradient::Factored(given)) =
        training.attention.as_mut().and_then(|attention| attention.gradient.as_mut())
    {
        given.eps.get_or_insert(Factoring::default().eps);
    }
}

/// The hooks of a method, and what attention looks like beside them.
pub struct Watched {
    inner: Box<dyn Hooks>,
    choosing: Arc<Choosing>,
    /// Share of the threshold above which there is a warning.
    limit: f64,
    metrics: BTreeMap<String, f64>,
    first: Option<f64>,
    crossed: Option<(u64, f64)>,
}

impl Watched {
    /// Shows what `choosing` sees.
    pub fn new(inner: Box<dyn Hooks>, choosing: Arc<Choosing>, attention: &Attention) -> Self {
        // Factored gradients want half of the threshold.
        let limit = if attention.factoring.is_some() { 0.5 } else { 1.0 };
        Self { inner, choosing, limit, metrics: BTreeMap::new(), first: None, crossed: None }
    }

    /// What the user should know after a training.
    pub fn warnings(&self) -> Vec<String> {
        let first = self.first.unwrap_or_default();
        let crossed = self.crossed.iter().map(|(step, margin)| {
            format!(
                "queries and keys grew from {first:.2} to {margin:.2} times the threshold at update {step}: \
                 gradients of attention can no longer be taken much faster than exactly"
            )
        });
        crossed.collect()
    }

    fn look(&mut self, step: u64) {
        let seen = self.choosing.take();
        if let (Some(gamma), Some(margin)) = (seen.gamma, seen.margin) {
            self.metrics.insert("attention_gamma".to_owned(), gamma);
            self.metrics.insert("attention_margin".to_owned(), margin);
            let first = *self.first.get_or_insert(margin);
            if self.crossed.is_none() && first < self.limit && margin >= self.limit {
                self.crossed = Some((step, margin));
            }
        }
        let heads = seen.factored + seen.exact;
        if heads > 0 {
            let share = seen.factored as f64 / heads as f64;
            self.metrics.insert("attention_factored_share".to_owned(), share);
        }
    }
}

impl Hooks for Watched {
    fn penalty(
        &mut self,
        place: Place,
        parameters: &Parameters,
    ) -> Result<Option<(f64, Gradients)>> {
        self.look(place.step);
        self.inner.penalty(place, parameters)
    }

    fn after_backward(
        &mut self,
        place: Place,
        parameters: &Parameters,
        gradients: &mut Gradients,
    ) -> Result<()> {
        self.inner.after_backward(place, parameters, gradients)
    }

    fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
        self.inner.after_step(updated)
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        let mut all = self.inner.metrics();
        all.extend(self.metrics.clone());
        all
    }

    fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        self.inner.save()
    }

    fn restore(
        &mut self,
        saved: BTreeMap<String, Tensor>,
        parameters: &mut Parameters,
        optimizer: &mut Optimizer,
    ) -> Result<()> {
        self.inner.restore(saved, parameters, optimizer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::hooks::Plain;

    fn training(factored: v1::FactoredAttention) -> v1::Training {
        let gradient = Some(Gradient::Factored(factored));
        let attention = v1::TrainingAttention { gradient, watch_every: None };
        v1::Training { attention: Some(attention), ..Default::default() }
    }

    #[test]
    fn options_are_read_and_bad_ones_named() {
        assert_eq!(Attention::read(&v1::Training::default()).unwrap(), Attention::default());
        assert!(Attention::default().choosing().is_none());
        let mut usual = training(v1::FactoredAttention::default());
        let read = Attention::read(&usual).unwrap();
        assert_eq!(read.factoring, Some(Factoring::default()));
        assert!(read.choosing().is_some());
        resolve(&mut usual);
        assert_eq!(Attention::read(&usual).unwrap(), read);
        assert!(format!("{usual:?}").contains("eps: Some(0.001)"));
        let field = |given| Attention::read(&given).unwrap_err().violations()[0].field.clone();
        for eps in [0.0, -1.0, 1.0, f64::NAN, f64::INFINITY] {
            let given = v1::FactoredAttention { eps: Some(eps), ..Default::default() };
            assert_eq!(field(training(given)), "attention.factored.eps");
        }
        let given = v1::FactoredAttention { max_features: Some(0), ..Default::default() };
        assert_eq!(field(training(given)), "attention.factored.max_features");
        let given = v1::FactoredAttention { project_d: Some(u32::MAX), ..Default::default() };
        assert_eq!(field(training(given)), "attention.factored.project_d");
        let attention = v1::TrainingAttention { gradient: None, watch_every: Some(0) };
        let given = v1::Training { attention: Some(attention), ..Default::default() };
        assert_eq!(field(given), "attention.watch_every");
    }

    #[test]
    fn large_heads_and_short_rows_are_refused_before_anything_is_run() {
        let with = |project, max_features| Attention {
            factoring: Some(Factoring { project, max_features, ..Factoring::default() }),
            watch_every: 0,
        };
        assert!(Attention::default().suits(1, 64, true).is_ok());
        let error = with(None, None).suits(512, 64, true).unwrap_err();
        assert!(error.message().contains("project_d"), "{}", error.message());
        assert!(with(None, Some(2145)).suits(512, 64, true).is_ok());
        assert!(with(Some(4), None).suits(8192, 32, true).is_ok());
        assert!(with(None, None).suits(4096, 4, true).is_ok());
        assert!(with(None, None).suits(8, 4, true).unwrap_err().message().contains("too few"));
        assert!(with(None, Some(99)).suits(1, 4, true).is_err());
    }

    #[test]
    fn growth_over_the_limit_is_told_once() {
        let attention = Attention { factoring: None, watch_every: 1 };
        let choosing = attention.choosing().unwrap();
        let mut hooks = Watched::new(Box::new(Plain), choosing, &attention);
        hooks.look(1);
        assert!(hooks.metrics().is_empty() && hooks.warnings().is_empty());
        for (step, margin) in [(2, 0.4), (3, 0.8), (4, 1.5), (5, 2.0)] {
            hooks.choosing.note_sizes(margin * 2.0, margin);
            hooks.look(step);
            assert_eq!(hooks.metrics()["attention_margin"], margin);
        }
        let warnings = hooks.warnings();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("0.40 to 1.50") && warnings[0].contains("update 4"));
    }
}
