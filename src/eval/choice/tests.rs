use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;

use super::*;
use crate::data::tokenizer::testing::bytes;
use crate::models::decoder::random;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};

fn model(vocab: usize) -> Model {
    let mut config = random::tiny("llama");
    config["vocab_size"] = json!(vocab);
    let mut model = random::model(config, 5).unwrap();
    model.tokenizer = Some(Arc::new(bytes()));
    model
}

fn item(question: &str, choices: &[&str], answer: usize) -> Item {
    let choices = choices.iter().map(|choice| (*choice).to_owned()).collect();
    Item { question: question.into(), choices, answer }
}

/// Items of different lengths.
fn items(count: usize) -> Vec<Item> {
    let words = ["red", "a long answer", "x", "blue", "yes"];
    (0..count)
        .map(|i| {
            let choices: Vec<_> = (0..2 + i % 3).map(|c| words[(i + c) % words.len()]).collect();
            item(&"what? ".repeat(1 + i % 4), &choices, i % 2)
        })
        .collect()
}

/// The sum of the log-probabilities of a choice's tokens from one forward without a shared cache.
fn reference(model: &Model, prompt: &[u32], choice: &[u32]) -> f64 {
    let tokens = [prompt, choice].concat();
    let config = model.decoder().unwrap();
    let mut cache = Cache::new(config, tokens.len());
    let mut decoder = Decoder::new(model).unwrap();
    let chunk = Chunk { tokens: &tokens, cache: &mut cache, logits: 0..tokens.len() };
    let logits = decoder.forward(&mut [chunk]).unwrap().to_vec();
    (prompt.len()..tokens.len())
        .map(|at| {
            let row = &logits[(at - 1) * config.vocab..at * config.vocab];
            let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            f64::from(row[tokens[at] as usize]) - total.ln()
        })
        .sum()
}

fn ids(length: usize, salt: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * 37 + salt * 11 + i * i) % 96) as u32).collect()
}

/// A question with a prompt and choices of these lengths.
fn question(prompt: usize, choices: &[usize]) -> Question {
    let choices = choices.iter().enumerate().map(|(i, n)| ids(*n, prompt + i + 1)).collect();
    Question { prompt: ids(prompt, prompt), choices, cut: false }
}

fn assert_sums(model: &Model, scorer: &mut Scorer, batch: &[Question]) {
    let sums = scorer.sums(batch, &Progress::silent(), "").unwrap();
    for (question, sums) in batch.iter().zip(&sums) {
        assert_eq!(sums.len(), question.choices.len());
        for (choice, sum) in question.choices.iter().zip(sums) {
            let expected = reference(model, &question.prompt, choice);
            assert!((sum - expected).abs() < 1e-4, "{sum} is not {expected}");
        }
    }
}

#[test]
fn sums_are_those_of_whole_sequences() {
    let batch = [
        question(7, &[1, 4, 2]),
        question(1, &[3, 1]),
        question(20, &[1, 1, 6, 2, 9]),
        question(12, &[8, 1]),
    ];
    for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] {
        let model = random::model(random::tiny(architecture), 3).unwrap();
        let mut scorer = Scorer::new(&model).unwrap();
        assert_sums(&model, &mut scorer, &batch);
        // Cut into parts wherever that can be.
        for (tokens, rows) in [(3, 2), (1, 1), (50, 1), (4, 50)] {
            (scorer.tokens, scorer.rows) = (tokens, rows);
            assert_sums(&model, &mut scorer, &batch);
        }
    }
}

#[test]
fn local_layers_may_forget_the_prompt() {
    let mut config = random::tiny("mistral");
    config["max_position_embeddings"] = json!(2048);
    let model = random::model(config, 3).unwrap();
    let batch = [question(9, &[600, 3, 560, 2]), question(4, &[2, 3])];
    assert_sums(&model, &mut Scorer::new(&model).unwrap(), &batch);
}

