//! The memory plan of a program: which of its tensors get a place in the arena of the step, and what it needs beside.
//!
//! It is known before the step runs when each tensor is made and read for the last time ([`BufferLifetimes`]). Tensors
//! that this crate makes, that are large and that end within the step get a place ([`MemoryPlan`]).

use std::collections::BTreeMap;

use super::buffers::{Buffer, BufferLifetimes};
use super::fused::Kernels;
use super::instruction::Instruction;
use super::memory_plan::{Lifetime, MemoryPlan};

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

/// The most bytes beside the arena: of pieces, which stay, and of what comes and goes.
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

#[cfg(test)]
mod tests {
    use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
    use burn::prelude::*;

    use super::super::liveness::{Program, program};
    use super::super::step::StepGraph;
    use super::super::{CustomOps, Executor, capture_step};
    use super::*;
    use crate::tensor::{ALIGN, Pool};

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
