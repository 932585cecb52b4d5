//! Multiple-choice data sets: questions, each with its choices and which of them is right.

use std::fmt;
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

use super::text::{parse_lines, read_bytes, utf8};
use crate::error::{Error, Reason, Result};

/// Choices of a question: as many as there are letters to name them.
const MIN_CHOICES: usize = 2;
const MAX_CHOICES: usize = 26;
/// Bytes of a question.
const MAX_QUESTION: usize = 64 << 10;
/// Bytes of a choice.
const MAX_CHOICE: usize = 8 << 10;

/// What a line must be.
const SHAPE: &str = "an object with a string 'question', 2 to 26 strings 'choices', and 'answer', the \
                     index from 0 or the text of the right one";

/// A question with its choices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub question: String,
    /// 2 to 26 texts, at least two of them different.
    pub choices: Vec<String>,
    /// Index of the right choice; of the first one where several have its text.
    pub answer: usize,
}

/// Reads `.jsonl` (or `.jsonl.gz`): one object a line with `question` (a string), `choices` (2 to 26
/// strings) and `answer` (the index of the right choice from 0, or its text exactly). Other fields are
/// left alone. `max_bytes` bounds the unpacked size. `file_name` is the name the file came with, which
/// tells its kind. The same choice may stand twice (published sets have such questions): both are the
/// same answer then.
///
/// # Errors
/// `UNSUPPORTED_FORMAT` for other names, `TOO_LARGE` beyond `max_bytes`, `MALFORMED_FILE` with the
/// line or the byte for what cannot be read, `DATASET_UNSUITABLE` when there is no question.
pub fn read_items(path: &Path, file_name: &str, max_bytes: u64) -> Result<Vec<Item>> {
    let name = file_name.to_ascii_lowercase();
    let (stem, packed) = match name.strip_suffix(".gz") {
        Some(stem) => (stem, true),
        None => (name.as_str(), false),
    };
    if !stem.ends_with(".jsonl") {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!(
                "{file_name}: the name ends in neither .jsonl nor .jsonl.gz; rename or convert the file"
            ),
        ));
    }
    let items = || {
        let text = utf8(read_bytes(path, packed, max_bytes)?)?;
        parse_lines::<Line>(&text, SHAPE)
            .map(|line| {
                let (number, line) = line?;
                line.check().map_err(|what| {
                    Error::new(Reason::MalformedFile, format!("line {number}: {what}"))
                })
            })
            .collect::<Result<Vec<Item>>>()
    };
    let items = items().map_err(|error| error.within(file_name))?;
    if items.is_empty() {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!("{file_name}: there is no question in it; choose another file"),
        ));
    }
    Ok(items)
}

#[derive(serde::Deserialize)]
struct Line {
    question: String,
    choices: Choices,
    answer: Answer,
}

impl Line {
    /// The item, or what is wrong with it.
    fn check(self) -> Result<Item, String> {
        let (question, Choices(choices)) = (self.question, self.choices);
        if question.trim().is_empty() {
            return Err("the question is blank; write one or remove the line".into());
        }
        if question.len() > MAX_QUESTION {
            return Err(format!(
                "the question has {} bytes, more than {MAX_QUESTION}; shorten it",
                question.len()
            ));
        }
        if choices.len() < MIN_CHOICES {
            return Err(format!(
                "the number of choices is {}; give {MIN_CHOICES} to {MAX_CHOICES}",
                choices.len()
            ));
        }
        for (i, choice) in choices.iter().enumerate() {
            if choice.trim().is_empty() {
                return Err(format!("choice {i} is blank; write it or remove it"));
            }
            if choice.len() > MAX_CHOICE {
                return Err(format!(
                    "choice {i} has {} bytes, more than {MAX_CHOICE}; shorten it",
                    choice.len()
                ));
            }
        }
        if choices.iter().all(|choice| *choice == choices[0]) {
            return Err("all choices are the same; give at least two different ones".into());
        }
        let right = match &self.answer {
            Answer::Index(index) => {
                let chosen = usize::try_from(*index).ok().and_then(|i| choices.get(i));
                chosen.ok_or_else(|| {
                    format!(
                        "the answer is {index}, but the last choice is {}; count from 0",
                        choices.len() - 1
                    )
                })?
            }
            Answer::Text(text) => text,
        };
        let answer = choices.iter().position(|choice| choice == right).ok_or(
            "the answer is none of the choices; repeat one of them exactly or give its index from 0",
        )?;
        Ok(Item { question, choices, answer })
    }
}

