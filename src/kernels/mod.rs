//! CPU kernels with runtime dispatch. The only room with `unsafe`.
//!
//! A layout's kernel is one function, [`dot::Rows::decode`], written once over the vectors of
//! [`simd::Simd`]; reading rows, products with few tokens and products with many are made from it.

pub mod activation;
pub mod attention;
pub mod bidirectional;
pub mod cast;
pub mod dot;
pub mod gemm;
pub mod ggml;
pub mod grouped;
mod multiversion;
pub mod norm;
pub mod product;
pub mod rope;
pub mod simd;
pub mod softmax;
pub mod sparse;
pub mod threads;
