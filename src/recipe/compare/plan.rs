//! The order of work: a tree of steps, in which arms that begin alike share what they have in common.

use std::collections::HashMap;

use crate::methods::registry;
use crate::proto::v1;

/// A step to take once, for every run below it.
#[derive(Debug)]
pub struct Node {
    /// The node whose model this step starts from; none: the base.
    pub parent: Option<usize>,
    /// The step, every option written out.
    pub step: v1::Step,
    /// Number of the step in its recipe, from 0.
    pub index: usize,
    /// The seed it is taken with.
    pub seed: u64,
    pub children: Vec<usize>,
    /// Runs whose recipe ends here.
    pub runs: Vec<usize>,
}

/// A measurement of an arm with a seed.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the arm.
    pub arm: usize,
    /// Absent for arms that draw no random numbers: one run stands for all seeds.
    pub seed: Option<u64>,
    /// Where its model comes from; none for arms without steps.
    pub node: Option<usize>,
}

/// What is to be done, in order: [`Plan::roots`] from left to right, each with all below it.
#[derive(Debug, Default)]
pub struct Plan {
    pub nodes: Vec<Node>,
    /// Steps that start from the base. All arms come with the first seed, then all with the second, so
    /// that an early end leaves whole columns and not whole arms out.
    pub roots: Vec<usize>,
    pub runs: Vec<Run>,
    /// Steps that were not put down a second time, over all arms and seeds.
    pub shared: usize,
}

impl Plan {
    /// Plans a comparison whose defaults are written out.
    pub fn new(comparison: &v1::Comparison) -> Self {
        let mut plan = Self::default();
        let mut known: HashMap<(Option<usize>, Vec<u8>, u64), usize> = HashMap::new();
        let first = comparison.seeds.first().copied().unwrap_or_default();
        for &seed in &comparison.seeds {
            for (a, arm) in comparison.arms.iter().enumerate() {
                let draws: Vec<bool> = arm
                    .steps
                    .iter()
                    .scan(false, |drawn, step| {
                        *drawn |= seeded(step);
                        Some(*drawn)
                    })
                    .collect();
                let tuned = arm.tuning.is_some();
                let drawn = draws.last().copied().unwrap_or(false) || tuned;
                if !drawn && seed != first {
                    plan.shared += arm.steps.len();
                    continue;
                }
                let mut parent = None;
                for (index, (step, drawn)) in arm.steps.iter().zip(&draws).enumerate() {
                    let seed = if *drawn { seed } else { first };
                    let key = (parent, prost::Message::encode_to_vec(step), seed);
                    let next = plan.nodes.len();
                    let node = *known.entry(key).or_insert(next);
                    if node == next {
                        let (step, children, runs) = (step.clone(), Vec::new(), Vec::new());
                        plan.nodes.push(Node { parent, step, index, seed, children, runs });
                        let siblings = match parent {
                            Some(parent) => &mut plan.nodes[parent].children,
                            None => &mut plan.roots,
                        };
                        siblings.push(node);
                    } else {
                        plan.shared += 1;
                    }
                    parent = Some(node);
                }
                if let Some(node) = parent {
                    plan.nodes[node].runs.push(plan.runs.len());
                }
                plan.runs.push(Run { arm: a, seed: drawn.then_some(seed), node: parent });
            }
        }
        plan
    }
}

fn seeded(step: &v1::Step) -> bool {
    registry::method(step).is_ok_and(crate::methods::Method::seeded)
}

#[cfg(test)]
mod tests {
    use super::super::resolve;
    use super::super::testing::{arm, comparison, round, wanda};
    use super::*;

    fn plan(arms: Vec<v1::Arm>, seeds: &[u64]) -> Plan {
        let mut comparison = comparison(arms);
        comparison.seeds = seeds.to_vec();
        Plan::new(&resolve(&comparison))
    }

    #[test]
    fn common_beginnings_are_taken_once() {
        let arms = vec![
            arm("a", vec![wanda(0.5), round(4)]),
            arm("b", vec![wanda(0.5), round(8)]),
            arm("c", vec![wanda(0.5)]),
            arm("d", vec![round(4)]),
        ];
        let plan = plan(arms, &[0]);
        assert_eq!((plan.nodes.len(), plan.shared), (4, 2));
        assert_eq!(plan.roots, [0, 3]);
        assert_eq!(plan.nodes[0].children, [1, 2]);
        assert_eq!(plan.nodes[0].runs, [2]);
        assert_eq!((plan.nodes[1].index, plan.nodes[3].index), (1, 0));
        let nodes: Vec<_> = plan.runs.iter().map(|run| run.node).collect();
        assert_eq!(nodes, [Some(1), Some(2), Some(0), Some(3)]);
    }

    #[test]
    fn tunings_draw_and_their_steps_are_shared() {
        let tuned = |name: &str, steps: Vec<v1::Step>| {
            let mut arm = arm(name, steps);
            arm.tuning = Some(v1::Tuning::default());
            arm
        };
        let arms =
            vec![tuned("a", Vec::new()), tuned("b", vec![round(4)]), arm("c", vec![round(4)])];
        let plan = plan(arms, &[7, 8]);
        let runs: Vec<_> = plan.runs.iter().map(|run| (run.arm, run.seed, run.node)).collect();
        let expected = [
            (0, Some(7), None),
            (1, Some(7), Some(0)),
            (2, None, Some(0)),
            (0, Some(8), None),
            (1, Some(8), Some(0)),
        ];
        assert_eq!(runs, expected);
        assert_eq!((plan.nodes.len(), plan.nodes[0].runs.as_slice()), (1, &[1, 2, 4][..]));
    }

    #[test]
    fn seeds_multiply_only_what_draws_random_numbers() {
        let arms = vec![
            arm("round", vec![round(4)]),
            arm("wanda", vec![wanda(0.5)]),
            arm("both", vec![round(8), wanda(0.5)]),
            arm("as-it-is", Vec::new()),
        ];
        let plan = plan(arms, &[7, 8, 9]);
        let runs: Vec<_> = plan.runs.iter().map(|run| (run.arm, run.seed)).collect();
        let expected = [
            (0, None),
            (1, Some(7)),
            (2, Some(7)),
            (3, None),
            (1, Some(8)),
            (2, Some(8)),
            (1, Some(9)),
            (2, Some(9)),
        ];
        assert_eq!(runs, expected);
        // round, wanda three times, round once for both's three wandas.
        assert_eq!(plan.nodes.len(), 1 + 3 + 1 + 3);
        assert_eq!(plan.shared, 12 - 8);
        assert_eq!(plan.nodes[plan.runs[5].node.expect("a step")].parent, plan.nodes[3].parent);
        assert_eq!(plan.runs[3].node, None);
    }
}
