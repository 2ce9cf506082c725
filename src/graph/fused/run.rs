//! Runs a kernel on Flex tensors: block after block, with the blocks split over the threads of the rank.

use std::cell::RefCell;
use std::ops::Range;
use std::ptr;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};
use half::{bf16, f16};
use rayon::prelude::*;

use super::functions::Float;
use super::kernel::{Extent, Home, Instruction, Kernel, Value};
use super::loops::{Operand, Stored, add_rows, binary, choose, reduce, round_to_bf16, round_to_f16, unary};
use crate::error::Error;
use crate::tensor::{Loops, PlainTensor, vectorized};

/// Elements of a value in a block: a few values of it fit into the first cache.
const BLOCK: usize = 2048;
/// Into so many parts a kernel is split, whatever the number of threads, so that sums over them are the same.
const PARTS: usize = 16;
/// Elements from which on it takes less to wake other threads up than to go on alone, as burn has it.
const SPLIT_FROM: usize = 256 * 1024;

/// An element type that kernels compute with, and those of the tensors that it stands for.
trait Native: Float {
    const DTYPE: DType;

    /// Reads elements that are `stride` apart.
    ///
    /// # Safety
    /// They are there, of this dtype.
    unsafe fn gather(dtype: DType, base: *const u8, offset: isize, stride: isize, out: &mut [Self]);

    /// Writes elements one after the other.
    ///
    /// # Safety
    /// There is room for them, of this dtype.
    unsafe fn scatter(dtype: DType, base: *mut u8, offset: usize, x: *const Self, len: usize);

    /// Rounds to a dtype of 16 bits.
    fn round(x: &mut [Self], to: DType);
}

unsafe fn gather_as<T: Float, S: Stored<T>>(base: *const u8, offset: isize, stride: isize, out: &mut [T]) {
    // SAFETY: as the caller says.
    unsafe {
        let base = base.cast::<S>().offset(offset);
        match stride {
            1 => {
                let source = std::slice::from_raw_parts(base, out.len());
                out.iter_mut().zip(source).for_each(|(out, x)| *out = x.load());
            }
            0 => out.fill((*base).load()),
            _ => {
                for (place, out) in out.iter_mut().enumerate() {
                    *out = (*base.offset(place as isize * stride)).load();
                }
            }
        }
    }
}

unsafe fn scatter_as<T: Float, S: Stored<T>>(base: *mut u8, offset: usize, x: *const T, len: usize) {
    // SAFETY: as the caller says; the elements are either at the same places as they go to, or elsewhere.
    unsafe {
        let base = base.cast::<S>().add(offset);
        if ptr::eq(base.cast::<T>(), x) {
            return;
        }
        let (x, out) = (std::slice::from_raw_parts(x, len), std::slice::from_raw_parts_mut(base, len));
        out.iter_mut().zip(x).for_each(|(out, x)| *out = S::store(*x));
    }
}

impl Native for f32 {
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    unsafe fn gather(dtype: DType, base: *const u8, offset: isize, stride: isize, out: &mut [Self]) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F32 => gather_as::<f32, f32>(base, offset, stride, out),
                DType::BF16 => gather_as::<f32, bf16>(base, offset, stride, out),
                DType::F16 => gather_as::<f32, f16>(base, offset, stride, out),
                _ => gather_as::<f32, u8>(base, offset, stride, out),
            }
        }
    }

    #[inline(always)]
    unsafe fn scatter(dtype: DType, base: *mut u8, offset: usize, x: *const Self, len: usize) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F32 => scatter_as::<f32, f32>(base, offset, x, len),
                DType::BF16 => scatter_as::<f32, bf16>(base, offset, x, len),
                DType::F16 => scatter_as::<f32, f16>(base, offset, x, len),
                _ => scatter_as::<f32, u8>(base, offset, x, len),
            }
        }
    }

    #[inline(always)]
    fn round(x: &mut [Self], to: DType) {
        match to {
            DType::BF16 => round_to_bf16(x),
            _ => round_to_f16(x),
        }
    }
}

impl Native for f64 {
    const DTYPE: DType = DType::F64;

    #[inline(always)]
    unsafe fn gather(dtype: DType, base: *const u8, offset: isize, stride: isize, out: &mut [Self]) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F64 => gather_as::<f64, f64>(base, offset, stride, out),
                _ => gather_as::<f64, u8>(base, offset, stride, out),
            }
        }
    }

    #[inline(always)]
    unsafe fn scatter(dtype: DType, base: *mut u8, offset: usize, x: *const Self, len: usize) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F64 => scatter_as::<f64, f64>(base, offset, x, len),
                _ => scatter_as::<f64, u8>(base, offset, x, len),
            }
        }
    }

    fn round(_: &mut [Self], to: DType) {
        unreachable!("{to:?} is not computed in f64")
    }
}

