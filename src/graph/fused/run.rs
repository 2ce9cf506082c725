//! Runs a kernel on Flex tensors: block after block, with the blocks split over the threads of the rank.

use std::cell::RefCell;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::AtomicBool;

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use burn_ir::CustomOpIr;
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::block::{BoundKernel, Source, Target};
use super::kernel::{Extent, Kernel};
use super::loops::add_rows;
use super::memory::Memory;
use super::native::{Native, check};
use super::takes;
use crate::error::Error;
use crate::graph::step_memory::StepMemory;
use crate::tensor::{PlainTensor, vectorized};

/// Elements of a value in a block: a few values of it fit into the first cache.
pub(super) const BLOCK: usize = 2048;
/// Into so many parts a kernel is split, whatever the number of threads, so that sums over them are the same.
const PARTS: usize = 16;
/// Elements from which on it takes less to wake other threads up than to go on alone, as burn has it.
pub(super) const SPLIT_FROM: usize = 256 * 1024;

/// The blocks of a part.
struct BlockRange<'a, T> {
    running: &'a BoundKernel<'a, T>,
    part: usize,
    blocks: Range<usize>,
    scratch: *mut T,
}

impl<T: Native> NullaryFnOnce for BlockRange<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let mut at: Vec<*mut T> = vec![ptr::null_mut(); self.running.places.len()];
        for (place, block) in self.blocks.enumerate() {
            // SAFETY: the scratch memory has room for the places of all values.
            unsafe { self.running.block(self.part, block, place == 0, self.scratch, &mut at) };
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

impl Kernel {
    /// Computes the results from the inputs.
    pub(super) fn run(
        &self,
        op: &CustomOpIr,
        inputs: Vec<PlainTensor>,
        memory: &StepMemory,
    ) -> Result<Vec<PlainTensor>, Error> {
        let inputs = inputs.into_iter().map(PlainTensor::into_flex).collect::<Result<Vec<_>, _>>()?;
        let run = if self.wide { Self::run_as::<f64> } else { Self::run_as::<f32> };
        let results = run(self, op, inputs, memory)?;
        Ok(results.into_iter().map(PlainTensor::from_flex).collect())
    }

    fn run_as<T: Native>(
        &self,
        op: &CustomOpIr,
        mut inputs: Vec<FlexTensor>,
        memory: &StepMemory,
    ) -> Result<Vec<FlexTensor>, Error> {
        check::<T>(inputs.iter().map(FlexTensor::dtype).chain(self.outputs.iter().map(|output| output.dtype)))?;
        for (input, view) in inputs.iter_mut().zip(&self.views) {
            if *input.layout().shape().as_slice() != **view {
                *input = input.reshape(Shape::from(view.clone()));
            }
        }
        let elements: usize = self.dims.iter().product();
        let columns = self.dims.last().copied().unwrap_or(1);
        let rows = elements / columns.max(1);
        let width = if self.cuts_rows() && columns > 2 * BLOCK { BLOCK } else { columns };
        let height = (BLOCK / width).clamp(1, rows);

        let mut sources: Vec<Source> = inputs.iter().zip(&self.inputs).map(|(t, e)| self.source::<T>(t, *e)).collect();
        let mut memories: Vec<Memory> = Vec::new();
        let mut targets: Vec<Target> = Vec::new();
        assert_eq!(self.outputs.len(), op.outputs.len(), "an operation has the results of its kernel");
        for ((place, output), take) in self.outputs.iter().enumerate().zip(takes(op)) {
            let size: usize = output.dims.iter().product();
            let written = match (output.value, output.extent) {
                (None, _) => columns,
                (_, Extent::Full) => elements,
                (_, Extent::Row) => rows,
                (_, Extent::One) => 1,
            };
            assert_eq!(size, written, "a kernel writes what its result {place} has room for");
            let native = output.dtype == T::DTYPE && output.extent == Extent::Full && output.value.is_some();
            // The plan is an expectation: that the memory is nobody else's is seen here.
            let taken = take.filter(|input| self.may_take(place, *input)).filter(|input| {
                let tensor = &inputs[*input];
                sources[*input].direct
                    && tensor.is_unique()
                    && tensor.layout().start_offset() == 0
                    && tensor.bytes().len() == size * size_of::<T>()
            });
            let mut made = match taken {
                Some(input) => {
                    let empty = FlexTensor::empty(Shape::from(vec![0]), T::DTYPE);
                    Memory::Taken(std::mem::replace(&mut inputs[input], empty))
                }
                None => Memory::new(output.dtype, size, &op.outputs[place], memory),
            };
            // The memory of an input is read by the pointer by which it is written.
            let base = made.pointer();
            taken.into_iter().for_each(|input| sources[input].base = base);
            targets.push(Target { base, direct: native && taken.is_none() && self.writes_at_once(place) });
            memories.push(made);
        }

        let (places, scratch) = self.places(height * width);
        let blocks = rows.div_ceil(height) * columns.div_ceil(width);
        let parts = blocks.min(PARTS);
        let summed = self.outputs.iter().filter(|output| output.value.is_none());
        let mut sums: Vec<Vec<T>> = summed.map(|_| vec![T::default(); parts * columns]).collect();
        let mut pointers = sums.iter_mut().map(|sums| sums.as_mut_ptr());
        let sums_of = self.outputs.iter().map(|output| match output.value {
            None => pointers.next().unwrap_or(ptr::null_mut()),
            Some(_) => ptr::null_mut(),
        });
        let running = BoundKernel::<T> {
            kernel: self,
            sums: sums_of.collect(),
            targets,
            sources,
            start: 0,
            rows,
            columns,
            height,
            width,
            places,
            scratch,
            unexpected: AtomicBool::new(false),
        };
        let part = |part: usize| running.part(part, blocks * part / parts..blocks * (part + 1) / parts);
        if elements >= SPLIT_FROM && rayon::current_num_threads() > 1 {
            (0..parts).into_par_iter().for_each(part);
        } else {
            (0..parts).for_each(part);
        }

        let mut sums = sums.into_iter();
        for (output, memory) in self.outputs.iter().zip(&mut memories).filter(|(output, _)| output.value.is_none()) {
            let mut parts = sums.next().unwrap_or_default();
            let (sum, others) = parts.split_at_mut(columns);
            add_rows(sum, others, columns);
            // SAFETY: the result has as many elements as a row.
            unsafe { T::scatter(output.dtype, memory.pointer(), 0, sum.as_ptr(), columns) };
        }
        let results = memories.into_iter().zip(&self.outputs);
        // SAFETY: the blocks cover all places.
        Ok(results.map(|(memory, output)| unsafe { memory.filled(&output.dims, output.dtype) }).collect())
    }

    pub(super) fn source<T: Native>(&self, tensor: &FlexTensor, extent: Extent) -> Source {
        let layout = tensor.layout();
        let broadcast = layout.shape().iter().zip(&self.dims).zip(layout.strides());
        let strides: Vec<isize> =
            broadcast.map(|((size, whole), stride)| if size == whole && *size != 1 { *stride } else { 0 }).collect();
        let whole = layout.shape().iter().eq(&self.dims);
        Source {
            direct: extent == Extent::Full && whole && tensor.dtype() == T::DTYPE && layout.is_contiguous(),
            base: tensor.bytes().as_ptr(),
            dtype: tensor.dtype(),
            offset: layout.start_offset() as isize,
            still: strides.split_last().is_none_or(|(_, rows)| rows.iter().all(|stride| *stride == 0)),
            strides,
        }
    }
}

impl<T: Native> BoundKernel<'_, T> {
    pub(super) fn part(&self, part: usize, blocks: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let words = (self.scratch * size_of::<T>()).div_ceil(8);
            if scratch.len() < words {
                scratch.resize(words, 0);
            }
            let scratch = scratch.as_mut_ptr().cast::<T>();
            vectorized(BlockRange { running: self, part, blocks, scratch });
        });
    }
}
