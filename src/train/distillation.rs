//! Learning from another decoder: beside the text's own tokens, the distribution that a teacher gives to each.
//!
//! The teacher runs on each batch, or ran once on every sequence and left its likeliest tokens. All logits of
//! a text would be thousands of bytes a token and vocabulary entry; the states before the head are the same
//! for a fraction, so logits are made of them, some rows at a time, when the student's are.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::data::sequence::Sequence;
use crate::error::{Error, Reason, Result};
use crate::models::decoder::graph::Graph;
use crate::nn::ops::{Answers, Linear, Loss, Network, Pool, Run, Sequences, Tape, Value, Weights};
use crate::nn::tuning::Frozen;
use crate::progress::Progress;

/// Tokens that the teacher sees at once where it runs ahead.
const CHUNK_TOKENS: usize = 1024;
/// Bytes of logits that are in memory at once.
const LOGITS: usize = 64 << 20;
/// Bytes of kept answers, at most.
const MOST_BYTES: u64 = 8 << 30;

/// An objective with a teacher: `kl KL(teacher || student) + ce CE`, both summed over predictions.
pub struct Distillation<'a> {
    teacher: Teacher<'a>,
    weights: Weights,
    seen: Cell<Parts>,
}

/// Where the teacher's answers come from.
pub enum Teacher<'a> {
    /// There is none: cross-entropy only.
    None,
    /// It runs.
    Online(Online<'a>),
    /// It ran.
    Known(&'a Known),
}

/// What was seen of both losses, each by itself, in sums over predictions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Parts {
    pub kl: f64,
    pub ce: f64,
    pub count: u64,
}

impl Parts {
    /// Means over predictions.
    pub fn means(&self) -> [f64; 2] {
        let count = self.count.max(1) as f64;
        [self.kl / count, self.ce / count]
    }
}

impl<'a> Distillation<'a> {
    pub fn new(teacher: Teacher<'a>, weights: Weights) -> Self {
        Self { teacher, weights, seen: Cell::default() }
    }

    /// What was seen since the last time this was asked.
    pub fn take(&self) -> Parts {
        self.seen.take()
    }

    /// The loss of `normed` states of `rows` of these sequences.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for a teacher with another vocabulary; INTERNAL for sequences that it did not see.
    pub(super) fn loss(
        &self,
        graph: &Graph<'_>,
        run: &Run<'_>,
        normed: &Value,
        (tokens, rows, targets): (&[u32], &[u32], &[u32]),
    ) -> Result<Loss> {
        let head = graph.head()?;
        let states;
        let known;
        let answers = match &self.teacher {
            Teacher::None => Answers::None,
            Teacher::Online(online) => {
                let teacher = online.head()?;
                if teacher.rows() != head.rows() {
                    return Err(Error::new(
                        Reason::ModelUnsuitable,
                        format!(
                            "the teacher knows {} tokens, the student {}; they need one vocabulary",
                            teacher.rows(),
                            head.rows()
                        ),
                    ));
                }
                states = online.states(tokens, run.sequences, rows)?;
                Answers::States(&states, teacher)
            }
            Teacher::Known(all) => {
                known = all.of(tokens, run.sequences)?;
                Answers::Top { k: all.k, tokens: &known.tokens, logs: &known.logs }
            }
        };
        let cap = graph.config().final_softcap;
        let found = run.tape.distilled(normed, head, targets, answers, cap, self.weights)?;
        let mut seen = self.seen.get();
        seen.kl += found.kl;
        seen.ce += found.ce;
        seen.count += targets.len() as u64;
        self.seen.set(seen);
        Ok(found.loss)
    }
}

/// A teacher that runs.
pub struct Online<'a> {
    graph: Arc<Graph<'a>>,
    pool: Pool,
}

impl<'a> Online<'a> {
    pub fn new(graph: Arc<Graph<'a>>) -> Self {
        Self { graph, pool: Pool::default() }
    }

    fn head(&self) -> Result<&Linear> {
        Ok(self.graph.head()?.as_ref())
    }

    /// The states before the head, of some rows.
    fn states(&self, tokens: &[u32], sequences: &Sequences, rows: &[u32]) -> Result<Vec<f32>> {
        let tape = Tape::forgetful(&self.pool);
        let run = Run { tape: &tape, tuning: &Frozen, sequences, training: false, read: true };
        let hidden = self.graph.start(&run, tokens)?;
        let hidden = self.graph.through(&run, hidden)?;
        let normed = self.graph.normed(&run, &tape.rows(&hidden, &rows.into())?)?;
        Ok(normed.read().to_vec())
    }

