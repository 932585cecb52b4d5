//! How the rows of a step are shared out.

use super::sequence::Need;

/// Rows of a step: so long can a running stream be held up by others' prompts.
pub const STEP: usize = 256;
/// Rows that prompts get at least when very many streams run.
const PROMPTS: usize = 32;
/// Rows of a step whose logits are all wanted: they take `vocab` floats each.
const SCORES: usize = 64;

/// Shares of a step, kept between steps.
#[derive(Default)]
pub struct Shares {
    /// Rows of each sequence.
    pub counts: Vec<usize>,
    wants: Vec<usize>,
}

impl Shares {
    /// Gives every stream its row and shares what is left of the step equally between the prompts; what
    /// a short one does not need goes to the others, the earlier first where rows are fewer than prompts.
    pub fn set(&mut self, needs: impl Iterator<Item = Need> + Clone) {
        let Self { counts, wants } = self;
        // Scores first among themselves: what they may take of the step.
        wants.clear();
        wants.extend(needs.clone().map(|need| match need {
            Need::Scores(rows) => rows,
            _ => 0,
        }));
        counts.clear();
        counts.resize(wants.len(), 0);
        pour(SCORES, wants, counts);
        let mut streams = 0;
        for (need, (want, most)) in needs.clone().zip(wants.iter_mut().zip(counts.iter_mut())) {
            *want = match need {
                Need::Prompt(rows) => rows,
                Need::Scores(_) => *most,
                Need::Token | Need::Nothing => 0,
            };
            *most = 0;
            streams += usize::from(need == Need::Token);
        }
        pour(STEP.saturating_sub(streams).max(PROMPTS), wants, counts);
        for (need, count) in needs.zip(counts) {
            if need == Need::Token {
                *count = 1;
            }
        }
    }
}

/// Shares `room` out: equally, but nobody gets more than it wants.
fn pour(mut room: usize, wants: &[usize], counts: &mut [usize]) {
    loop {
        let open = wants.iter().zip(&*counts).filter(|(want, count)| count < want).count();
        if open == 0 || room == 0 {
            return;
        }
        let share = (room / open).max(1);
        for (want, count) in wants.iter().zip(counts.iter_mut()) {
            let more = (want - *count).min(share).min(room);
            *count += more;
            room -= more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(needs: &[Need]) -> Vec<usize> {
        let mut shares = Shares::default();
        shares.set(needs.iter().copied());
        shares.counts
    }

    #[test]
    fn rows_are_shared_equally_and_none_is_lost() {
        use Need::{Nothing, Prompt, Scores, Token};
        assert_eq!(shares(&[]), [0; 0]);
        assert_eq!(shares(&[Prompt(1000)]), [256]);
        assert_eq!(shares(&[Prompt(1000), Prompt(10)]), [246, 10]);
        assert_eq!(
            shares(&[Prompt(1000), Token, Nothing, Prompt(2000), Token]),
            [127, 1, 0, 127, 1]
        );
        assert_eq!(shares(&[Prompt(40), Prompt(1000), Prompt(1000)]), [40, 108, 108]);
        assert_eq!(shares(&[Scores(500)]), [64]);
        assert_eq!(shares(&[Scores(10), Scores(500), Prompt(500)]), [10, 54, 192]);
        // A row that does not divide goes to the first.
        assert_eq!(shares(&[Prompt(300), Prompt(300), Prompt(300)]), [86, 85, 85]);
    }

    #[test]
    fn streams_always_get_their_row_and_prompts_some() {
        let mut needs = vec![Need::Token; 300];
        needs.extend([Need::Prompt(90); 40]);
        let counts = shares(&needs);
        assert!(counts[..300].iter().all(|count| *count == 1));
        assert_eq!(counts[300..332], [1; 32]);
        assert_eq!(counts[332..], [0; 8]);
    }
}
