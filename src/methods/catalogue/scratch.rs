//! Training of whole models, and where it begins.

use super::{Basis, Change, Cost, DataNeed, Entry, Family, Gain, Scale, Tuning, after};

pub(super) const ALL: &[Entry] = &[
    Entry {
        verb: "train",
        name: "train",
        family: Family::Adaptation,
        sub: "training of all weights, which heals what a step before it broke",
        data: DataNeed::Train(0),
        tuning: Tuning::Full,
        changes: &[Change::Values],
        speeds_up: &[],
        kernel: "",
        conflicts: &[after::QUANTISED, after::FACTORED, after::GROUPED],
        scale: Scale::Medium,
        seed_paper: "gradual-pruning",
        // Three products for each parameter and token; weights, gradients and two moments.
        cost: Cost {
            parameter: 0.0,
            parameter_token: 2e-10,
            parameter_bytes: 20.0,
            token_bytes: 0.0,
            basis: Basis::Reasoned,
        },
    },
    Entry {
        verb: "train",
        name: "initialise",
        family: Family::CompactArchitecture,
        sub: "random weights for wider or narrower layers",
        data: DataNeed::None,
        tuning: Tuning::Free,
        changes: &[Change::Shapes, Change::Values],
        speeds_up: &[Gain::Memory, Gain::Prefill, Gain::Decode],
        kernel: "gemm",
        conflicts: &after::DRAWN_ANEW,
        scale: Scale::Medium,
        seed_paper: "gradual-pruning",
        cost: Cost {
            parameter: 4e-8,
            parameter_token: 0.0,
            parameter_bytes: 8.0,
            token_bytes: 0.0,
            basis: Basis::Reasoned,
        },
    },
];
