//! Options that are one of several names.

/// The value of an enum's number, with 0 standing for the first choice; an error names the option.
macro_rules! choice {
    ($kind:ident, $name:literal, $value:expr, $default:ident) => {
        match $kind::try_from($value) {
            Ok($kind::Unspecified) => Ok($kind::$default),
            Ok(value) => Ok(value),
            Err(_) => Err($crate::error::Error::option(
                $name,
                format!("{} is no number of {}", $value, stringify!($kind)),
            )),
        }
    };
}
pub(super) use choice;
