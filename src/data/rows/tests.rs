use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use super::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Reads `bytes` as a file of this name.
fn read_up_to(name: &str, bytes: &[u8], header: bool, max: u64) -> Result<Vec<Row>> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let format = Format::of(name, name.contains("tag"))?;
    let mut rows = open(file.path(), format, header, max)?;
    let read = rows.by_ref().collect::<Result<Vec<_>>>();
    assert!(rows.next().is_none(), "something follows the end or an error");
    read
}

fn read(name: &str, bytes: impl AsRef<[u8]>) -> Result<Vec<Row>> {
    read_up_to(name, bytes.as_ref(), true, 1 << 20)
}

fn refusal(name: &str, bytes: impl AsRef<[u8]>) -> (Reason, String) {
    let error = read(name, bytes).unwrap_err();
    assert!(error.message().len() < 500, "{error}");
    (error.reason(), error.message().to_owned())
}

fn rows(rows: &[(u64, Value)]) -> Vec<Row> {
    let fields = |value: &Value| value.as_object().unwrap().clone();
    rows.iter().map(|(line, value)| Row { line: *line, fields: fields(value) }).collect()
}

#[test]
fn the_same_rows_come_from_every_format_of_tables() {
    let expected = [json!({"text": "a,\"b", "label": "x"}), json!({"text": "ü", "label": "y"})];
    let at = |lines: [u64; 2]| rows(&lines.into_iter().zip(expected.clone()).collect::<Vec<_>>());
    let lines =
        "\u{FEFF}{\"text\":\"a,\\\"b\",\"label\":\"x\"}\r\n\n {\"text\":\"ü\",\"label\":\"y\"}";
    assert_eq!(read("A.JSONL", lines).unwrap(), at([1, 3]));
    assert_eq!(read("a.jsonl.gz", gzip(lines.as_bytes())).unwrap(), at([1, 3]));
    let array =
        "[\n{\"text\":\"a,\\\"b\",\n\"label\":\"x\"},\n\n{\"text\":\"ü\",\"label\":\"y\"}]\n";
    assert_eq!(read("a.json", array).unwrap(), at([2, 5]));
    let csv = "\u{FEFF}text, label\n\"a,\"\"b\",x\r\nü,y";
    assert_eq!(read("a.csv", csv).unwrap(), at([2, 3]));
    // Between tabs a quote is a character.
    assert_eq!(read("a.tsv", "text\tlabel\na,\"b\tx\nü\ty\n").unwrap(), at([2, 3]));
}

#[test]
fn columns_without_names_are_called_by_their_places() {
    let expected = rows(&[(1, json!({"1": "a", "2": "b"})), (2, json!({"1": "c", "2": ""}))]);
    assert_eq!(read_up_to("a.csv", b"a,b\nc,\n", false, 99).unwrap(), expected);
    let expected = rows(&[(2, json!({"a": "c", "2": "d"}))]);
    assert_eq!(read("a.csv", "a,\nc,d\n").unwrap(), expected);
    // Blank lines are left out, and counted, however lines end.
    let expected = rows(&[(2, json!({"1": "a", "2": "b"})), (5, json!({"1": "c", "2": "d"}))]);
    assert_eq!(
        read_up_to("a.csv", b"\r\na,\"b\"\r\n\r\n\r\nc,d\r\n", false, 99).unwrap(),
        expected
    );
    // A record over several lines begins at its first; the next one is counted on.
    let expected = rows(&[(1, json!({"1": "a\nb"})), (3, json!({"1": "c"}))]);
    assert_eq!(read_up_to("a.csv", b"\"a\nb\"\nc", false, 99).unwrap(), expected);
}

#[test]
fn sentences_are_columns_of_words() {
    let text = "-DOCSTART- O\n\nBob B-PER\nran O\r\n\n\n# O\nthere O\n";
    let expected = rows(&[
        (3, json!({"1": ["Bob", "ran"], "2": ["B-PER", "O"]})),
        (7, json!({"1": ["#", "there"], "2": ["O", "O"]})),
    ]);
    assert_eq!(read("a.conll", text).unwrap(), expected);
    assert_eq!(read("tag.txt", text).unwrap(), expected);
    // With tabs a word may hold spaces; a no-break space is no separator either way.
    let tabs = read("tag.tsv", "New York\tB\n\u{a0}\tO").unwrap();
    assert_eq!(tabs[0].fields["1"], json!(["New York", "\u{a0}"]));
    let line =
        |id: &str, form: &str, tag: &str| format!("{id}\t{form}\t_\t{tag}{}\n", "\t_".repeat(6));
    let text = ["# text = au", &line("1-2", "au", "_"), &line("1", "à", "ADP")].join("\n");
    let text = text.replace("\n\n", "\n") + &line("2", "le", "DET") + &line("2.1", "x", "X");
    let sentence = &read("a.conllu", &text).unwrap()[0];
    assert_eq!((sentence.line, &sentence.fields["form"]), (3, &json!(["à", "le"])));
    assert_eq!(sentence.fields["upos"], json!(["ADP", "DET"]));
    assert_eq!(sentence.fields.len(), 10);
}

