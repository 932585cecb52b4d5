//! Configuration: defaults, then a file, then `PLANISH_*` variables, then flags.
