//! Adapters in the forward: rows of a step, each with the adapters of its request.
//!
//! Rows with the same adapters form a group. The linears of a block that share their input also
//! share the pass through the `A` factors: it runs when the first of them asks, the others find its
//! result.

mod extras;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use sha2::{Digest, Sha256};

pub(super) use self::extras::Norm;

use self::extras::Extras;
use super::super::Config;
use super::super::config::EMBEDDING;
use crate::error::{Error, Reason, Result};
use crate::kernels::lowrank::{self, Down, RowGroups, TILE, Tile};
use crate::nn::adapter::{Adapter, Changes, Factors};

/// Ranks of a unit of work.
const RANKS: usize = 16;

/// A linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Site {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

const SITES: usize = 7;

impl Site {
    /// In the order of [`Config::linears`].
    const ALL: [Self; SITES] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The linears that share this one's input, the first of which runs first.
    fn shared(self) -> &'static [Self] {
        match self {
            Self::Q | Self::K | Self::V => &Self::ALL[..3],
            Self::O => &Self::ALL[3..4],
            Self::Gate | Self::Up => &Self::ALL[4..6],
            Self::Down => &Self::ALL[6..],
        }
    }
}

/// The shapes of the linears that adapters add to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    layers: usize,
    /// `[out, in]` of each linear of a block, of the widest where they differ.
    sites: [[usize; 2]; SITES],
    /// Channels of the feed-forward networks, where they differ.
    widths: Vec<usize>,
}

impl Shape {
    fn of(config: &Config) -> Self {
        let sites = Self::sites(config, config.intermediate);
        Self { layers: config.layers.len(), sites, widths: config.widths.clone() }
    }

    /// Whether `config` has these shapes.
    fn is_of(&self, config: &Config) -> bool {
        self.layers == config.layers.len()
            && self.sites == Self::sites(config, config.intermediate)
            && self.widths == config.widths
    }

    fn sites(config: &Config, wide: usize) -> [[usize; 2]; SITES] {
        let hidden = config.hidden;
        let (q, kv) = (config.query_channels(), config.key_channels());
        [
            [q, hidden],
            [kv, hidden],
            [kv, hidden],
            [hidden, q],
            [wide, hidden],
            [wide, hidden],
            [hidden, wide],
        ]
    }
}

/// An adapter that fits the shapes of a decoder, ready to run.
#[derive(Debug)]
pub struct Fitted {
    digest: String,
    shape: Shape,
    layers: Vec<[Option<Arc<Factors>>; SITES]>,
    /// What is more than products; most adapters have none of it.
    extras: Option<Box<Extras>>,
    bytes: u64,
}

impl Fitted {
    /// Finds the place of every addition. `digest` stands for the adapter's content.
    ///
    /// # Errors
    /// MODEL_UNSUITABLE for an adapter that adds to what the decoder does not have or to what has
    /// another shape.
    pub fn new(digest: &str, adapter: &Adapter, config: &Config) -> Result<Self> {
        let shape = Shape::of(config);
        let mut layers = vec![[const { None }; SITES]; shape.layers];
        let mut placed = 0;
        for (layer, sites) in layers.iter_mut().enumerate() {
            let names = config.linears(layer).concat();
            let wanted = Shape::sites(config, config.wide(layer));
            for ((site, name), wanted) in sites.iter_mut().zip(names).zip(wanted) {
                let Some(factors) = adapter.linears.get(&name) else { continue };
                if factors.shape() != wanted {
                    return Err(misfit(format!(
                        "'{name}' is {wanted:?}, but the adapter adds to {:?}",
                        factors.shape()
                    )));
                }
                *site = Some(Arc::clone(factors));
                placed += 1;
            }
        }
        if placed != adapter.linears.len() {
            let known: Vec<String> =
                (0..shape.layers).flat_map(|layer| config.linears(layer).concat()).collect();
            let stranger = adapter.linears.keys().find(|name| !known.contains(name));
            return Err(misfit(format!(
                "the adapter adds to '{}', which is no linear of one of the {} blocks",
                stranger.map_or("", String::as_str),
                shape.layers
            )));
        }
        if placed == 0 {
            return Err(misfit("the adapter adds to nothing"));
        }
        let (digest, bytes) = (digest.to_owned(), adapter.bytes());
        Ok(Self { digest, shape, layers, extras: None, bytes })
    }

