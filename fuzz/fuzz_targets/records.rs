#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use planish::data::records::{Kind, Layout, Records, Source, check};

const NAMES: [&str; 8] =
    ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.conllu", "a.parquet", "a.jsonl.gz"];

// The kind, the format, the file.
fuzz_target!(|data: &[u8]| {
    let [kind, format, file @ ..] = data else { return };
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.write_all(file).unwrap();
    let source = Source {
        path: on_disk.path().to_owned(),
        file_name: NAMES[usize::from(*format) % NAMES.len()].to_owned(),
        kind: Kind::ALL[usize::from(*kind) % Kind::ALL.len()],
        layout: Layout { skip_unusable: format & 128 != 0, ..Layout::default() },
        max_bytes: 1 << 20,
    };
    // What was checked can be read, as often as it was counted.
    if let Ok(checked) = check(&source) {
        let source = Source { layout: checked.layout, ..source };
        let records = Records::open(&source).unwrap().map(|record| record.unwrap());
        assert_eq!(records.count() as u64, checked.records);
    }
});
