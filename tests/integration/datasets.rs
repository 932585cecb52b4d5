//! Data sets of every kind as users bring them in: by the command, against a real server, from small
//! samples and, where they are at hand, from published sets, which must also become tokens.

use std::path::{Path, PathBuf};

use planish::data::records::{Checked, Columns, Kind, Layout, Record, Records, Source, check};
use planish::data::sequence::Target;
use planish::data::tokenise::{
    Form, Options, Overlong, TagPieces, Tokeniser, tokenise, tokenise_pairs,
};
use planish::data::tokenizer::Tokenizer;
use planish::models::import;
use planish::progress::Progress;
use planish::proto::v1;
use serde_json::json;
use tonic::Code;

use crate::cli::Service as Program;
use crate::harness::{Service, assert_error, import_dataset};
use crate::{embedding, support};

fn program() -> (tempfile::TempDir, Program) {
    let folder = tempfile::tempdir().unwrap();
    let service = Program::start(&folder.path().join("data"), &[]);
    (folder, service)
}

#[test]
fn every_kind_comes_in_through_the_command() {
    let (folder, service) = program();
    let at = folder.path().display();
    for (file, text, flags, expected) in [
        (
            "reviews.tsv",
            "fine film\t1\nawful\t0\nnice\t1\n",
            "--kind classification",
            json!({"kind": "DATASET_KIND_CLASSIFICATION", "record_count": "3", "label_count": 2, "layout": {
                "text_column": "1", "label_column": "2", "has_header": false, "labels": ["0", "1"]}}),
        ),
        (
            "news.jsonl",
            "{\"label\":1,\"title\":\"t\",\"text\":\"x\"}\n{\"label\":0,\"title\":\"u\",\"text\":\"y\"}\n",
            "--kind classification --text-column title --labels world,sports,business",
            json!({"kind": "DATASET_KIND_CLASSIFICATION", "record_count": "2", "label_count": 3, "layout": {
                "text_column": "title", "label_column": "label", "labels": ["world", "sports", "business"]}}),
        ),
        (
            "scores.csv",
            "text,score\n\"a, b\",0.5\nc,1\n",
            "--kind regression",
            json!({"kind": "DATASET_KIND_REGRESSION", "record_count": "2", "layout": {
                "text_column": "text", "label_column": "score", "has_header": true}}),
        ),
        (
            "names.txt",
            "Ada B-PER\nslept O\n\nOslo B-LOC\n",
            "--kind tagging",
            json!({"kind": "DATASET_KIND_TAGGING", "record_count": "2", "label_count": 3, "layout": {
                "text_column": "1", "label_column": "2", "labels": ["B-PER", "O", "B-LOC"]}}),
        ),
        (
            "chat.jsonl",
            "{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":\"a\"}]}\n",
            "--kind chat",
            json!({"kind": "DATASET_KIND_CHAT", "record_count": "1", "layout": {"messages_column": "messages"}}),
        ),
        (
            "tasks.json",
            "[{\"intent\": \"add\", \"snippet\": \"a + b\"}, {\"intent\": \"none\", \"snippet\": \"\"}]",
            "--kind chat --prompt-column intent --answer-column snippet --skip-unusable",
            json!({"kind": "DATASET_KIND_CHAT", "record_count": "1", "skipped_count": "1", "layout": {
                "prompt_column": "intent", "answer_column": "snippet", "skip_unusable": true}}),
        ),
        (
            "pairs.jsonl",
            "{\"prompt\":\"q\",\"chosen\":\"good\",\"rejected\":\"bad\"}\n",
            "--kind preferences",
            json!({"kind": "DATASET_KIND_PREFERENCES", "record_count": "1", "layout": {
                "prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"}}),
        ),
        (
            "table.csv",
            "id,content\n1,one\n2,two\n",
            "",
            json!({"kind": "DATASET_KIND_TEXT", "record_count": "2", "layout": {
                "text_column": "content", "has_header": true}}),
        ),
    ] {
        std::fs::write(folder.path().join(file), text).unwrap();
        let found = service.json(&format!("datasets import {at}/{file} {flags}"));
        for (field, value) in expected.as_object().unwrap() {
            assert_eq!(found.get(field), Some(value), "{file}: {found}");
        }
        let name = found["name"].as_str().unwrap().trim_start_matches("datasets/");
        assert_eq!(service.json(&format!("datasets show {name}")), found);
    }
    let shown = service.run("datasets show news");
    for part in ["classification", "text = title, label = label", "3: world, sports, business"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // Lists leave the names of classes out, which can be many.
    let list = service.json("datasets list");
    let news = list["datasets"].as_array().unwrap().iter().find(|d| d["name"] == "datasets/news");
    let news = news.unwrap();
    assert_eq!((news["label_count"].as_i64(), news["layout"].get("labels")), (Some(3), None));
    assert!(service.run("datasets list").contains("preferences"));
}

#[test]
fn what_cannot_be_read_is_refused_with_its_line() {
    let (folder, service) = program();
    let at = folder.path().display();
    for (file, text, flags, parts) in [
        (
            "a.jsonl",
            "{\"text\":\"a\",\"label\":1}\n{\"text\":\"b\"}\n",
            "--kind classification",
            &["a.jsonl: line 2: there is no 'label'"][..],
        ),
        (
            "a.csv",
            "text,label\na,b\nc\n",
            "--kind classification",
            &["a.csv: line 3: the number of values is 1"],
        ),
        (
            "a.tsv",
            "who\twhat\na\tb\n",
            "--kind classification",
            &["header.layout.header", "who, what"],
        ),
        ("b.jsonl", "{\"a\":\"b\"}\n", "--kind chat", &["header.layout.answer_column"]),
        (
            "c.jsonl",
            "{\"a\":\"b\"}\n",
            "--kind chat --text-column a",
            &["header.layout.text_column"],
        ),
        (
            "d.jsonl",
            "{\"question\":\"q\",\"answer\":\" \"}\n",
            "--kind chat",
            &["line 1: 'answer' is blank", "skip_unusable", "DATASET_UNSUITABLE"],
        ),
        ("e.conll", "a O\nb\n", "--kind tagging", &["line 2: the number of columns is 1"]),
        ("f.parquet", "PAR1", "--kind chat", &["parquet", "MALFORMED_FILE"]),
    ] {
        std::fs::write(folder.path().join(file), text).unwrap();
        // What is well formed but of no use is no mistake of the format.
        let code = if file == "d.jsonl" { 1 } else { 65 };
        let error =
            service.fail(code, &format!("datasets import {at}/{file} {flags} --id refused"));
        for part in parts {
            assert!(error.contains(part), "{file}: {error}");
        }
    }
    assert_eq!(service.json("datasets list"), json!({ "datasets": [] }));
    // A data set of another kind is no text to measure on.
    support::tiny_model(folder.path(), 1, 32);
    service.run(&format!("models import {at}/tiny"));
    std::fs::write(folder.path().join("n.csv"), "text,label\na,x\nb,y\n").unwrap();
    service.run(&format!("datasets import {at}/n.csv --kind classification"));
    let error = service.fail(1, "evaluate --model tiny --dataset n --context 64");
    assert!(error.contains("holds classification, but text"), "{error}");
}

#[tokio::test]
async fn the_same_request_is_the_same_layout() {
    let service = Service::start().await;
    let text = "a,b,x\nc,d,y\n";
    let header = |text_column: &str| v1::DatasetHeader {
        dataset_id: "d".into(),
        kind: v1::DatasetKind::Classification.into(),
        file_name: "a.csv".into(),
        size_bytes: text.len() as i64,
        request_id: "once".into(),
        layout: Some(v1::DatasetLayout {
            text_column: text_column.into(),
            label_column: "3".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let chunks = [text.as_bytes()];
    let import = |header| import_dataset(service.datasets(), header, &chunks);
    let first = import(header("1")).await.unwrap();
    assert_eq!(first.layout.as_ref().unwrap().has_header, Some(false));
    assert_eq!(import(header("1")).await.unwrap(), first);
    let other = import(header("2")).await;
    assert_error(other, Code::AlreadyExists, "REQUEST_ID_REUSED", "");
    let mut many = header("1");
    let labels = (0..10_001).map(|i| i.to_string()).collect();
    many.layout = Some(v1::DatasetLayout { labels, ..Default::default() });
    let field = "header.layout.labels[10000]";
    assert_error(import(many).await, Code::InvalidArgument, "INVALID_FIELD", field);
    service.running.stop().await.unwrap();
}

/// A published set: its file, how it is imported, and what must come of it.
struct Published {
    file: &'static str,
    kind: Kind,
    flags: &'static str,
    records: u64,
    skipped: u64,
    labels: usize,
}

const fn published(file: &'static str, kind: Kind, flags: &'static str, records: u64) -> Published {
    Published { file, kind, flags, records, skipped: 0, labels: 0 }
}

const fn labelled(set: Published, labels: usize) -> Published {
    Published { labels, ..set }
}

const fn skipping(set: Published, skipped: u64) -> Published {
    Published { skipped, ..set }
}

use Kind::{Chat, Classification, Preferences, Tagging};

/// The counts are those that the sets' sources state, less what is left out.
const PUBLISHED: &[Published] = &[
    labelled(published("sst2/train.tsv", Classification, "", 6920), 2),
    labelled(published("sst2/dev.tsv", Classification, "", 872), 2),
    labelled(published("sst2/test.tsv", Classification, "", 1821), 2),
    labelled(published("financial-phrasebank/sentences.tsv", Classification, "", 4846), 3),
    labelled(
        published(
            "ag-news/train.jsonl.gz",
            Classification,
            "--labels World,Sports,Business,Sci/Tech",
            6652,
        ),
        4,
    ),
    labelled(published("ag-news/test.jsonl", Classification, "", 948), 4),
    labelled(
        published("trec-questions/train.tsv", Classification, "--label-column coarse", 5452),
        6,
    ),
    labelled(published("trec-questions/test.tsv", Classification, "--label-column coarse", 500), 6),
    labelled(
        skipping(
            published(
                "goemotions/dev.jsonl.gz",
                Classification,
                "--label-column fine --skip-unusable",
                4548,
            ),
            878,
        ),
        28,
    ),
    labelled(published("conll2003/train.txt.gz", Tagging, "", 14_041), 9),
    labelled(published("conll2003/dev.txt", Tagging, "", 3250), 9),
    labelled(published("conll2003/test.txt", Tagging, "", 3453), 9),
    labelled(published("crossner/ai/train.txt", Tagging, "", 100), 29),
    labelled(published("crossner/science/test.txt", Tagging, "", 543), 35),
    labelled(published("masakhaner/hau/train.txt", Tagging, "", 1912), 9),
    labelled(published("masakhaner/swa/test.txt", Tagging, "", 604), 9),
    labelled(published("ud/en_ewt-train-sixth.conllu.gz", Tagging, "", 2091), 17),
    labelled(published("ud/en_ewt-dev.conllu.gz", Tagging, "", 2001), 17),
    labelled(published("ud/fi_pud-test.conllu.gz", Tagging, "", 1000), 15),
    labelled(published("ud/de_pud-test.conllu.gz", Tagging, "", 1000), 16),
    published("gsm8k/train.jsonl.gz", Chat, "", 7473),
    published("gsm8k/test.jsonl", Chat, "", 1319),
    published("instructions/alpaca_en.jsonl", Chat, "", 999),
    published("instructions/simple_en.jsonl", Chat, "", 1100),
    published("instructions/seed_tasks.jsonl", Chat, "", 175),
    published("conala/train.json", Chat, "--prompt-column intent --answer-column snippet", 2378),
    published("conala/test.json", Chat, "--prompt-column intent --answer-column snippet", 500),
    published("preferences/dpo_en.jsonl.gz", Preferences, "", 300),
    skipping(published("preferences/hh_harmless.jsonl.gz", Preferences, "--skip-unusable", 998), 2),
    skipping(
        published("preferences/polite_rewrites.jsonl", Preferences, "--skip-unusable", 1094),
        6,
    ),
];

#[test]
fn published_sets_are_imported_and_become_tokens() {
    // The data sets do not belong to the repository; where they are, they must be readable.
    let data = std::env::var_os("PLANISH_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
        PathBuf::from,
    );
    if !data.join("sst2").is_dir() {
        eprintln!("{} is not there; set PLANISH_DATA to read it", data.display());
        return;
    }
    let decoder = support::byte_tokenizer();
    let encoder = import::open_any(&embedding::minilm()).unwrap().encoder().unwrap();
    let encoder = encoder.tokenizer.as_deref().unwrap();
    let (_folder, service) = program();
    for set in PUBLISHED {
        let file = data.join(set.file);
        let name = set.file.replace(['/', '.', '_'], "-").to_lowercase();
        let kind = set.kind.name();
        let flags = format!("--kind {kind} --id {name} {}", set.flags);
        let found = service.json(&format!("datasets import {} {flags}", file.display()));
        assert_eq!(found["record_count"], set.records.to_string(), "{found}");
        let skipped = found.get("skipped_count").map_or("0", |count| count.as_str().unwrap());
        assert_eq!(skipped, set.skipped.to_string(), "{found}");
        let labels = found.get("label_count").map_or(0, |count| count.as_u64().unwrap());
        assert_eq!(labels, set.labels as u64, "{found}");
        let source = Source {
            file_name: file.file_name().unwrap().to_str().unwrap().to_owned(),
            path: file,
            kind: set.kind,
            layout: layout(&found["layout"]),
            max_bytes: 1 << 30,
        };
        tokens(&source, set, &decoder, encoder);
    }
}

/// The layout that the service found, as the library takes it.
fn layout(found: &serde_json::Value) -> Layout {
    let text = |field: &str| found.get(field).and_then(|name| name.as_str()).map(str::to_owned);
    let labels = found.get("labels").and_then(|list| list.as_array().cloned()).unwrap_or_default();
    Layout {
        columns: Columns {
            text: text("text_column"),
            label: text("label_column"),
            prompt: text("prompt_column"),
            input: text("input_column"),
            answer: text("answer_column"),
            system: text("system_column"),
            messages: text("messages_column"),
            chosen: text("chosen_column"),
            rejected: text("rejected_column"),
            second: text("second_text_column"),
        },
        header: found.get("has_header").and_then(serde_json::Value::as_bool),
        labels: labels.iter().map(|label| label.as_str().unwrap().to_owned()).collect(),
        templates: Vec::new(),
        skip_unusable: found.get("skip_unusable").is_some(),
        skip_records: None,
        max_records: None,
    }
}

fn tokens(source: &Source, set: &Published, decoder: &Tokenizer, encoder: &Tokenizer) {
    let Checked { layout, records, skipped } = check(source).unwrap();
    assert_eq!(
        (&layout, records, skipped),
        (&source.layout, set.records, set.skipped),
        "{}",
        set.file
    );
    let reads = matches!(set.kind, Classification | Tagging);
    let options = Options {
        form: if reads { Form::Encoder } else { Form::Decoder },
        max_length: if reads { 128 } else { 1 << 16 },
        overlong: Overlong::Cut,
        lowercase: reads,
        tag_pieces: TagPieces::First,
        max_tokens: 1 << 30,
    };
    let tokenizer = if reads { encoder } else { decoder };
    let records = || Records::open(source).unwrap();
    let tokeniser = Tokeniser::new(tokenizer, options).unwrap();
    let silent = Progress::silent();
    if set.kind == Preferences {
        let (pairs, report) = tokenise_pairs(records(), tokeniser, &silent).unwrap();
        assert_eq!((pairs.len() as u64, report.dropped), (set.records, 0), "{}", set.file);
        for (pair, record) in pairs.iter().zip(records()) {
            let (line, Record::Preference(preference)) = record.unwrap() else { panic!() };
            for (side, rest) in
                [(&pair.chosen, preference.chosen), (&pair.rejected, preference.rejected)]
            {
                assert_eq!(side.line, line);
                let said: Vec<_> = rest.iter().filter(|m| m.role == "assistant").collect();
                assert_eq!(
                    learned(decoder, &side.tokens, &side.target),
                    said.iter().map(|m| m.content.as_str()).collect::<String>()
                );
            }
        }
        return;
    }
    let (sequences, report) = tokenise(records(), tokeniser, &silent).unwrap();
    assert_eq!((sequences.len() as u64, report.dropped), (set.records, 0), "{}", set.file);
    for (sequence, record) in sequences.iter().zip(records()) {
        let (line, record) = record.unwrap();
        assert_eq!(sequence.line, line);
        match (record, &sequence.target) {
            (Record::Chat(messages), target) => {
                let said = messages.iter().filter(|m| m.role == "assistant");
                let said: String = said.map(|m| m.content.as_str()).collect();
                assert_eq!(
                    learned(decoder, &sequence.tokens, target),
                    said,
                    "{}: {line}",
                    set.file
                );
            }
            (Record::Class(_, class), Target::Class(found)) => {
                assert_eq!(class, *found);
                assert!(
                    (class as usize) < set.labels && (3..=128).contains(&sequence.tokens.len())
                );
            }
            (Record::Tagged(words, tags), Target::Tags(found)) => {
                let found: Vec<u32> = found.iter().flatten().copied().collect();
                // Sentences of more than 126 pieces are cut.
                assert!(tags.starts_with(&found), "{}: {line}", set.file);
                assert!(found.len() == words.len() || sequence.tokens.len() > 100);
            }
            (record, target) => panic!("{record:?} became {target:?}"),
        }
    }
}

/// The text of the tokens that are learned.
fn learned(tokenizer: &Tokenizer, tokens: &[u32], target: &Target) -> String {
    let Target::Next(wanted) = target else { panic!("{target:?}") };
    let learned = tokens.iter().zip(wanted).filter(|(_, wanted)| **wanted);
    tokenizer.decode(&learned.map(|(token, _)| *token).collect::<Vec<_>>(), false).unwrap()
}
