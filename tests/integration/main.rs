//! The service as its users meet it: a real server in this process, driven over the network by the
//! generated client and by the command line. One binary, so that it is linked once; a module for each
//! journey.

mod adaptation;
mod adapters;
mod api;
mod bench;
mod cli;
mod clients;
mod contract;
mod correction;
mod datasets;
mod embedding;
mod exports;
mod families;
mod harness;
mod inference;
mod invariants;
mod journey;
mod layers;
mod nola;
mod residency;
mod rules;
mod security;
mod soak;
mod structured;
mod support;
mod telemetry;
mod texts;
mod training;
mod tuned;
mod tuning;
mod tunings;