    /// Logits of states, a chunk of rows at a time, capped.
    fn each_row(&self, states: &[f32], mut work: impl FnMut(&mut [f32])) -> Result<()> {
        let head = self.head()?;
        let (outputs, width) = (head.rows(), head.cols());
        let each = (LOGITS / size_of::<f32>() / outputs).max(1);
        let mut logits = vec![0.0; each.min(states.len() / width) * outputs];
        for states in states.chunks(each * width) {
            let logits = &mut logits[..states.len() / width * outputs];
            head.multiply(states, logits);
            if let Some(cap) = self.graph.config().final_softcap {
                logits.iter_mut().for_each(|v| *v = cap * (*v / cap).tanh());
            }
            logits.chunks_exact_mut(outputs).for_each(&mut work);
        }
        Ok(())
    }
}

/// What a teacher said of sequences, by their tokens.
pub struct Known {
    k: usize,
    answers: HashMap<Vec<u32>, Said>,
}

#[derive(Default)]
struct Said {
    tokens: Vec<u32>,
    logs: Vec<f32>,
}

impl Known {
    /// Bytes of the answers to so many predictions.
    pub fn bytes(predictions: u64, k: usize) -> u64 {
        predictions.saturating_mul(8).saturating_mul(k as u64)
    }

    /// The `k` likeliest tokens of every prediction in `sequences`, which predict all tokens but the first.
    ///
    /// # Errors
    /// `LIMIT_REACHED` for answers that would not fit into memory; `CANCELLED`.
    pub fn new(
        teacher: &Online<'_>,
        sequences: &[Sequence],
        k: usize,
        progress: &Progress,
    ) -> Result<Self> {
        let k = k.min(teacher.head()?.rows());
        let predictions: usize = sequences.iter().map(|s| s.tokens.len().saturating_sub(1)).sum();
        let bytes = Self::bytes(predictions as u64, k);
        if bytes > MOST_BYTES {
            return Err(Error::new(
                Reason::LimitReached,
                format!(
                    "the teacher's answers would take {bytes} bytes; lower top_k or the text, or let the \
                     teacher run online"
                ),
            ));
        }
        let mut answers = HashMap::with_capacity(sequences.len());
        let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(1).max(1);
        let some = (CHUNK_TOKENS / longest).max(1);
        for (i, part) in sequences.chunks(some).enumerate() {
            let done = (i * some) as f64 / sequences.len() as f64;
            progress.report(done, "asking the teacher")?;
            let together = Sequences::of(part.iter().map(|s| s.tokens.len()));
            let tokens: Vec<u32> = part.iter().flat_map(|s| s.tokens.iter().copied()).collect();
            let rows: Vec<u32> = together
                .ranges()
                .iter()
                .flat_map(|range| range.start..range.end.saturating_sub(1).max(range.start))
                .map(|row| row as u32)
                .collect();
            let states = teacher.states(&tokens, &together, &rows)?;
            let (mut said, mut order) = (Said::default(), Vec::new());
            teacher.each_row(&states, |logits| likeliest(logits, k, &mut order, &mut said))?;
            let mut at = 0;
            for sequence in part {
                let count = sequence.tokens.len().saturating_sub(1) * k;
                let own = Said {
                    tokens: said.tokens[at..at + count].to_vec(),
                    logs: said.logs[at..at + count].to_vec(),
                };
                at += count;
                answers.insert(sequence.tokens.clone(), own);
            }
        }
        Ok(Self { k, answers })
    }

    /// The answers to sequences that stand one after another.
    fn of(&self, tokens: &[u32], sequences: &Sequences) -> Result<Said> {
        let mut all = Said::default();
        for range in sequences.ranges().iter() {
            let said = self.answers.get(&tokens[range.clone()]).ok_or_else(|| {
                Error::internal("a sequence was not among those that the teacher saw")
            })?;
            all.tokens.extend(&said.tokens);
            all.logs.extend(&said.logs);
        }
        Ok(all)
    }
}

