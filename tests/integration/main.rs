//! The one integration binary: a module for each journey.

mod cli;
mod clients;
mod contract;
mod layers;
mod support;
