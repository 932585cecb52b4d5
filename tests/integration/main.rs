//! The service as its users meet it: a real server in this process, driven over the network by the
//! generated client and by the command line. One binary, so that it is linked once; a module for each
//! journey.

mod api;
mod cli;
mod clients;
mod contract;
mod embedding;
mod harness;
mod journey;
mod layers;
mod security;
mod support;
mod telemetry;
