//! Text data sets: reading documents, joining them, cutting token windows.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Reason, Result};

/// Characters of the parser's words that an error repeats.
const MAX_WHAT: usize = 200;

/// Reads the documents of a text file: `.txt` is one document, `.jsonl` has one `text` field a line,
/// either may end in `.gz`. `max_bytes` bounds the unpacked size. `file_name` is the name the file
/// came with, which tells its kind. Documents without text are left out.
///
/// # Errors
/// `UNSUPPORTED_FORMAT` for other names, `TOO_LARGE` beyond `max_bytes`, `MALFORMED_FILE` with the
/// line or the byte for what cannot be read, `DATASET_UNSUITABLE` when no text is left.
pub fn read_documents(path: &Path, file_name: &str, max_bytes: u64) -> Result<Vec<String>> {
    let name = file_name.to_ascii_lowercase();
    let (stem, packed) = match name.strip_suffix(".gz") {
        Some(stem) => (stem, true),
        None => (name.as_str(), false),
    };
    let lines = match stem.rsplit_once('.') {
        Some((_, "txt")) => false,
        Some((_, "jsonl")) => true,
        _ => {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "{file_name}: the name ends in none of .txt, .jsonl, .txt.gz, .jsonl.gz; rename or \
                     convert the file"
                ),
            ));
        }
    };
    let bytes = read_bytes(path, packed, max_bytes).map_err(|error| error.within(file_name))?;
    let text = utf8(bytes).map_err(|error| error.within(file_name))?;
    let documents = if lines {
        parse_lines(&text, "an object with a string 'text'")
            .map(|line| line.map(|(_, Line { text })| text))
            .collect()
    } else {
        Ok(vec![text])
    };
    let mut documents = documents.map_err(|error| error.within(file_name))?;
    documents.retain(|document| !document.trim().is_empty());
    if documents.is_empty() {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!("{file_name}: there is no text in it; choose another file"),
        ));
    }
    Ok(documents)
}

/// Documents joined by a blank line, the form in which text is tokenised for evaluation and calibration.
pub fn join(documents: &[String]) -> String {
    documents.join("\n\n")
}

/// Consecutive windows of exactly `length` tokens, `stride` apart; a shorter rest is dropped. Without
/// a length or a stride there are none.
pub fn windows(tokens: &[u32], length: usize, stride: usize) -> Vec<&[u32]> {
    if length == 0 || stride == 0 {
        return Vec::new();
    }
    tokens.windows(length).step_by(stride).collect()
}

pub(super) fn read_bytes(path: &Path, packed: bool, max_bytes: u64) -> Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    // One more than allowed, to tell "all of it" from "more than that".
    let limit = max_bytes.saturating_add(1);
    let read = if packed {
        MultiGzDecoder::new(io::BufReader::new(file)).take(limit).read_to_end(&mut bytes)
    } else {
        file.take(limit).read_to_end(&mut bytes)
    };
    read.map_err(|error| {
        let damaged = matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof
        );
        if packed && damaged {
            Error::new(
                Reason::MalformedFile,
                format!("the gzip data is damaged: {error}; pack the file again"),
            )
        } else {
            error.into()
        }
    })?;
    if bytes.len() as u64 > max_bytes {
        return Err(Error::new(
            Reason::TooLarge,
            format!("more than {max_bytes} bytes of text; split the file or raise the limit"),
        ));
    }
    Ok(bytes)
}

/// The text without its byte order mark.
pub(super) fn utf8(bytes: Vec<u8>) -> Result<String> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        Error::new(
            Reason::MalformedFile,
            format!("byte {offset} is not utf-8; convert the file to utf-8"),
        )
    })?;
    if text.starts_with('\u{FEFF}') {
        text.drain(..'\u{FEFF}'.len_utf8());
    }
    Ok(text)
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

