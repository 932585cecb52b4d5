//! As much of Thrift's compact protocol as is needed to look at a file before the crate trusts it.

/// Structures within structures.
const MAX_DEPTH: usize = 32;

/// Reads bytes; every function gives `None` where they end too early or break the rules.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
}

/// Types of a field's value, as their numbers in the protocol.
pub const LIST: u8 = 9;
pub const STRUCT: u8 = 12;

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, depth: 0 }
    }

    /// Bytes read so far.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Reads a structure; `field` gets the number and the type of each field, and reads its value or
    /// gives false to have it stepped over.
    pub fn structure(
        &mut self,
        mut field: impl FnMut(&mut Self, i64, u8) -> Option<bool>,
    ) -> Option<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let mut id = 0i64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                break;
            }
            let (delta, kind) = (head >> 4, head & 15);
            id = match delta {
                0 => self.integer()?,
                delta => id.checked_add(delta.into())?,
            };
            if !field(self, id, kind)? {
                self.skip(kind)?;
            }
        }
        self.depth -= 1;
        Some(())
    }

    /// Reads the head of a list: the type of its elements and their number.
    pub fn list(&mut self) -> Option<(u8, usize)> {
        let head = self.byte()?;
        let size = match head >> 4 {
            15 => usize::try_from(self.varint()?).ok()?,
            size => size.into(),
        };
        // An element has a byte at least.
        (size <= self.bytes.len() - self.at).then_some((head & 15, size))
    }

    /// Reads an integer of any width.
    pub fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    }

    fn skip(&mut self, kind: u8) -> Option<()> {
        match kind {
            // Booleans are in the head of a field.
            1 | 2 => Some(()),
            3..=6 => self.scalar(kind),
            7 | 8 => self.scalar(kind),
            LIST | 10 => {
                let (kind, size) = self.list()?;
                (0..size).try_for_each(|_| self.element(kind))
            }
            11 => {
                let size = self.varint()?;
                if size == 0 {
                    return Some(());
                }
                let kinds = self.byte()?;
                (0..size).try_for_each(|_| {
                    self.element(kinds >> 4)?;
                    self.element(kinds & 15)
                })
            }
            STRUCT => self.structure(|_, _, _| Some(false)),
            _ => None,
        }
    }

    fn scalar(&mut self, kind: u8) -> Option<()> {
        match kind {
            3 => self.step(1),
            4..=6 => self.varint().map(drop),
            7 => self.step(8),
            _ => {
                let length = usize::try_from(self.varint()?).ok()?;
                self.step(length)
            }
        }
    }

    /// Steps over an element of a list or map; booleans have a byte there.
    fn element(&mut self, kind: u8) -> Option<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        match kind {
            1 | 2 => self.step(1)?,
            kind => self.skip(kind)?,
        }
        self.depth -= 1;
        Some(())
    }

    fn step(&mut self, bytes: usize) -> Option<()> {
        self.at = self.at.checked_add(bytes).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure with field 1 an integer of 150, 3 a text, 4 a list of two structures, 5 a true.
    const BYTES: &[u8] =
        &[0x15, 0xAC, 0x02, 0x28, 2, b'h', b'i', 0x19, 0x2C, 0x15, 1, 0, 0x15, 2, 0, 0x11, 0];

    #[test]
    fn fields_are_read_or_stepped_over() {
        let mut found = None;
        let mut reader = Reader::new(BYTES);
        let mut seen = Vec::new();
        let read = reader.structure(|reader, id, kind| {
            seen.push((id, kind));
            if id == 1 {
                found = Some(reader.integer()?);
            }
            Some(id == 1)
        });
        assert_eq!(read, Some(()));
        assert_eq!((found, reader.at()), (Some(150), BYTES.len()));
        assert_eq!(seen, [(1, 5), (3, 8), (4, LIST), (5, 1)]);
    }

    #[test]
    fn whatever_is_cut_or_too_deep_is_refused() {
        for end in 0..BYTES.len() {
            assert_eq!(Reader::new(&BYTES[..end]).structure(|_, _, _| Some(false)), None, "{end}");
        }
        let deep = [0x1C; 1000];
        assert_eq!(Reader::new(&deep).structure(|_, _, _| Some(false)), None);
        // Lists of lists, and a list that claims more than there is.
        let deep = [[0x19].as_slice(), &[0x19; 1000]].concat();
        assert_eq!(Reader::new(&deep).structure(|_, _, _| Some(false)), None);
        assert_eq!(Reader::new(&[0xF3, 0xFF, 0xFF, 3, 0]).list(), None);
        assert_eq!(Reader::new(&[0xFF; 11]).integer(), None);
        assert_eq!(Reader::new(&[3]).integer(), Some(-2));
    }
}
