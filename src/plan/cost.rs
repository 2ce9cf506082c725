//! The cost of a plan.

use crate::layout::Layout;

/// What one training step costs a rank under a plan, as far as it can be told from its operations.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PlanCost {
    /// Collectives of a step.
    pub collectives: usize,
    /// Bytes that a rank sends for them, as in a ring.
    pub collective_bytes: f64,
    /// Bytes of the parameters that a rank holds.
    pub parameter_bytes: f64,
    /// Floating-point operations of a rank: of matrix products and convolutions, and one for each element that any
    /// other operation makes.
    pub work: f64,
}

impl PlanCost {
    /// All of it in bytes sent: a collective takes as long as 8192 of them to begin, 16 operations take as long as one
    /// of them, and an optimizer as AdamW goes over a parameter, its gradient and two moments.
    pub fn total(&self) -> f64 {
        self.collective_bytes + 8192.0 * self.collectives as f64 + 4.0 * self.parameter_bytes + self.work / 16.0
    }
}

/// Which of some groups of parameters must be split, whatever it costs: the largest, until they have nine tenths of the
/// bytes. A plan that splits nothing would often be the cheapest, and no use.
pub(crate) fn must_split(bytes: &[usize]) -> Vec<bool> {
    let mut largest_first: Vec<usize> = (0..bytes.len()).collect();
    largest_first.sort_by_key(|group| std::cmp::Reverse(bytes[*group]));
    let most = bytes.iter().sum::<usize>() * 9 / 10;
    let (mut so_far, mut must) = (0, vec![false; bytes.len()]);
    for group in largest_first {
        must[group] = so_far < most;
        so_far += bytes[group];
    }
    must
}

/// Says so if a plan that was looked for splits no parameter.
pub(crate) fn warn_of_nothing_split(mut layouts: impl Iterator<Item = Layout>, degree: usize) {
    if degree > 1 && layouts.all(|layout| layout == Layout::Replicated) {
        log::warn!(
            "the plan that is suggested for {degree} ranks splits no parameter: the degree fits no dim of any of them"
        );
    }
}
