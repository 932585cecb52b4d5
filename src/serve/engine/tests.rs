//! The engine on small random models.

use std::time::Duration;

use rand::Rng as _;

use super::worker::Worker;
use super::*;
use crate::models::decoder::plan::adapters::Fitted;
use crate::models::decoder::plan::{Cache, Chunk};
use crate::models::decoder::random;
use crate::nn::adapter::{Adapter, Factors};

const LIMITS: Limits = Limits {
    slots: 3,
    queue: 4,
    context: 200,
    kv_bytes: 64 << 20,
    kv_format: CacheFormat::F32,
    prefix_cache: true,
};

/// Bytes of `count` pages of the tiny models: 3 layers, keys and values, 2 heads of 16 channels.
const fn pages(count: u64) -> u64 {
    count * 3 * 2 * 2 * 16 * 4 * PAGE as u64
}

fn model(architecture: &str) -> Model {
    random::model(random::tiny(architecture), 3).unwrap()
}

fn engine(architecture: &str, limits: Limits) -> Engine {
    Engine::start(model(architecture), limits).unwrap()
}

/// An adapter of the tiny Llama that adds nothing.
fn idle_adapter() -> Mix {
    let factors = Factors::from_f32([64, 32], 1, &[1.0; 32], &[0.0; 64], 1.0).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight".to_owned();
    let adapter = Adapter { linears: [(name, Arc::new(factors))].into() };
    let config = model("llama").decoder().unwrap().clone();
    Mix::new([(Arc::new(Fitted::new("idle", &adapter, &config).unwrap()), 1.0)])
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
        constraint: None,
        client: 0,
        adapters: Mix::default(),
        deadline: None,
    }
}

/// What the engine and its thread share, without the thread: tests drive the worker step by step.
fn shared(architecture: &str, limits: Limits) -> Shared {
    let mut config = random::tiny(architecture);
    config["max_position_embeddings"] = 4096.into();
    Shared::new(random::model(config, 3).unwrap(), 0, limits).unwrap()
}

fn worker(shared: &Shared) -> Worker<'_> {
    Worker::new(shared, Decoder::new(&shared.model).unwrap())
}

type Answer = mpsc::Receiver<Result<Event>>;

fn submit(shared: &Shared, request: Request) -> Answer {
    let (events, receiver) = mpsc::channel(LAG);
    shared.submit(Job::Generate { request, events, queued: Instant::now() }).unwrap();
    receiver
}