    /// The same of an adapter that is more than products. `digest` stands for its content and the version
    /// that it was made ready for.
    ///
    /// # Errors
    /// As [`Fitted::new`]; UNSUPPORTED for a tensor that does not serve beside its base.
    pub fn of(digest: &str, changes: &Changes, config: &Config) -> Result<Self> {
        // A table is read by rows, not multiplied with.
        let linears = changes.products.iter().filter(|(name, _)| *name != EMBEDDING);
        let linears = linears.map(|(name, p)| {
            let factors = Factors::from_f32(p.shape, p.rank, &p.a, &p.b, p.scale)?;
            Ok((name.clone(), Arc::new(factors)))
        });
        let adapter = Adapter { linears: linears.collect::<Result<_>>()? };
        let extras = Extras::new(changes, config)?;
        let mut fitted = match adapter.linears.is_empty() && !extras.is_empty() {
            false => Self::new(digest, &adapter, config)?,
            true => {
                let shape = Shape::of(config);
                let layers = vec![[const { None }; SITES]; shape.layers];
                Self { digest: digest.to_owned(), shape, layers, extras: None, bytes: 0 }
            }
        };
        if !extras.is_empty() {
            fitted.bytes += extras.bytes();
            fitted.extras = Some(Box::new(extras));
        }
        Ok(fitted)
    }

    /// Digest of the adapter's content.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Refuses a decoder with other shapes than the one it was fitted to.
    pub fn check(&self, config: &Config) -> Result<()> {
        if self.shape.is_of(config) {
            return Ok(());
        }
        Err(misfit("the adapter was made for a model with other shapes"))
    }
}

fn misfit(problem: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!("{problem}; the adapter belongs to another model: name the one it was made for"),
    )
}

/// The adapters of a request with their weights. Cheap to clone; empty by default.
#[derive(Debug, Clone, Default)]
pub struct Mix {
    parts: Arc<[(Arc<Fitted>, f32)]>,
    namespace: u64,
}