/// The lines that are not blank, with their numbers from 1; `shape` says what each must be.
pub(super) fn parse_lines<T: DeserializeOwned>(
    text: &str,
    shape: &str,
) -> impl Iterator<Item = Result<(usize, T)>> {
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered.map(move |(index, line)| match serde_json::from_str(line) {
        Ok(value) => Ok((index + 1, value)),
        Err(error) => {
            // The parser counts lines too, but sees only this one; it may repeat a long string.
            let what = error.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            let what: String = what.chars().take(MAX_WHAT).collect();
            Err(Error::new(
                Reason::MalformedFile,
                format!(
                    "line {}, column {}: {what}; each line must be {shape}",
                    index + 1,
                    error.column()
                ),
            ))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn read(name: &str, bytes: &[u8], max: u64) -> Result<Vec<String>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read_documents(file.path(), name, max)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn all_four_kinds_are_read() {
        assert_eq!(read("a.txt", b"one\n\ntwo\n", 9).unwrap(), ["one\n\ntwo\n"]);
        let lines =
            b"\xEF\xBB\xBF{\"text\":\"one\",\"id\":3}\r\n\n{\"text\":\"\"}\n{\"text\":\"two\"}";
        assert_eq!(read("a.jsonl", lines, 99).unwrap(), ["one", "two"]);
        assert_eq!(read("A.TXT.GZ", &gzip(b"\xEF\xBB\xBFx"), 9).unwrap(), ["x"]);
        let mut twice = gzip(b"{\"text\":\"one\"}\n");
        twice.extend(gzip(b"{\"text\":\"two\"}\n"));
        assert_eq!(read("a.jsonl.gz", &twice, 99).unwrap(), ["one", "two"]);
    }

    #[test]
    fn errors_say_where() {
        let refusal = |name: &str, bytes: &[u8]| {
            let error = read(name, bytes, 100).unwrap_err();
            (error.reason(), error.message().to_owned())
        };
        let (reason, message) = refusal("a.jsonl", b"{\"text\":\"one\"}\n\n{\"text\":3}\n");
        assert_eq!(reason, Reason::MalformedFile);
        assert!(message.starts_with("a.jsonl: line 3, column 9: invalid type"), "{message}");
        let (_, message) = refusal("a.jsonl", b"{\"txt\":\"one\"}");
        assert!(
            message.contains("line 1") && message.contains("missing field `text`"),
            "{message}"
        );
        let (reason, message) = refusal("a.txt", b"caf\xE9");
        assert_eq!(reason, Reason::MalformedFile);
        assert!(message.contains("byte 3 is not utf-8"), "{message}");
        assert_eq!(refusal("a.txt", b" \n").0, Reason::DatasetUnsuitable);
        assert_eq!(refusal("a.jsonl", b"").0, Reason::DatasetUnsuitable);
        assert_eq!(refusal("a.csv", b"x").0, Reason::UnsupportedFormat);
        assert_eq!(refusal("txt", b"x").0, Reason::UnsupportedFormat);
        assert_eq!(refusal("a.txt.gz", b"no gzip").0, Reason::MalformedFile);
        let whole = gzip(b"some text that is long enough to be cut");
        assert_eq!(refusal("a.txt.gz", &whole[..whole.len() - 9]).0, Reason::MalformedFile);
    }

    #[test]
    fn sizes_are_bounded_after_unpacking() {
        assert!(read("a.txt", &[b'x'; 10], 10).is_ok());
        assert_eq!(read("a.txt", &[b'x'; 11], 10).unwrap_err().reason(), Reason::TooLarge);
        let bomb = gzip(&vec![b'x'; 1 << 20]);
        assert!(bomb.len() < 2000);
        assert_eq!(read("a.txt.gz", &bomb, 2000).unwrap_err().reason(), Reason::TooLarge);
    }

    #[test]
    fn windows_are_whole() {
        let tokens = [1, 2, 3, 4, 5];
        assert_eq!(windows(&tokens, 2, 2), [[1, 2], [3, 4]]);
        assert_eq!(windows(&tokens, 3, 1), [[1, 2, 3], [2, 3, 4], [3, 4, 5]]);
        assert_eq!(windows(&tokens, 2, 3), [[1, 2], [4, 5]]);
        assert!(windows(&tokens, 6, 1).is_empty());
        assert!(windows(&tokens, 0, 1).is_empty());
        assert!(windows(&tokens, 1, 0).is_empty());
        assert_eq!(join(&["a".into(), "b".into()]), "a\n\nb");
    }
}
