//! Messages and services generated from `proto/`.

#![allow(clippy::all, clippy::pedantic, missing_docs)]

/// Serialized descriptors of every file in `proto/`, with comments.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/planish.descriptors.bin"));

pub mod google {
    pub mod longrunning {
        include!(concat!(env!("OUT_DIR"), "/google.longrunning.rs"));
        include!(concat!(env!("OUT_DIR"), "/google.longrunning.serde.rs"));
    }
    pub mod rpc {
        include!(concat!(env!("OUT_DIR"), "/google.rpc.rs"));
        include!(concat!(env!("OUT_DIR"), "/google.rpc.serde.rs"));
    }
}

/// The Open Inference Protocol.
pub mod inference {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

pub mod planish {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/planish.v1.rs"));
        include!(concat!(env!("OUT_DIR"), "/planish.v1.serde.rs"));
    }
}

pub use planish::v1;
