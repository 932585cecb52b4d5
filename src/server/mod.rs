//! The wire: one file per service; decode, check, convert, call, convert.
