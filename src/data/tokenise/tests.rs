use super::*;
use crate::data::chat::Message;
use crate::data::tokenizer::testing;

fn options(form: Form, max_length: usize) -> Options {
    Options {
        form,
        max_length,
        overlong: Overlong::Cut,
        lowercase: false,
        tag_pieces: TagPieces::First,
        max_tokens: 1 << 20,
    }
}

/// A token a byte, and an end token.
fn ending() -> Tokenizer {
    let mut tokenizer = testing::bytes();
    (tokenizer.add_bos, tokenizer.bos, tokenizer.eos) = (false, None, vec![256]);
    tokenizer
}

fn say(turns: &[(&str, &str)]) -> Vec<Message> {
    turns
        .iter()
        .map(|(role, content)| Message { role: (*role).into(), content: (*content).into() })
        .collect()
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn run(
    tokenizer: &Tokenizer,
    options: Options,
    records: Vec<Record>,
) -> Result<(Vec<Sequence>, Report)> {
    let records = (1..).zip(records).map(Ok);
    tokenise(records, Tokeniser::new(tokenizer, options)?, &Progress::silent())
}

#[test]
fn texts_are_cut_into_sequences_that_give_them_back() {
    let tokenizer = ending();
    let text = "some text of a few words";
    let (sequences, report) =
        run(&tokenizer, options(Form::Decoder, 10), vec![Record::Text(text.into())]).unwrap();
    let tokens: Vec<u32> = sequences.iter().flat_map(|s| s.tokens.clone()).collect();
    assert_eq!(tokenizer.decode(&tokens, false).unwrap(), format!("{text}<s>"));
    assert_eq!(sequences.iter().map(|s| s.tokens.len()).collect::<Vec<_>>(), [10, 10, 5]);
    for sequence in &sequences {
        let Target::Next(wanted) = &sequence.target else { panic!("{sequence:?}") };
        assert!(!wanted[0] && wanted[1..].iter().all(|wanted| *wanted));
        assert_eq!(sequence.line, 1);
    }
    let expected =
        Report { records: 1, sequences: 3, tokens: 25, targets: 22, ..Report::default() };
    assert_eq!(report, expected);
    // The start token, where the model asks for one.
    let bytes = testing::bytes();
    let (sequences, _) =
        run(&bytes, options(Form::Decoder, 99), vec![Record::Text("ab".into())]).unwrap();
    assert_eq!(sequences[0].tokens[0], 256);
    assert_eq!(sequences[0].target, Target::Next(vec![false, true, true]));
}

#[test]
fn encoders_get_their_special_tokens_and_never_guess_them() {
    let tokenizer = testing::word_pieces();
    // [CLS] 2, [SEP] 3, a 5, un 6, ##aff 7, ##able 8, run 9.
    let text = Record::Text("a run unaffable run".into());
    let (sequences, report) = run(&tokenizer, options(Form::Encoder, 6), vec![text]).unwrap();
    assert_eq!(sequences[0].tokens, [2, 5, 9, 6, 7, 3]);
    assert_eq!(sequences[1].tokens, [2, 8, 9, 3]);
    assert_eq!(sequences[1].target, Target::Next(vec![false, true, true, false]));
    assert_eq!((report.sequences, report.targets), (2, 6));
}

#[test]
fn classes_and_numbers_are_cut_or_dropped() {
    let tokenizer = testing::word_pieces();
    let records =
        || vec![Record::Class("a run".into(), 3), Record::Value("run unaffable".into(), 0.5)];
    let (sequences, report) = run(&tokenizer, options(Form::Encoder, 4), records()).unwrap();
    assert_eq!(
        sequences[0],
        Sequence { tokens: vec![2, 5, 9, 3], target: Target::Class(3), line: 1 }
    );
    assert_eq!(
        sequences[1],
        Sequence { tokens: vec![2, 9, 6, 3], target: Target::Value(0.5), line: 2 }
    );
    assert_eq!((report.cut, report.first_cut, report.dropped), (1, Some(2), 0));
    let dropping = Options { overlong: Overlong::Drop, ..options(Form::Encoder, 4) };
    let (sequences, report) = run(&tokenizer, dropping, records()).unwrap();
    assert_eq!(sequences.len(), 1);
    assert_eq!((report.cut, report.dropped, report.first_dropped), (0, 1, Some(2)));
    let lower = Options { lowercase: true, ..options(Form::Decoder, 9) };
    let (sequences, _) = run(&ending(), lower, vec![Record::Class("AB".into(), 0)]).unwrap();
    assert_eq!(sequences[0].tokens, ending().encode("ab", false, false).unwrap());
}

#[test]
fn the_first_piece_of_a_word_has_its_tag() {
    let tokenizer = testing::word_pieces();
    let record = || vec![Record::Tagged(words("unaffable \u{200b} a"), vec![4, 5, 6])];
    let (sequences, _) = run(&tokenizer, options(Form::Encoder, 9), record()).unwrap();
    // A word of which nothing is left is an unknown one ([UNK] 1).
    assert_eq!(sequences[0].tokens, [2, 6, 7, 8, 1, 5, 3]);
    let tags = [None, Some(4), None, None, Some(5), Some(6), None];
    assert_eq!(sequences[0].target, Target::Tags(tags.into()));
    let all = Options { tag_pieces: TagPieces::All, ..options(Form::Encoder, 9) };
    let (sequences, report) = run(&tokenizer, all, record()).unwrap();
    let tags = [None, Some(4), Some(4), Some(4), Some(5), Some(6), None];
    assert_eq!(sequences[0].target, Target::Tags(tags.into()));
    assert_eq!(report.targets, 5);
    // Words stay whole: the first takes 3 pieces, of which there is room for 2.
    let error = run(&tokenizer, options(Form::Encoder, 4), record()).unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetUnsuitable);
    let (sequences, report) = run(&tokenizer, options(Form::Encoder, 6), record()).unwrap();
    assert_eq!((sequences[0].tokens.len(), report.cut), (6, 1));
}

