//! Little-endian bit streams: field `i` of `bits <= 8` bits stands at bit `i * bits`.

/// Bytes of `count` fields.
pub(super) fn stream_bytes(count: usize, bits: usize) -> usize {
    // Written so that it cannot overflow for counts of things that fit into memory.
    count / 8 * bits + (count % 8 * bits).div_ceil(8)
}

/// Appends fields, padded with zero bits to a byte. Fields must not exceed `bits`.
pub(super) fn put(fields: impl IntoIterator<Item = u8>, bits: usize, out: &mut Vec<u8>) {
    let (mut pending, mut have) = (0_u32, 0);
    for field in fields {
        debug_assert!(usize::from(field) < 1 << bits);
        pending |= u32::from(field) << have;
        have += bits;
        while have >= 8 {
            out.push(pending as u8);
            pending >>= 8;
            have -= 8;
        }
    }
    if have > 0 {
        out.push(pending as u8);
    }
}

/// Field `i` of a stream that holds it.
pub(super) fn get(stream: &[u8], i: usize, bits: usize) -> u8 {
    let (first, shift) = (i * bits / 8, i * bits % 8);
    let next = if shift + bits > 8 { stream[first + 1] } else { 0 };
    let both = u16::from(stream[first]) | u16::from(next) << 8;
    (both >> shift) as u8 & (0xff_u16 >> (8 - bits)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_bit_fields_cross_bytes() {
        let mut out = Vec::new();
        put([1, 2, 7, 4], 3, &mut out);
        // 1 | 2 << 3 | 7 << 6 | 4 << 9 = 0x9d1
        assert_eq!(out, [0xd1, 0x09]);
        assert_eq!([0, 1, 2, 3].map(|i| get(&out, i, 3)), [1, 2, 7, 4]);
    }

    #[test]
    fn what_is_put_is_got() {
        for bits in 1..=8 {
            for count in [0, 1, 7, 8, 9, 33] {
                let fields: Vec<u8> = (0..count)
                    .map(|i| (i * 89 + 3) as u8 & (0xff_u16 >> (8 - bits)) as u8)
                    .collect();
                let mut out = Vec::new();
                put(fields.iter().copied(), bits, &mut out);
                assert_eq!(out.len(), stream_bytes(count, bits));
                assert_eq!((0..count).map(|i| get(&out, i, bits)).collect::<Vec<_>>(), fields);
            }
        }
    }
}
