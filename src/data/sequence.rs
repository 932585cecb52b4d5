//! A record as training and evaluation take it: tokens, and what is wanted of them.

/// What is wanted of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// The tokens themselves: `true` at `i` where predicting token `i` counts. As long as the tokens. For a
    /// decoder, which predicts from the tokens before, the first is never true; for an encoder, which
    /// sees a blank in its place, special tokens are never true.
    Next(Vec<bool>),
    /// The index of a class.
    Class(u32),
    /// A number.
    Value(f32),
    /// The index of a tag for each token; `None` where no tag is wanted (special tokens, later pieces of a
    /// word).
    Tags(Vec<Option<u32>>),
    /// The indices of any number of classes.
    Labels(Vec<u32>),
    /// For each place the token that stood there before it was hidden; `None` where none was.
    Hidden(Vec<Option<u32>>),
    /// Two sequences one after the other, of which the first is preferred: its tokens, and `true` at `i` where
    /// predicting token `i` counts, as in [`Target::Next`], for both.
    Pair { chosen: usize, counts: Vec<bool> },
}

/// A tokenised record.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    pub target: Target,
    /// The line of the file it came from, from 1.
    pub line: u64,
}