/// Takes what has come: the ids, and the end if it has come.
fn taken(answer: &mut Answer) -> (Vec<u32>, Option<Result<Event>>) {
    let mut ids = Vec::new();
    loop {
        match answer.try_recv() {
            Ok(Ok(Event::Tokens { tokens, .. })) => ids.extend(tokens.iter().map(|t| t.id)),
            Ok(end) => return (ids, Some(end)),
            Err(_) => return (ids, None),
        }
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
            assert_eq!(ids, alone(&model(architecture), prompt, 12), "{architecture} {prompt:?}");
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
    let ids = alone(&model("llama"), &[1, 2, 3], 4);
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
    let engine = engine("llama", Limits { slots: 1, queue: 1, ..LIMITS });
    let mut first = engine.generate(request(vec![1], 190)).unwrap();
    first.recv().await.unwrap().unwrap();
    let second = engine.generate(request(vec![2], 3)).unwrap();
    let refused = engine.generate(request(vec![3], 3)).unwrap_err();
    assert_eq!(refused.reason(), Reason::LimitReached);
    let hint = refused.retry_after().unwrap().as_secs_f64();
    assert!((RETRY[0]..=RETRY[1]).contains(&hint), "{hint}");
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
    assert_eq!(ids, alone(&model("llama"), &[1], 150));
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
    let scores = engine.score(ids, Mix::default(), 0, None).await.unwrap();
    for (score, logprob) in scores[1..].iter().zip(logprobs) {
        assert!((score - logprob).abs() < 1e-4, "{score} {logprob}");
    }
    let long: Vec<u32> = (0..150).map(|i| i % 90).collect();
    assert_eq!(engine.score(long, Mix::default(), 0, None).await.unwrap().len(), 149);
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let engine = engine("llama", LIMITS);
    for prompt in [vec![], vec![96], vec![1; 200]] {
        let error = engine.generate(request(prompt, 5)).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidField);
        assert_eq!(error.violations()[0].field, "prompt");
    }
    assert!(engine.score(vec![1; 201], Mix::default(), 0, None).await.is_err());
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

fn cached(done: &Event) -> usize {
    match done {
        Event::Done { cached_prompt_tokens, .. } => *cached_prompt_tokens,
        Event::Tokens { .. } => panic!(),
    }
}

#[tokio::test]
async fn known_beginnings_are_not_computed_again_and_change_nothing() {
    let text: Vec<u32> = (0..150).map(|i| (i * i + 7 * i) % 96).collect();
    let longer = [&text[..], &[5; 20]].concat();
    let branch = [&text[..70], &[9; 40]].concat();
    for prefix_cache in [true, false] {
        let engine = engine("llama", Limits { prefix_cache, ..LIMITS });
        for (prompt, other, known) in [
            (&text, 0, 0),
            (&text, 0, 128),
            (&longer, 0, 128),
            (&branch, 0, 64),
            (&text, 1, 0),
            (&text, 1, 128),
            // The last token always runs: of two whole pages only the first is taken over.
            (&text[..128].to_vec(), 0, 64),
            (&text[..129].to_vec(), 0, 128),
        ] {
            // An adapter that changes nothing, but might.
            let adapters = if other == 0 { Mix::default() } else { idle_adapter() };
            let request = Request { adapters, ..request(prompt.clone(), 10) };
            let (ids, done) = collect(engine.generate(request).unwrap()).await;
            assert_eq!(ids, alone(&model("llama"), prompt, 10), "{} {other}", prompt.len());
            assert_eq!(cached(&done), if prefix_cache { known } else { 0 });
        }
        // What an answer said is known too: prompt and answer fill the next page.
        let ids = alone(&model("llama"), &text, 45);
        collect(engine.generate(request(text.clone(), 45)).unwrap()).await;
        let all = [&text[..], &ids].concat();
        let (got, done) = collect(engine.generate(request(all.clone(), 3)).unwrap()).await;
        assert_eq!(got, alone(&model("llama"), &all, 3));
        assert_eq!(cached(&done), if prefix_cache { 192 } else { 0 });
        let scores = engine.score(text.clone(), Mix::default(), 0, None).await.unwrap();
        assert_eq!(scores.len(), 149);
    }
}

#[tokio::test]
async fn a_tiny_budget_evicts_and_refuses_what_can_never_fit() {
    let engine = engine("llama", Limits { kv_bytes: pages(3), ..LIMITS });
    assert_eq!(engine.pages().budget, 3);
    let refused = engine.generate(request(vec![1; 150], 43)).unwrap_err();
    assert_eq!(refused.reason(), Reason::TooLarge);
    assert_eq!(refused.violations()[0].field, "max_tokens");
    let refused = engine.score(vec![1; 193], Mix::default(), 0, None).await.unwrap_err();
    assert_eq!(refused.violations()[0].field, "input");
    // Each prompt fills two pages of its own: there is room for one at a time and one kept page.
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| vec![seed; 130]).collect();
    for round in 0..2 {
        let answers: Vec<_> =
            prompts.iter().map(|p| engine.generate(request(p.clone(), 20)).unwrap()).collect();
        for (prompt, answer) in prompts.iter().zip(answers) {
            let (ids, _) = collect(answer).await;
            assert_eq!(ids, alone(&model("llama"), prompt, 20), "{round} {prompt:?}");
            assert!(engine.pages().live <= 3);
        }
    }
}