#[test]
fn parquet_of_another_writer_is_read() {
    let read = read("a.parquet", include_bytes!("parquet/samples/snappy.parquet")).unwrap();
    let say = |role: &str, content: &str| json!({"role": role, "content": content});
    let expected = rows(&[
        (
            1,
            json!({"text": "one", "label": 0, "score": 0.5, "tokens": ["a", "b"], "tags": [1, 0],
            "messages": [say("user", "hi"), say("assistant", "ho")], "good": true}),
        ),
        (
            2,
            json!({"text": "zwei ä", "label": 1, "score": -2.0, "tokens": [], "tags": [],
            "messages": [say("user", "x"), say("assistant", "y")], "good": false, "blob": "ab"}),
        ),
        (
            3,
            json!({"text": null, "label": 0, "score": 1000.0, "tokens": ["c"], "tags": [2],
            "messages": [], "good": null, "blob": "\0"}),
        ),
    ]);
    assert_eq!(read, expected);
    let read = super::tests::read("a.parquet", include_bytes!("parquet/samples/gzip.parquet"));
    assert_eq!(read.unwrap()[1].fields["text"], "zwei ä");
    let (reason, message) = refusal("a.parquet", include_bytes!("parquet/samples/zstd.parquet"));
    assert_eq!(reason, Reason::UnsupportedFormat);
    assert!(message.contains("snappy"), "{message}");
}

#[test]
fn damaged_parquet_is_refused_and_never_takes_the_thread_down() {
    let whole = include_bytes!("parquet/samples/snappy.parquet");
    for end in (0..whole.len()).step_by(37) {
        let (reason, _) = refusal("a.parquet", &whole[..end]);
        assert_eq!(reason, Reason::MalformedFile, "cut at {end}");
    }
    let whole = include_bytes!("parquet/samples/gzip.parquet");
    let mut refused = 0;
    for at in 4..whole.len() {
        for bits in [0x01, 0x80, 0xFF] {
            let mut bytes = whole.to_vec();
            bytes[at] ^= bits;
            // Some bytes are free (statistics, names of writers); the others must be refused as such.
            if let Err(error) = read("a.parquet", &bytes) {
                let known = [Reason::MalformedFile, Reason::TooLarge, Reason::UnsupportedFormat];
                assert!(known.contains(&error.reason()), "byte {at}: {error}");
                refused += 1;
            }
        }
    }
    assert!(refused > whole.len(), "{refused}");
    let whole = include_bytes!("parquet/samples/snappy.parquet");
    assert_eq!(read_up_to("a.parquet", whole, true, 60).unwrap_err().reason(), Reason::TooLarge);
    for bytes in [&b""[..], b"PAR1", b"PAR1\xFF\xFF\xFF\x7FPAR1", b"PAR1\0\0\0\0PAR1"] {
        assert_eq!(refusal("a.parquet", bytes).0, Reason::MalformedFile);
    }
}

#[test]
fn a_schema_that_nests_without_end_is_refused_before_it_is_followed() {
    // Field 2 of the footer: a list of structures, each with one child (field 5) but the last.
    let nodes = 5000u32;
    let mut footer = vec![0x15, 2, 0x19, 0xFC];
    footer.extend([(nodes & 127) as u8 | 128, (nodes >> 7) as u8]);
    for _ in 1..nodes {
        footer.extend([0x55, 2, 0]);
    }
    footer.extend([0, 0]);
    for claimed in [&footer[..], &[0x15, 2, 0x19, 0x1C, 0x55, 0xFE, 0xFF, 0xFF, 0xFF, 0x0F, 0, 0]] {
        let mut bytes = b"PAR1".to_vec();
        bytes.extend_from_slice(claimed);
        bytes.extend((claimed.len() as u32).to_le_bytes());
        bytes.extend(b"PAR1");
        let (reason, message) = refusal("a.parquet", &bytes);
        assert_eq!(reason, Reason::MalformedFile);
        assert!(message.contains("schema"), "{message}");
    }
}

