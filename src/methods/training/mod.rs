//! Training from scratch and pruning while training.
//!
//! Three steps share one way: a model's tensors become the loop's parameters ([`net`]), its data sets become
//! records ([`data`]), [`crate::train::run`] trains, and what came out is stored as it was before, or sparse where
//! a mask left zeros ([`run`]). They differ in what they do besides: [`initialise`] only draws weights,
//! [`train`] keeps the zeros that a sparse layout has, [`gradual`] makes more of them ([`pruner`]).

mod data;
pub mod gradual;
pub mod initialise;
mod lstm;
pub mod masked_run;
pub mod masks;
mod net;
pub mod pruner;
mod run;
pub mod schedule;
mod scope;
pub mod train;
mod two_tower;
mod vision;

#[cfg(test)]
mod tests;