/// At most [`MAX_CHOICES`] strings: a longer list is refused before it fills the memory.
struct Choices(Vec<String>);

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;

        impl<'de> Visitor<'de> for List {
            type Value = Choices;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of {MIN_CHOICES} to {MAX_CHOICES} strings")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Choices, A::Error> {
                let mut choices = Vec::new();
                while let Some(choice) = list.next_element()? {
                    if choices.len() == MAX_CHOICES {
                        return Err(de::Error::custom(format!("more than {MAX_CHOICES} choices")));
                    }
                    choices.push(choice);
                }
                Ok(Choices(choices))
            }
        }

        deserializer.deserialize_seq(List)
    }
}

/// The right choice as a line names it.
enum Answer {
    Index(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for Answer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = Answer;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an index from 0 or the text of a choice")
            }

            fn visit_u64<E: de::Error>(self, index: u64) -> Result<Answer, E> {
                Ok(Answer::Index(index))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Answer, E> {
                Ok(Answer::Text(text.to_owned()))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn read(name: &str, bytes: &[u8], max: u64) -> Result<Vec<Item>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read_items(file.path(), name, max)
    }

    fn refusal(text: &str) -> (Reason, String) {
        let error = read("a.jsonl", text.as_bytes(), 1 << 24).unwrap_err();
        assert!(error.message().starts_with("a.jsonl: "), "{error}");
        assert!(error.message().len() < 600, "{error}");
        (error.reason(), error.message().to_owned())
    }

    fn item(question: &str, choices: &[&str], answer: usize) -> Item {
        let choices = choices.iter().map(|c| (*c).to_owned()).collect();
        Item { question: question.into(), choices, answer }
    }

    #[test]
    fn answers_are_indices_or_texts() {
        let text = "\u{FEFF}{\"question\":\"q\",\"choices\":[\"a\",\"b\"],\"answer\":1,\"id\":[{}]}\r\n\n\
                    {\"answer\":\"1\",\"choices\":[\"0\",\"1\",\"2\"],\"question\":\"r\"}";
        let expected = [item("q", &["a", "b"], 1), item("r", &["0", "1", "2"], 1)];
        assert_eq!(read("A.JSONL", text.as_bytes(), 999).unwrap(), expected);
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(text.as_bytes()).unwrap();
        let packed = packed.finish().unwrap();
        assert_eq!(read("a.jsonl.gz", &packed, 999).unwrap(), expected);
        let error = read("a.jsonl.gz", &packed, 20).unwrap_err();
        assert_eq!(error.reason(), Reason::TooLarge);
        let error = read("a.jsonl.gz", &packed[..packed.len() - 9], 999).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile);
    }

    #[test]
    fn a_choice_that_stands_twice_is_one_answer() {
        let text = r#"{"question":"q","choices":["x","a","b","a"],"answer":3}
                      {"question":"q","choices":["x","a","b","a"],"answer":"a"}"#;
        let items = read("a.jsonl", text.as_bytes(), 999).unwrap();
        assert_eq!((items[0].answer, items[1].answer), (1, 1));
    }

    #[test]
    fn bad_lines_are_named_with_the_remedy() {
        let many = format!("[{}\"z\"]", "\"y\",".repeat(26));
        let long = format!("[\"{}\",\"b\"]", "x".repeat(MAX_CHOICE + 1));
        let deep = "[".repeat(100_000);
        let listed = format!("[[{}\"z\"]]", "\"y\",".repeat(1 << 18));
        for (choices, answer, part) in [
            ("[]", "0", "the number of choices is 0; give 2 to 26"),
            ("[\"a\"]", "0", "the number of choices is 1"),
            (many.as_str(), "0", "more than 26 choices"),
            (listed.as_str(), "0", "expected a string"),
            ("[\"a\",\"a\"]", "0", "all choices are the same"),
            ("[\"a\",\" \\n\\u00a0\"]", "0", "choice 1 is blank"),
            (long.as_str(), "0", "choice 0 has 8193 bytes, more than 8192"),
            ("[\"a\",3]", "0", "invalid type: integer `3`, expected a string"),
            ("{\"a\":1}", "0", "expected a list of 2 to 26 strings"),
            ("null", "0", "expected a list of 2 to 26 strings"),
            ("[\"a\",\"b\"]", "2", "the answer is 2, but the last choice is 1; count from 0"),
            ("[\"a\",\"b\"]", "18446744073709551615", "the answer is 18446744073709551615"),
            ("[\"a\",\"b\"]", "18446744073709551616", "expected an index from 0 or the text"),
            ("[\"a\",\"b\"]", "-1", "integer `-1`, expected an index from 0"),
            ("[\"a\",\"b\"]", "1.0", "floating point `1.0`, expected an index"),
            ("[\"a\",\"b\"]", "1e400", "number out of range"),
            ("[\"a\",\"b\"]", "NaN", "expected value"),
            ("[\"a\",\"b\"]", "true", "expected an index"),
            ("[\"a\",\"b\"]", "null", "expected an index"),
            ("[\"a\",\"b\"]", "{\"a\":1}", "expected an index"),
            ("[\"a\",\"b\"]", "\"A\"", "the answer is none of the choices"),
            ("[\"a\",\"b\"]", "\"\"", "the answer is none of the choices"),
            (deep.as_str(), "0", "expected a string"),
            ("[\"a\",\"b\"]", deep.as_str(), "expected an index"),
        ] {
            let good = r#"{"question":"q","choices":["a","b"],"answer":0}"#;
            let line = format!("{{\"question\":\"q\",\"choices\":{choices},\"answer\":{answer}}}");
            let (reason, message) = refusal(&format!("{good}\n\n{line}\n"));
            assert_eq!(reason, Reason::MalformedFile);
            assert!(message.contains("line 3") && message.contains(part), "{message}");
        }
    }

