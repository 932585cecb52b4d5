//! Heads that make classes, numbers or tags of an encoder's states: `s W^T + b`.

use crate::error::{Error, Reason, Result};

/// What a head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// A class of each text.
    Classification,
    /// A number of each text.
    Regression,
    /// A tag of each word, by its first token.
    Tagging,
}

/// A linear layer over states.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    pub task: Task,
    /// Names of the outputs; none of a number.
    pub labels: Vec<String>,
    hidden: usize,
    /// `[outputs, hidden]`
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Head {
    /// # Errors
    /// MALFORMED_FILE for parts that do not fit each other, MODEL_UNSUITABLE for a width that is not
    /// `hidden`, the model's.
    pub fn new(
        task: Task,
        labels: Vec<String>,
        (shape, weight): (&[usize], Vec<f32>),
        bias: Vec<f32>,
        hidden: usize,
    ) -> Result<Self> {
        let malformed = |problem: String| {
            Error::new(
                Reason::MalformedFile,
                format!("the head of the adapter {problem}; export it again"),
            )
        };
        let &[outputs, width] = shape else {
            return Err(malformed(format!("has the shape {shape:?} instead of two dimensions")));
        };
        if width != hidden {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                format!(
                    "the head of the adapter is for states of {width} values, and those of the model \
                     have {hidden}; name the model that it was trained on"
                ),
            ));
        }
        let wanted = match task {
            Task::Regression => 1,
            Task::Classification | Task::Tagging => labels.len(),
        };
        let held = outputs.checked_mul(width);
        if outputs == 0 || outputs != wanted || bias.len() != outputs || held != Some(weight.len())
        {
            return Err(malformed(format!(
                "has {outputs} outputs, {} numbers in its bias and {} labels",
                bias.len(),
                labels.len()
            )));
        }
        if weight.iter().chain(&bias).any(|v| !v.is_finite()) {
            return Err(malformed("holds numbers that are not finite".to_owned()));
        }
        Ok(Self { task, labels, hidden, weight, bias })
    }

    /// The weight `[outputs, hidden]` and the bias.
    pub fn parts(&self) -> (&[f32], &[f32]) {
        (&self.weight, &self.bias)
    }

    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// Whether it reads the state of each token, not one vector of the text.
    pub fn of_tokens(&self) -> bool {
        self.task == Task::Tagging
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        (size_of_val(&self.weight[..]) + size_of_val(&self.bias[..])) as u64
    }

    /// Scores `[rows, outputs]` of states `[rows, hidden]`; sums in f64.
    pub fn scores(&self, states: &[f32]) -> Vec<f32> {
        let rows = states.chunks_exact(self.hidden);
        let score = |row: &[f32], weight: &[f32], bias: f32| {
            let products = row.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w));
            (products.sum::<f64>() + f64::from(bias)) as f32
        };
        rows.flat_map(|row| {
            let weights = self.weight.chunks_exact(self.hidden).zip(&self.bias);
            weights.map(move |(weight, bias)| score(row, weight, *bias))
        })
        .collect()
    }
}

/// Probabilities of scores; the largest score decides what may overflow.
pub fn probabilities(scores: &[f32]) -> Vec<f32> {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let parts: Vec<f64> = scores.iter().map(|s| f64::from(s - top).exp()).collect();
    let sum: f64 = parts.iter().sum();
    parts.into_iter().map(|part| (part / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(task: Task, labels: &[&str]) -> Result<Head> {
        let labels = labels.iter().map(|l| (*l).to_owned()).collect();
        let weight = (&[2, 3][..], vec![1.0, 0.0, -1.0, 0.5, 0.5, 0.5]);
        Head::new(task, labels, weight, vec![0.0, 10.0], 3)
    }

    #[test]
    fn scores_worked_out_by_hand() {
        let head = head(Task::Tagging, &["a", "b"]).unwrap();
        assert!(head.of_tokens());
        assert_eq!((head.outputs(), head.bytes()), (2, 32));
        // [1, 2, 3]: 1 - 3 and 3 + 10; [0, 0, 2]: -2 and 1 + 10.
        assert_eq!(head.scores(&[1.0, 2.0, 3.0, 0.0, 0.0, 2.0]), [-2.0, 13.0, -2.0, 11.0]);
    }

    #[test]
    fn probabilities_add_up_and_do_not_overflow() {
        let p = probabilities(&[1000.0, 1000.0 + 3.0_f32.ln(), f32::MIN]);
        assert!((p[0] - 0.25).abs() < 1e-4 && (p[1] - 0.75).abs() < 1e-4 && p[2] == 0.0, "{p:?}");
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        assert_eq!(head(Task::Regression, &[]).unwrap_err().reason(), Reason::MalformedFile);
        let error = head(Task::Classification, &["a"]).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile);
        let new = |shape: &[usize], count: usize, hidden| {
            let labels = vec!["a".to_owned(), "b".to_owned()];
            let weight = (shape, vec![1.0; count]);
            Head::new(Task::Classification, labels, weight, vec![0.0; 2], hidden)
        };
        assert!(new(&[2, 3], 6, 3).is_ok());
        assert_eq!(new(&[2, 3], 6, 4).unwrap_err().reason(), Reason::ModelUnsuitable);
        for (shape, count) in [(&[2, 3][..], 5), (&[6], 6), (&[3, 3], 9), (&[usize::MAX, 3], 6)] {
            assert_eq!(new(shape, count, 3).unwrap_err().reason(), Reason::MalformedFile);
        }
        let labels = vec!["a".to_owned(), "b".to_owned()];
        let nan = (&[2, 1][..], vec![f32::NAN; 2]);
        let error = Head::new(Task::Classification, labels, nan, vec![0.0; 2], 1).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile);
    }
}
