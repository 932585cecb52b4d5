//! Text data sets: reading documents, joining them, cutting token windows.

use std::path::Path;

use crate::error::Result;

/// Reads the documents of a text file: `.txt` is one document, `.jsonl` has one `text` field a line,
/// either may end in `.gz`. `max_bytes` bounds the unpacked size. Errors name the line.
pub fn read_documents(_path: &Path, _file_name: &str, _max_bytes: u64) -> Result<Vec<String>> {
    todo!()
}

/// Documents joined by a blank line, the form in which text is tokenised for evaluation and calibration.
pub fn join(_documents: &[String]) -> String {
    todo!()
}

/// Consecutive windows of exactly `length` tokens, `stride` apart; a shorter rest is dropped.
pub fn windows(_tokens: &[u32], _length: usize, _stride: usize) -> Vec<&[u32]> {
    todo!()
}
