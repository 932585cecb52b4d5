//! Parts of a data set: what is trained on and what is held out.

use rand::Rng as _;

use crate::error::{Error, Reason, Result};
use crate::seed::Stream;

/// How the records that are held out are chosen.
#[derive(Debug, Clone)]
pub enum Choice<'a> {
    /// The last ones of the file.
    Last,
    /// By chance.
    Random(&'a Stream),
    /// By chance, the same share of each class.
    Stratified(&'a Stream, &'a [u32]),
}

/// Two parts of a data set: indices of records from 0, in the order of the file. No index is in both, and
/// every index is in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    pub train: Vec<usize>,
    pub held_out: Vec<usize>,
}

/// Holds out `share` of `records`, to the nearest whole number but at least one, and leaves at least one.
/// The same arguments give the same parts. Stratified, each class gives its share rounded down, and those
/// who lost most by that give one more until the total is reached; a class never gives all it has.
///
/// # Errors
/// `INVALID_FIELD` (of `share`) for shares outside of (0, 1), `DATASET_UNSUITABLE` for fewer than two
/// records, and for classes that cannot give any.
pub fn split(records: usize, share: f64, choice: &Choice<'_>) -> Result<Split> {
    if !(share > 0.0 && share < 1.0) {
        return Err(Error::field("share", format!("{share} is not between 0 and 1")));
    }
    if records < 2 {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!("{records} record cannot be split into two parts; choose a larger data set"),
        ));
    }
    let wanted = ((records as f64 * share).round() as usize).clamp(1, records - 1);
    let mut out = vec![false; records];
    match choice {
        Choice::Last => out[records - wanted..].fill(true),
        Choice::Random(stream) => {
            let all: Vec<usize> = (0..records).collect();
            draw(all, wanted, &stream.child("split"), &mut out);
        }
        Choice::Stratified(stream, classes) => {
            if classes.len() != records {
                return Err(Error::internal("a split needs the class of every record"));
            }
            let count = classes.iter().max().map_or(0, |class| *class as usize + 1);
            let mut members = vec![Vec::new(); count];
            for (index, class) in classes.iter().enumerate() {
                members[*class as usize].push(index);
            }
            let takes = shares(&members.iter().map(Vec::len).collect::<Vec<_>>(), share, wanted);
            for (class, (members, take)) in members.into_iter().zip(takes).enumerate() {
                draw(members, take, &stream.child(&format!("split/{class}")), &mut out);
            }
        }
    }
    if !out.contains(&true) {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            "no class has two records, so that none can be held out; split without regard to classes",
        ));
    }
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for (index, out) in out.into_iter().enumerate() {
        if out { held_out.push(index) } else { train.push(index) }
    }
    Ok(Split { train, held_out })
}

/// Marks `take` of `members`, chosen by the stream.
fn draw(mut members: Vec<usize>, take: usize, stream: &Stream, out: &mut [bool]) {
    let mut rng = stream.rng();
    for i in 0..take.min(members.len()) {
        let other = rng.random_range(i..members.len());
        members.swap(i, other);
        out[members[i]] = true;
    }
}

/// How many each class gives.
fn shares(sizes: &[usize], share: f64, wanted: usize) -> Vec<usize> {
    let exact = |size: usize| size as f64 * share;
    let mut takes: Vec<usize> = sizes.iter().map(|&size| exact(size) as usize).collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by(|&a, &b| {
        exact(sizes[b]).fract().total_cmp(&exact(sizes[a]).fract()).then(a.cmp(&b))
    });
    let mut missing = wanted.saturating_sub(takes.iter().sum());
    for class in order {
        if missing > 0 && takes[class] + 1 < sizes[class] {
            takes[class] += 1;
            missing -= 1;
        }
    }
    takes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted_union(split: &Split) -> Vec<usize> {
        let mut all = [split.train.clone(), split.held_out.clone()].concat();
        all.sort_unstable();
        all
    }

    #[test]
    fn parts_are_disjoint_and_whole_for_every_choice() {
        let stream = Stream::root(7);
        for records in [2, 3, 10, 101] {
            let classes: Vec<u32> = (0..records as u32).map(|i| i * i % 3).collect();
            let all: Vec<usize> = (0..records).collect();
            for share in [0.001, 0.1, 0.5, 0.77, 0.999] {
                let wanted = ((records as f64 * share).round() as usize).clamp(1, records - 1);
                let choices =
                    [Choice::Last, Choice::Random(&stream), Choice::Stratified(&stream, &classes)];
                // With fewer records no class may have two.
                let choices = &choices[..if records < 10 { 2 } else { 3 }];
                for choice in choices {
                    let parts = split(records, share, choice).unwrap();
                    assert_eq!(sorted_union(&parts), all);
                    assert!(parts.train.is_sorted() && parts.held_out.is_sorted());
                    assert_eq!(parts, split(records, share, choice).unwrap());
                    match choice {
                        Choice::Stratified(..) => assert!(parts.held_out.len() <= wanted),
                        _ => assert_eq!(parts.held_out.len(), wanted),
                    }
                }
            }
        }
    }

    #[test]
    fn the_last_are_the_last_and_seeds_differ() {
        let last = split(10, 0.25, &Choice::Last).unwrap();
        assert_eq!(last.held_out, [7, 8, 9]);
        let of = |seed| split(1000, 0.5, &Choice::Random(&Stream::root(seed))).unwrap();
        assert_ne!(of(1), of(2));
        // A fair draw of 500 of 1000 puts about 250 into the first half (s.d. 8).
        let early = of(1).held_out.iter().filter(|index| **index < 500).count();
        assert!((200..300).contains(&early), "{early}");
    }

    #[test]
    fn classes_keep_their_shares() {
        // 50, 30, 7 and 1 of the classes: a fifth is 10, 6, 1.4 and 0.2, together 18 (of 17.6).
        let sizes = [50, 30, 7, 1];
        assert_eq!(shares(&sizes, 0.2, 18), [10, 6, 2, 0]);
        let classes: Vec<u32> =
            (0..4).flat_map(|class: u32| vec![class; sizes[class as usize]]).collect();
        let stream = Stream::root(3);
        let parts = split(88, 0.2, &Choice::Stratified(&stream, &classes)).unwrap();
        let mut counts = [0; 4];
        for index in &parts.held_out {
            counts[classes[*index] as usize] += 1;
        }
        assert_eq!(counts, [10, 6, 2, 0]);
        // A class of one keeps it, whatever the share.
        let parts = split(3, 0.9, &Choice::Stratified(&stream, &[0, 1, 1])).unwrap();
        assert_eq!(parts.train.len(), 2);
        assert!(parts.train.contains(&0));
    }

    #[test]
    fn impossible_splits_are_refused() {
        for share in [0.0, 1.0, -0.5, f64::NAN, f64::INFINITY] {
            assert_eq!(split(9, share, &Choice::Last).unwrap_err().reason(), Reason::InvalidField);
        }
        let stream = Stream::root(3);
        let alone = Choice::Stratified(&stream, &[0, 1]);
        for (records, choice) in [(0, Choice::Last), (1, Choice::Last), (2, alone)] {
            let error = split(records, 0.5, &choice).unwrap_err();
            assert_eq!(error.reason(), Reason::DatasetUnsuitable);
        }
    }
}
