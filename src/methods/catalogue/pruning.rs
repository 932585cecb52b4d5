//! Pruning: weights or channels go.

use super::{Basis, Change, Conflict, Cost, DataNeed, Entry, Family, Gain, Scale, Tuning, after};

/// Tokens of calibration by default: 32 sequences of 256.
const TOKENS: u64 = 32 * 256;

/// What prunes weights where they stand; zeros need no text to be stored.
const SPARSE: Entry = Entry {
    verb: "compress",
    name: "",
    family: Family::Pruning,
    sub: "unstructured or n:m",
    data: DataNeed::Calibration(TOKENS),
    tuning: Tuning::Free,
    changes: &[Change::Values],
    speeds_up: &[Gain::Memory, Gain::Decode],
    kernel: "expand",
    conflicts: &[after::QUANTISED, after::FACTORED],
    scale: Scale::Both,
    seed_paper: "baselines-pruning",
    cost: Cost {
        parameter: 1.7e-8,
        parameter_token: 2.3e-11,
        parameter_bytes: 3.0,
        token_bytes: 4000.0,
        basis: Basis::Measured,
    },
};

/// What removes channels of feed-forward networks.
const NARROW: Entry = Entry {
    sub: "structured, width of feed-forward networks",
    changes: &[Change::Shapes],
    speeds_up: &[Gain::Memory, Gain::Prefill, Gain::Decode],
    kernel: "gemm",
    seed_paper: "cfsp",
    cost: Cost {
        parameter: 2e-8,
        parameter_token: 3e-11,
        parameter_bytes: 6.0,
        token_bytes: 5000.0,
        basis: Basis::Reasoned,
    },
    ..SPARSE
};

/// What exchanges pruned weights for kept ones.
const EXCHANGING: [Conflict; 10] = [
    after::QUANTISED,
    after::FACTORED,
    after::exchanges("magnitude"),
    after::exchanges("random_pruning"),
    after::exchanges("wanda"),
    after::exchanges("sparsegpt"),
    after::exchanges("dsnot"),
    after::exchanges("ecoflap"),
    after::exchanges("gradual"),
    after::exchanges("group_sparse"),
];

pub(super) const ALL: &[Entry] = &[
    Entry {
        name: "magnitude",
        data: DataNeed::None,
        cost: Cost { parameter_token: 0.0, parameter_bytes: 2.4, token_bytes: 0.0, ..SPARSE.cost },
        ..SPARSE
    },
    Entry {
        name: "random_pruning",
        data: DataNeed::None,
        // Magnitude, and a number drawn for each weight.
        cost: Cost {
            parameter_token: 0.0,
            parameter_bytes: 2.4,
            token_bytes: 0.0,
            basis: Basis::Reasoned,
            ..SPARSE.cost
        },
        ..SPARSE
    },
    Entry { name: "wanda", ..SPARSE },
    Entry {
        name: "sparsegpt",
        cost: Cost { parameter_token: 4.4e-11, parameter_bytes: 3.4, ..SPARSE.cost },
        ..SPARSE
    },
    Entry {
        name: "dsnot",
        sub: "unstructured or n:m, masks refined",
        conflicts: &EXCHANGING,
        seed_paper: "dsnot",
        // Wanda, and exchanges that take about as long as a pass.
        cost: Cost { parameter_token: 4e-11, basis: Basis::Reasoned, ..SPARSE.cost },
        ..SPARSE
    },
    Entry {
        name: "ecoflap",
        sub: "unstructured, a share for each block",
        data: DataNeed::Calibration(TOKENS + ECOFLAP_TOKENS),
        seed_paper: "ecoflap",
        // Wanda, and two passes of its own text for each block.
        cost: Cost {
            parameter_token: 2e-10,
            parameter_bytes: 5.0,
            basis: Basis::Reasoned,
            ..SPARSE.cost
        },
        ..SPARSE
    },
    Entry {
        name: "gradual",
        verb: "train",
        conflicts: &[after::QUANTISED, after::FACTORED, after::GROUPED],
        sub: "unstructured, n:m or blocks, while training",
        data: DataNeed::Train(0),
        tuning: Tuning::Full,
        scale: Scale::Medium,
        seed_paper: "gradual-pruning",
        cost: Cost {
            parameter: 0.0,
            parameter_token: 2e-10,
            parameter_bytes: 20.0,
            token_bytes: 0.0,
            basis: Basis::Reasoned,
        },
        ..SPARSE
    },
    Entry {
        name: "mag_sp",
        data: DataNeed::None,
        cost: Cost { parameter_token: 0.0, token_bytes: 0.0, ..NARROW.cost },
        ..NARROW
    },
    Entry {
        name: "group_sparse",
        sub: "inputs of groups of outputs",
        kernel: "row_groups",
        data: DataNeed::None,
        seed_paper: "sparsebytenn",
        cost: Cost {
            parameter_token: 0.0,
            token_bytes: 0.0,
            basis: Basis::Reasoned,
            ..SPARSE.cost
        },
        ..SPARSE
    },
    Entry { name: "wanda_sp", ..NARROW },
    Entry { name: "flap", changes: &[Change::Shapes, Change::Values], ..NARROW },
    Entry {
        name: "cfsp",
        sub: "structured, width of feed-forward networks, a share for each block",
        ..NARROW
    },
];

/// Tokens that the scores of ECoFLaP see by default.
const ECOFLAP_TOKENS: u64 = 16 * 128;