impl Mix {
    /// Parts in any order; those with weight 0 are left out. What they add is summed.
    pub fn new(parts: impl IntoIterator<Item = (Arc<Fitted>, f32)>) -> Self {
        let mut parts: Vec<_> = parts.into_iter().filter(|(_, weight)| *weight != 0.0).collect();
        if parts.is_empty() {
            return Self::default();
        }
        // In one order, so that a set adds up to the same bits however it was written.
        parts.sort_by(|(a, v), (b, w)| a.digest.cmp(&b.digest).then(v.total_cmp(w)));
        let mut hash = Sha256::new();
        for (adapter, weight) in &parts {
            hash.update((adapter.digest.len() as u64).to_le_bytes());
            hash.update(&adapter.digest);
            hash.update(weight.to_bits().to_le_bytes());
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        // 0 stands for no adapter.
        let namespace = u64::from_le_bytes(first).max(1);
        Self { parts: parts.into(), namespace }
    }

    /// A number for the set of adapters and weights: 0 for none, equal for equal sets, different
    /// (up to chance of one in 2^64) for others. Keys and values of one namespace must not serve
    /// another.
    pub fn namespace(&self) -> u64 {
        self.namespace
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Refuses a decoder with other shapes than the adapters'.
    pub fn check(&self, config: &Config) -> Result<()> {
        self.parts.iter().try_for_each(|(adapter, _)| adapter.check(config))
    }

    /// What of the adapters is more than products, with the weights.
    fn extras(&self) -> impl Iterator<Item = (&Extras, f32)> {
        self.parts
            .iter()
            .filter_map(|(adapter, weight)| Some((adapter.extras.as_deref()?, *weight)))
    }

    /// The factors that add to a linear, with their weights.
    fn at(&self, layer: usize, site: Site) -> impl Iterator<Item = (&Factors, f32)> {
        self.parts.iter().filter_map(move |(adapter, weight)| {
            let factors = adapter.layers.get(layer)?[site as usize].as_deref()?;
            Some((factors, *weight))
        })
    }
}

/// The adapters of a step's rows, and the memory that applying them takes; kept between steps.
#[derive(Default)]
pub(super) struct Adapters {
    groups: RowGroups,
    mixes: Vec<Mix>,
    /// Tiles of the linears of the present input that have additions.
    tiles: [Vec<Tile>; SITES],
    units: Vec<Unit>,
    ends: Vec<usize>,
    h: Vec<f32>,
    /// Whether some adapter is more than products.
    more: bool,
    scratch: Vec<f32>,
}

/// Some ranks of one factor for the rows of a tile.
#[derive(Clone, Copy)]
struct Unit {
    site: Site,
    group: usize,
    /// Which of the factors of the group.
    part: usize,
    /// First and last rank.
    ranks: (usize, usize),
    /// First and last place within the rows of all groups.
    places: (usize, usize),
}

impl Adapters {
    /// Starts a step of `rows` rows; each part of it has adapters and consecutive rows.
    pub fn start<'a>(
        &mut self,
        rows: usize,
        parts: impl Iterator<Item = (&'a Mix, std::ops::Range<usize>)> + Clone,
    ) {
        self.mixes.clear();
        for (mix, rows) in parts.clone() {
            let known = self.mixes.iter().any(|m| m.namespace == mix.namespace);
            if !mix.is_empty() && !rows.is_empty() && !known {
                self.mixes.push(mix.clone());
            }
        }
        self.more = self.mixes.iter().any(|mix| mix.extras().next().is_some());
        if self.mixes.is_empty() {
            return;
        }
        self.groups.clear(rows);
        for mix in &self.mixes {
            for (_, rows) in parts.clone().filter(|(m, _)| m.namespace == mix.namespace) {
                self.groups.push(rows);
            }
            self.groups.close();
        }
    }

    /// Lets go of the adapters.
    pub fn end(&mut self) {
        self.mixes.clear();
        self.more = false;
    }

    /// `y += weight * (g y + scale * B A x + t)` for every row with its adapters; `x` is `[rows, in]` and
    /// `y` `[rows, out]`. The linears that share an input must be asked for in order.
    pub fn add(&mut self, layer: usize, site: Site, x: &[f32], y: &mut [f32]) {
        if self.mixes.is_empty() {
            return;
        }
        if self.more {
            self.shift(layer, site, y);
        }
        if site.shared()[0] == site {
            self.project(layer, site.shared(), x);
        }
        let Some(first) = self.mixes.iter().find_map(|m| m.at(layer, site).next()) else { return };
        let width = first.0.shape()[0];
        let mixes = &self.mixes;
        let part = |tile: &Tile, i: usize| {
            mixes[tile.group].at(layer, site).nth(i).map(|(factors, _)| factors.b())
        };
        lowrank::up(&self.groups, &self.tiles[site as usize], part, &self.h, y, width);
    }

    /// Multiplies `x` by the `A` factors of all linears that share it.
    fn project(&mut self, layer: usize, sites: &[Site], x: &[f32]) {
        self.units.clear();
        self.ends.clear();
        let (mut at, mut width) = (0, 0);
        for &site in sites {
            let tiles = &mut self.tiles[site as usize];
            tiles.clear();
            for (group, mix) in self.mixes.iter().enumerate() {
                if mix.at(layer, site).next().is_none() {
                    continue;
                }
                let places = self.groups.places(group);
                for first in places.clone().step_by(TILE) {
                    let end = places.end.min(first + TILE);
                    tiles.push(Tile { group, first, count: end - first, at });
                    for (part, (factors, _)) in mix.at(layer, site).enumerate() {
                        width = factors.shape()[1];
                        for low in (0..factors.rank()).step_by(RANKS) {
                            let ranks = (low, factors.rank().min(low + RANKS));
                            self.units.push(Unit {
                                site,
                                group,
                                part,
                                ranks,
                                places: (first, end),
                            });
                            at += (ranks.1 - ranks.0) * (end - first);
                            self.ends.push(at);
                        }
                    }
                }
            }
        }
        let h = super::sized(&mut self.h, at);
        let (mixes, units) = (&self.mixes, &self.units);
        let unit = |i: usize| {
            let Unit { site, group, part, ranks, places } = units[i];
            // Found a moment ago; an empty factor would be refused by its size.
            let (a, factor) = match mixes[group].at(layer, site).nth(part) {
                Some((factors, weight)) => (factors.a(), weight * factors.scale()),
                None => (&[][..], 0.0),
            };
            Down { a: &a[ranks.0 * width..ranks.1 * width], places: places.0..places.1, factor }
        };
        lowrank::down(&self.groups, &self.ends, unit, x, width, h);
    }
}
