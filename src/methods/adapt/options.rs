//! The options that adapters share, read and checked against a model's shapes.

use regex::Regex;

use super::shapes::{Shapes, module};
use super::targets::{self, ALL_LINEAR, Targets};
use crate::error::{Error, Reason, Result};
use crate::proto::v1::{AdapterBias, AdapterOptions};

/// Largest rank.
const MAX_RANK: u32 = 1 << 14;

/// What a method takes where the options say nothing.
#[derive(Debug, Clone, Copy)]
pub struct Usual {
    /// None: the smaller side of each weight.
    pub rank: Option<u32>,
    /// None: as the rank.
    pub alpha: Option<f64>,
    /// All linears, not those that are usual for the architecture.
    pub all_linear: bool,
    /// The rank must not exceed the smaller side of the weight.
    pub fits: bool,
}

impl Usual {
    /// LoRA's: rank 8 on the architecture's usual linears.
    pub const LORA: Self = Self { rank: Some(8), alpha: None, all_linear: false, fits: false };
}

/// A linear that gets an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Name of the weight.
    pub linear: String,
    /// `[out, in]`
    pub shape: [usize; 2],
    pub rank: usize,
    pub alpha: f64,
    pub rslora: bool,
}

impl Site {
    /// `model.layers.0.self_attn.q_proj`
    pub fn module(&self) -> &str {
        module(&self.linear)
    }

    /// What the product of the factors is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Elements of two factors: `r (in + out)`.
    pub fn factors(&self) -> u64 {
        self.rank as u64 * (self.shape[0] + self.shape[1]) as u64
    }
}

/// Where a method's adapters go.
#[derive(Debug, Clone)]
pub struct Plan {
    /// In running order.
    pub sites: Vec<Site>,
    pub dropout: f32,
    /// Biases of the base that are trained.
    pub biases: Vec<String>,
    /// Other tensors of the base that are trained.
    pub saved: Vec<String>,
    pub warnings: Vec<String>,
}

impl Plan {
    /// Elements of the base's tensors that are trained beside the adapters.
    pub fn whole(&self, shapes: &Shapes) -> u64 {
        self.biases.iter().chain(&self.saved).map(|name| shapes.elements(name)).sum()
    }

    /// All `r (in + out)`.
    pub fn factors(&self) -> u64 {
        self.sites.iter().map(Site::factors).sum()
    }
}

/// Writes the defaults out that do not depend on the model.
pub fn resolve(options: &mut Option<AdapterOptions>, usual: &Usual) {
    let options = options.get_or_insert_default();
    if let (None, Some(rank)) = (options.r, usual.rank) {
        options.r = Some(rank);
    }
    if options.alpha.is_none() {
        options.alpha = usual.alpha.or(options.r.map(f64::from));
    }
    options.dropout.get_or_insert(0.0);
    options.rslora.get_or_insert(false);
    if options.targets.is_empty() && options.target_pattern.is_empty() && usual.all_linear {
        options.targets.push(ALL_LINEAR.to_owned());
    }
    if options.bias == AdapterBias::Unspecified as i32 {
        options.bias = AdapterBias::None as i32;
    }
}