#[test]
fn measures_like_whole_sequences() {
    let model = model(257);
    let tokenizer = bytes();
    // More than run at once.
    let items = items(AT_ONCE + 6);
    let found = measure(&model, &items, 256, &Progress::silent()).unwrap();
    for i in [0, 1, 2, 3, AT_ONCE - 1, AT_ONCE, AT_ONCE + 5] {
        let item = &items[i];
        let text = format!("Question: {}\nAnswer:", item.question);
        let prompt = tokenizer.encode(&text, true, false).unwrap();
        assert_eq!(prompt[0], 256);
        let scores: Vec<f64> = item
            .choices
            .iter()
            .map(|choice| {
                let tokens = tokenizer.encode(&format!(" {choice}"), true, false).unwrap();
                reference(&model, &prompt, &tokens[1..]) / choice.len() as f64
            })
            .collect();
        let best = (0..scores.len()).fold(0, |a, b| if scores[b] > scores[a] { b } else { a });
        assert_eq!(found.predicted[i], best, "{i}: {scores:?}");
        assert_eq!(found.correct[i], best == item.answer);
    }
    assert_eq!((found.predicted.len(), found.classes, found.cut), (items.len(), None, 0));
    assert!(found.macro_f1(&[]).is_none());
}

#[test]
fn long_prompts_lose_their_start_but_not_the_start_token() {
    let tokenizer = bytes();
    let writer = Writer::new(&tokenizer, 257, 20).unwrap();
    let long = item("where is the very long question?", &["a", "four"], 0);
    let question = writer.question(&long).unwrap();
    assert_eq!(question.choices.iter().map(Vec::len).collect::<Vec<_>>(), [2, 5]);
    assert_eq!((question.cut, question.prompt.len(), question.prompt[0]), (true, 15, 256));
    let text = tokenizer.decode(&question.prompt[1..], false).unwrap();
    assert_eq!(text, "stion?\nAnswer:");
    // "Question: q\nAnswer:" and the start token are 20 tokens.
    for (context, cut) in [(25, false), (24, true)] {
        let writer = Writer::new(&tokenizer, 257, context).unwrap();
        let question = writer.question(&item("q", &["a", "four"], 0)).unwrap();
        assert_eq!((question.cut, question.positions()), (cut, context - 1));
    }

    let model = model(257);
    let items = [long.clone(), item("q", &["a", "b"], 0), long];
    let found = measure(&model, &items, 40, &Progress::silent()).unwrap();
    assert_eq!(found.cut, 2);
    assert_eq!(measure(&model, &items, 7, &Progress::silent()).unwrap().cut, 3);
    // A start token and the longest choice take 6.
    let error = measure(&model, &items, 6, &Progress::silent()).unwrap_err();
    assert_eq!(error.reason(), Reason::DatasetUnsuitable);
    assert!(error.message().starts_with("question 1: a choice has 5 tokens"), "{error}");
}

#[test]
fn spaces_in_front_are_not_doubled() {
    let mut spelled = serde_json::Map::new();
    for (id, token) in ["<unk>", "\u{2581}", "a", "b", "\u{2581}a"].iter().enumerate() {
        spelled.insert((*token).into(), json!(id));
    }
    let json = json!({
        "version": "1.0",
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        ]},
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ]},
        "model": { "type": "BPE", "vocab": spelled, "merges": [["\u{2581}", "a"]], "unk_token": "<unk>" },
    });
    let tokenizer = Tokenizer::new(json.to_string()).unwrap();
    let writer = Writer::new(&tokenizer, 5, 99).unwrap();
    let question = writer.question(&item("q", &["a", "b", "ab"], 0)).unwrap();
    assert_eq!(question.choices, [vec![4], vec![1, 3], vec![4, 3]]);
    assert_eq!(Writer::new(&bytes(), 257, 99).unwrap().space, " ");
}

#[test]
fn scores_are_per_byte_and_ties_go_to_the_lower_index() {
    let words = item("q", &["ab", "abcd", "xy", "é", "abcd"], 0);
    assert_eq!(choose(&words, &[-3.0, -4.0, -2.5, -9.0, -9.0]).unwrap(), 1);
    assert_eq!(choose(&words, &[-2.0, -4.0, -2.0, -2.0, -4.0]).unwrap(), 0);
    assert_eq!(choose(&words, &[-2.5, -4.0, -2.0, -2.0, -4.5]).unwrap(), 1);
    // Rounding set the two equal texts apart.
    assert_eq!(choose(&words, &[-9.0, -4.0, -9.0, -9.0, -3.999_999]).unwrap(), 1);
    for bad in [f64::NAN, f64::NEG_INFINITY, f64::INFINITY] {
        let error = choose(&words, &[-1.0, -1.0, bad, -1.0, -1.0]).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains("choice 2"), "{error}");
    }
}

