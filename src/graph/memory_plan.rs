//! Where the tensors of a step lie in one arena, and the bytes that the step needs.
//!
//! Tensors get a place each, so that no two that are there at the same time overlap, in as small an arena as is found
//! by placing the largest first. Results of the step are in the arena where there is room, up to the end of the step.
//! Whoever gets them may keep them: what has its place there in a later step is made elsewhere then.
//!
//! The plan decides nothing about correctness: a place whose tensor is still there, against the plan, is not lent
//! ([`Pool`](crate::tensor::Pool)), and memory with another owner is not taken.

use std::cmp::Reverse;
use std::collections::HashMap;

use burn_ir::TensorId;

/// Where tensors lie in the arena of a step.
#[derive(Debug, Default)]
pub(crate) struct MemoryPlan {
    places: HashMap<TensorId, usize>,
    size: usize,
    /// The most bytes beside the arena, if results stay, and if they leave when they are given.
    beside: [usize; 2],
}

impl MemoryPlan {
    /// Bytes of the arena.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The bytes that the step needs at most beside parameters, inputs and constants, from its second run on: of the
    /// arena, which stays, of the results, all of them if the caller `keeps` them, and of what burn makes meanwhile.
    pub(crate) fn needed(&self, keeps: bool) -> usize {
        self.size + self.beside[usize::from(!keeps)]
    }

    /// Where a tensor begins, if it is in the arena.
    pub(crate) fn place(&self, id: TensorId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    /// The plan in which tensors get places, the largest first. Those that leave the step get one where there is room
    /// for them anyway: as far up as can be, so that if they stay for longer they are in the way of few others in the
    /// next run.
    pub(super) fn new(ending: Vec<Lifetime>, leaving: Vec<Lifetime>) -> Self {
        let mut plan = Self::default();
        let mut placed: Vec<(Lifetime, usize)> = Vec::with_capacity(ending.len() + leaving.len());
        for one in largest_first(ending) {
            let start = gap(taken(&placed, &one), one.bytes);
            plan.size = plan.size.max(start + one.bytes);
            placed.push((one, start));
        }
        for one in largest_first(leaving) {
            if let Some(start) = last_gap(taken(&placed, &one), one.bytes, plan.size) {
                placed.push((one, start));
            }
        }
        plan.places = placed.into_iter().map(|(one, start)| (one.tensor, start)).collect();
        plan
    }

    /// The same with the bytes beside the arena, if results stay, and if they leave when they are given.
    pub(super) fn with_beside(self, beside: [usize; 2]) -> Self {
        Self { beside, ..self }
    }
}

/// How long a tensor is there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    pub(super) tensor: TensorId,
    pub(super) bytes: usize,
    /// The numbers of the first and the last instruction that it is there for.
    pub(super) born: usize,
    pub(super) ends: usize,
}

fn largest_first(mut lifetimes: Vec<Lifetime>) -> Vec<Lifetime> {
    lifetimes.sort_by_key(|one| (Reverse(one.bytes), one.born));
    lifetimes
}

/// The places of what is there at the same time as a tensor.
fn taken(placed: &[(Lifetime, usize)], one: &Lifetime) -> Vec<(usize, usize)> {
    let meet = |(other, _): &&(Lifetime, usize)| other.born <= one.ends && one.born <= other.ends;
    placed.iter().filter(meet).map(|(other, start)| (*start, start + other.bytes)).collect()
}

/// The begin of the smallest gap that has so many bytes, between places that may overlap each other.
fn gap(mut taken: Vec<(usize, usize)>, bytes: usize) -> usize {
    taken.sort_unstable();
    let (mut end, mut best) = (0, None);
    for (from, to) in taken {
        if from >= end + bytes && best.is_none_or(|(_, size)| from - end < size) {
            best = Some((end, from - end));
        }
        end = end.max(to);
    }
    best.map_or(end, |(start, _)| start)
}

/// Where so many bytes begin that end with the last gap below `size` that has room for them.
fn last_gap(mut taken: Vec<(usize, usize)>, bytes: usize, size: usize) -> Option<usize> {
    taken.sort_unstable();
    taken.push((size, size));
    let (mut end, mut last) = (0, None);
    for (from, to) in taken {
        if from >= end + bytes {
            last = Some(from - bytes);
        }
        end = end.max(to);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_the_smallest_that_is_large_enough() {
        assert_eq!(gap(vec![], 7), 0);
        assert_eq!(gap(vec![(10, 20), (0, 3)], 7), 3);
        assert_eq!(gap(vec![(10, 20), (0, 3)], 8), 20);
        assert_eq!(gap(vec![(20, 30), (0, 15), (2, 4), (33, 40)], 3), 30);
        assert_eq!(gap(vec![(0, 9), (2, 4), (3, 12)], 1), 12);
    }

    #[test]
    fn what_leaves_ends_with_the_last_gap() {
        assert_eq!(last_gap(vec![], 7, 6), None);
        assert_eq!(last_gap(vec![], 7, 9), Some(2));
        assert_eq!(last_gap(vec![(10, 20), (0, 3)], 7, 21), Some(3));
        assert_eq!(last_gap(vec![(10, 20), (0, 3)], 6, 20), Some(4));
        assert_eq!(last_gap(vec![(10, 12), (0, 20)], 1, 20), None);
        assert_eq!(last_gap(vec![(4, 8), (0, 6)], 2, 40), Some(38));
    }
}