/// Adds the likeliest tokens of a row, the lowest of equal ones first.
fn likeliest(logits: &[f32], k: usize, order: &mut Vec<u32>, said: &mut Said) {
    let sum = crate::kernels::softmax::log_sum_exp(logits);
    order.clear();
    order.extend(0..logits.len() as u32);
    let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, by);
        order.truncate(k);
    }
    order.sort_unstable_by(by);
    said.tokens.extend(order.iter());
    said.logs.extend(order.iter().map(|t| (f64::from(logits[*t as usize]) - sum) as f32));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sequence::Target;
    use crate::models::Model;
    use crate::models::decoder::random;
    use crate::nn::ops::Precision;
    use crate::train::parameters::Parameters;
    use crate::train::pass::{InPlace, Options, Pass};

    fn sequences() -> Vec<Sequence> {
        let sequence = |start: u32, length: u32| Sequence {
            tokens: (0..length).map(|i| (i * 29 + start) % 96).collect(),
            target: Target::Next((0..length).map(|i| i > 0).collect()),
            line: 1,
        };
        vec![sequence(5, 14), sequence(50, 9)]
    }

    fn loss(student: &Model, distillation: &Distillation<'_>) -> Parts {
        let parameters = Parameters::new();
        let tuning = InPlace(&parameters);
        let graph = Graph::new(student, Precision::F32).unwrap();
        let pass = Pass::decoder(graph, &tuning, Options::default()).distilled(distillation);
        let all = sequences();
        let sums = pass.loss(&all.iter().collect::<Vec<_>>(), &parameters).unwrap();
        let parts = distillation.take();
        assert_eq!(parts.count, sums.count);
        parts
    }

    #[test]
    fn a_teacher_is_told_apart_and_its_likeliest_tokens_say_less() {
        for architecture in ["llama", "gemma3_text"] {
            let teacher = random::model(random::tiny(architecture), 1).unwrap();
            let student = random::model(random::tiny(architecture), 2).unwrap();
            let graph = |model| Arc::new(Graph::new(model, Precision::F32).unwrap());
            let online = || Teacher::Online(Online::new(graph(&teacher)));
            fn of(student: &Model, teacher: Teacher<'_>) -> Parts {
                loss(student, &Distillation::new(teacher, Weights { kl: 1.0, ce: 0.5 }))
            }
            let same = of(&teacher, online());
            assert_eq!(same.kl, 0.0, "the teacher itself");
            let full = of(&student, online());
            assert!(full.kl > 0.01, "{full:?}");
            let plain = of(&student, Teacher::None);
            assert_eq!((plain.kl, plain.count), (0.0, full.count));
            assert!((plain.ce - full.ce).abs() < 1e-5 * full.ce);
            let mut last = 0.0;
            for k in [1, 8, 95, 96, 500] {
                let asked = Online::new(graph(&teacher));
                let known = Known::new(&asked, &sequences(), k, &Progress::silent()).unwrap();
                let parts = of(&student, Teacher::Known(&known));
                assert!(parts.kl >= last - 1e-4 && parts.kl <= full.kl + 1e-3, "{k}: {parts:?}");
                last = parts.kl;
            }
            assert!((last - full.kl).abs() < 1e-3 * full.kl, "all tokens are the whole");
        }
    }

    #[test]
    fn other_vocabularies_and_unknown_sequences_are_refused() {
        let teacher = random::model(random::tiny("llama"), 1).unwrap();
        let mut config = random::tiny("llama");
        config["vocab_size"] = serde_json::json!(100);
        let student = random::model(config, 2).unwrap();
        let graph = Arc::new(Graph::new(&teacher, Precision::F32).unwrap());
        let parameters = Parameters::new();
        let weights = Weights { kl: 1.0, ce: 0.0 };
        let try_with = |model, teacher| {
            let distillation = Distillation::new(teacher, weights);
            let tuning = InPlace(&parameters);
            let graph = Graph::new(model, Precision::F32).unwrap();
            let pass = Pass::decoder(graph, &tuning, Options::default()).distilled(&distillation);
            let all = sequences();
            pass.loss(&all.iter().collect::<Vec<_>>(), &parameters).unwrap_err().reason()
        };
        let online = Teacher::Online(Online::new(graph.clone()));
        assert_eq!(try_with(&student, online), Reason::ModelUnsuitable);
        let online = Online::new(graph);
        let known = Known::new(&online, &sequences()[..1], 4, &Progress::silent()).unwrap();
        assert_eq!(try_with(&teacher, Teacher::Known(&known)), Reason::Internal);
    }

    #[test]
    fn the_objective_is_the_weighted_sum_of_both() {
        let teacher = random::model(random::tiny("llama"), 1).unwrap();
        let student = random::model(random::tiny("llama"), 2).unwrap();
        let graph = |model| Graph::new(model, Precision::F32).unwrap();
        let parameters = Parameters::new();
        let tuning = InPlace(&parameters);
        let all = sequences();
        let all: Vec<&Sequence> = all.iter().collect();
        for (kl, ce) in [(1.0, 0.1), (2.0, 0.0), (0.0, 1.0)] {
            let online = Teacher::Online(Online::new(Arc::new(graph(&teacher))));
            let distillation = Distillation::new(online, Weights { kl, ce });
            let pass = Pass::decoder(graph(&student), &tuning, Options::default());
            let sums = pass.distilled(&distillation).loss(&all, &parameters).unwrap();
            let parts = distillation.take();
            assert!(parts.kl > 0.0 && parts.ce > 0.0);
            let want = kl * parts.kl + ce * parts.ce;
            assert!((sums.loss - want).abs() < 1e-6 * want, "{} is not {want}", sums.loss);
            // Means over predictions, as of 14 and 9 tokens.
            assert_eq!(parts.count, 13 + 8);
            assert!((parts.means()[0] - parts.kl / 21.0).abs() < 1e-12);
        }
    }
}
