//! A model under tuning: adapters on its linears, and tensors that are trained whole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor, Var};

use super::basis;
use super::module::{self, Module, Modules};
use super::shapes;
use crate::error::Result;
use crate::nn::dtype::Dtype;
use crate::nn::tuning::{Dropout, LowRank, Tuning};
use crate::nn::weight::{Dense, Weight};
use crate::progress::Progress;
use crate::train::parameters::{Parameter, Parameters};

/// How a kind of trained tensor is stepped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stepping {
    /// Multiplies the learning rate.
    pub rate: f64,
    pub decay: bool,
}

/// What a method trains.
#[derive(Debug, Default)]
pub struct Tuned {
    pub modules: Modules,
    /// Tensors of the base that are trained whole, by their names.
    pub whole: BTreeMap<String, Var>,
    /// Share of an adapter's input that is dropped in training.
    pub dropout: f32,
    /// By the end of the name (`lora_g`), where it differs from the usual: the rate as it is, decay for
    /// matrices.
    pub stepping: BTreeMap<&'static str, Stepping>,
    /// What the user should know of how the method started.
    pub notes: Vec<String>,
    /// What dropout draws from.
    seed: String,
    /// The pass that is under way; 0 outside training.
    pass: AtomicU64,
}

impl Tuned {
    /// Nothing yet; `seed` is the path of the random stream that dropout draws from.
    pub fn new(dropout: f32, seed: &str) -> Self {
        Self { dropout, seed: seed.to_owned(), ..Self::default() }
    }

    /// Trains the tensors called `names` whole, from what they are.
    pub fn add_whole<'a>(
        &mut self,
        names: impl Iterator<Item = &'a String>,
        weights: &BTreeMap<String, Arc<Weight>>,
    ) -> Result<()> {
        for name in names {
            let weight = super::find(weights, name)?;
            let var = Var::from_vec(weight.to_f32(), weight.shape(), &Device::Cpu)?;
            self.whole.insert(name.clone(), var);
        }
        Ok(())
    }

    /// Says which pass comes: it decides what dropout drops, so a pass that is run again drops the same.
    /// None: evaluation, nothing is dropped.
    pub fn set_pass(&self, pass: Option<u64>) {
        self.pass.store(pass.map_or(0, |p| p.saturating_add(1)), Ordering::Relaxed);
    }

    /// All trained tensors: `<module>.lora_A` and the like, and the names of whole tensors.
    pub fn parameters(&self) -> Parameters {
        let mut all = Parameters::new();
        for adapter in self.modules.values() {
            let path = shapes::module(&adapter.linear);
            for (kind, var) in adapter.trained() {
                let usual = Stepping { rate: 1.0, decay: var.rank() > 1 };
                let Stepping { rate, decay } = self.stepping.get(kind).copied().unwrap_or(usual);
                let parameter = Parameter { var: var.clone(), rate, decay };
                all.insert(format!("{path}.{kind}"), parameter);
            }
        }
        for (name, var) in &self.whole {
            let parameter = Parameter { var: var.clone(), rate: 1.0, decay: var.rank() > 1 };
            all.insert(name.clone(), parameter);
        }
        all
    }

    /// Number of trained elements.
    pub fn count(&self) -> u64 {
        let whole: usize = self.whole.values().map(|var| var.elem_count()).sum();
        self.modules.values().map(Module::parameters).sum::<u64>() + whole as u64
    }

    /// The tuned weights of a model as f32, with what was tuned put in.
    pub fn dense(
        &self,
        weights: &BTreeMap<String, Arc<Weight>>,
        progress: &Progress,
    ) -> Result<BTreeMap<String, Arc<Weight>>> {
        let mut dense = BTreeMap::new();
        for name in self.modules.keys().chain(self.whole.keys()) {
            progress.check()?;
            let stored = super::find(weights, name)?;
            let values = match (self.modules.get(name), self.whole.get(name)) {
                (Some(module), _) => module.merged(stored)?,
                (None, Some(var)) => var.flatten_all()?.to_vec1::<f32>()?,
                (None, None) => continue,
            };
            let weight = Dense::from_f32(stored.shape().to_vec(), &values, Dtype::F32)?;
            dense.insert(name.clone(), Arc::new(Weight::Dense(weight)));
        }
        Ok(dense)
    }

    /// The values of all trained tensors by name, for comparisons and files.
    pub fn values(&self) -> Result<BTreeMap<String, Vec<f32>>> {
        let parameters = self.parameters().into_iter();
        parameters.map(|(name, p)| Ok((name, p.var.flatten_all()?.to_vec1::<f32>()?))).collect()
    }

    fn drop(&self, linear: &str) -> Option<Dropout> {
        let pass = self.pass.load(Ordering::Relaxed);
        (pass > 0 && self.dropout > 0.0).then(|| {
            let [low, high] = basis::key(&format!("{}/dropout/{pass}/{linear}", self.seed));
            let seed = u64::from(low) | u64::from(high) << 32;
            Dropout { probability: self.dropout, seed }
        })
    }
}

impl Tuning for Tuned {
    fn low_rank(&self, name: &str) -> Result<Option<LowRank>> {
        self.modules.get(name).map(|adapter| adapter.addition(self.drop(name))).transpose()
    }

    fn linear(&self, name: &str, x: &Tensor, stored: &Arc<Weight>) -> Result<Option<Tensor>> {
        if let Some(adapter) = self.modules.get(name) {
            return adapter.forward(x, stored, self.drop(name)).map(Some);
        }
        self.whole.get(name).map(|var| module::whole(x, var.as_tensor())).transpose()
    }

    /// All there is has the form of [`Tuning::low_rank`] or [`Tuning::tensor`].
    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.whole.get(name).map(|var| var.as_tensor().clone()))
    }
}
