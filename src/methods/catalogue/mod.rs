//! The catalogue: facts about methods that planning needs and running does not.
//!
//! A [`Card`] says what a method is; an [`Entry`] says when to take it: what it needs, what it changes, what
//! becomes faster, what it stands behind badly, what it costs. The terms are those of the survey of model
//! compression (arXiv 2402.09748). One file per family; a method without an entry, and an entry
//! without a method, fail a test.

mod adaptation;
mod factoring;
mod pruning;
mod quantisation;
mod scratch;

use super::{Card, adapt, registry};

/// What kind of system a method is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Quantisation,
    Pruning,
    CompactArchitecture,
    LowRank,
    Adaptation,
}

/// What a method needs besides the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataNeed {
    None,
    /// Text that runs through the model; so many tokens by default.
    Calibration(u64),
    /// Text (or images) that is learnt; so many tokens by default, 0 where the options of the training say.
    Train(u64),
    /// Records with right answers.
    Labels,
}

/// How much of the model is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tuning {
    /// Nothing.
    Free,
    /// Something small beside the model, or a small part of it.
    Light,
    /// All weights.
    Full,
}

/// What is different afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Widths or ranks of matrices.
    Shapes,
    /// The numbers.
    Values,
    /// Which operations are computed.
    Graph,
}

/// What becomes less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gain {
    Memory,
    Prefill,
    Decode,
}

/// For models of which size a method is meant: medium ones have at most a billion parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Medium,
    Large,
    Both,
}

/// What a method does not stand behind, and why.
#[derive(Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Name of a method or of a family.
    pub after: &'static str,
    pub why: &'static str,
}

/// What a step costs, roughly, of a model with `p` parameters and `t` tokens of data. The plan of a recipe knows
/// the model and is closer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Seconds for each parameter.
    pub parameter: f64,
    /// Seconds for each parameter and token.
    pub parameter_token: f64,
    /// Bytes held at the peak for each parameter, the model before and after included.
    pub parameter_bytes: f64,
    /// Bytes held at the peak for each token.
    pub token_bytes: f64,
    pub basis: Basis,
}

/// Where the numbers of a [`Cost`] come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// Runs of 135 million parameters on two cores of the machine of `docs/claims.md`.
    Measured,
    /// Counted products and copies, at the speed that the measured ones reach.
    Reasoned,
}

/// Facts about a method.
#[derive(Debug)]
pub struct Entry {
    pub verb: &'static str,
    /// Name in recipes.
    pub name: &'static str,
    pub family: Family,
    /// Kind within the family.
    pub sub: &'static str,
    pub data: DataNeed,
    pub tuning: Tuning,
    pub changes: &'static [Change],
    /// Empty: nothing without a kernel that is not here.
    pub speeds_up: &'static [Gain],
    /// Folder or file of `src/kernels` that makes speed of it; empty: none.
    pub kernel: &'static str,
    pub conflicts: &'static [Conflict],
    pub scale: Scale,
    /// Name of the specification that the method was built from.
    pub seed_paper: &'static str,
    pub cost: Cost,
}

macro_rules! words {
    ($type:ty: $($variant:ident = $word:literal),+ $(,)?) => {
        impl $type {
            /// All values, by name.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The name in the API.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$variant { .. } => $word),+
                }
            }
        }
    };
}

words!(Family:
    Quantisation = "quantisation",
    Pruning = "pruning",
    CompactArchitecture = "compact_architecture",
    LowRank = "low_rank",
    Adaptation = "adaptation",
);
words!(DataNeed: None = "none", Calibration = "calibration", Train = "train", Labels = "labels");
words!(Tuning: Free = "free", Light = "light", Full = "full");
words!(Change: Shapes = "shapes", Values = "values", Graph = "graph");
words!(Gain: Memory = "memory", Prefill = "prefill", Decode = "decode");
words!(Scale: Medium = "medium", Large = "large", Both = "both");
words!(Basis: Measured = "measured", Reasoned = "reasoned");

/// Said of what becomes no faster.
pub const NOTHING: &str = "nothing";

/// Conflicts that many methods share.
mod after {
    use super::Conflict;