#[test]
fn macro_f1_by_hand() {
    let found = |predicted: &[usize], classes| Found {
        predicted: predicted.to_vec(),
        correct: Vec::new(),
        classes,
        cut: 0,
    };
    // Class 0: TP 2, FP 1, FN 1: 4/6. Class 1: TP 1, FP 1, FN 0: 2/3. Class 2: only missed: 0.
    // Class 3 is neither predicted nor true and does not count.
    let answers = [0, 0, 0, 1, 2];
    let score = found(&[0, 0, 1, 1, 0], Some(4)).macro_f1(&answers).unwrap();
    assert!((score - (4.0 / 6.0 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
    // A class that is only predicted counts as 0.
    let score = found(&[3, 0], Some(4)).macro_f1(&[0, 0]).unwrap();
    assert!((score - (2.0 / 3.0) / 2.0).abs() < 1e-12);
    assert_eq!(found(&answers, Some(3)).macro_f1(&answers), Some(1.0));
    assert_eq!(found(&[0], None).macro_f1(&[0]), None);
    assert_eq!(found(&[], Some(2)).macro_f1(&[]), None);
}

#[test]
fn classes_are_choices_that_all_questions_share() {
    let model = model(257);
    let mut items: Vec<_> = ["one", "two", "three"].map(|q| item(q, &["yes", "no"], 1)).into();
    let found = measure(&model, &items, 128, &Progress::silent()).unwrap();
    assert_eq!(found.classes, Some(2));
    assert!(found.macro_f1(&[1, 1, 1]).is_some());
    items[2].choices.swap(0, 1);
    let found = measure(&model, &items, 128, &Progress::silent()).unwrap();
    assert_eq!(found.classes, None);
}

#[test]
fn unsuitable_models_and_data_are_refused() {
    let items = items(3);
    let refusal = |model: &Model, items: &[Item]| {
        let error = measure(model, items, 128, &Progress::silent()).unwrap_err();
        (error.reason(), error.message().to_owned())
    };
    let mut without = model(257);
    without.tokenizer = None;
    assert_eq!(refusal(&without, &items).0, Reason::ModelUnsuitable);
    // The start token is one more than the model knows.
    let (reason, message) = refusal(&model(256), &items);
    assert_eq!(reason, Reason::ModelUnsuitable);
    assert!(message.starts_with("question 1: the prompt: the tokenizer gives token 256"));
    assert_eq!(refusal(&model(257), &[]).0, Reason::DatasetUnsuitable);

    let mut broken = model(257);
    let norm = "model.norm.weight";
    let width = broken.weights[norm].shape()[0];
    let nan = Dense::from_f32(vec![width], &vec![f32::NAN; width], Dtype::F32).unwrap();
    broken.weights.insert(norm.into(), Arc::new(Weight::Dense(nan)));
    let (reason, message) = refusal(&broken, &items);
    assert_eq!(reason, Reason::NonFinite);
    assert!(message.starts_with("question 1: the likelihood of choice 0"), "{message}");
}

#[test]
fn cancelling_stops_it() {
    let (model, items) = (model(257), items(3 * AT_ONCE));
    for after in [0, 1, 2, 5] {
        let cancelled = Arc::new(AtomicBool::new(after == 0));
        let reports = Arc::new(AtomicUsize::new(0));
        let (flag, count) = (cancelled.clone(), reports.clone());
        let sink = move |done: f64, _: &str| {
            assert!((0.0..=1.0).contains(&done));
            if count.fetch_add(1, Ordering::Relaxed) + 1 == after {
                flag.store(true, Ordering::Relaxed);
            }
        };
        let progress = Progress::new(Arc::new(sink), cancelled);
        let error = measure(&model, &items, 128, &progress).unwrap_err();
        assert_eq!(error.reason(), Reason::Cancelled);
        assert_eq!(reports.load(Ordering::Relaxed), after);
    }
}

#[test]
fn batches_keep_to_the_memory() {
    let model = model(257);
    let config = model.decoder().unwrap();
    let positions = CACHE_BYTES / Cache::bytes_per_position(config);
    let lengths = [5, positions / 2, positions / 3, positions / 2, 2 * positions, 5];
    let mut questions = lengths.iter().map(|n| Ok(question(*n, &[1]))).peekable();
    let mut sizes = Vec::new();
    while questions.peek().is_some() {
        sizes.push(take_batch(&mut questions, config).unwrap().len());
    }
    assert_eq!(sizes, [3, 1, 1, 1]);
    let mut many = (0..AT_ONCE + 1).map(|_| Ok(question(3, &[1, 2]))).peekable();
    assert_eq!(take_batch(&mut many, config).unwrap().len(), AT_ONCE);
    assert_eq!(take_batch(&mut many, config).unwrap().len(), 1);
}