/// The memory of a result.
enum Memory {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bits16(Vec<u16>),
    Bytes(Vec<u8>),
    /// That of an input.
    Taken(FlexTensor),
}

impl Memory {
    fn new(dtype: DType, elements: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(Vec::with_capacity(elements)),
            DType::F64 => Self::F64(Vec::with_capacity(elements)),
            DType::F16 | DType::BF16 => Self::Bits16(Vec::with_capacity(elements)),
            _ => Self::Bytes(Vec::with_capacity(elements)),
        }
    }

    fn pointer(&mut self) -> *mut u8 {
        match self {
            Self::F32(memory) => memory.as_mut_ptr().cast(),
            Self::F64(memory) => memory.as_mut_ptr().cast(),
            Self::Bits16(memory) => memory.as_mut_ptr().cast(),
            Self::Bytes(memory) => memory.as_mut_ptr(),
            Self::Taken(tensor) => match tensor.dtype() {
                DType::F64 => tensor.storage_mut::<f64>().as_mut_ptr().cast(),
                _ => tensor.storage_mut::<f32>().as_mut_ptr().cast(),
            },
        }
    }

    /// # Safety
    /// All elements have been written.
    unsafe fn filled(self, dims: &[usize], dtype: DType) -> FlexTensor {
        let shape = Shape::from(dims.to_vec());
        let elements = shape.num_elements();
        // SAFETY: as the caller says, and the capacity is that of the result.
        let bytes = unsafe {
            match self {
                Self::Taken(tensor) => return tensor.with_layout(Layout::contiguous(shape)),
                Self::F32(memory) => Bytes::from_elems(all(memory, elements)),
                Self::F64(memory) => Bytes::from_elems(all(memory, elements)),
                Self::Bits16(memory) => Bytes::from_elems(all(memory, elements)),
                Self::Bytes(memory) => Bytes::from_elems(all(memory, elements)),
            }
        };
        FlexTensor::new(bytes, Layout::contiguous(shape), dtype)
    }
}

unsafe fn all<E>(mut memory: Vec<E>, elements: usize) -> Vec<E> {
    // SAFETY: the caller has written so many.
    unsafe { memory.set_len(elements) };
    memory
}

/// An input as a block finds it.
struct Source {
    base: *const u8,
    dtype: DType,
    /// Whether a block of it is one piece of memory of the type that is computed with.
    direct: bool,
    offset: isize,
    /// Of all dims, 0 where the input is broadcast.
    strides: Vec<isize>,
    /// Whether it is the same for all rows.
    still: bool,
}

/// A result as a block finds it.
struct Target {
    base: *mut u8,
    /// Whether it is written while it is computed, not at the end of the block.
    direct: bool,
}

/// A kernel with its tensors.
struct Running<'a, T> {
    kernel: &'a Kernel,
    sources: Vec<Source>,
    targets: Vec<Target>,
    /// The sums over rows, part by part.
    sums: Vec<*mut T>,
    rows: usize,
    columns: usize,
    /// Rows of a block, and elements of each.
    height: usize,
    width: usize,
    /// Where values are that are in no tensor, in elements of the scratch memory.
    places: Vec<usize>,
    scratch: usize,
}

// SAFETY: parts read inputs, and write places of results and sums that no other part touches.
unsafe impl<T: Sync> Sync for Running<'_, T> {}

/// The blocks of a part.
struct Part<'a, T> {
    running: &'a Running<'a, T>,
    part: usize,
    blocks: Range<usize>,
    scratch: *mut T,
}

