//! The engine on small random models.

use std::time::Duration;

use super::*;
use crate::models::decoder::plan::{Cache, Chunk};
use crate::models::decoder::random;

const LIMITS: Limits = Limits { slots: 3, queue: 4, context: 200 };

fn engine(architecture: &str, limits: Limits) -> Engine {
    Engine::start(random::model(random::tiny(architecture), 3).unwrap(), limits).unwrap()
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: Sampling::GREEDY,
        end: Vec::new(),
        stop: Vec::new(),
        logprobs: true,
        top_logprobs: 2,
        adapters: Mix::default(),
    }
}

/// Ids and the last event.
async fn collect(mut events: mpsc::Receiver<Result<Event>>) -> (Vec<u32>, Event) {
    let mut ids = Vec::new();
    while let Some(event) = events.recv().await {
        match event.unwrap() {
            Event::Tokens { tokens, .. } => ids.extend(tokens.iter().map(|t| t.id)),
            done @ Event::Done { .. } => return (ids, done),
        }
    }
    panic!("the answer has no end");
}

/// Greedy answer by the decoder alone, one full forward a token.
fn alone(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut decoder = Decoder::new(model).unwrap();
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let mut cache = Cache::new(model.decoder().unwrap(), tokens.len());
        let logits = tokens.len() - 1..tokens.len();
        let logits =
            decoder.forward(&mut [Chunk { tokens: &tokens, cache: &mut cache, logits }]).unwrap();
        let id = crate::serve::sample::Sampler::new(Sampling::GREEDY, &[]).next(logits).unwrap();
        tokens.push(id);
    }
    tokens.split_off(prompt.len())
}

#[tokio::test]
async fn requests_in_one_batch_answer_as_if_alone() {
    for architecture in ["llama", "gemma3_text"] {
        let engine = engine(architecture, LIMITS);
        let prompts: Vec<Vec<u32>> =
            vec![vec![5], (0..90).collect(), vec![7, 8, 9], (10..40).rev().collect()];
        let answers: Vec<_> =
            prompts.iter().map(|p| engine.generate(request(p.clone(), 12)).unwrap()).collect();
        for (prompt, answer) in prompts.iter().zip(answers) {
            let (ids, done) = collect(answer).await;
            assert_eq!(ids, alone(engine.model(), prompt, 12), "{architecture} {prompt:?}");
            let Event::Done { finish, prompt_tokens, generated_tokens, .. } = done else {
                panic!()
            };
            assert_eq!(
                (finish, prompt_tokens, generated_tokens),
                (Finish::Length, prompt.len(), 12)
            );
        }
    }
}

#[tokio::test]
async fn end_tokens_and_the_context_end_an_answer() {
    let engine = engine("llama", LIMITS);
    let ids = alone(engine.model(), &[1, 2, 3], 4);
    let first = ids.iter().position(|id| *id == ids[3]).unwrap();
    let ends = Request { end: vec![ids[3]], ..request(vec![1, 2, 3], 50) };
    let (got, done) = collect(engine.generate(ends).unwrap()).await;
    assert_eq!(got, ids[..first]);
    assert!(matches!(done, Event::Done { finish: Finish::Eos, .. }));

    // 198 positions for the prompt, 2 to feed what was generated; the last token needs none.
    let (got, done) = collect(engine.generate(request(vec![4; 198], 50)).unwrap()).await;
    assert_eq!(got.len(), 3);
    assert!(matches!(done, Event::Done { finish: Finish::Length, .. }));
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_client_that_leaves_frees_its_slot() {
    let engine = engine("llama", Limits { slots: 1, queue: 1, context: 200 });
    let mut first = engine.generate(request(vec![1], 190)).unwrap();
    first.recv().await.unwrap().unwrap();
    let second = engine.generate(request(vec![2], 3)).unwrap();
    let refused = engine.generate(request(vec![3], 3)).unwrap_err();
    assert_eq!(refused.reason(), Reason::LimitReached);
    // The channel is smaller than the answer: nobody reads, so the first request never ends by itself.
    drop(first);
    let (ids, _) = collect(second).await;
    assert_eq!(ids.len(), 3);
}

#[tokio::test]
async fn a_slow_client_does_not_stall_others_and_loses_nothing() {
    let engine = engine("llama", LIMITS);
    let slow = engine.generate(request(vec![1], 150)).unwrap();
    let (ids, _) = collect(engine.generate(request(vec![2], 150)).unwrap()).await;
    assert_eq!(ids.len(), 150);
    let (ids, _) = collect(slow).await;
    assert_eq!(ids, alone(engine.model(), &[1], 150));
}

#[tokio::test]
async fn scores_are_the_logprobs_of_generation() {
    let engine = engine("qwen3", LIMITS);
    let mut events = engine.generate(request(vec![1, 2], 5)).unwrap();
    let (mut ids, mut logprobs) = (vec![1, 2], Vec::new());
    while let Some(Ok(Event::Tokens { tokens, .. })) = events.recv().await {
        for token in tokens {
            assert_eq!(token.alternatives[0].0, token.id);
            assert_eq!(token.alternatives.len(), 2);
            ids.push(token.id);
            logprobs.push(token.logprob.unwrap());
        }
    }
    let scores = engine.score(ids, Mix::default()).await.unwrap();
    for (score, logprob) in scores[1..].iter().zip(logprobs) {
        assert!((score - logprob).abs() < 1e-4, "{score} {logprob}");
    }
    let long: Vec<u32> = (0..150).map(|i| i % 90).collect();
    assert_eq!(engine.score(long, Mix::default()).await.unwrap().len(), 149);
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let engine = engine("llama", LIMITS);
    for prompt in [vec![], vec![96], vec![1; 200]] {
        let error = engine.generate(request(prompt, 5)).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidField);
        assert_eq!(error.violations()[0].field, "prompt");
    }
    assert!(engine.score(vec![1; 201], Mix::default()).await.is_err());
    assert!(engine.healthy());
}

#[tokio::test]
async fn seeds_repeat_and_differ() {
    let engine = engine("llama", LIMITS);
    let drawn = |seed| {
        let sampling = Sampling { temperature: 1.5, seed, ..Sampling::GREEDY };
        engine.generate(Request { sampling, ..request(vec![1], 20) }).unwrap()
    };
    let (a, b, c) = (drawn(1), drawn(1), drawn(2));
    let (a, b, c) = (collect(a).await.0, collect(b).await.0, collect(c).await.0);
    assert_eq!(a, b);
    assert_ne!(a, c);
}

#[tokio::test]
async fn work_that_was_taken_is_finished_after_the_last_handle_is_gone() {
    let engine = engine("llama", LIMITS);
    let answer = engine.generate(request(vec![1], 30)).unwrap();
    drop(engine);
    let (ids, _) = tokio::time::timeout(Duration::from_secs(20), collect(answer)).await.unwrap();
    assert_eq!(ids.len(), 30);
}