    pub const QUANTISED: Conflict = Conflict {
        after: "quantisation",
        why: "what was rounded is not pruned, factored or trained: take that step first",
    };
    pub const QUANTISED_TWICE: Conflict = Conflict {
        after: "quantisation",
        why: "weights are rounded once: start from the version before",
    };
    pub const FACTORED: Conflict = Conflict {
        after: "low_rank",
        why: "a product of two matrices is left as it is: leave it out of the scope, or start from the \
              version before",
    };
    pub const GROUPED: Conflict = Conflict {
        after: "group_sparse",
        why: "groups of rows are not trained by other methods: name a `training` in that step, or start from the version \
              before",
    };
    pub const DRAWN_ANEW: [Conflict; 5] = [
        draws("pruning"),
        draws("quantisation"),
        draws("low_rank"),
        draws("adaptation"),
        draws("compact_architecture"),
    ];

    const fn draws(after: &'static str) -> Conflict {
        Conflict { after, why: "all weights are drawn anew, which undoes it: take this step first" }
    }

    pub const fn exchanges(after: &'static str) -> Conflict {
        Conflict {
            after,
            why: "pruned weights come back with the values they had, and those are lost: start from the \
                  model before the pruning and name how it begins with `initial`",
        }
    }
}

impl Cost {
    /// Seconds of a step.
    pub fn seconds(&self, parameters: u64, tokens: u64) -> f64 {
        let (p, t) = (parameters as f64, tokens as f64);
        p * (self.parameter + self.parameter_token * t)
    }

    /// Bytes held at the peak.
    pub fn peak_bytes(&self, parameters: u64, tokens: u64) -> f64 {
        self.parameter_bytes * parameters as f64 + self.token_bytes * tokens as f64
    }
}

impl DataNeed {
    /// Tokens by default; 0 where there are none, or none are known.
    pub fn tokens(self) -> u64 {
        match self {
            Self::Calibration(tokens) | Self::Train(tokens) => tokens,
            Self::None | Self::Labels => 0,
        }
    }
}

impl Entry {
    /// What is less afterwards, in words: [`NOTHING`] alone where nothing is.
    pub fn gains(&self) -> Vec<&'static str> {
        match self.speeds_up {
            [] => vec![NOTHING],
            gains => gains.iter().map(|gain| gain.word()).collect(),
        }
    }

    /// Why this method does not stand behind `other`, if it does not.
    pub fn conflict(&self, other: &Self) -> Option<&'static Conflict> {
        let named = |c: &&Conflict| c.after == other.name || c.after == other.family.word();
        self.conflicts.iter().find(named)
    }
}

/// All entries, by verb and name.
pub fn entries() -> impl Iterator<Item = &'static Entry> {
    let files = [pruning::ALL, quantisation::ALL, factoring::ALL, scratch::ALL, adaptation::ALL];
    files.into_iter().flatten()
}

/// The entry of a method.
pub fn entry(verb: &str, name: &str) -> Option<&'static Entry> {
    entries().find(|entry| entry.verb == verb && entry.name == name)
}

/// All cards with their entries, by name.
pub fn all() -> Vec<(&'static Card, &'static Entry)> {
    let mut cards = registry::cards();
    cards.extend(adapt::registry::cards());
    cards.sort_unstable_by_key(|card| card.name);
    cards.into_iter().filter_map(|card| Some((card, entry(card.verb, card.name)?))).collect()
}

/// Verbs that have methods, each once, sorted.
pub fn verbs() -> Vec<&'static str> {
    let verbs: std::collections::BTreeSet<_> = entries().map(|entry| entry.verb).collect();
    verbs.into_iter().collect()
}

/// Names of the methods that a method may come after, and of those it may come before, in a recipe; both
/// by name. Adapters are trained beside a model, so that no step comes after one.
pub fn neighbours(card: &Card, entry: &Entry) -> (Vec<&'static str>, Vec<&'static str>) {
    let step = |entry: &Entry| entry.verb != "adapt";
    let (mut after, mut before) = (Vec::new(), Vec::new());
    for (other, its) in all() {
        if !other.families.iter().any(|family| card.families.contains(family)) {
            continue;
        }
        if step(its) && entry.conflict(its).is_none() {
            after.push(other.name);
        }
        if step(entry) && its.conflict(entry).is_none() {
            before.push(other.name);
        }
    }
    (after, before)
}

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
