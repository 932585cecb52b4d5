//! CPU kernels with runtime dispatch. The only room with `unsafe`.
//!
//! A layout's kernel is one function, [`dot::Rows::decode`], written once over the vectors of
//! [`simd::Simd`]; reading rows, products with few tokens and products with many are made from it.

pub mod activation;
#[cfg(test)]
pub mod allocations;
pub mod attention;
pub mod bf16;
pub mod bidirectional;
pub mod cast;
pub mod dot;
pub mod dual_grained;
mod expand;
pub mod f32_panels;
pub mod few;
pub mod gemm;
pub mod ggml;
pub mod grouped;
pub mod integer;
pub mod limits;
pub mod lowrank;
pub mod memory;
mod multiversion;
pub mod nf4;
pub mod norm;
pub mod packed;
pub mod philox;
pub mod product;
pub mod quantize;
pub mod rope;
pub mod row_groups;
pub mod simd;
pub mod softmax;
pub mod sparse;
pub mod threads;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub mod training;
