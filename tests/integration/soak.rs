//! A small engine under random arrivals, cancellations and deadlines, whose adapters come and go
//! meanwhile: `PLANISH_SOAK_SECONDS` says for how long (10 by default). Where it is set, this test should
//! run alone: then the memory of the process is watched too.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use planish::error::Reason;
use planish::models::decoder::plan::adapters::{Fitted, Mix};
use planish::models::decoder::plan::{Cache, CacheFormat, Chunk, Decoder, PAGE};
use planish::models::decoder::{Config, random};
use planish::nn::adapter::Adapter;
use planish::serve::adapters::{Adapters, Held, Stats};
use planish::serve::engine::{Engine, Event, Limits, Request};
use planish::serve::sample::Sampling;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::harness::PATIENCE;

const CLIENTS: u64 = 6;
const TOKENS: usize = 16;
/// Adapters that there are, and those of them that fit into memory at once.
const ADAPTERS: usize = 5;
const ROOM: usize = 3;
/// Adapters and weights that requests ask for.
const MIXES: [&[(usize, f32)]; 7] = [
    &[],
    &[(0, 1.0)],
    &[(1, 1.0)],
    &[(2, -0.75)],
    &[(0, 0.5), (1, -0.5)],
    &[(3, 2.0)],
    &[(4, 1.0), (2, 0.25)],
];
/// Bytes by which the process may grow once it is warm.
const GROWTH: u64 = 8 << 20;

/// What became of the requests.
#[derive(Default)]
struct Counts {
    finished: AtomicUsize,
    cancelled: AtomicUsize,
    late: AtomicUsize,
    refused: AtomicUsize,
    reused: AtomicUsize,
    /// Of those that finished, with adapters.
    adapted: AtomicUsize,
    /// Requests whose adapters found no room.
    crowded: AtomicUsize,
    /// Adapters that were unloaded, and those of them that a request still held.
    unloaded: AtomicUsize,
    held: AtomicUsize,
}

/// The adapters as a server has them: read when they are asked for, dropped when others need the room.
struct Shelf {
    config: Config,
    sources: Vec<Adapter>,
    loaded: Adapters,
    reads: AtomicUsize,
    /// Those that are still in memory somewhere.
    alive: Mutex<Vec<Weak<Fitted>>>,
}

impl Shelf {
    fn new(config: &Config) -> Self {
        let draw = |seed| random::adapter(config, 4, 1.0, seed, |_| true).unwrap();
        let sources: Vec<_> = (0..ADAPTERS as u64).map(draw).collect();
        let room = ROOM as u64 * sources[0].bytes();
        let (config, loaded) = (config.clone(), Adapters::new(room));
        Self { config, sources, loaded, reads: AtomicUsize::new(0), alive: Mutex::default() }
    }

    fn digest(index: usize) -> String {
        format!("adapter {index}")
    }

    fn fitted(&self, index: usize) -> Fitted {
        Fitted::new(&Self::digest(index), &self.sources[index], &self.config).unwrap()
    }

    /// An adapter, or None when those at work take all the room.
    async fn get(&self, index: usize) -> Option<Arc<Fitted>> {
        let open = || async {
            self.reads.fetch_add(1, Ordering::Relaxed);
            // As reading a file does.
            tokio::time::sleep(Duration::from_micros(500)).await;
            Ok(Held::Decoder(Arc::new(self.fitted(index))))
        };
        let bytes = self.sources[index].bytes();
        match self.loaded.get(&Self::digest(index), bytes, open).await {
            Ok(Held::Encoder(_)) => panic!("an adapter of a decoder"),
            Ok(Held::Decoder(adapter)) => {
                let mut alive = self.alive.lock().unwrap();
                alive.retain(|known| known.strong_count() > 0);
                if !alive.iter().any(|known| std::ptr::eq(known.as_ptr(), &raw const *adapter)) {
                    alive.push(Arc::downgrade(&adapter));
                }
                Some(adapter)
            }
            Err(error) => {
                assert_eq!(error.reason(), Reason::LimitReached, "{error}");
                None
            }
        }
    }