#[test]
fn words_stand_as_they_do_in_a_text() {
    let record = || vec![Record::Tagged(words("ab true ab"), vec![0, 1, 2])];
    for tokenizer in [ending(), testing::bytes(), testing::pieces()] {
        let (sequences, _) = run(&tokenizer, options(Form::Decoder, 99), record()).unwrap();
        let whole = tokenizer.encode("ab true ab", true, false).unwrap();
        assert_eq!(sequences[0].tokens, whole);
        let Target::Tags(tags) = &sequences[0].target else { panic!("{sequences:?}") };
        let tags: Vec<u32> = tags.iter().flatten().copied().collect();
        assert_eq!(tags, [0, 1, 2]);
    }
}

#[test]
fn only_answers_are_learned_and_the_rest_is_cut() {
    let tokenizer = ending();
    let chat = |answer: &str| Record::Chat(say(&[("user", "q"), ("assistant", answer)]));
    // "### User:\nq\n\n### Assistant:\n" has 28 bytes, each a token here.
    let prompt = 28;
    let records = vec![chat("12"), chat("xyz"), chat(&"x".repeat(99))];
    let (sequences, report) = run(&tokenizer, options(Form::Decoder, prompt + 3), records).unwrap();
    assert_eq!(sequences.len(), 3);
    for (sequence, answer) in sequences.iter().zip(["12<s>", "xyz", "xxx"]) {
        let Target::Next(wanted) = &sequence.target else { panic!("{sequence:?}") };
        let learned: Vec<u32> = sequence
            .tokens
            .iter()
            .zip(wanted)
            .filter_map(|(token, wanted)| wanted.then_some(*token))
            .collect();
        assert_eq!(tokenizer.decode(&learned, false).unwrap(), answer);
        assert_eq!(wanted.iter().position(|wanted| *wanted), Some(prompt));
    }
    assert_eq!((report.cut, report.first_cut, report.dropped), (2, Some(2), 0));
    let error = run(&tokenizer, options(Form::Decoder, prompt), vec![chat("1")]).unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetUnsuitable);
    assert!(error.message().contains("1 dropped"), "{error}");
    let encoder = run(&testing::word_pieces(), options(Form::Encoder, 99), vec![chat("a")]);
    assert_eq!(encoder.unwrap_err().reason(), Reason::ModelUnsuitable);
}

