//! Tuning: methods that leave the base as it is and train something small beside it.
//!
//! A method is an initialiser, what is trained, what happens around a step, and what comes out. The
//! low-rank ones share one form of an adapter ([`module`]); they differ in how its parts start and which
//! of them are trained. The loop that trains is [`crate::train`]; nothing here runs a model, what a method
//! needs of runs before training (gradients, inputs) it asks of a [`Setup`].

pub mod adalora;
pub mod basis;
pub mod bitfit;
#[cfg(test)]
mod contract;
pub mod corda;
mod cut;
pub mod dora;
pub mod export;
pub mod full;
pub mod gradients;
pub mod head_only;
pub mod learner;
pub mod loldu;
pub mod lora;
pub mod lora_sb;
pub mod lora_xs;
pub mod merge;
pub mod module;
pub mod moments;
pub mod native;
pub mod nola;
pub mod options;
pub mod pissa;
pub mod qlora;
#[cfg(test)]
mod quantised_base;
pub mod registry;
pub mod shapes;
pub mod sora;
pub mod stored;
pub mod targets;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod tuned;

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;
use rayon::prelude::*;

use self::gradients::WeightGradients;
use self::module::Module;
use self::moments::SecondMoments;
use self::options::{Plan, Site};
use self::shapes::Shapes;
use self::tuned::Tuned;
use super::Card;
use crate::error::{Error, Reason, Result};
use crate::nn::weight::Weight;
use crate::progress::Progress;
use crate::seed::Stream;
use crate::train::hooks::Hooks;

/// What is known before any weight is read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cost {
    /// Trained elements, without those of a task's head.
    pub parameters: u64,
    /// Elements that are kept beside the base and not trained.
    pub frozen: u64,
    pub warnings: Vec<String>,
}

/// What a method starts from.
pub struct Setup<'a> {
    pub weights: &'a BTreeMap<String, Arc<Weight>>,
    pub shapes: &'a Shapes,
    /// Seeded random numbers; a stream for each purpose and module.
    pub random: Stream,
    pub progress: &'a Progress,
    /// Learning rate of the first optimiser step.
    pub first_rate: f64,
    /// Gradients of the base's weights; methods that need them say so in [`Adapt::needs`].
    pub gradients: Option<&'a mut dyn WeightGradients>,
    /// Second moments of the linears' inputs; likewise.
    pub moments: Option<&'a mut dyn SecondMoments>,
}

/// What a method needs of the model before training, beside its weights.
#[derive(Debug, Clone, PartialEq)]
pub enum Needs {
    Nothing,
    /// Sums of weight gradients over this many records of the training data, so many a pass.
    Gradients {
        samples: usize,
        batch: usize,
    },
    /// Second moments of the inputs on a text.
    Moments(moments::Settings),
}

/// A method that tunes. The options message of the API implements it.
pub trait Adapt: Send + Sync {
    /// Facts about the method.
    fn card(&self) -> &'static Card;
    /// Writes out every default that does not depend on the model.
    fn resolve(&mut self);
    /// Resource names of data sets that the method reads beside the training data.
    fn datasets(&self) -> Vec<&str>;
    /// Refuses bad options, and counts.
    fn check(&self, shapes: &Shapes) -> Result<Cost>;
    /// What has to be run before [`Adapt::start`].
    fn needs(&self) -> Result<Needs>;
    /// What is trained, as it stands before the first step.
    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned>;
    /// What happens around the updates of a training of so many; none for most.
    fn hooks(&self, tuned: &Tuned, updates: u64) -> Result<Option<Box<dyn Hooks>>>;
    /// What is kept after training: ranks that came out empty are cut.
    fn finish(&self, tuned: Tuned) -> Result<Tuned>;
}

/// The weight called `name`.
fn find<'a>(weights: &'a BTreeMap<String, Arc<Weight>>, name: &str) -> Result<&'a Arc<Weight>> {
    weights.get(name).ok_or_else(|| {
        Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
    })
}

/// Makes the modules of all sites, several at a time, and adds the tensors that are trained whole.
fn build(
    plan: &Plan,
    setup: &Setup<'_>,
    make: impl Fn(&Site, &Arc<Weight>, &Stream) -> Result<Module> + Sync,
) -> Result<Tuned> {
    let mut tuned = Tuned::new(plan.dropout, setup.random.path());
    let (count, mut done) = (plan.sites.len(), 0);
    let (weights, init) = (setup.weights, setup.random.child("init"));
    // Some at a time, so that progress is seen and a cancellation heard.
    for sites in plan.sites.chunks(4 * rayon::current_num_threads()) {
        setup.progress.report(done as f64 / count as f64, "starting the adapters")?;
        let made: Vec<Module> = sites
            .par_iter()
            .map(|site| make(site, find(weights, &site.linear)?, &init.child(&site.linear)))
            .collect::<Result<_>>()?;
        done += sites.len();
        tuned.modules.extend(made.into_iter().map(|module| (module.linear.clone(), module)));
    }
    finish_build(&mut tuned, plan, setup)?;
    Ok(tuned)
}

/// Adds the tensors of a plan that are trained whole.
fn finish_build(tuned: &mut Tuned, plan: &Plan, setup: &Setup<'_>) -> Result<()> {
    tuned.add_whole(plan.biases.iter().chain(&plan.saved), setup.weights)
}

/// The elements of a stored weight, checked.
fn finite_values(site: &Site, stored: &Weight) -> Result<Vec<f32>> {
    let values = stored.to_f32();
    match values.iter().all(|v| v.is_finite()) {
        true => Ok(values),
        false => Err(Error::new(
            Reason::NonFinite,
            format!(
                "'{}' holds numbers that are not finite; the model is broken, import it again",
                site.linear
            ),
        )),
    }
}

/// `count` numbers uniform in plus and minus `bound`.
fn uniform(rng: &mut impl Rng, count: usize, bound: f32) -> Vec<f32> {
    (0..count).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect()
}

/// `count` normal numbers with the given deviation, by Box and Muller.
fn normal(rng: &mut impl Rng, count: usize, deviation: f64) -> Vec<f32> {
    let mut out = Vec::with_capacity(count + 1);
    while out.len() < count {
        let radius = deviation * (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let angle = std::f64::consts::TAU * rng.random::<f64>();
        out.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    out.truncate(count);
    out
}
