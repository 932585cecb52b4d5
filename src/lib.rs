//! Planish makes models smaller, faster and more specialised, proves what that cost, and serves the
//! result over gRPC. `ARCHITECTURE.md` walks through the modules.

pub mod bench;
pub mod calibrate;
pub mod cli;
pub mod code;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod formats;
pub mod jobs;
pub mod kernels;
pub mod machine;
pub mod methods;
pub mod models;
pub mod nn;
pub mod progress;
pub mod proto;
pub mod recipe;
pub mod seed;
pub mod serve;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod train;
