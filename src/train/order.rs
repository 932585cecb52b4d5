//! Which rows go into which batch: cutting, packing, shuffling, grouping by length.
//!
//! All of it follows from the sequences, the options and a named random stream. So the number of updates
//! done says where in the data a run stands, and nothing else needs to be kept to go on there.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng;

use super::batch::{Batch, Maker, Masking, Piece};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::seed::Stream;

/// Batches whose rows are sorted by length together, where rows are grouped: enough for little padding,
/// few enough that batches differ from epoch to epoch.
const GROUP: usize = 50;

/// How sequences become batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches of an update.
    pub accumulation: usize,
    /// Tokens of a row, at most.
    pub max_length: usize,
    /// Several documents in a row.
    pub packing: bool,
    /// Rows of about the same length in a batch.
    pub group_by_length: bool,
    pub padding: u32,
    pub masking: Option<Masking>,
}

/// The rows of a data set and their order.
pub struct Order<'a> {
    sequences: &'a [Sequence],
    options: &'a Options,
    /// The pieces of each row.
    rows: Vec<Vec<Piece>>,
    random: Stream,
    shuffled: bool,
    /// An epoch and its batches, as indices of rows.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl<'a> Order<'a> {
    /// Training: every epoch in another order.
    ///
    /// # Errors
    /// `DATASET_UNSUITABLE` when nothing is left to learn from, or a record that cannot be cut is longer
    /// than a row.
    pub fn shuffled(
        sequences: &'a [Sequence],
        options: &'a Options,
        random: Stream,
    ) -> Result<Self> {
        Self::new(sequences, options, random, true)
    }

    /// Evaluation: the same batches each time, the longest rows first.
    pub fn fixed(sequences: &'a [Sequence], options: &'a Options, random: Stream) -> Result<Self> {
        Self::new(sequences, options, random, false)
    }

    fn new(
        sequences: &'a [Sequence],
        options: &'a Options,
        random: Stream,
        shuffled: bool,
    ) -> Result<Self> {
        if options.batch_size == 0 || options.accumulation == 0 || options.max_length < 2 {
            return Err(Error::internal("batches of nothing"));
        }
        let mut pieces = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            cut(index, sequence, options.max_length, &mut pieces)?;
        }
        if pieces.is_empty() {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                "no record has anything to predict; records need at least two tokens, and chats an answer",
            ));
        }
        let mut rows: Vec<Vec<Piece>> = match options.packing {
            true => pack(pieces, options.max_length),
            false => pieces.into_iter().map(|piece| vec![piece]).collect(),
        };
        if !shuffled {
            rows.sort_by_key(|row| std::cmp::Reverse(length(row)));
        }
        Ok(Self { sequences, options, rows, random, shuffled, epoch: None })
    }

    /// Rows of an epoch.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Tokens of an epoch, without padding.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(|row| length(row)).sum()
    }

    /// The longest row.
    pub fn width(&self) -> usize {
        self.rows.iter().map(|row| length(row)).max().unwrap_or(0)
    }

    /// Batches of an epoch; the last may be smaller.
    pub fn batches(&self) -> usize {
        self.rows.len().div_ceil(self.options.batch_size)
    }

    /// Updates of an epoch; the last may have fewer batches.
    pub fn updates(&self) -> usize {
        self.batches().div_ceil(self.options.accumulation)
    }

    /// Batches of update `update`, which counts from 0 over all epochs.
    pub fn batches_of(&self, update: u64) -> usize {
        let first = (update % self.updates() as u64) as usize * self.options.accumulation;
        (self.batches() - first).min(self.options.accumulation)
    }

    /// Batch `micro` of update `update`.
    pub fn batch(&mut self, update: u64, micro: usize) -> Result<Batch> {
        let (epoch, place) = (update / self.updates() as u64, update % self.updates() as u64);
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, self.arrange(epoch)));
        }
        let index = place as usize * self.options.accumulation + micro;
        let batches = self.epoch.as_ref().map(|(_, batches)| batches.as_slice());
        let rows = batches.and_then(|batches| batches.get(index));
        let rows = rows.ok_or_else(|| Error::internal("a batch beyond the end of an epoch"))?;
        let rows: Vec<&[Piece]> = rows.iter().map(|row| self.rows[*row].as_slice()).collect();
        let maker = Maker {
            sequences: self.sequences,
            padding: self.options.padding,
            masking: self.options.masking.as_ref(),
        };
        maker.batch(&rows, self.random.child(&format!("update {update}/batch {micro}")))
    }

    /// The batches of an epoch.
    fn arrange(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        let size = self.options.batch_size;
        if !self.shuffled {
            return order.chunks(size).map(<[usize]>::to_vec).collect();
        }
        let random = self.random.child(&format!("epoch {epoch}"));
        shuffle(&mut order, &random.child("rows"));
        if self.options.group_by_length {
            for group in order.chunks_mut(GROUP.saturating_mul(size)) {
                group.sort_by_key(|row| std::cmp::Reverse(length(&self.rows[*row])));
            }
        }
        let mut batches: Vec<Vec<usize>> = order.chunks(size).map(<[usize]>::to_vec).collect();
        if self.options.group_by_length {
            // Without this, every epoch would go through lengths in the same direction. The small batch
            // stays last, so that updates keep their sizes.
            let whole = self.rows.len() / size;
            shuffle(&mut batches[..whole], &random.child("batches"));
        }
        batches
    }
}

