use std::io::Write;

use super::*;

/// A file with what is asked of it.
struct File {
    file: tempfile::NamedTempFile,
    source: Source,
}

fn file(name: &str, kind: Kind, text: &str) -> File {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let source = Source {
        path: file.path().to_owned(),
        file_name: name.to_owned(),
        kind,
        layout: Layout::default(),
        max_bytes: 1 << 20,
    };
    File { file, source }
}

impl File {
    fn with(mut self, change: impl FnOnce(&mut Layout)) -> Self {
        change(&mut self.source.layout);
        self
    }

    /// Checks the file, then reads it as it was found.
    fn read(&self) -> Result<(Checked, Vec<(u64, Record)>)> {
        assert!(self.file.path().exists());
        let checked = check(&self.source)?;
        let source = Source { layout: checked.layout.clone(), ..self.source.clone() };
        // What was found is a layout that finds itself.
        assert_eq!(check(&source)?, checked);
        let records = Records::open(&source)?.collect::<Result<Vec<_>>>()?;
        assert_eq!(records.len() as u64, checked.records);
        Ok((checked, records))
    }

    fn refusal(&self) -> (Reason, String) {
        let error = check(&self.source).unwrap_err();
        assert!(error.message().len() < 600, "{error}");
        (error.reason(), error.message().to_owned())
    }
}

fn class(text: &str, class: u32) -> Record {
    Record::Class(text.to_owned(), class)
}

fn say(turns: &[(&str, &str)]) -> Vec<Message> {
    turns
        .iter()
        .map(|(role, content)| Message { role: (*role).into(), content: (*content).into() })
        .collect()
}

