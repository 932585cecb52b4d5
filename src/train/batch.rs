//! Batches: rows of tokens of one width, with what is wanted at each position or of each row.
//!
//! A row holds one document and padding, or, packed, several documents. Tokens see only those of their own
//! document: the model looks at [`Batch::segments`] or takes the documents one by one from
//! [`Batch::documents`], and counts positions from the document's start.

use std::ops::Range;

use rand::Rng;

use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Result};
use crate::seed::Stream;

/// Stands where no label is wanted.
pub const NO_LABEL: u32 = u32::MAX;

/// What is wanted of a batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// For each position the token that follows it, or [`NO_LABEL`]: `[rows * width]`.
    Next(Vec<u32>),
    /// For each position the token that stood there before it was hidden, or [`NO_LABEL`].
    Masked(Vec<u32>),
    /// For each position a tag, or [`NO_LABEL`].
    Tags(Vec<u32>),
    /// For each row a class: `[rows]`.
    Classes(Vec<u32>),
    /// For each row a number: `[rows]`.
    Values(Vec<f32>),
    /// For each row any number of classes: `[rows]`.
    Labels(Vec<Vec<u32>>),
    /// For each position the token that follows it, or [`NO_LABEL`]; a row holds two documents, of which the
    /// first is preferred.
    Pairs(Vec<u32>),
}

/// Rows that go through the model together.
#[derive(Debug, Clone)]
pub struct Batch {
    pub rows: usize,
    /// Tokens of a row, with padding.
    pub width: usize,
    /// `[rows * width]`, row after row.
    pub tokens: Vec<u32>,
    /// Place of each token in its document, from 0; 0 in padding.
    pub positions: Vec<u32>,
    /// Number of each token's document in its row, from 1 and rising; 0 in padding, which ends a row.
    pub segments: Vec<u32>,
    pub targets: Targets,
    /// Random numbers of this batch (dropout); a stream for each purpose.
    pub random: Stream,
}

impl Batch {
    /// What the loss counts: labelled positions, or rows.
    pub fn counted(&self) -> u64 {
        let labels = match &self.targets {
            Targets::Next(labels) | Targets::Masked(labels) | Targets::Tags(labels) => labels,
            Targets::Classes(rows) => return rows.len() as u64,
            Targets::Values(rows) => return rows.len() as u64,
            Targets::Labels(rows) => return rows.len() as u64,
            Targets::Pairs(_) => return self.rows as u64,
        };
        labels.iter().filter(|label| **label != NO_LABEL).count() as u64
    }

    /// Tokens that are not padding.
    pub fn used(&self) -> usize {
        self.segments.iter().filter(|segment| **segment != 0).count()
    }

    /// The documents as ranges of `0..rows * width`, in their order.
    pub fn documents(&self) -> Vec<Range<usize>> {
        let mut documents = Vec::new();
        for row in 0..self.rows {
            let (mut start, end) = (row * self.width, (row + 1) * self.width);
            while start < end && self.segments[start] != 0 {
                let segment = self.segments[start];
                let run = self.segments[start..end].iter().take_while(|s| **s == segment);
                let next = start + run.count();
                documents.push(start..next);
                start = next;
            }
        }
        documents
    }
}

/// A part of a sequence: tokens `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub sequence: usize,
    pub start: usize,
    pub end: usize,
}

impl Piece {
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// How tokens are hidden for masked language modelling, as BERT's are: of those chosen 80 % become the mask
/// token, 10 % a random one and 10 % stay.
#[derive(Debug, Clone, PartialEq)]
pub struct Masking {
    /// Share of the tokens that may be hidden which are chosen, at least one a document.
    pub share: f64,
    /// The token that says that one is hidden.
    pub token: u32,
    /// Random tokens are below this.
    pub vocabulary: u32,
    /// Tokens that are never hidden and never drawn, sorted.
    pub special: Vec<u32>,
}

/// Makes batches from pieces.
#[derive(Debug, Clone)]
pub struct Maker<'a> {
    pub sequences: &'a [Sequence],
    /// The token of padding; it is never looked at.
    pub padding: u32,
    /// Hides tokens instead of asking for the next ones.
    pub masking: Option<&'a Masking>,
}