/// Tokens of a row.
fn length(row: &[Piece]) -> usize {
    row.iter().map(Piece::len).sum()
}

/// Shuffles by Fisher and Yates.
fn shuffle<T>(items: &mut [T], random: &Stream) {
    let mut random = random.rng();
    for i in (1..items.len()).rev() {
        let other = random.random_range(0..=i);
        items.swap(i, other);
    }
}

/// The pieces of a sequence. A text that is longer than a row is cut so that each piece begins with the
/// last token of the one before: so every token but the first is predicted once. What predicts nothing is
/// left out.
fn cut(
    index: usize,
    sequence: &Sequence,
    max_length: usize,
    pieces: &mut Vec<Piece>,
) -> Result<()> {
    let length = sequence.tokens.len();
    let labels = match &sequence.target {
        Target::Next(counts) => counts.len(),
        Target::Tags(tags) => tags.len(),
        Target::Hidden(tokens) => tokens.len(),
        Target::Pair { chosen, counts } if *chosen < length => counts.len(),
        Target::Pair { .. } => 0,
        Target::Class(_) | Target::Value(_) | Target::Labels(_) => length,
    };
    if labels != length {
        return Err(Error::internal(format!(
            "line {}: {length} tokens with {labels} targets",
            sequence.line
        )));
    }
    let Target::Next(counts) = &sequence.target else {
        // A pair is two sequences.
        let two = matches!(sequence.target, Target::Pair { .. });
        let max_length = if two { max_length.saturating_mul(2) } else { max_length };
        if length == 0 || length > max_length {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!(
                    "line {}: {length} tokens do not fit into 1 to {max_length}; raise max_length, or \
                     shorten or leave out the record",
                    sequence.line
                ),
            ));
        }
        pieces.push(Piece { sequence: index, start: 0, end: length });
        return Ok(());
    };
    let mut start = 0;
    while start + 1 < length {
        let end = length.min(start + max_length);
        if counts[start + 1..end].contains(&true) {
            pieces.push(Piece { sequence: index, start, end });
        }
        start = end - 1;
    }
    Ok(())
}

