//! The memory that a step makes its results in, on the host.

use std::sync::Arc;

use burn_ir::TensorIr;

use super::memory_plan::MemoryPlan;
use crate::tensor::{Pool, Room};

/// The places of a step's tensors, and the memory where they are.
#[derive(Debug)]
pub(crate) struct StepMemory {
    pool: Arc<Pool>,
    plan: MemoryPlan,
}

impl StepMemory {
    /// Without a plan.
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self { pool, plan: MemoryPlan::default() }
    }

    pub(super) fn with_plan(&self, plan: MemoryPlan) -> Self {
        Self { pool: self.pool.clone(), plan }
    }

    /// Room for a result, whose values are not set: where the plan has it, else anywhere.
    pub(crate) fn room(&self, out: &TensorIr) -> Room {
        let bytes = out.shape.num_elements() * out.dtype.size();
        match self.plan.place(out.id) {
            Some(start) => self.pool.room_at(start, bytes, self.plan.size()),
            None => self.pool.room(bytes),
        }
    }

    /// Where memory comes from that no result is made in.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}