/// Reads the options. Errors name `adapter.<option>`.
pub fn plan(options: Option<&AdapterOptions>, usual: &Usual, shapes: &Shapes) -> Result<Plan> {
    let mut options = options.cloned();
    resolve(&mut options, usual);
    let options = options.unwrap_or_default();
    if let Some(r) = options.r {
        check_rank("adapter.r", r)?;
    }
    let alpha = |field: &str, alpha: f64| match alpha.is_finite() && alpha > 0.0 {
        true => Ok(alpha),
        false => Err(Error::option(field, format!("{alpha} is not a number above 0"))),
    };
    if let Some(value) = options.alpha {
        alpha("adapter.alpha", value)?;
    }
    let dropout = options.dropout.unwrap_or_default();
    if !(0.0..1.0).contains(&dropout) {
        return Err(Error::option("adapter.dropout", format!("{dropout} is outside [0, 1)")));
    }
    let mut ranks: Vec<(Regex, u32)> = Vec::new();
    for (pattern, rank) in &options.rank_pattern {
        check_rank("adapter.rank_pattern", *rank)?;
        ranks.push((targets::key(pattern, "adapter.rank_pattern")?, *rank));
    }
    let mut alphas: Vec<(Regex, f64)> = Vec::new();
    for (pattern, value) in &options.alpha_pattern {
        let value = alpha("adapter.alpha_pattern", *value)?;
        alphas.push((targets::key(pattern, "adapter.alpha_pattern")?, value));
    }
    let targets = Targets::new(
        &options.targets,
        &options.target_pattern,
        &options.exclude,
        &options.exclude_pattern,
        &options.layers,
        &options.modules_to_save,
        shapes.usual,
    )?;
    let chosen = targets.choose(shapes.linears.iter().map(|(name, _)| module(name)))?;
    let mut sites = Vec::with_capacity(chosen.len());
    for (linear, shape) in shapes.linears.iter().filter(|(name, _)| chosen.contains(&module(name)))
    {
        let path = module(linear);
        let smaller = shape[0].min(shape[1]);
        let rank = first(&ranks, path).or(options.r).map_or(smaller, |r| r as usize);
        if usual.fits && rank > smaller {
            return Err(Error::option(
                "adapter.r",
                format!("{rank} is more than the smaller side of '{linear}', {smaller}"),
            ));
        }
        let alpha = first(&alphas, path).or(options.alpha).unwrap_or(rank as f64);
        let rslora = options.rslora.unwrap_or_default();
        sites.push(Site { linear: linear.clone(), shape: *shape, rank, alpha, rslora });
    }
    let mut warnings = Vec::new();
    if let Some(site) = sites.iter().find(|site| site.rank > site.shape[0].min(site.shape[1])) {
        warnings.push(format!(
            "rank {} is more than the smaller side of '{}': a part of it is of no use",
            site.rank, site.linear
        ));
    }
    let mut saved = Vec::new();
    for name in &options.modules_to_save {
        let found = shapes.saved(name);
        if found.is_empty() {
            return Err(Error::at(
                Reason::TensorNotFound,
                "adapter.modules_to_save",
                format!(
                    "the model has no module '{name}'; name the end of one of its modules, '{}' for \
                     instance",
                    shapes.modules().last().copied().unwrap_or_default()
                ),
            ));
        }
        saved.extend(found.into_iter().map(str::to_owned));
    }
    saved.sort();
    saved.dedup();
    let names: Vec<String> = sites.iter().map(|site| site.linear.clone()).collect();
    let mut biases = match AdapterBias::try_from(options.bias) {
        Ok(AdapterBias::Unspecified | AdapterBias::None) => Vec::new(),
        Ok(AdapterBias::All) => shapes.all_biases(),
        Ok(AdapterBias::LoraOnly) => shapes.biases(Some(&names)),
        Err(_) => {
            return Err(Error::option(
                "adapter.bias",
                format!("{} is no number of AdapterBias", options.bias),
            ));
        }
    };
    biases.retain(|name| !saved.contains(name));
    Ok(Plan { sites, dropout: dropout as f32, biases, saved, warnings })
}

fn first<T: Copy>(pattern: &[(Regex, T)], module: &str) -> Option<T> {
    pattern.iter().find(|(key, _)| key.is_match(module)).map(|(_, value)| *value)
}

fn check_rank(field: &str, rank: u32) -> Result<()> {
    match (1..=MAX_RANK).contains(&rank) {
        true => Ok(()),
        false => Err(Error::option(field, format!("{rank} is outside 1 to {MAX_RANK}"))),
    }
}

/// A number of an option that lies in a range; `default` where it is absent.
pub fn number(
    field: &str,
    value: Option<u32>,
    default: u32,
    range: std::ops::RangeInclusive<u32>,
) -> Result<u32> {
    let value = value.unwrap_or(default);
    if range.contains(&value) {
        return Ok(value);
    }
    let (low, high) = range.into_inner();
    Err(Error::option(field, format!("{value} is outside {low} to {high}")))
}