/// Puts pieces into rows, the longest first, each into the fullest row that has room.
fn pack(mut pieces: Vec<Piece>, max_length: usize) -> Vec<Vec<Piece>> {
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.len()));
    let mut rows: Vec<Vec<Piece>> = Vec::new();
    let mut by_room: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for piece in pieces {
        let fullest = by_room.range(piece.len()..).next();
        let place = fullest.and_then(|(room, rows)| Some((*room, *rows.first()?)));
        let (room, row) = match place {
            Some((room, row)) => {
                if let Some(others) = by_room.get_mut(&room) {
                    others.remove(&row);
                    if others.is_empty() {
                        by_room.remove(&room);
                    }
                }
                (room, row)
            }
            None => {
                rows.push(Vec::new());
                (max_length, rows.len() - 1)
            }
        };
        let room = room - piece.len();
        rows[row].push(piece);
        // A document needs two tokens.
        if room > 1 {
            by_room.entry(room).or_default().insert(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::train::batch::{NO_LABEL, Targets};

    fn text(index: usize, length: usize) -> Sequence {
        // Tokens say where they are from.
        let tokens = (0..length).map(|i| (index * 1000 + i) as u32).collect();
        let counts = (0..length).map(|i| i > 0).collect();
        Sequence { tokens, target: Target::Next(counts), line: index as u64 + 1 }
    }

    fn options(max_length: usize, packing: bool) -> Options {
        Options {
            batch_size: 3,
            accumulation: 2,
            max_length,
            packing,
            group_by_length: false,
            padding: 0,
            masking: None,
        }
    }

    /// How often each token is predicted in the epoch that begins with update `first`.
    fn predicted(order: &mut Order<'_>, first: u64) -> BTreeMap<u32, usize> {
        let mut predicted = BTreeMap::new();
        for update in first..first + order.updates() as u64 {
            for micro in 0..order.batches_of(update) {
                let batch = order.batch(update, micro).unwrap();
                let Targets::Next(labels) = &batch.targets else { panic!("another target") };
                for (place, label) in labels.iter().enumerate() {
                    if *label != NO_LABEL {
                        // It follows its predecessor, in the same document.
                        assert_eq!(batch.tokens[place] + 1, *label);
                        assert_eq!(batch.tokens[place + 1], *label);
                        assert_eq!(batch.segments[place], batch.segments[place + 1]);
                        *predicted.entry(*label).or_default() += 1;
                    }
                }
                for document in batch.documents() {
                    let source = batch.tokens[document.start] / 1000;
                    assert!(document.clone().all(|i| batch.tokens[i] / 1000 == source));
                    let positions = &batch.positions[document.clone()];
                    assert!(positions.iter().copied().eq(0..positions.len() as u32));
                }
            }
        }
        predicted
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn no_token_is_lost_and_none_is_predicted_twice(
            lengths in proptest::collection::vec(0usize..40, 1..20),
            max_length in 2usize..17,
            packing: bool,
            group_by_length: bool,
        ) {
            let sequences: Vec<_> =
                lengths.iter().enumerate().map(|(i, n)| text(i, *n)).collect();
            let options = Options { group_by_length, ..options(max_length, packing) };
            let order = Order::shuffled(&sequences, &options, Stream::root(1));
            let wanted: BTreeMap<u32, usize> = sequences
                .iter()
                .flat_map(|s| s.tokens.iter().skip(1).map(|t| (*t, 1)))
                .collect();
            let Ok(mut order) = order else {
                prop_assert!(wanted.is_empty());
                return Ok(());
            };
            prop_assert!(order.width() <= max_length);
            prop_assert_eq!(&predicted(&mut order, 0), &wanted);
            let later = order.updates() as u64 * 2;
            prop_assert_eq!(&predicted(&mut order, later), &wanted);
        }
    }

    #[test]
    fn packing_fills_rows() {
        // 7 + 3, 6 + 4, 5 + 5 is what fits into ten.
        let sequences: Vec<_> =
            [7, 5, 3, 4, 6, 5].iter().enumerate().map(|(i, n)| text(i, *n)).collect();
        let options = options(10, true);
        let order = Order::shuffled(&sequences, &options, Stream::root(1)).unwrap();
        assert_eq!((order.rows(), order.tokens(), order.width()), (3, 30, 10));
    }

    #[test]
    fn epochs_differ_and_streams_decide() {
        let sequences: Vec<_> = (0..30).map(|i| text(i, 5)).collect();
        let options = options(8, false);
        let firsts = |seed: u64, update: u64| {
            let mut order = Order::shuffled(&sequences, &options, Stream::root(seed)).unwrap();
            assert_eq!((order.batches(), order.updates()), (10, 5));
            let batch = order.batch(update, 0).unwrap();
            (0..3).map(|row| batch.tokens[row * batch.width]).collect::<Vec<_>>()
        };
        assert_eq!(firsts(1, 0), firsts(1, 0));
        assert_ne!(firsts(1, 0), firsts(1, 5));
        assert_ne!(firsts(1, 0), firsts(2, 0));
    }

    #[test]
    fn the_ends_of_epochs_are_smaller() {
        let sequences: Vec<_> = (0..7).map(|i| text(i, 5)).collect();
        let options = options(8, false);
        let mut order = Order::shuffled(&sequences, &options, Stream::root(1)).unwrap();
        assert_eq!((order.batches(), order.updates()), (3, 2));
        assert_eq!((order.batches_of(0), order.batches_of(1), order.batches_of(2)), (2, 1, 2));
        assert_eq!(order.batch(1, 0).unwrap().rows, 1);
        assert!(order.batch(1, 1).is_err());
    }

    #[test]
    fn grouping_saves_padding() {
        let sequences: Vec<_> = (0..60).map(|i| text(i, 2 + i * 7 % 60)).collect();
        let padding = |group_by_length: bool| {
            let options = Options { group_by_length, ..options(64, false) };
            let mut order = Order::shuffled(&sequences, &options, Stream::root(1)).unwrap();
            let mut padding = 0;
            for update in 0..order.updates() as u64 {
                for micro in 0..order.batches_of(update) {
                    let batch = order.batch(update, micro).unwrap();
                    padding += batch.tokens.len() - batch.used();
                }
            }
            padding
        };
        assert!(padding(true) * 4 < padding(false), "{} {}", padding(true), padding(false));
    }

    #[test]
    fn what_cannot_be_cut_names_its_line() {
        let long = Sequence { tokens: vec![1; 9], target: Target::Class(0), line: 42 };
        let options = options(8, false);
        let error = Order::shuffled(std::slice::from_ref(&long), &options, Stream::root(1));
        let error = error.err().unwrap();
        assert_eq!(error.reason(), Reason::DatasetUnsuitable);
        assert!(error.message().contains("line 42: 9 tokens"), "{error}");
        let silent = Sequence { tokens: vec![1; 5], target: Target::Next(vec![false; 5]), line: 1 };
        let error = Order::fixed(&[silent], &options, Stream::root(1)).err().unwrap();
        assert_eq!(error.reason(), Reason::DatasetUnsuitable);
    }
}
