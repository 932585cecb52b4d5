//! Low rank: a matrix becomes a product of two narrow ones.

use super::{Basis, Change, Cost, DataNeed, Entry, Family, Gain, Scale, Tuning, after};

pub(super) const ALL: &[Entry] = &[Entry {
    verb: "compress",
    name: "low_rank",
    family: Family::LowRank,
    sub: "truncated decompositions ordered by the inputs",
    data: DataNeed::Calibration(32 * 256),
    tuning: Tuning::Free,
    changes: &[Change::Values, Change::Graph],
    speeds_up: &[Gain::Memory, Gain::Prefill, Gain::Decode],
    kernel: "gemm",
    conflicts: &[after::QUANTISED, after::FACTORED],
    scale: Scale::Both,
    seed_paper: "corda",
    // A decomposition takes some twenty products with the shorter side of each matrix.
    cost: Cost {
        parameter: 5e-7,
        parameter_token: 4e-11,
        parameter_bytes: 6.0,
        token_bytes: 4000.0,
        basis: Basis::Reasoned,
    },
}];