#[test]
fn pairs_learn_what_follows_their_prompt() {
    let tokenizer = ending();
    let preference = Preference {
        prompt: say(&[("user", "q"), ("assistant", "old"), ("user", "r")]),
        chosen: say(&[("assistant", "good")]),
        rejected: say(&[("assistant", "bad")]),
    };
    let records = || vec![Ok((7, Record::Preference(preference.clone())))];
    let tokeniser = Tokeniser::new(&tokenizer, options(Form::Decoder, 200)).unwrap();
    let (pairs, report) = tokenise_pairs(records(), tokeniser, &Progress::silent()).unwrap();
    for (side, answer) in [(&pairs[0].chosen, "good<s>"), (&pairs[0].rejected, "bad<s>")] {
        let Target::Next(wanted) = &side.target else { panic!("{side:?}") };
        let learned = side.tokens.iter().zip(wanted).filter(|(_, wanted)| **wanted);
        let learned: Vec<u32> = learned.map(|(token, _)| *token).collect();
        assert_eq!(tokenizer.decode(&learned, false).unwrap(), answer);
        assert_eq!(side.line, 7);
    }
    assert_eq!((report.records, report.sequences, report.targets), (1, 2, 9));
    // Room for the prompt and a letter: both sides are cut, which is one record.
    let room = pairs[0].chosen.tokens.len() - 4;
    let tokeniser = Tokeniser::new(&tokenizer, options(Form::Decoder, room)).unwrap();
    let (_, report) = tokenise_pairs(records(), tokeniser, &Progress::silent()).unwrap();
    assert_eq!((report.cut, report.dropped, report.targets), (1, 0, 2));
    // Too short for either side: one record is dropped, not two.
    let tokeniser = Tokeniser::new(&tokenizer, options(Form::Decoder, 10)).unwrap();
    let error = tokenise_pairs(records(), tokeniser, &Progress::silent()).unwrap_err();
    assert!(error.message().contains("1 records is left (1 dropped)"), "{error}");
    let tokeniser = Tokeniser::new(&tokenizer, options(Form::Decoder, 10)).unwrap();
    let text = vec![Ok((3, Record::Text("x".into())))];
    let error = tokenise_pairs(text, tokeniser, &Progress::silent()).unwrap_err();
    assert!(error.message().starts_with("line 3: "), "{error}");
}

#[test]
fn two_texts_stand_between_separators_and_the_longer_one_is_cut() {
    let tokenizer = testing::word_pieces();
    assert_eq!(tokenizer.between().unwrap(), (vec![3], 1));
    assert_eq!(tokenizer.mask(), Some(4));
    let two = |first: &str, second: &str| {
        let first = Record::Labels(first.to_owned(), vec![0, 2]);
        Record::Two(Box::new(first), second.to_owned())
    };
    let records = vec![two("a run", "cafe"), two("a a a a a", "run run"), two("a", "a a a a a")];
    let (sequences, report) = run(&tokenizer, options(Form::Encoder, 9), records.clone()).unwrap();
    let tokens: Vec<_> = sequences.iter().map(|s| s.tokens.clone()).collect();
    assert_eq!(tokens[0], [2, 5, 9, 3, 12, 3]);
    assert_eq!(tokens[1], [2, 5, 5, 5, 5, 3, 9, 9, 3]);
    assert_eq!(tokens[2], [2, 5, 3, 5, 5, 5, 5, 5, 3]);
    assert!(sequences.iter().all(|s| s.target == Target::Labels(vec![0, 2])));
    assert_eq!((report.cut, report.first_cut, report.targets), (1, Some(2), 3));
    let error = run(&tokenizer, options(Form::Encoder, 3), records.clone()).unwrap_err();
    assert!(error.violations().iter().any(|v| v.field.ends_with("max_length")), "{error}");
    let error = run(&ending(), options(Form::Decoder, 9), records).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    for (first, second, room, kept) in [
        (9, 9, 5, (3, 2)),
        (9, 1, 5, (4, 1)),
        (1, 9, 5, (1, 4)),
        (9, 9, 0, (0, 0)),
        (0, 9, 4, (0, 4)),
    ] {
        assert_eq!(shares(first, second, room), kept);
    }
}

#[test]
fn limits_and_cancellation_end_the_work() {
    let tokenizer = testing::word_pieces();
    for length in [0, 1, 2, 1 << 21] {
        let error =
            Tokeniser::new(&tokenizer, options(Form::Encoder, length)).map(|_| ()).unwrap_err();
        assert_eq!(error.violations()[0].field, "max_length");
    }
    let text = || vec![Record::Text("a ".repeat(50))];
    let few = Options { max_tokens: 40, ..options(Form::Encoder, 9) };
    let error = run(&tokenizer, few, text()).unwrap_err();
    assert_eq!(error.reason(), Reason::TooLarge);
    assert!(error.message().starts_with("line 1: "), "{error}");
    let cancelled = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let progress = Progress::new(std::sync::Arc::new(|_, _| {}), cancelled);
    let tokeniser = Tokeniser::new(&tokenizer, options(Form::Encoder, 9)).unwrap();
    let records = text().into_iter().map(|record| Ok((1, record)));
    assert_eq!(tokenise(records, tokeniser, &progress).unwrap_err().reason(), Reason::Cancelled);
}