#[test]
fn errors_say_where() {
    let many = format!(
        "{{{}\"z\":0}}",
        (0..MAX_FIELDS).map(|i| format!("\"{i}\":0,")).collect::<String>()
    );
    let wide = "x,".repeat(MAX_FIELDS) + "x\n";
    let deep = "{\"a\":".to_owned() + &"[".repeat(100_000);
    for (name, text, part) in [
        ("a.jsonl", "{}\n{\"a\":}", "line 2, column 6: expected value"),
        ("a.jsonl", "[1]", "line 1, column "),
        ("a.jsonl", "{\"a\":1} x", "line 1, column 9: trailing characters"),
        ("a.jsonl", &deep, "recursion limit"),
        ("a.jsonl", &many, "line 1: 1001 fields are more than 1000"),
        ("a.json", "{\"a\":1}", "line 1: there is no '['"),
        ("a.json", "", "line 1: there is no '['"),
        ("a.json", "[", "line 1: the array has no end"),
        ("a.json", "[{},\n{}", "line 2: neither ',' nor ']'"),
        ("a.json", "[{}\n,{\"a\":\n1,}]", "line 3"),
        ("a.json", "[{},]", "line 1, column 1: "),
        ("a.json", "[{}]\n[]", "line 2: something follows the array"),
        ("a.json", "[1]", "line 1, column 1: invalid type"),
        ("a.json", &format!("[{deep}"), "recursion limit"),
        ("a.csv", "a,b\nc,d\ne\n", "line 3: the number of values is 1, but 2"),
        ("a.csv", "a,a\n", "line 1: two columns are called 'a'"),
        ("a.csv", &wide, "line 1: more than 1000 values"),
        ("a.conll", "a B\nb\n", "line 2: the number of columns is 1, but 2"),
        ("a.conllu", "1\ta\n", "line 1: the number of columns is 2, but 10"),
    ] {
        let (reason, message) = refusal(name, text);
        assert_eq!(reason, Reason::MalformedFile, "{message}");
        assert!(message.contains(part), "{name}: {message} lacks {part}");
    }
    for name in ["a.jsonl", "a.csv", "a.tsv", "a.conll", "a.json"] {
        let (reason, message) = refusal(name, b"[{\"a\":\n\"caf\xE9\"}]");
        assert_eq!(reason, Reason::MalformedFile, "{name}");
        assert!(name == "a.jsonl" || message.contains("not utf-8"), "{name}: {message}");
    }
    for name in ["a.doc", "jsonl", "a.jsonl.zip", "a.gz", "", "a.parquet.gz", "a"] {
        assert_eq!(Format::of(name, true).unwrap_err().reason(), Reason::UnsupportedFormat);
    }
    let text = Format::of("a.txt", false).unwrap();
    let error = open(Path::new("/nowhere"), text, true, 9).map(|_| ()).unwrap_err();
    assert_eq!(error.reason(), Reason::UnsupportedFormat);
}

#[test]
fn sizes_are_bounded() {
    // A record that never ends, in each format, packed so that it is small as it comes.
    let long = "x".repeat(MAX_ROW_BYTES + (4 << 20));
    for (name, text) in [
        ("a.jsonl.gz", format!("{{\"a\":\"{long}\"}}")),
        ("a.json.gz", format!("[{{\"a\":\"{long}\"}}]")),
        ("a.csv.gz", format!("a\n\"{long}\"")),
        ("a.tsv.gz", format!("a\n{long}")),
        ("a.conll.gz", format!("{long} O\n")),
        ("tag.txt.gz", "x O\n".repeat(MAX_ROW_BYTES / 2)),
    ] {
        let error = read_up_to(name, &gzip(text.as_bytes()), true, 1 << 30).unwrap_err();
        assert_eq!(error.reason(), Reason::TooLarge, "{name}: {error}");
    }
    for name in ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.conllu.gz"] {
        let error = read_up_to(name, &gzip(&vec![b'\n'; 1 << 20]), true, 1000).unwrap_err();
        assert_eq!(error.reason(), Reason::TooLarge, "{name}: {error}");
        let whole = gzip(b"[{\"a\":\"some text that is long enough to be cut\"}]");
        assert_eq!(refusal(name, &whole[..whole.len() - 9]).0, Reason::MalformedFile, "{name}");
        assert_eq!(refusal(name, b"no gzip").0, Reason::MalformedFile, "{name}");
    }
}