    #[test]
    fn bad_files_are_refused() {
        let long = format!(r#"{{"question":"{}"#, "x".repeat(MAX_QUESTION + 1));
        let string = format!("\"{}\"", "x".repeat(1 << 20));
        let unknown = format!("{{\"x\":{}", "[".repeat(1 << 20));
        for (line, part) in [
            (r#"{"choices":["a","b"],"answer":0}"#, "missing field `question`"),
            (r#"{"question":"q","answer":0}"#, "missing field `choices`"),
            (r#"{"question":"q","choices":["a","b"]}"#, "missing field `answer`"),
            (r#"{"question":"q","question":"q"}"#, "duplicate field `question`"),
            (r#"{"question":["q"],"choices":["a","b"],"answer":0}"#, "column 12: invalid type"),
            (r#"{"question":"\t ","choices":["a","b"],"answer":0}"#, "the question is blank"),
            (&format!(r#"{long}","choices":["a","b"],"answer":0}}"#), "has 65537 bytes"),
            (r#"{"question":"q","choices":["a","b"],"answer":0} x"#, "trailing characters"),
            ("[[[", "invalid type"),
            (&string, "invalid type"),
            (&unknown, "EOF"),
            ("question,choices", "expected value"),
        ] {
            let (reason, message) = refusal(line);
            assert_eq!(reason, Reason::MalformedFile);
            assert!(message.contains("line 1") && message.contains(part), "{message}");
        }
        let (_, message) = refusal("{}");
        assert!(message.ends_with("the right one"), "{message}");
        assert_eq!(refusal("").0, Reason::DatasetUnsuitable);
        assert_eq!(refusal(" \n\n").0, Reason::DatasetUnsuitable);
        for name in ["a.txt", "a.json", "jsonl", "a.jsonl.zip", "a.gz", ""] {
            assert_eq!(read(name, b"{}", 9).unwrap_err().reason(), Reason::UnsupportedFormat);
        }
        let error = read("a.jsonl", b"{\"question\":\"caf\xE9\"}", 99).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile);
        assert!(error.message().contains("byte 16 is not utf-8"), "{error}");
        assert_eq!(read("a.jsonl", b"{}\n{}", 4).unwrap_err().reason(), Reason::TooLarge);
        let missing = read_items(Path::new("/nowhere/a.jsonl"), "a.jsonl", 9).unwrap_err();
        assert_eq!(missing.reason(), Reason::SourceUnavailable);
    }

    #[test]
    fn commonsense_qa_is_read() {
        // The data sets do not belong to the repository; where they are, this one must be readable.
        let folder = std::env::var_os("PLANISH_DATA").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
            Into::into,
        );
        let path = folder.join("commonsense-qa/dev.jsonl");
        if !path.exists() {
            eprintln!("{} is not there; set PLANISH_DATA to read it", path.display());
            return;
        }
        let items = read_items(&path, "dev.jsonl", 1 << 20).unwrap();
        assert_eq!(items.len(), 1221);
        assert!(items.iter().all(|item| item.choices.len() == 5));
        assert_eq!((items[0].choices[0].as_str(), items[0].answer), ("bank", 0));
    }
}
