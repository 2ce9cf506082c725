//! The memory plan of a step: where its tensors lie, and the bytes that it needs.
//!
//! It is known before the step runs when each tensor is made and read for the last time ([`BufferLifetimes`]). Tensors
//! that this crate makes, that are large and that end within the step get a place each in one block, so that no two
//! that are there at the same time overlap, in as small a block as is found by placing the largest first. Results of
//! the step are in the block where there is room, up to the end of the step. Whoever gets them may keep them: what has
//! its place there in a later step is made elsewhere then.
//!
//! The plan decides nothing about correctness: a place whose tensor is still there, against the plan, is not lent
//! ([`Pool`](crate::tensor::Pool)), and memory with another owner is not taken.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use burn_ir::TensorId;

use super::buffers::{Buffer, BufferLifetimes};
use super::fused::Kernels;
use super::instruction::Instruction;

/// The plan of a program whose operations are fused, in sections that run one after the other. Kernels are told whose
/// memory they take.
pub(crate) fn plan_memory<const SECTIONS: usize>(
    sections: &mut [Vec<Instruction>; SECTIONS],
    kernels: &Kernels,
) -> MemoryPlan {
    let lifetimes = BufferLifetimes::of(sections.iter_mut().flatten(), kernels);
    let (leaving, ending): (Vec<&Buffer>, Vec<&Buffer>) =
        lifetimes.buffers.iter().filter(|buffer| buffer.is_kept()).partition(|buffer| buffer.leaves);
    let lifetime = |buffer: &Buffer| {
        let Buffer { made, bytes, born, ends, leaves, .. } = *buffer;
        Lifetime { tensor: made, bytes, born, ends: if leaves { usize::MAX } else { ends } }
    };
    let [ending, leaving] = [ending, leaving].map(|buffers| buffers.into_iter().map(lifetime).collect());
    let plan = MemoryPlan::new(ending, leaving);
    let beside = [true, false].map(|keeps| beside(&lifetimes, &plan, keeps));
    plan.with_beside(beside)
}

/// The most bytes beside the block: of pieces, which stay, and of what comes and goes.
fn beside(lifetimes: &BufferLifetimes, plan: &MemoryPlan, keeps: bool) -> usize {
    let mut changes: BTreeMap<usize, [isize; 2]> = BTreeMap::new();
    for buffer in lifetimes.buffers.iter().filter(|buffer| plan.place(buffer.made).is_none()) {
        let kind = usize::from(buffer.is_kept());
        changes.entry(buffer.born).or_default()[kind] += buffer.bytes as isize;
        if !(buffer.leaves_alone && keeps) {
            changes.entry(buffer.ends_alone + 1).or_default()[kind] -= buffer.bytes as isize;
        }
    }
    for (at, bytes) in &lifetimes.passing {
        changes.entry(*at).or_default()[0] += *bytes as isize;
        changes.entry(at + 1).or_default()[0] -= *bytes as isize;
    }
    let (mut now, mut most) = ([0; 2], [0; 2]);
    for change in changes.into_values() {
        for kind in 0..2 {
            now[kind] += change[kind];
            most[kind] = most[kind].max(now[kind]);
        }
    }
    most.iter().sum::<isize>() as usize
}

/// Where tensors lie in the block of a step.
#[derive(Debug, Default)]
pub(crate) struct MemoryPlan {
    places: HashMap<TensorId, usize>,
    size: usize,
    /// The most bytes beside the block, if results stay, and if they leave when they are given.
    beside: [usize; 2],
}

impl MemoryPlan {
    /// Bytes of the block.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The bytes that the step needs at most beside parameters, inputs and constants, from its second run on: of the
    /// block, which stays, of the results, all of them if the caller `keeps` them, and of what burn makes meanwhile.
    pub(crate) fn needed(&self, keeps: bool) -> usize {
        self.size + self.beside[usize::from(!keeps)]
    }

    /// Where a tensor begins, if it is in the block.
    pub(crate) fn place(&self, id: TensorId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    /// The plan in which tensors get places, the largest first. Those that leave the step get one where there is room
    /// for them anyway: as far up as can be, so that if they stay for longer they are in the way of few others in the
    /// next run.
    fn new(ending: Vec<Lifetime>, leaving: Vec<Lifetime>) -> Self {
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

    /// The same with the bytes beside the block, if results stay, and if they leave when they are given.
    fn with_beside(self, beside: [usize; 2]) -> Self {
        Self { beside, ..self }
    }
}

/// How long a tensor is there.
#[derive(Debug, Clone, Copy)]
struct Lifetime {
    tensor: TensorId,
    bytes: usize,
    /// The numbers of the first and the last instruction that it is there for.
    born: usize,
    ends: usize,
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
    use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
    use burn::prelude::*;

    use super::super::liveness::{Program, program};
    use super::super::step::StepGraph;
    use super::super::{CustomOps, Executor, capture_step};
    use super::*;
    use crate::tensor::{ALIGN, Pool};

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

    fn encoder() -> TransformerEncoder {
        TransformerEncoderConfig::new(128, 256, 4, 2).with_dropout(0.0).init(&Device::flex().autodiff())
    }

    /// Tensors of the width have 256 KiB.
    fn x() -> Tensor<3> {
        Tensor::ones([8, 64, 128], &Device::flex().autodiff())
    }

    fn captured() -> StepGraph {
        let loss = |model: &TransformerEncoder, x| model.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean();
        capture_step(&encoder(), x(), loss).unwrap()
    }

    #[test]
    fn tensors_that_are_there_at_the_same_time_lie_apart() {
        let Program { mut instructions, fused } = program(&captured(), true);
        let (kernels, plan) = fused.unwrap();
        let lifetimes = BufferLifetimes::of(&mut instructions, &kernels);
        let planned: Vec<&Buffer> =
            lifetimes.buffers.iter().filter(|buffer| plan.place(buffer.made).is_some()).collect();
        let ends = |buffer: &Buffer| if buffer.leaves { usize::MAX } else { buffer.ends };
        assert!(planned.len() > 30, "{} tensors have a place", planned.len());
        let mut most = 0;
        for (number, buffer) in planned.iter().enumerate() {
            let start = plan.place(buffer.made).unwrap();
            assert!(start + buffer.bytes <= plan.size() && start % ALIGN == 0);
            for other in &planned[..number] {
                let from = plan.place(other.made).unwrap();
                let apart = ends(buffer) < other.born || ends(other) < buffer.born;
                assert!(apart || start + buffer.bytes <= from || from + other.bytes <= start);
            }
            let at_birth = planned.iter().filter(|other| other.born <= buffer.born && buffer.born <= ends(other));
            most = most.max(at_birth.map(|other| other.bytes).sum());
        }
        assert!(plan.size() <= most + most / 20, "{} bytes for {most} that are there at once", plan.size());
    }

    #[test]
    fn a_step_finds_every_place_free() {
        let pool = Pool::of_thread();
        let model = encoder();
        let loss = |model: &TransformerEncoder, x| model.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean();
        let mut executor = Executor::new(capture_step(&model, x(), loss).unwrap(), CustomOps::new()).unwrap();
        for _ in 0..2 {
            executor.step(&model, x()).unwrap();
        }
        assert_eq!(pool.elsewhere(), 0);
    }
}
