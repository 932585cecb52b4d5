//! f32 slices as little-endian bytes and back, without copying where alignment allows.

use bytes::Bytes;

#[cfg(target_endian = "big")]
compile_error!("stored tensors are little-endian and read in place");

/// The bytes as f32 elements, or `None` if they are misaligned or not a whole number of elements.
pub fn f32s(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is a valid f32; `align_to` keeps alignment and bounds.
    let (head, body, tail) = unsafe { bytes.align_to::<f32>() };
    (head.is_empty() && tail.is_empty()).then_some(body)
}

/// Owns f32 elements and shows them as bytes, so that the bytes stay aligned for f32.
struct Owner(Vec<f32>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: f32 has no padding and u8 no alignment; the length is that of the vector in bytes.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(&self.0[..])) }
    }
}

/// The elements as bytes that [`f32s`] can read back in place.
pub fn to_bytes(values: Vec<f32>) -> Bytes {
    Bytes::from_owner(Owner(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_back_in_place_and_misaligned_bytes_are_refused() {
        let bytes = to_bytes(vec![1.0, -2.0, 3.5]);
        assert_eq!(bytes.len(), 12);
        assert_eq!(f32s(&bytes), Some(&[1.0, -2.0, 3.5][..]));
        assert_eq!(f32s(&bytes[4..]), Some(&[-2.0, 3.5][..]));
        assert!(f32s(&bytes[1..9]).is_none());
        assert!(f32s(&bytes[..10]).is_none());
    }
}