#[test]
fn clients_take_turns_and_nobody_starves() {
    let shared = shared("llama", Limits { slots: 2, queue: 64, ..LIMITS });
    let mut worker = worker(&shared);
    // All of one client's requests come before the next client's.
    let mut answers: Vec<_> = (0..64)
        .map(|i| {
            let request = Request { client: i / 16, ..request(vec![i as u32], 3) };
            (i / 16, submit(&shared, request))
        })
        .collect();
    let mut order = Vec::new();
    while order.len() < 64 {
        assert!(worker.turn());
        answers.retain_mut(|(client, answer)| {
            let (_, end) = taken(answer);
            if let Some(end) = &end {
                assert!(matches!(end, Ok(Event::Done { generated_tokens: 3, .. })));
                order.push(*client);
            }
            end.is_none()
        });
    }
    // Two slots: pairs end together, in any order within the pair.
    for four in order.chunks(4) {
        let mut clients = four.to_vec();
        clients.sort_unstable();
        assert_eq!(clients, [0, 1, 2, 3], "{order:?}");
    }
}

#[test]
fn streams_advance_in_every_step_while_prompts_prefill() {
    let limits = Limits { slots: 4, queue: 4, context: 2000, ..LIMITS };
    let shared = shared("qwen3", limits);
    let mut worker = worker(&shared);
    let mut streams: Vec<_> = (1..3).map(|i| submit(&shared, request(vec![i], 1000))).collect();
    worker.turn();
    let step = |worker: &mut Worker<'_>, streams: &mut [Answer]| {
        worker.turn();
        for stream in streams {
            assert_eq!(taken(stream).0.len(), 1);
        }
    };
    streams.iter_mut().for_each(|s| assert_eq!(taken(s).0.len(), 1));
    let long: Vec<u32> = (0..1000).map(|i| i % 96).collect();
    let mut long = submit(&shared, request(long, 2));
    // 254 rows a step beside two streams.
    step(&mut worker, &mut streams);
    let mut short = submit(&shared, request(vec![7; 100], 2));
    // 127 rows each: the short prompt is through at once, in the middle of the long one.
    step(&mut worker, &mut streams);
    assert_eq!(taken(&mut short).0.len(), 1);
    // 254 + 154 are done; 253 rows beside three streams, then 254.
    for rest in [1000 - 408, 1000 - 408 - 253, 1000 - 408 - 253 - 254] {
        assert!(rest > 0 && taken(&mut long).0.is_empty());
        step(&mut worker, &mut streams);
    }
    assert_eq!(taken(&mut long).0.len(), 1);
}

#[test]
fn a_turn_allocates_only_what_it_hands_out() {
    use crate::kernels::{allocations, threads};

    let shared = shared("llama", Limits { slots: 3, ..LIMITS });
    let mut worker = worker(&shared);
    let plain = |prompt: Vec<u32>| Request { logprobs: false, ..request(prompt, 60) };
    let mixes = [Mix::default(), idle_adapter(), Mix::default()];
    let mut answers =
        mixes.map(|adapters| submit(&shared, Request { adapters, ..plain(vec![1, 2, 3]) }));
    let mut most = 0;
    let mut turns = || {
        // Within one page of keys and values, and less than the channel's own blocks hold.
        for turn in 0..30 {
            let before = allocations::count();
            assert!(worker.turn());
            let made = allocations::count() - before;
            for answer in &mut answers {
                assert_eq!(taken(answer).0.len(), 1);
            }
            if turn > 3 {
                most = most.max(made);
            }
        }
    };
    // As a part of shared work a turn runs on one thread, whose allocations are counted.
    let once = std::sync::Mutex::new(&mut turns);
    threads::share(2, &|part| {
        if part == 0 {
            (once.lock().unwrap())();
        }
    });
    // The list of tokens in each of three events.
    assert!(most <= 3, "{most}");
}