    /// The adapters of a request, held for it.
    async fn mix(&self, wanted: &[(usize, f32)]) -> Option<Mix> {
        let mut parts = Vec::new();
        for (index, weight) in wanted {
            parts.push((self.get(*index).await?, *weight));
        }
        Some(Mix::new(parts))
    }

    /// Copies of an adapter that are in memory.
    fn copies(&self, index: usize) -> usize {
        let alive = self.alive.lock().unwrap();
        let digest = Self::digest(index);
        alive.iter().filter_map(Weak::upgrade).filter(|a| a.digest() == digest).count()
    }
}

/// Bytes of the process in memory, where the system says so.
fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Loads and unloads adapters until `end`; what the process took in memory meanwhile.
async fn churn(shelf: Arc<Shelf>, counts: Arc<Counts>, end: Instant) -> Vec<u64> {
    let mut rng = ChaCha8Rng::seed_from_u64(77);
    let (mut memory, mut looked) = (Vec::new(), Instant::now());
    while Instant::now() < end {
        let index = rng.random_range(0..ADAPTERS);
        if rng.random_bool(0.5) {
            shelf.get(index).await;
        } else if shelf.loaded.unload(&Shelf::digest(index)) {
            counts.unloaded.fetch_add(1, Ordering::Relaxed);
            counts.held.fetch_add(usize::from(shelf.copies(index) > 0), Ordering::Relaxed);
        }
        let stats = shelf.loaded.stats();
        assert!(stats.adapters <= ROOM, "{stats:?}");
        if looked.elapsed() > Duration::from_millis(100) {
            looked = Instant::now();
            memory.extend(resident());
        }
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..4000))).await;
    }
    memory
}

fn request(
    prompt: &[u32],
    adapters: Mix,
    max_tokens: usize,
    client: u64,
    deadline: Option<Instant>,
) -> Request {
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
        adapters,
        deadline,
    }
}

/// Greedy answers with adapters, one sequence at a time.
fn answers(decoder: &mut Decoder, prompts: &[Vec<u32>], mix: &Mix) -> Vec<Vec<u32>> {
    let mut answer = |prompt: &Vec<u32>| {
        let mut cache = Cache::new(decoder.config(), prompt.len() + TOKENS);
        let (mut next, mut ids) = (prompt.clone(), Vec::new());
        while ids.len() < TOKENS {
            let logits = next.len() - 1..next.len();
            let chunk = Chunk { tokens: &next, cache: &mut cache, logits };
            let mixes = std::slice::from_ref(mix);
            let logits = decoder.forward_with(&mut [chunk], mixes).unwrap();
            let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            ids.push(best.unwrap() as u32);
            next = vec![ids[ids.len() - 1]];
        }
        ids
    };
    prompts.iter().map(&mut answer).collect()
}

/// Prompts, and what is answered to each with each of the mixes.
struct Known {
    prompts: Vec<Vec<u32>>,
    /// By mix and prompt.
    answers: Vec<Vec<Vec<u32>>>,
}

