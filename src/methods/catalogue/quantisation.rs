//! Quantisation: weights take fewer bits.

use super::{Basis, Change, Cost, DataNeed, Entry, Family, Gain, Scale, Tuning, after};

/// Tokens of calibration by default: 32 sequences of 256.
const TOKENS: u64 = 32 * 256;

/// Grids of groups of inputs, which serve from packed panels in integers.
const GRID: Entry = Entry {
    verb: "compress",
    name: "",
    family: Family::Quantisation,
    sub: "weight-only, after training",
    data: DataNeed::Calibration(TOKENS),
    tuning: Tuning::Free,
    changes: &[Change::Values],
    speeds_up: &[Gain::Memory, Gain::Prefill, Gain::Decode],
    kernel: "packed",
    conflicts: &[after::QUANTISED_TWICE, after::FACTORED],
    scale: Scale::Both,
    seed_paper: "baselines-pruning",
    cost: Cost {
        parameter: 1.5e-8,
        parameter_token: 4e-11,
        parameter_bytes: 2.9,
        token_bytes: 4000.0,
        basis: Basis::Measured,
    },
};

pub(super) const ALL: &[Entry] = &[
    Entry {
        name: "round_to_nearest",
        data: DataNeed::None,
        cost: Cost { parameter_token: 0.0, parameter_bytes: 2.0, token_bytes: 0.0, ..GRID.cost },
        ..GRID
    },
    Entry { name: "gptq", ..GRID },
    Entry {
        name: "awq",
        sub: "weight-only, after training, with scales of channels",
        seed_paper: "dgq",
        // A grid of exponents, each with a rounding and a product.
        cost: Cost { parameter_token: 8e-11, basis: Basis::Reasoned, ..GRID.cost },
        ..GRID
    },
    Entry {
        name: "dgq",
        sub: "weights and activations, after training",
        seed_paper: "dgq",
        cost: Cost { parameter: 1e-6, parameter_token: 8e-11, basis: Basis::Reasoned, ..GRID.cost },
        ..GRID
    },
    Entry {
        name: "normal_float",
        sub: "weight-only, after training, quantiles of a normal distribution",
        data: DataNeed::None,
        speeds_up: &[Gain::Memory],
        kernel: "",
        seed_paper: "int2-1",
        cost: Cost { parameter_token: 0.0, token_bytes: 0.0, basis: Basis::Reasoned, ..GRID.cost },
        ..GRID
    },
    Entry {
        name: "lrec",
        sub: "weight-only, with a correction that is distilled",
        data: DataNeed::Train(TOKENS + 512 * 128),
        tuning: Tuning::Light,
        changes: &[Change::Values, Change::Graph],
        seed_paper: "int2-1",
        // Forward, backward, and the teacher's forward.
        cost: Cost {
            parameter_token: 1.3e-10,
            parameter_bytes: 12.0,
            token_bytes: 4000.0,
            basis: Basis::Reasoned,
            ..GRID.cost
        },
        ..GRID
    },
];