impl<T: Native> Loops for Part<'_, T> {
    #[inline(always)]
    fn run(self) {
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
    pub(super) fn run(&self, inputs: Vec<PlainTensor>) -> Result<Vec<PlainTensor>, Error> {
        let inputs = inputs.into_iter().map(PlainTensor::into_flex).collect::<Result<Vec<_>, _>>()?;
        let results = if self.wide { self.run_as::<f64>(inputs) } else { self.run_as::<f32>(inputs) };
        Ok(results.into_iter().map(PlainTensor::from_flex).collect())
    }

    fn run_as<T: Native>(&self, mut inputs: Vec<FlexTensor>) -> Vec<FlexTensor> {
        let elements: usize = self.dims.iter().product();
        let columns = self.dims.last().copied().unwrap_or(1);
        let rows = elements / columns.max(1);
        let width = if self.cuts_rows() && columns > 2 * BLOCK { BLOCK } else { columns };
        let height = (BLOCK / width).clamp(1, rows);

        let mut sources: Vec<Source> = inputs.iter().zip(&self.inputs).map(|(t, e)| self.source::<T>(t, *e)).collect();
        let mut memories: Vec<Memory> = Vec::new();
        let mut targets: Vec<Target> = Vec::new();
        let mut free: Vec<usize> = (0..inputs.len()).filter(|input| sources[*input].direct).collect();
        for (place, output) in self.outputs.iter().enumerate() {
            let size: usize = output.dims.iter().product();
            let native = output.dtype == T::DTYPE && output.extent == Extent::Full && output.value.is_some();
            let taken = free.iter().position(|input| {
                let tensor = &inputs[*input];
                native
                    && tensor.is_unique()
                    && tensor.layout().start_offset() == 0
                    && tensor.bytes().len() == size * size_of::<T>()
            });
            let mut memory = match taken {
                Some(at) => {
                    let input = free.swap_remove(at);
                    let empty = FlexTensor::empty(Shape::from(vec![0]), T::DTYPE);
                    let mut memory = Memory::Taken(std::mem::replace(&mut inputs[input], empty));
                    sources[input].base = memory.pointer();
                    memory
                }
                None => Memory::new(output.dtype, size),
            };
            let computed = output
                .value
                .is_some_and(|value| self.homes[value] == Home::Result(place) && self.extents[value] == Extent::Full);
            targets.push(Target { base: memory.pointer(), direct: native && taken.is_none() && computed });
            memories.push(memory);
        }

        let block = height * width;
        let mut places = Vec::with_capacity(self.homes.len());
        let (inputs_at, results_at) = (self.registers * block, (self.registers + sources.len()) * block);
        for home in &self.homes {
            places.push(match home {
                Home::Register(register) => register * block,
                Home::Input(input) => inputs_at + input * block,
                Home::Result(result) => results_at + result * block,
            });
        }
        let blocks = rows.div_ceil(height) * columns.div_ceil(width);
        let parts = blocks.min(PARTS);
        let summed = self.outputs.iter().filter(|output| output.value.is_none());
        let mut sums: Vec<Vec<T>> = summed.map(|_| vec![T::default(); parts * columns]).collect();
        let mut pointers = sums.iter_mut().map(|sums| sums.as_mut_ptr());
        let sums_of = self.outputs.iter().map(|output| match output.value {
            None => pointers.next().unwrap_or(ptr::null_mut()),
            Some(_) => ptr::null_mut(),
        });
        let running = Running::<T> {
            kernel: self,
            sums: sums_of.collect(),
            targets,
            sources,
            rows,
            columns,
            height,
            width,
            places,
            scratch: results_at + self.outputs.len() * block,
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
        results.map(|(memory, output)| unsafe { memory.filled(&output.dims, output.dtype) }).collect()
    }

    fn source<T: Native>(&self, tensor: &FlexTensor, extent: Extent) -> Source {
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

impl<T: Native> Running<'_, T> {
    fn part(&self, part: usize, blocks: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let words = (self.scratch * size_of::<T>()).div_ceil(8);
            if scratch.len() < words {
                scratch.resize(words, 0);
            }
            let scratch = scratch.as_mut_ptr().cast::<T>();
            vectorized(Part { running: self, part, blocks, scratch });
        });
    }

    /// # Safety
    /// `scratch` has room for the places of all values.
    #[inline(always)]
    unsafe fn block(&self, part: usize, block: usize, first: bool, scratch: *mut T, at: &mut [*mut T]) {
        let across = self.columns.div_ceil(self.width);
        let (row, column) = (block / across * self.height, block % across * self.width);
        let (height, width) = (self.height.min(self.rows - row), self.width.min(self.columns - column));
        let place = row * self.columns + column;
        let kernel = self.kernel;
        // SAFETY: direct tensors have an element for each place of the block; all others are in the scratch memory,
        // apart from each other. An instruction never writes what it reads.
        unsafe {
            for (value, home) in kernel.homes.iter().enumerate() {
                let own = scratch.add(self.places[value]);
                at[value] = match *home {
                    Home::Input(input) => {
                        let source = &self.sources[input];
                        if source.direct {
                            source.base.cast::<T>().cast_mut().offset(source.offset).add(place)
                        } else {
                            // Blocks after the first have no more rows than it.
                            if first || !source.still || across > 1 {
                                let len = count(kernel.extents[value], height, width);
                                let out = std::slice::from_raw_parts_mut(own, len);
                                self.load(source, kernel.extents[value], row, column, out);
                            }
                            own
                        }
                    }
                    Home::Result(result) if self.targets[result].direct => {
                        self.targets[result].base.cast::<T>().add(place)
                    }
                    _ => own,
                };
            }
            for instruction in &kernel.code {
                self.execute(instruction, part, column, height, width, at);
            }
            for (output, target) in kernel.outputs.iter().zip(&self.targets) {
                let Some(value) = output.value.filter(|_| !target.direct) else { continue };
                let (from, x) = (kernel.extents[value], at[value]);
                let start = match output.extent {
                    Extent::One => 0,
                    Extent::Row => row,
                    Extent::Full => place,
                };
                if from == output.extent {
                    T::scatter(output.dtype, target.base, start, x, count(from, height, width));
                    continue;
                }
                // Fewer elements than the result has.
                let of_row = if output.extent == Extent::Full { width } else { 1 };
                for line in 0..height {
                    let x = x.add(if from == Extent::Row { line } else { 0 });
                    for element in 0..of_row {
                        T::scatter(output.dtype, target.base, start + line * of_row + element, x, 1);
                    }
                }
            }
        }
    }

    /// # Safety
    /// The source has the rows, and `out` is as long as the extent says.
    #[inline(always)]
    unsafe fn load(&self, source: &Source, extent: Extent, row: usize, column: usize, out: &mut [T]) {
        let (Some((stride, strides)), Some((_, dims))) = (source.strides.split_last(), self.kernel.dims.split_last())
        else {
            return;
        };
        let of_row = match extent {
            Extent::Full => self.width.min(self.columns - column),
            Extent::Row | Extent::One => 1,
        };
        for (line, out) in out.chunks_exact_mut(of_row).enumerate() {
            let (mut index, mut offset) = (row + line, source.offset + column as isize * stride);
            for (size, stride) in dims.iter().zip(strides).rev() {
                offset += (index % size) as isize * stride;
                index /= size;
            }
            // SAFETY: passed on.
            unsafe { T::gather(source.dtype, source.base, offset, *stride, out) };
        }
    }

    /// # Safety
    /// `at` has the values of a block, and what is written is apart from what is read.
    #[inline(always)]
    unsafe fn execute(
        &self,
        instruction: &Instruction,
        part: usize,
        column: usize,
        height: usize,
        width: usize,
        at: &[*mut T],
    ) {
        let extent = |value: Value| self.kernel.extents[value];
        let len = |value: Value| count(extent(value), height, width);
        // SAFETY: as the caller says.
        let read = |value: Value| unsafe { std::slice::from_raw_parts(at[value].cast_const(), len(value)) };
        // SAFETY: the same.
        let write = |value: Value| unsafe { std::slice::from_raw_parts_mut(at[value], len(value)) };
        match *instruction {
            Instruction::Fill { out, with } => write(out).fill(T::from_f64(with)),
            Instruction::Unary { op, out, x } => unary(op, write(out), read(x)),
            Instruction::Binary { op, out, a, b } => {
                let (a, b) = ((extent(a), read(a)), (extent(b), read(b)));
                let whole = extent(out);
                let alike = |(extent, x)| match extent {
                    Extent::One => Some(Operand::One(<[T]>::first(x).copied().unwrap_or_default())),
                    extent if extent == whole => Some(Operand::Each(x)),
                    _ => None,
                };
                match (alike(a), alike(b)) {
                    (Some(a), Some(b)) => binary(op, write(out), a, b),
                    _ => {
                        for (line, out) in write(out).chunks_exact_mut(width).enumerate() {
                            let of = |(extent, x): (Extent, &[T])| match extent {
                                Extent::One => Operand::One(x[0]),
                                Extent::Row => Operand::One(x[line]),
                                Extent::Full => {
                                    // SAFETY: it has as many lines.
                                    let x = unsafe { x.as_ptr().add(line * width) };
                                    // SAFETY: the same.
                                    Operand::Each(unsafe { std::slice::from_raw_parts(x, width) })
                                }
                            };
                            binary(op, out, of(a), of(b));
                        }
                    }
                }
            }
            Instruction::Choose { out, mask, a, b } => choose(write(out), read(mask), read(a), read(b)),
            Instruction::Spread { out, x } => {
                let x = read(x);
                let each = write(out).len() / x.len();
                write(out).chunks_exact_mut(each).zip(x).for_each(|(out, x)| out.fill(*x));
            }
            Instruction::Reduce { op, out, x } => {
                let rows = read(x).chunks_exact(width);
                write(out).iter_mut().zip(rows).for_each(|(out, row)| *out = reduce(op, row));
            }
            Instruction::AddRows { sums, x } => {
                // SAFETY: each part has sums of its own.
                let sums = unsafe {
                    let sums = self.sums[sums].add(part * self.columns + column);
                    std::slice::from_raw_parts_mut(sums, width)
                };
                add_rows(sums, read(x), width);
            }
            Instruction::Round { x, to } => T::round(write(x), to),
        }
    }
}

/// The elements of a value in a block of so many rows of so many elements.
fn count(extent: Extent, height: usize, width: usize) -> usize {
    match extent {
        Extent::One => 1,
        Extent::Row => height,
        Extent::Full => height * width,
    }
}
