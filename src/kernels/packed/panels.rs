//! Aligned memory of panels, and where a code stands in it.

use super::super::quantize::BLOCK;

/// Rows of a panel.
pub(super) const LANES: usize = 16;
/// Bytes of a vector of codes: four columns of each row.
pub(super) const VECTOR: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; VECTOR]);

/// Zeroed bytes, one equal piece a panel, aligned to cache lines, with a line more behind them.
pub(super) struct Panels {
    lines: Vec<Line>,
    bytes: usize,
    each: usize,
}

impl std::fmt::Debug for Panels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} panels of {} bytes", self.bytes / self.each.max(1), self.each)
    }
}

impl Panels {
    pub fn new(count: usize, each: usize) -> Self {
        let bytes = count * each;
        // A line more, so that vectors may be read a little beyond the last scale.
        let lines = vec![Line([0; VECTOR]); bytes.div_ceil(VECTOR) + 1];
        Self { lines, bytes, each }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn panel(&self, panel: usize) -> &[u8] {
        &self.all()[panel * self.each..(panel + 1) * self.each]
    }

    /// Start of a panel; readable for the rest of the allocation.
    pub fn start(&self, panel: usize) -> *const u8 {
        self.all()[panel * self.each..].as_ptr()
    }

    /// The first `bytes` of them, in one piece.
    pub fn all_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        // SAFETY: lines are plain bytes without gaps, and `bytes` of them are in the allocation.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), bytes) }
    }

    pub fn panels_mut(&mut self) -> std::slice::ChunksExactMut<'_, u8> {
        let each = self.each.max(1);
        self.all_mut().chunks_exact_mut(each)
    }

    pub fn all(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes) }
    }
}

/// Bytes that the codes of 32 columns take in a panel.
pub(super) const fn block_bytes(bits: u8) -> usize {
    LANES * BLOCK * bits as usize / 8
}

/// Puts `code` into a panel's block of codes of `bits` bits: lane `lane`, column `column` of the block.
///
/// The low part of a code stands in fields of 4 bits (2 for codes below four bits, 8 for eight): fields
/// of one position make vectors of four columns. What is left of a wider code stands behind, one bit a
/// code (3 and 5 bits) or two (6 bits).
pub(super) fn put(block: &mut [u8], bits: u8, lane: usize, column: usize, code: u8) {
    let place = Place::new(bits, lane, column);
    let (low, shift) = place.low;
    block[low] |= (code & place.low_mask) << shift;
    if let Some((high, shift)) = place.high {
        block[high] |= (code >> place.low_mask.count_ones()) << shift;
    }
}

/// The code that [`put`] wrote.
pub(super) fn get(block: &[u8], bits: u8, lane: usize, column: usize) -> u8 {
    let place = Place::new(bits, lane, column);
    let (low, shift) = place.low;
    let code = (block[low] >> shift) & place.low_mask;
    match place.high {
        None => code,
        Some((high, shift)) => {
            let width = bits - place.low_mask.count_ones() as u8;
            let rest = (block[high] >> shift) & ((1 << width) - 1);
            code | (rest << place.low_mask.count_ones())
        }
    }
}

/// Byte and shift of the parts of a code.
struct Place {
    low: (usize, u32),
    low_mask: u8,
    high: Option<(usize, u32)>,
}

impl Place {
    fn new(bits: u8, lane: usize, column: usize) -> Self {
        let (vector, byte) = (column / 4, 4 * lane + column % 4);
        // Vectors whose fields share the same bytes stand one above the other.
        let fields = |width: usize| {
            let each = 8 / width;
            (vector / each * VECTOR + byte, (vector % each * width) as u32)
        };
        let (low_width, low_mask) = match bits {
            2 | 3 => (2, 3),
            4..=6 => (4, 15),
            _ => (8, 255),
        };
        let behind = block_bytes(low_width as u8);
        let high = match bits {
            3 | 5 => Some((behind + 8 * vector + byte / 8, byte as u32 % 8)),
            6 => {
                let (at, shift) = fields(2);
                Some((behind + at, shift))
            }
            _ => None,
        };
        Self { low: fields(low_width), low_mask, high }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_places_of_their_own() {
        for bits in [2, 3, 4, 5, 6, 8] {
            let top = ((1_u16 << bits) - 1) as u8;
            let code = |lane: usize, column: usize| (lane * 37 + column * 101 + 3) as u8 & top;
            let mut block = vec![0; block_bytes(bits)];
            for lane in 0..LANES {
                for column in 0..BLOCK {
                    put(&mut block, bits, lane, column, code(lane, column));
                }
            }
            for lane in 0..LANES {
                for column in 0..BLOCK {
                    assert_eq!(get(&block, bits, lane, column), code(lane, column), "{bits}");
                }
            }
        }
    }
}