fn name(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn classes_are_found_in_tables_with_and_without_names() {
    let expected = vec![(2, class("bad", 0)), (3, class("good", 1)), (4, class("worse", 0))];
    let named = file("a.tsv", Kind::Classification, "Sentence\tlabel\nbad\t0\ngood\t1\nworse\t0\n");
    let (checked, records) = named.read().unwrap();
    assert_eq!(records, expected);
    assert_eq!(checked.layout.labels, ["0", "1"]);
    assert_eq!(checked.layout.header, Some(true));
    assert_eq!(checked.layout.columns.text, name("Sentence"));
    // Without names: the label of the first line comes again.
    let bare = file("a.tsv", Kind::Classification, "worse\t0\ngood\t1\nbad\t0\n");
    let (checked, records) = bare.read().unwrap();
    assert_eq!(records[0], (1, class("worse", 0)));
    assert_eq!(checked.layout.header, Some(false));
    // Unusual names are no records: nothing says that they are one.
    let unusual = "thing\tkind\nbad\tno\ngood\tyes\n";
    let (reason, message) = file("a.tsv", Kind::Classification, unusual).refusal();
    assert_eq!(reason, Reason::InvalidField);
    assert!(message.starts_with("header: whether the first line (thing, kind)"), "{message}");
    let asked = |layout: &mut Layout| {
        layout.columns = Columns { text: name("thing"), label: name("2"), ..Columns::default() };
        layout.header = Some(true);
    };
    let (checked, records) =
        file("a.tsv", Kind::Classification, unusual).with(asked).read().unwrap();
    assert_eq!(records, [(2, class("bad", 0)), (3, class("good", 1))]);
    assert_eq!(
        (checked.layout.columns.label, checked.layout.labels),
        (name("kind"), vec!["no".into(), "yes".into()])
    );
    let places = |layout: &mut Layout| {
        layout.columns = Columns { text: name("2"), label: name("1"), ..Columns::default() };
    };
    let (_, records) =
        file("a.csv", Kind::Classification, "x,one,9\ny,two,9\n").with(places).read().unwrap();
    assert_eq!(records, [(1, class("one", 0)), (2, class("two", 1))]);
}

#[test]
fn labels_of_another_data_set_give_their_indices() {
    let text = "{\"text\":\"a\",\"label\":1}\n{\"text\":\"b\",\"label\":\"Sports\"}";
    let names: Vec<String> = ["World", "Sports", "Business"].map(str::to_owned).into();
    let given =
        file("a.jsonl", Kind::Classification, text).with(|layout| layout.labels = names.clone());
    let (checked, records) = given.read().unwrap();
    assert_eq!(records, [(1, class("a", 1)), (2, class("b", 1))]);
    assert_eq!(checked.layout.labels, names);
    let other = file("a.jsonl", Kind::Classification, "{\"text\":\"a\",\"label\":\"Chess\"}");
    let (reason, message) = other.with(|layout| layout.labels = names).refusal();
    assert_eq!(reason, Reason::MalformedFile);
    assert!(
        message.starts_with("a.jsonl: line 1: the label 'Chess' is none of the 3"),
        "{message}"
    );
    let (reason, _) = file("a.jsonl", Kind::Classification, text.lines().next().unwrap()).refusal();
    assert_eq!(reason, Reason::DatasetUnsuitable);
}

#[test]
fn numbers_are_finite() {
    let (_, records) = file("a.csv", Kind::Regression, "a,0.5\nb,-2e3\n").read().unwrap();
    assert_eq!(records[1], (2, Record::Value("b".into(), -2000.0)));
    for (value, reason) in [
        ("\"x\"", Reason::MalformedFile),
        ("1e39", Reason::MalformedFile),
        ("\"nan\"", Reason::MalformedFile),
        ("[1]", Reason::MalformedFile),
        ("null", Reason::DatasetUnsuitable),
        ("\" \"", Reason::DatasetUnsuitable),
    ] {
        let text = format!("{{\"text\":\"a\",\"score\":1}}\n{{\"text\":\"a\",\"score\":{value}}}");
        let (found, message) = file("a.jsonl", Kind::Regression, &text).refusal();
        assert_eq!(found, reason, "{message}");
        assert!(message.starts_with("a.jsonl: line 2: "), "{message}");
    }
}

#[test]
fn sentences_come_from_columns_and_from_lists() {
    let expected = Record::Tagged(vec!["Bob".into(), "ran".into()], vec![1, 0]);
    let conll = file("a.txt", Kind::Tagging, "it O\n\nBob B-PER\nran O\n\n");
    let (checked, records) = conll.read().unwrap();
    assert_eq!(records[1], (3, expected.clone()));
    assert_eq!(checked.layout.labels, ["O", "B-PER"]);
    let lists = "{\"tokens\":[\"Bob\",\"ran\"],\"ner_tags\":[1,0]}";
    let (checked, records) = file("a.jsonl", Kind::Tagging, lists).read().unwrap();
    assert_eq!(records, [(1, expected)]);
    assert_eq!(checked.layout.columns.label, name("ner_tags"));
    // The third of four columns, by its place.
    let four = file("a.conll", Kind::Tagging, "a x P y\nb x Q y\n");
    let four = four.with(|layout| layout.columns.label = name("3"));
    assert_eq!(four.read().unwrap().0.layout.labels, ["P", "Q"]);
    for (line, part) in [
        ("{\"tokens\":[\"a\"],\"tags\":[1,2]}", "1 words have 2 tags"),
        ("{\"tokens\":[1],\"tags\":[1]}", "a word is not a string"),
        ("{\"tokens\":\"a\",\"tags\":[1]}", "'tokens' is not a list"),
        ("{\"tokens\":[],\"tags\":[]}", "'tokens' is an empty list"),
        ("{\"tokens\":[\"a\"],\"tags\":[[1,2]]}", "the number of labels is 2"),
    ] {
        let (_, message) = file("a.jsonl", Kind::Tagging, line).refusal();
        assert!(message.contains("line 1") && message.contains(part), "{message}");
    }
}

#[test]
fn conversations_have_many_forms() {
    let expected = say(&[("system", "s"), ("user", "q"), ("assistant", "a")]);
    for line in [
        r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"a"},{"role":"user","content":"left out"}]}"#,
        r#"{"conversations":[{"from":"system","value":"s"},{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}"#,
        r#"{"system":"s","question":"q","answer":"a"}"#,
    ] {
        let (_, records) = file("a.jsonl", Kind::Chat, line).read().unwrap();
        assert_eq!(records, [(1, Record::Chat(expected.clone()))], "{line}");
    }
    let text = r#"[{"instruction":"i","input":"x","output":"a"},{"instruction":"j","input":" ","output":"b"}]"#;
    let (checked, records) = file("a.json", Kind::Chat, text).read().unwrap();
    assert_eq!(records[0].1, Record::Chat(say(&[("user", "i\n\nx"), ("assistant", "a")])));
    assert_eq!(records[1].1, Record::Chat(say(&[("user", "j"), ("assistant", "b")])));
    assert_eq!(checked.layout.columns.input, name("input"));
    let named = file("a.jsonl", Kind::Chat, r#"{"intent":"i","snippet":"s"}"#).with(|layout| {
        layout.columns.prompt = name("intent");
        layout.columns.answer = name("snippet");
    });
    assert_eq!(
        named.read().unwrap().1[0].1,
        Record::Chat(say(&[("user", "i"), ("assistant", "s")]))
    );
}