impl Maker<'_> {
    /// The batch whose rows are the given pieces, in their order.
    pub fn batch(&self, rows: &[&[Piece]], random: Stream) -> Result<Batch> {
        let width = rows.iter().map(|row| row.iter().map(Piece::len).sum()).max().unwrap_or(0);
        let size = rows.len() * width;
        let mut batch = Batch {
            rows: rows.len(),
            width,
            tokens: vec![self.padding; size],
            positions: vec![0; size],
            segments: vec![0; size],
            targets: self.empty(rows, size)?,
            random,
        };
        for (row, pieces) in rows.iter().enumerate() {
            let mut at = row * width;
            for (piece, segment) in pieces.iter().zip(1..) {
                let sequence = &self.sequences[piece.sequence];
                let places = at..at + piece.len();
                batch.tokens[places.clone()]
                    .copy_from_slice(&sequence.tokens[piece.start..piece.end]);
                batch.segments[places.clone()].fill(segment);
                for (position, place) in (0..).zip(places.clone()) {
                    batch.positions[place] = position;
                }
                if let Target::Pair { chosen, .. } = &sequence.target {
                    // Such a row has one piece: the second document of it begins within.
                    let second = (places.start + chosen).min(places.end)..places.end;
                    batch.segments[second.clone()].fill(segment + 1);
                    for (position, place) in (0..).zip(second) {
                        batch.positions[place] = position;
                    }
                }
                self.label(&mut batch.targets, row, at, piece)?;
                at = places.end;
            }
        }
        if let Some(masking) = self.masking {
            hide(masking, &mut batch)?;
        }
        Ok(batch)
    }

    /// Targets of the kind of the first piece, with nothing wanted yet.
    fn empty(&self, rows: &[&[Piece]], size: usize) -> Result<Targets> {
        let first = rows.iter().find_map(|row| row.first());
        let first = first.ok_or_else(|| Error::internal("a batch without a piece"))?;
        Ok(match self.sequences[first.sequence].target {
            Target::Next(_) => Targets::Next(vec![NO_LABEL; size]),
            Target::Tags(_) => Targets::Tags(vec![NO_LABEL; size]),
            Target::Class(_) => Targets::Classes(Vec::with_capacity(rows.len())),
            Target::Value(_) => Targets::Values(Vec::with_capacity(rows.len())),
            Target::Labels(_) => Targets::Labels(Vec::with_capacity(rows.len())),
            Target::Pair { .. } => Targets::Pairs(vec![NO_LABEL; size]),
            Target::Hidden(_) => return Err(Error::internal("tokens are hidden by the loop")),
        })
    }

    /// Writes what is wanted of a piece that stands at `at` of the flat batch.
    fn label(&self, targets: &mut Targets, row: usize, at: usize, piece: &Piece) -> Result<()> {
        let sequence = &self.sequences[piece.sequence];
        match (targets, &sequence.target) {
            (Targets::Next(labels), Target::Next(counts)) => {
                for i in piece.start + 1..piece.end {
                    if counts[i] {
                        labels[at + i - 1 - piece.start] = sequence.tokens[i];
                    }
                }
            }
            (Targets::Tags(labels), Target::Tags(tags)) => {
                for i in piece.start..piece.end {
                    labels[at + i - piece.start] = tags[i].unwrap_or(NO_LABEL);
                }
            }
            // A row is one document here, which `order` sees to.
            (Targets::Classes(classes), Target::Class(class)) if classes.len() == row => {
                classes.push(*class);
            }
            (Targets::Values(values), Target::Value(value)) if values.len() == row => {
                values.push(*value);
            }
            (Targets::Labels(all), Target::Labels(classes)) if all.len() == row => {
                all.push(classes.clone());
            }
            (Targets::Pairs(labels), Target::Pair { chosen, counts }) => {
                for i in piece.start + 1..piece.end {
                    // Nothing before the second document predicts its first token.
                    if counts[i] && i != *chosen {
                        labels[at + i - 1 - piece.start] = sequence.tokens[i];
                    }
                }
            }
            _ => {
                let line = sequence.line;
                return Err(Error::internal(format!("line {line}: a target of another kind")));
            }
        }
        Ok(())
    }
}

/// Hides tokens of a batch that asked for the next ones: those that may be predicted may be hidden.
fn hide(masking: &Masking, batch: &mut Batch) -> Result<()> {
    let Targets::Next(next) = &batch.targets else {
        return Err(Error::internal("only texts can be hidden"));
    };
    let mut random = batch.random.child("mask").rng();
    let mut labels = vec![NO_LABEL; next.len()];
    let special = |token: u32| masking.special.binary_search(&token).is_ok();
    for document in batch.documents() {
        // The label before a token says whether that counts.
        let counts = |i: &usize| next[*i - 1] != NO_LABEL && !special(batch.tokens[*i]);
        let mut places: Vec<usize> = (document.start + 1..document.end).filter(counts).collect();
        if places.is_empty() {
            continue;
        }
        let chosen = (masking.share * places.len() as f64).round() as usize;
        for i in 0..chosen.clamp(1, places.len()) {
            let other = random.random_range(i..places.len());
            places.swap(i, other);
            let place = places[i];
            labels[place] = batch.tokens[place];
            batch.tokens[place] = match random.random_range(0..10) {
                0..8 => masking.token,
                8 => draw(masking, &mut random, batch.tokens[place]),
                _ => batch.tokens[place],
            };
        }
    }
    batch.targets = Targets::Masked(labels);
    Ok(())
}

