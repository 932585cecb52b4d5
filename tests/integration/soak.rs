//! A small engine under random arrivals, cancellations and deadlines: `PLANISH_SOAK_SECONDS` says for
//! how long (10 by default).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use planish::error::Reason;
use planish::models::decoder::plan::adapters::Mix;
use planish::models::decoder::plan::{Cache, CacheFormat, Chunk, Decoder, PAGE};
use planish::models::decoder::random;
use planish::serve::engine::{Engine, Event, Limits, Request};
use planish::serve::sample::Sampling;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::harness::PATIENCE;

const CLIENTS: u64 = 6;
const TOKENS: usize = 16;

/// What became of the requests.
#[derive(Default)]
struct Counts {
    finished: AtomicUsize,
    cancelled: AtomicUsize,
    late: AtomicUsize,
    refused: AtomicUsize,
    reused: AtomicUsize,
}

fn request(prompt: &[u32], max_tokens: usize, client: u64, deadline: Option<Instant>) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: Sampling::GREEDY,
        end: Vec::new(),
        stop: Vec::new(),
        logprobs: false,
        top_logprobs: 0,
        constraint: None,
        client,
        adapters: Mix::default(),
        deadline,
    }
}

/// Greedy answers, one sequence at a time.
fn answers(decoder: &mut Decoder, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut answer = |prompt: &Vec<u32>| {
        let mut cache = Cache::new(decoder.config(), prompt.len() + TOKENS);
        let (mut next, mut ids) = (prompt.clone(), Vec::new());
        while ids.len() < TOKENS {
            let logits = next.len() - 1..next.len();
            let chunk = Chunk { tokens: &next, cache: &mut cache, logits };
            let logits = decoder.forward(&mut [chunk]).unwrap();
            let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            ids.push(best.unwrap() as u32);
            next = vec![ids[ids.len() - 1]];
        }
        ids
    };
    prompts.iter().map(&mut answer).collect()
}

/// Sends requests one after the other until `end` and checks what comes back.
async fn client(
    engine: Engine,
    known: Arc<Vec<(Vec<u32>, Vec<u32>)>>,
    counts: Arc<Counts>,
    id: u64,
    end: Instant,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(id);
    while Instant::now() < end {
        let (prompt, want) = &known[rng.random_range(0..known.len())];
        let max_tokens = rng.random_range(1..=TOKENS);
        let deadline = rng
            .random_bool(0.2)
            .then(|| Instant::now() + Duration::from_micros(rng.random_range(0..20_000)));
        let leaves_after = rng.random_bool(0.2).then(|| rng.random_range(0..max_tokens));
        let mut events = match engine.generate(request(prompt, max_tokens, id, deadline)) {
            Ok(events) => events,
            Err(error) => {
                assert_eq!(error.reason(), Reason::LimitReached);
                let hint = error.retry_after().unwrap();
                assert!((0.1..=30.0).contains(&hint.as_secs_f64()), "{hint:?}");
                counts.refused.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
        };
        let mut ids = Vec::new();
        loop {
            if leaves_after.is_some_and(|after| ids.len() >= after) {
                counts.cancelled.fetch_add(1, Ordering::Relaxed);
                break;
            }
            let event = tokio::time::timeout(PATIENCE, events.recv()).await;
            match event.expect("a request is stuck").expect("an answer has an end") {
                Ok(Event::Tokens { tokens, .. }) => {
                    ids.extend(tokens.iter().map(|t| t.id));
                    assert_eq!(ids, want[..ids.len()]);
                    if rng.random_bool(0.02) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                Ok(Event::Done { cached_prompt_tokens, .. }) => {
                    assert_eq!(ids, want[..max_tokens]);
                    assert!(cached_prompt_tokens < prompt.len());
                    counts.reused.fetch_add(cached_prompt_tokens, Ordering::Relaxed);
                    counts.finished.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(error) => {
                    assert_eq!(error.reason(), Reason::DeadlineExceeded, "{error}");
                    assert!(deadline.is_some_and(|deadline| deadline <= Instant::now()));
                    counts.late.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
        }
        let pages = engine.pages();
        assert!(pages.live <= pages.budget && pages.kept <= pages.budget, "{pages:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_under_fire_answers_right_and_keeps_its_memory() {
    let seconds = std::env::var("PLANISH_SOAK_SECONDS")
        .map_or(10, |text| text.parse().expect("PLANISH_SOAK_SECONDS is a whole number"));
    let mut settings = random::tiny("llama");
    settings["max_position_embeddings"] = 512.into();
    let model = random::model(settings, 3).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut text =
        |length: usize| (0..length).map(|_| rng.random_range(0..96)).collect::<Vec<u32>>();
    let base = text(200);
    let prompts: Vec<Vec<u32>> = [0, 0, 30, 64, 64, 100, 128, 129, 192, 200]
        .iter()
        .zip([1, 90, 40, 10, 70, 30, 64, 5, 1, 40])
        .map(|(same, own)| [&base[..*same], &text(own)].concat())
        .collect();
    let want = answers(&mut Decoder::new(&model).unwrap(), &prompts);
    let known: Arc<Vec<_>> = Arc::new(prompts.into_iter().zip(want).collect());
    let position = Cache::bytes_per_position(model.decoder().unwrap());
    let limits = Limits {
        slots: 4,
        queue: 3,
        context: 300,
        // Less than four of the longest requests take.
        kv_bytes: (14 * PAGE * position) as u64,
        kv_format: CacheFormat::F32,
        prefix_cache: true,
    };
    let engine = Engine::start(model, limits).unwrap();
    assert_eq!(engine.pages().budget, 14);

    let counts = Arc::new(Counts::default());
    let end = Instant::now() + Duration::from_secs(seconds);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|id| tokio::spawn(client(engine.clone(), known.clone(), counts.clone(), id, end)))
        .collect();
    for client in clients {
        client.await.unwrap();
    }

    // No slot is stuck, and every page is kept under its tokens or free.
    let (prompt, want) = &known[9];
    let mut events = engine.generate(request(prompt, TOKENS, 0, None)).unwrap();
    let mut ids = Vec::new();
    while let Some(event) = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap() {
        if let Event::Tokens { tokens, .. } = event.unwrap() {
            ids.extend(tokens.iter().map(|t| t.id));
        }
    }
    assert_eq!(&ids, want);
    let waited = Instant::now();
    while engine.load() != (0, 0) || engine.pages().live != engine.pages().kept {
        assert!(waited.elapsed() < PATIENCE, "{:?} {:?}", engine.load(), engine.pages());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(engine.healthy() && engine.pages().kept > 0);
    let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
    println!(
        "{} finished ({} tokens known), {} cancelled, {} late, {} refused",
        count(&counts.finished),
        count(&counts.reused),
        count(&counts.cancelled),
        count(&counts.late),
        count(&counts.refused)
    );
    assert!(count(&counts.finished) > 0 && count(&counts.reused) > 0);
}