/// Sends requests one after the other until `end` and checks what comes back.
async fn client(
    engine: Engine,
    shelf: Arc<Shelf>,
    known: Arc<Known>,
    counts: Arc<Counts>,
    id: u64,
    end: Instant,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(id);
    while Instant::now() < end {
        let which = rng.random_range(0..known.prompts.len());
        let with = if rng.random_bool(0.3) { 0 } else { rng.random_range(0..MIXES.len()) };
        let (prompt, want) = (&known.prompts[which], &known.answers[with][which]);
        let Some(mix) = shelf.mix(MIXES[with]).await else {
            counts.crowded.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(2)).await;
            continue;
        };
        let max_tokens = rng.random_range(1..=TOKENS);
        let deadline = rng
            .random_bool(0.2)
            .then(|| Instant::now() + Duration::from_micros(rng.random_range(0..20_000)));
        let leaves_after = rng.random_bool(0.2).then(|| rng.random_range(0..max_tokens));
        let request = request(prompt, mix, max_tokens, id, deadline);
        let mut events = match engine.generate(request) {
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
                    counts.adapted.fetch_add(usize::from(with > 0), Ordering::Relaxed);
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
    let asked = std::env::var("PLANISH_SOAK_SECONDS").ok();
    let seconds = asked
        .as_ref()
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
    let shelf = Arc::new(Shelf::new(model.decoder().unwrap()));
    let mut decoder = Decoder::new(&model).unwrap();
    let mut each = |wanted: &[(usize, f32)]| {
        let part = |(index, weight): &(usize, f32)| (Arc::new(shelf.fitted(*index)), *weight);
        answers(&mut decoder, &prompts, &Mix::new(wanted.iter().map(part)))
    };
    let want: Vec<_> = MIXES.map(&mut each).into();
    for (at, answers) in want.iter().enumerate() {
        assert!(want[..at].iter().all(|other| other != answers), "adapters change what is said");
    }
    drop(decoder);
    let known = Arc::new(Known { prompts, answers: want });
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
        .map(|id| {
            let (shelf, known, counts) = (shelf.clone(), known.clone(), counts.clone());
            tokio::spawn(client(engine.clone(), shelf, known, counts, id, end))
        })
        .collect();
    let churn = tokio::spawn(churn(shelf.clone(), counts.clone(), end));
    for client in clients {
        client.await.unwrap();
    }
    let memory = churn.await.unwrap();

    // No slot is stuck, and every page is kept under its tokens or free.
    for (wanted, answers) in MIXES.iter().zip(&known.answers) {
        let waited = Instant::now();
        // Those that left last hold their adapters until the engine has looked.
        let mix = loop {
            if let Some(mix) = shelf.mix(wanted).await {
                break mix;
            }
            assert!(waited.elapsed() < PATIENCE, "adapters that nobody uses take the room");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let request = request(&known.prompts[9], mix, TOKENS, 0, None);
        let mut events = engine.generate(request).unwrap();
        let mut ids = Vec::new();
        while let Some(event) = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap() {
            if let Event::Tokens { tokens, .. } = event.unwrap() {
                ids.extend(tokens.iter().map(|t| t.id));
            }
        }
        assert_eq!(ids, answers[9]);
    }
    let waited = Instant::now();
    while engine.load() != (0, 0) || engine.pages().live != engine.pages().kept {
        assert!(waited.elapsed() < PATIENCE, "{:?} {:?}", engine.load(), engine.pages());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(engine.healthy() && engine.pages().kept > 0);

    // An adapter that is unloaded and that no request holds is out of memory.
    for index in 0..ADAPTERS {
        shelf.loaded.unload(&Shelf::digest(index));
    }
    assert_eq!(shelf.loaded.stats(), Stats::default());
    let waited = Instant::now();
    while (0..ADAPTERS).any(|index| shelf.copies(index) > 0) {
        assert!(waited.elapsed() < PATIENCE, "an adapter is held for ever");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if asked.is_some() && memory.len() >= 40 {
        let typical = |part: &[u64]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part[part.len() / 2]
        };
        let quarter = memory.len() / 4;
        let warm = typical(&memory[quarter..2 * quarter]);
        let late = typical(&memory[3 * quarter..]);
        println!("{} MB in memory, {} MB at the end", warm >> 20, late >> 20);
        assert!(late <= warm + GROWTH, "{warm} bytes in memory became {late}");
    }
    let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
    println!(
        "{} finished ({} with adapters, {} tokens known), {} cancelled, {} late, {} refused",
        count(&counts.finished),
        count(&counts.adapted),
        count(&counts.reused),
        count(&counts.cancelled),
        count(&counts.late),
        count(&counts.refused)
    );
    println!(
        "{} reads of adapters, {} unloaded ({} while held), {} requests without room for theirs",
        count(&shelf.reads),
        count(&counts.unloaded),
        count(&counts.held),
        count(&counts.crowded)
    );
    assert!(count(&counts.finished) > 0 && count(&counts.reused) > 0);
    assert!(count(&counts.adapted) > 0 && count(&counts.cancelled) > 0);
    assert!(count(&counts.unloaded) > 0 && count(&counts.held) > 0);
    assert!(count(&shelf.reads) > ADAPTERS);
}