/// An enum's value from its number; the first where it is unset.
pub fn choice<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T> {
    T::try_from(value)
        .map_err(|_| Error::option(field, format!("{value} is no number of its enum")))
}

#[cfg(test)]
mod tests {
    use super::super::shapes::testing::{minilm, smollm2};
    use super::*;

    fn read(options: AdapterOptions) -> Result<Plan> {
        plan(Some(&options), &Usual::LORA, &smollm2())
    }

    #[test]
    fn defaults_are_lora_on_queries_and_values() {
        let plan = read(AdapterOptions::default()).unwrap();
        assert_eq!(plan.sites.len(), 60);
        let site = &plan.sites[1];
        assert_eq!(site.linear, "model.layers.0.self_attn.v_proj.weight");
        assert_eq!((site.shape, site.rank, site.alpha, site.scale()), ([192, 576], 8, 8.0, 1.0));
        // The cards: LoRA r 1 on q and v of SmolLM2 has 57,600.
        assert_eq!(plan.factors(), 8 * 57_600);
        let all = AdapterOptions { targets: vec!["all-linear".into()], ..Default::default() };
        assert_eq!(read(all).unwrap().factors(), 8 * 305_280);
    }

    #[test]
    fn patterns_change_ranks_and_scales() {
        let options = AdapterOptions {
            r: Some(4),
            alpha: Some(16.0),
            rslora: Some(true),
            layers: vec![2, 3],
            rank_pattern: [("layers.3.self_attn.q_proj".to_owned(), 16)].into(),
            alpha_pattern: [("v_proj".to_owned(), 2.0)].into(),
            ..Default::default()
        };
        let plan = read(options).unwrap();
        let facts: Vec<_> = plan.sites.iter().map(|s| (s.rank, s.scale())).collect();
        assert_eq!(facts, [(4, 8.0), (4, 1.0), (16, 4.0), (4, 1.0)]);
    }

    #[test]
    fn whole_modules_and_biases() {
        let options = AdapterOptions {
            modules_to_save: vec!["embeddings.LayerNorm".into()],
            bias: AdapterBias::LoraOnly as i32,
            ..Default::default()
        };
        let plan = plan(Some(&options), &Usual::LORA, &minilm()).unwrap();
        assert_eq!((plan.sites.len(), plan.biases.len(), plan.saved.len()), (12, 12, 2));
        assert_eq!(plan.whole(&minilm()), 12 * 384 + 2 * 384);
    }

    #[test]
    fn bad_options_name_their_field() {
        let d = AdapterOptions::default;
        for (options, field) in [
            (AdapterOptions { r: Some(0), ..d() }, "adapter.r"),
            (AdapterOptions { r: Some(1 << 20), ..d() }, "adapter.r"),
            (AdapterOptions { alpha: Some(0.0), ..d() }, "adapter.alpha"),
            (AdapterOptions { alpha: Some(f64::NAN), ..d() }, "adapter.alpha"),
            (AdapterOptions { dropout: Some(1.0), ..d() }, "adapter.dropout"),
            (AdapterOptions { bias: 9, ..d() }, "adapter.bias"),
            (AdapterOptions { targets: vec!["c_attn".into()], ..d() }, "adapter.targets"),
            (
                AdapterOptions { modules_to_save: vec!["cls".into()], ..d() },
                "adapter.modules_to_save",
            ),
            (
                AdapterOptions { rank_pattern: [("q".into(), 0)].into(), ..d() },
                "adapter.rank_pattern",
            ),
            (
                AdapterOptions { alpha_pattern: [("(".into(), 1.0)].into(), ..d() },
                "adapter.alpha_pattern",
            ),
        ] {
            let error = read(options).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
        let wide = AdapterOptions { r: Some(200), ..d() };
        let usual = Usual { fits: true, ..Usual::LORA };
        let error = plan(Some(&wide), &usual, &smollm2()).unwrap_err();
        assert!(error.message().contains("v_proj"), "{error}");
        assert_eq!(read(wide).unwrap().warnings.len(), 1);
    }
}