/// A random token that is not special; `fallback` where it is hard to find one.
fn draw(masking: &Masking, random: &mut impl Rng, fallback: u32) -> u32 {
    let mut tries = (0..64).map(|_| random.random_range(0..masking.vocabulary.max(1)));
    tries.find(|token| masking.special.binary_search(token).is_err()).unwrap_or(fallback)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(tokens: &[u32], counts: &[bool]) -> Sequence {
        Sequence { tokens: tokens.into(), target: Target::Next(counts.into()), line: 1 }
    }

    fn piece(sequence: usize, start: usize, end: usize) -> Piece {
        Piece { sequence, start, end }
    }

    fn maker(sequences: &[Sequence]) -> Maker<'_> {
        Maker { sequences, padding: 99, masking: None }
    }

    const N: u32 = NO_LABEL;

    #[test]
    fn padded_rows_ask_for_the_next_token_where_it_counts() {
        let sequences =
            [next(&[1, 2, 3, 4], &[false, true, false, true]), next(&[5, 6], &[false, true])];
        let rows: [&[Piece]; 2] = [&[piece(0, 0, 4)], &[piece(1, 0, 2)]];
        let batch = maker(&sequences).batch(&rows, Stream::root(1)).unwrap();
        assert_eq!((batch.rows, batch.width), (2, 4));
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 6, 99, 99]);
        assert_eq!(batch.segments, [1, 1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(batch.positions, [0, 1, 2, 3, 0, 1, 0, 0]);
        assert_eq!(batch.targets, Targets::Next(vec![2, N, 4, N, 6, N, N, N]));
        assert_eq!((batch.counted(), batch.used()), (3, 6));
        assert_eq!(batch.documents(), [0..4, 4..6]);
    }

    #[test]
    fn packed_documents_have_their_own_segments_and_positions() {
        let sequences = [next(&[1, 2], &[true; 2]), next(&[3, 4, 5], &[true; 3])];
        let rows: [&[Piece]; 1] = [&[piece(0, 0, 2), piece(1, 0, 3)]];
        let batch = maker(&sequences).batch(&rows, Stream::root(1)).unwrap();
        assert_eq!(batch.segments, [1, 1, 2, 2, 2]);
        assert_eq!(batch.positions, [0, 1, 0, 1, 2]);
        // The last token of a document does not predict the first of the next.
        assert_eq!(batch.targets, Targets::Next(vec![2, N, 4, 5, N]));
        assert_eq!(batch.documents(), [0..2, 2..5]);
    }

    #[test]
    fn rows_have_classes_values_and_tags() {
        let with = |target| Sequence { tokens: vec![7, 8], target, line: 3 };
        let (one, two): (&[Piece], &[Piece]) = (&[piece(0, 0, 2)], &[piece(1, 0, 2)]);
        let made = |a, b| {
            let sequences = [with(a), with(b)];
            maker(&sequences).batch(&[one, two], Stream::root(1)).map(|batch| batch.targets)
        };
        let classes = made(Target::Class(3), Target::Class(0)).unwrap();
        assert_eq!(classes, Targets::Classes(vec![3, 0]));
        let values = made(Target::Value(0.5), Target::Value(-1.0)).unwrap();
        assert_eq!(values, Targets::Values(vec![0.5, -1.0]));
        let tags = made(Target::Tags(vec![None, Some(2)]), Target::Tags(vec![Some(0), None]));
        assert_eq!(tags.unwrap(), Targets::Tags(vec![N, 2, 0, N]));
        assert!(made(Target::Class(0), Target::Value(0.0)).is_err());
    }

    #[test]
    fn hidden_tokens_are_the_share_asked_for_and_never_special() {
        let tokens: Vec<u32> = (0..200).map(|i| 10 + i % 50).collect();
        let mut counts = vec![true; 200];
        counts[0] = false;
        let sequences = [next(&tokens, &counts), next(&[1, 11, 2], &[false, true, true])];
        let masking = Masking { share: 0.2, token: 5, vocabulary: 60, special: vec![1, 2, 5] };
        let maker = Maker { sequences: &sequences, padding: 0, masking: Some(&masking) };
        let rows: [&[Piece]; 2] = [&[piece(0, 0, 200)], &[piece(1, 0, 3)]];
        let batch = maker.batch(&rows, Stream::root(4)).unwrap();
        let Targets::Masked(labels) = &batch.targets else { panic!("{:?}", batch.targets) };
        let hidden: Vec<usize> = (0..400).filter(|i| labels[*i] != N).collect();
        // 40 of 199, and the only token of the second that is not special.
        assert_eq!(hidden.iter().filter(|i| **i < 200).count(), 40);
        assert_eq!(hidden.last(), Some(&201));
        assert!(hidden.iter().all(|i| *i == 201 || labels[*i] == tokens[*i]));
        let masked = hidden.iter().filter(|i| batch.tokens[**i] == 5).count();
        assert!((25..=40).contains(&masked), "{masked} of 41");
        assert!((0..200).all(|i| labels[i] != N || batch.tokens[i] == tokens[i]));
        let again = maker.batch(&rows, Stream::root(4)).unwrap();
        assert_eq!((again.tokens, again.targets), (batch.tokens, batch.targets));
    }
}
