//! The one integration binary: a module for each journey.

mod contract;