#[test]
fn what_is_no_conversation_is_refused_or_left_out() {
    let good = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;
    let many = format!("[{}{{}}]", r#"{"role":"user","content":""},"#.repeat(1000));
    for (messages, part) in [
        (r#"[{"role":"boss","content":"q"}]"#, "'messages': 'message 0': \"boss\" is not a role"),
        (r#"[{"role":"user","content":3}]"#, "its content is not a string"),
        (r#"[{"content":"q"}]"#, "neither 'role' nor 'from'"),
        (r#"["q"]"#, "it is not an object"),
        ("3", "it is not a list of messages"),
        (&many, "1001 messages are more than 1000"),
    ] {
        let text = format!("{good}\n{{\"messages\":{messages}}}");
        let bad = file("a.jsonl", Kind::Chat, &text).with(|layout| layout.skip_unusable = true);
        let (reason, message) = bad.refusal();
        assert_eq!(reason, Reason::MalformedFile, "{message}");
        assert!(message.contains("line 2") && message.contains(part), "{message}");
    }
    for (messages, part) in [
        (r#"[{"role":"user","content":"q"}]"#, "no message is an answer"),
        (r#"[{"role":"assistant","content":"a"}]"#, "nothing stands before"),
        (r#"[{"role":"user","content":"q"},{"role":"assistant","content":" "}]"#, "is blank"),
        (r#"[{"role":"user","content":"q"},{"role":"assistant","content":null}]"#, "no content"),
        ("[]", "no message is an answer"),
    ] {
        let text = format!("{{\"messages\":{messages}}}\n{good}");
        let (reason, message) = file("a.jsonl", Kind::Chat, &text).refusal();
        assert_eq!(reason, Reason::DatasetUnsuitable, "{message}");
        assert!(message.contains("line 1") && message.contains(part), "{message}");
        assert!(message.contains("skip_unusable"), "{message}");
        let skipping =
            file("a.jsonl", Kind::Chat, &text).with(|layout| layout.skip_unusable = true);
        let (checked, records) = skipping.read().unwrap();
        assert_eq!((checked.records, checked.skipped, records[0].0), (1, 1, 2));
    }
}

#[test]
fn pairs_share_what_comes_before_they_part() {
    let expected = Preference {
        prompt: say(&[("user", "q")]),
        chosen: say(&[("assistant", "good")]),
        rejected: say(&[("assistant", "bad")]),
    };
    for line in [
        r#"{"prompt":"q","chosen":"good","rejected":"bad"}"#,
        r#"{"conversations":[{"from":"human","value":"q"}],"chosen":{"from":"gpt","value":"good"},"rejected":{"from":"gpt","value":"bad"}}"#,
        r#"{"chosen":"\n\nHuman: q\n\nAssistant: good","rejected":"\n\nHuman: q\n\nAssistant: bad"}"#,
        r#"{"prompt":"q","chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"good"}],"rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"bad"}]}"#,
    ] {
        let (_, records) = file("a.jsonl", Kind::Preferences, line).read().unwrap();
        assert_eq!(records, [(1, Record::Preference(expected.clone()))], "{line}");
    }
    let text = r#"{"instruction":"i","input":"x","output":"o","chosen":"a","rejected":"b"}"#;
    let (_, records) = file("a.jsonl", Kind::Preferences, text).read().unwrap();
    let Record::Preference(found) = &records[0].1 else { panic!("{records:?}") };
    assert_eq!(found.prompt, say(&[("user", "i\n\nx")]));
    for (line, reason, part) in [
        (
            r#"{"prompt":"q","chosen":"a","rejected":"a"}"#,
            Reason::DatasetUnsuitable,
            "are the same",
        ),
        (r#"{"prompt":"q","chosen":"a","rejected":""}"#, Reason::DatasetUnsuitable, "is blank"),
        (r#"{"prompt":"q","chosen":"a","rejected":4}"#, Reason::MalformedFile, "'rejected'"),
        (r#"{"chosen":"a","rejected":"b"}"#, Reason::MalformedFile, "Human:"),
        (
            r#"{"chosen":"\n\nHuman: q\n\nAssistant: ","rejected":"\n\nHuman: q\n\nAssistant: b"}"#,
            Reason::DatasetUnsuitable,
            "is blank",
        ),
        (
            r#"{"chosen":"\n\nHuman: q\n\nAssistant: a","rejected":"\n\nHuman: r\n\nAssistant: a"}"#,
            Reason::DatasetUnsuitable,
            "no prompt in common",
        ),
    ] {
        let (found, message) = file("a.jsonl", Kind::Preferences, line).refusal();
        assert_eq!(found, reason, "{message}");
        assert!(message.contains("line 1") && message.contains(part), "{message}");
    }
}

#[test]
fn several_classes_are_refused_or_left_out() {
    let text = "{\"text\":\"a\",\"fine\":[3]}\n{\"text\":\"b\",\"fine\":[3,4]}\n{\"text\":\"c\",\"fine\":[4]}";
    let asked = |layout: &mut Layout| layout.columns.label = name("fine");
    let (reason, message) = file("a.jsonl", Kind::Classification, text).with(asked).refusal();
    assert_eq!(reason, Reason::DatasetUnsuitable);
    assert!(message.contains("line 2: the number of labels is 2"), "{message}");
    let skipping = file("a.jsonl", Kind::Classification, text).with(asked);
    let (checked, records) = skipping.with(|layout| layout.skip_unusable = true).read().unwrap();
    assert_eq!(records, [(1, class("a", 0)), (3, class("c", 1))]);
    assert_eq!((checked.skipped, checked.layout.labels), (1, vec!["3".into(), "4".into()]));
}

#[test]
fn texts_are_documents() {
    let (_, records) = file("a.txt", Kind::Text, "one\ntwo").read().unwrap();
    assert_eq!(records, [(1, Record::Text("one\ntwo".into()))]);
    let table = file("a.csv", Kind::Text, "id,content\n1,one\n2,\n3,two\n");
    let (checked, records) = table.read().unwrap();
    assert_eq!(records, [(2, Record::Text("one".into())), (4, Record::Text("two".into()))]);
    assert_eq!(checked.skipped, 1);
    assert_eq!(file("a.txt", Kind::Text, " \n").refusal().0, Reason::DatasetUnsuitable);
    assert_eq!(file("a.jsonl", Kind::Text, "").refusal().0, Reason::DatasetUnsuitable);
}

#[test]
fn layouts_that_do_not_fit_are_refused() {
    let text = "{\"text\":\"a\",\"label\":1}\n{\"text\":\"b\",\"label\":2}";
    let refused = |kind, change: fn(&mut Layout)| {
        let error = check(&file("a.jsonl", kind, text).with(change).source).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidField, "{error}");
        error.violations()[0].field.clone()
    };
    use Kind::{Chat, Classification, Tagging, Text};
    assert_eq!(refused(Classification, |l| l.columns.prompt = name("text")), "prompt_column");
    assert_eq!(refused(Classification, |l| l.columns.label = name("lable")), "label_column");
    assert_eq!(refused(Classification, |l| l.columns.label = name(" ")), "label_column");
    assert_eq!(
        refused(Classification, |l| l.columns.label = Some("x".repeat(300))),
        "label_column"
    );
    assert_eq!(refused(Classification, |l| l.header = Some(true)), "header");
    assert_eq!(refused(Classification, |l| l.labels = vec!["a".into(), "a".into()]), "labels[1]");
    assert_eq!(refused(Text, |l| l.labels = vec!["a".into()]), "labels");
    assert_eq!(refused(Chat, |_| {}), "answer_column");
    assert_eq!(refused(Tagging, |_| {}), "text_column");
    let error =
        Records::open(&file("a.jsonl", Kind::Choices, text).source).map(|_| ()).unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetUnsuitable);
}

#[test]
fn parts_of_a_file_are_taken_by_place() {
    let text = "text,label\na,x\nb,y\n,x\nc,x\nd,y\ne,x\n";
    let part = |skip: Option<u64>, most: Option<u64>| {
        let taken = file("a.csv", Kind::Classification, text).with(|layout| {
            layout.skip_records = skip;
            layout.max_records = most;
            layout.skip_unusable = true;
        });
        taken.read()
    };
    let lines = |found: &[(u64, Record)]| found.iter().map(|(line, _)| *line).collect::<Vec<_>>();
    assert_eq!(lines(&part(None, Some(2)).unwrap().1), [2, 3]);
    // What is of no use takes a place as well: the parts of a file have nothing in common.
    let (checked, records) = part(Some(2), Some(3)).unwrap();
    assert_eq!((lines(&records), checked.skipped), (vec![5, 6], 1));
    assert_eq!(lines(&part(Some(4), None).unwrap().1), [6, 7]);
    assert!(part(Some(9), None).is_err(), "nothing is left");
    let refused = |kind: Kind, name: &str| {
        let source = file(name, kind, "one two").with(|layout| layout.max_records = Some(1)).source;
        check(&source).unwrap_err().violations()[0].field.clone()
    };
    assert_eq!(refused(Kind::Text, "a.txt"), "max_records");
    assert_eq!(refused(Kind::Choices, "a.jsonl"), "max_records");
}
