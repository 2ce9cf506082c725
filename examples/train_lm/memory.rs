//! What a rank holds of the model, its gradients and the optimizer's state, in bytes, and what a step needs beside
//! that.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::Tensor;
use burn_pack::Reader;
use burn_parallel::prelude::*;
use serde::Serialize;

/// What a rank holds between two steps, and what a step gives it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Memory {
    /// Parameters and buffers.
    pub parameters: usize,
    /// The gradients that the optimizer is given.
    pub gradients: usize,
    /// The tensors of the optimizer's state.
    pub optimizer: usize,
    /// By how much the memory of the host that the process has in use grows in a step at most, divided by the ranks in
    /// the process: activations, gradients, gathered parameters, and buffers of collectives.
    pub step: usize,
}

/// The allocator of the program, which counts the bytes in use.
struct Counted;

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// The bytes in use now, and the most since [`Peak::begin`].
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn more(size: usize) {
    MOST.fetch_max(NOW.fetch_add(size, Relaxed) + size, Relaxed);
}

// Safety: each call goes to the allocator of the system as it came.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        more(size);
        NOW.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Measures what a step needs beside what is held between steps.
pub struct Peak {
    before: usize,
}

impl Peak {
    /// Begins to measure, when all ranks are between two steps. Collective.
    pub fn begin(world: &Communicator) -> Result<Self, Error> {
        world.barrier()?;
        let before = NOW.load(Relaxed);
        MOST.store(before, Relaxed);
        world.barrier()?;
        Ok(Self { before })
    }

    /// The most bytes since then beside those that were in use then, for each of so many ranks in this process.
    /// Collective.
    pub fn end(self, world: &Communicator, ranks: usize) -> Result<usize, Error> {
        world.barrier()?;
        Ok(MOST.load(Relaxed).saturating_sub(self.before) / ranks)
    }
}

impl Memory {
    /// Counts what a model holds, and the gradients of a step.
    pub fn of_step<M: Module>(model: &M, grads: &GradientsParams) -> Self {
        let mut count = Count { grads, memory: Self::default() };
        model.visit(&mut count);
        count.memory
    }

    /// Counts the state of the optimizer.
    pub fn with_optimizer(self, optim: &ModuleOptimizer) -> Result<Self, Error> {
        let state = Reader::from_bytes(optim.into_bytes().map_err(Error::user)?).map_err(Error::user)?;
        let mut optimizer = 0;
        for tensor in state.into_tensors().map_err(Error::user)? {
            let (.., bytes) = tensor.into_parts().map_err(Error::user)?;
            optimizer += bytes.len();
        }
        Ok(Self { optimizer, ..self })
    }
}

struct Count<'a> {
    grads: &'a GradientsParams,
    memory: Memory,
}

impl ModuleVisitor for Count<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let bytes = |tensor: &Tensor<D>| tensor.shape().num_elements() * tensor.dtype().size();
        self.memory.parameters += bytes(&param.base());
        self.memory.gradients += self.grads.get::<D>(param.id).as_ref().map_or(0, bytes);
    }
}
