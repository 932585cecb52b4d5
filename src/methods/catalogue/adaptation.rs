//! Adaptation: something is trained beside a model, or a part of it.

use super::{Basis, Change, Cost, DataNeed, Entry, Family, Scale, Tuning};

/// Low-rank adapters of linears: forward, and back through frozen weights.
const ADAPTER: Entry = Entry {
    verb: "adapt",
    name: "",
    family: Family::Adaptation,
    sub: "low-rank adapter",
    data: DataNeed::Train(0),
    tuning: Tuning::Light,
    changes: &[Change::Graph],
    speeds_up: &[],
    kernel: "lowrank",
    conflicts: &[],
    scale: Scale::Both,
    seed_paper: "baselines-adapters",
    cost: Cost {
        parameter: 0.0,
        parameter_token: 1.3e-10,
        parameter_bytes: 4.0,
        token_bytes: 0.0,
        basis: Basis::Reasoned,
    },
};

/// What starts from a decomposition of each weight.
const DECOMPOSED: Cost = Cost { parameter: 5e-7, parameter_bytes: 8.0, ..ADAPTER.cost };

pub(super) const ALL: &[Entry] = &[
    Entry { name: "lora", ..ADAPTER },
    Entry { name: "dora", sub: "low-rank adapter with magnitudes", ..ADAPTER },
    Entry { name: "adalora", sub: "low-rank adapter with ranks that move", ..ADAPTER },
    Entry {
        name: "pissa",
        sub: "low-rank adapter that starts from singular directions",
        cost: DECOMPOSED,
        ..ADAPTER
    },
    Entry {
        name: "lora_xs",
        sub: "square core between frozen singular directions",
        cost: DECOMPOSED,
        ..ADAPTER
    },
    Entry {
        name: "lora_sb",
        sub: "square core between directions of the first update",
        seed_paper: "lora-sb",
        cost: DECOMPOSED,
        ..ADAPTER
    },
    Entry {
        name: "loldu",
        sub: "diagonal of a triangular decomposition",
        seed_paper: "loldu",
        cost: DECOMPOSED,
        ..ADAPTER
    },
    Entry {
        name: "nola",
        sub: "low-rank adapter from random matrices",
        seed_paper: "nola",
        ..ADAPTER
    },
    Entry {
        name: "sora",
        sub: "low-rank adapter with gates that close",
        seed_paper: "sora",
        ..ADAPTER
    },
    Entry {
        name: "corda",
        sub: "low-rank adapter that starts from directions of a text",
        seed_paper: "corda",
        cost: DECOMPOSED,
        ..ADAPTER
    },
    Entry {
        name: "qlora",
        sub: "low-rank adapter of a quantised base",
        seed_paper: "int2-1",
        cost: Cost { parameter_bytes: 2.0, ..ADAPTER.cost },
        ..ADAPTER
    },
    Entry {
        name: "bitfit",
        sub: "biases of the base",
        changes: &[Change::Values],
        kernel: "",
        scale: Scale::Medium,
        ..ADAPTER
    },
    Entry {
        name: "full",
        sub: "all weights",
        tuning: Tuning::Full,
        changes: &[Change::Values],
        kernel: "",
        scale: Scale::Medium,
        cost: Cost { parameter_token: 2e-10, parameter_bytes: 20.0, ..ADAPTER.cost },
        ..ADAPTER
    },
    Entry {
        name: "head_only",
        sub: "a head on frozen states",
        data: DataNeed::Labels,
        kernel: "",
        scale: Scale::Medium,
        // The base runs forward only.
        cost: Cost { parameter_token: 6e-11, ..ADAPTER.cost },
        ..ADAPTER
    },
];
