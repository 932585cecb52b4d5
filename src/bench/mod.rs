//! Measuring from inside: speeds of a model and of its kernels, beside what the machine can do at most,
//! and the plan of a load on a server. `docs/performance.md` says how to read the numbers.
//!
//! Everything here computes with the threads that the program computes with, [`threads`].

pub mod attention;
pub mod cost;
pub mod embed;
pub mod images;
pub mod kernels;
pub mod layouts;
pub mod limits;
pub mod load;
pub mod model;
pub mod row_groups;
pub mod stats;
pub mod train;
pub mod wire;

use serde::Serialize;

use crate::machine;

/// Number of threads that products are shared over.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Computes with this many threads from now on. `false` when the process computes with another number
/// already, which cannot be changed.
pub fn set_threads(threads: usize) -> bool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().is_ok()
        || rayon::current_num_threads() == threads
}

/// Where something was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    pub processor: String,
    pub instructions: &'static str,
    pub system: String,
    pub threads: usize,
    /// Version of the program.
    pub version: &'static str,
}

impl Machine {
    pub fn here() -> Self {
        Self {
            processor: machine::processor(),
            instructions: machine::instructions(),
            system: machine::system(),
            threads: threads(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}
