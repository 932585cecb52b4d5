//! Numeric options that several methods share.

use crate::error::{Error, Result};

/// Default dampening.
pub const DAMP: f64 = 0.01;
/// Default number of columns decided together.
pub const BLOCK: u32 = 128;

/// Dampening as a share of the mean diagonal, in (0, 1].
pub fn damp(value: Option<f64>) -> Result<f64> {
    let value = value.unwrap_or(DAMP);
    if value > 0.0 && value <= 1.0 {
        return Ok(value);
    }
    Err(Error::option("damp", format!("{value} is outside (0, 1]; {DAMP} is usual")))
}

/// Columns decided together, 1 to 65536.
pub fn block(value: Option<u32>) -> Result<usize> {
    let value = value.unwrap_or(BLOCK);
    if (1..=65536).contains(&value) {
        return Ok(value as usize);
    }
    Err(Error::option("block_size", format!("{value} is outside 1 to 65536; {BLOCK} is usual")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for bad in [0.0, -0.1, 1.1, f64::NAN] {
            assert_eq!(damp(Some(bad)).unwrap_err().violations()[0].field, "damp");
        }
        assert_eq!(damp(None).expect("default"), DAMP);
        for bad in [0, 65537] {
            assert_eq!(block(Some(bad)).unwrap_err().violations()[0].field, "block_size");
        }
    }
}