#[test]
fn deadlines_end_requests_in_the_queue_and_in_a_slot() {
    let shared = shared("llama", Limits { slots: 1, ..LIMITS });
    let mut worker = worker(&shared);
    let soon = Instant::now() + Duration::from_millis(30);
    // Nobody reads, so the first never ends by itself; the second waits for its slot.
    let mut running = submit(&shared, Request { deadline: Some(soon), ..request(vec![1], 190) });
    let mut waiting = submit(&shared, Request { deadline: Some(soon), ..request(vec![2], 3) });
    let patient = submit(&shared, request(vec![3], 3));
    while patient.len() < 4 {
        assert!(worker.turn());
    }
    let reason = |end: Option<Result<Event>>| end.unwrap().unwrap_err().reason();
    let (ids, end) = taken(&mut waiting);
    assert_eq!((ids.len(), reason(end)), (0, Reason::DeadlineExceeded));
    // The error comes after what was said before, when there is room for it.
    let (ids, end) = taken(&mut running);
    assert!(ids.len() >= LAG && end.is_none(), "{end:?}");
    let _more = submit(&shared, request(vec![4], 3));
    let (mut rest, mut end) = (Vec::new(), None);
    while end.is_none() {
        assert!(worker.turn());
        let more = taken(&mut running);
        rest.extend(more.0);
        end = more.1;
    }
    assert_eq!(reason(end), Reason::DeadlineExceeded);
    assert_eq!([ids, rest].concat(), alone(&shared.model, &[1], 190)[..LAG + 1]);
}

#[test]
fn answers_do_not_depend_on_arrivals_and_cancellations() {
    let mut rng = crate::seed::Stream::root(11).child("arrivals").rng();
    // Prompts that share beginnings of no, one and two pages.
    let base: Vec<u32> = (0..140).map(|i| (i * 31 + 5) % 96).collect();
    let prompts: Vec<Vec<u32>> = [(0, 3), (70, 5), (70, 60), (130, 2), (130, 64), (20, 44)]
        .iter()
        .enumerate()
        .map(|(i, (same, own))| [&base[..*same], &vec![i as u32; *own][..]].concat())
        .collect();
    for (round, prefix_cache) in [(0, true), (1, true), (2, false)] {
        let limits = Limits { queue: 16, context: 256, kv_bytes: pages(7), prefix_cache, ..LIMITS };
        let shared = shared(["llama", "gemma3_text", "qwen3"][round], limits);
        let budget = shared.pool.budget();
        let mut worker = worker(&shared);
        let want: Vec<Vec<u32>> = prompts.iter().map(|p| alone(&shared.model, p, 12)).collect();
        let mut answers: Vec<(usize, usize, Vec<u32>, Answer)> = Vec::new();
        let (mut arrived, mut finished, mut reused) = (0, 0, 0);
        while arrived < 120 || !answers.is_empty() {
            while arrived < 120 && answers.len() < 10 && rng.random_bool(0.4) {
                let (which, count) = (rng.random_range(0..prompts.len()), rng.random_range(1..=12));
                let client = rng.random_range(0..3);
                let request = Request { client, ..request(prompts[which].clone(), count) };
                answers.push((which, count, Vec::new(), submit(&shared, request)));
                arrived += 1;
            }
            if answers.is_empty() {
                continue;
            }
            if rng.random_bool(0.05) {
                answers.swap_remove(rng.random_range(0..answers.len()));
            }
            // Something waits or runs; without answers the worker would wait for ever.
            if !answers.is_empty() {
                assert!(worker.turn());
            }
            assert!(shared.pool.live() <= budget);
            answers.retain_mut(|(which, count, ids, answer)| {
                let (more, end) = taken(answer);
                ids.extend(more);
                let Some(end) = end else { return true };
                reused += cached(&end.unwrap());
                assert_eq!(ids, &want[*which][..*count], "{which}");
                finished += 1;
                false
            });
        }
        assert!(finished > 60);
        assert_eq!(reused > 0, prefix_cache);
        // Those that were dropped last leave at the next turn, which needs something to do.
        let mut last = submit(&shared, request(vec![1], 1));
        while taken(&mut last).1.is_none() {
            assert!(worker.turn());
        }
        let kept = shared.kept.load(Ordering::Relaxed);
        assert_eq!(shared.pool.live(), kept, "pages are in the tree or free");
        assert!(kept <= budget && (kept > 0) == prefix_cache);
    }
}
