//! A block of a kernel: what it reads is brought together, computed instruction by instruction, and written.

use std::sync::atomic::{AtomicBool, Ordering};

use super::kernel::{BlockOp, Extent, Home, Kernel, Value};
use super::loops::{Operand, add_rows, binary, choose, place_of, reduce, unary};
use super::native::Native;
use burn::tensor::DType;

/// An input as a block finds it.
pub(super) struct Source {
    pub(super) base: *const u8,
    pub(super) dtype: DType,
    /// Whether a block of it is one piece of memory of the type that is computed with.
    pub(super) direct: bool,
    pub(super) offset: isize,
    /// Of all dims, 0 where the input is broadcast.
    pub(super) strides: Vec<isize>,
    /// Whether it is the same for all rows.
    pub(super) still: bool,
}

/// A result as a block finds it.
pub(super) struct Target {
    pub(super) base: *mut u8,
    /// Whether it is written while it is computed, not at the end of the block.
    pub(super) direct: bool,
}

/// A kernel with its tensors.
pub(super) struct BoundKernel<'a, T> {
    pub(super) kernel: &'a Kernel,
    pub(super) sources: Vec<Source>,
    pub(super) targets: Vec<Target>,
    /// The sums over rows, part by part.
    pub(super) sums: Vec<*mut T>,
    /// The first row, and where rows end: results of each place begin with the first.
    pub(super) start: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Rows of a block, and elements of each.
    pub(super) height: usize,
    pub(super) width: usize,
    /// Where values are that are in no tensor, in elements of the scratch memory.
    pub(super) places: Vec<usize>,
    pub(super) scratch: usize,
    /// Whether a number was not as the kernel expects.
    pub(super) unexpected: AtomicBool,
}

// SAFETY: parts read inputs, and write places of results and sums that no other part touches.
unsafe impl<T: Sync> Sync for BoundKernel<'_, T> {}

impl<T: Native> BoundKernel<'_, T> {
    /// # Safety
    /// `scratch` has room for the places of all values.
    #[inline(always)]
    pub(super) unsafe fn block(&self, part: usize, block: usize, first: bool, scratch: *mut T, at: &mut [*mut T]) {
        let across = self.columns.div_ceil(self.width);
        let (line, column) = (block / across * self.height, block % across * self.width);
        let row = self.start + line;
        let (height, width) = (self.height.min(self.rows - row), self.width.min(self.columns - column));
        let place = line * self.columns + column;
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
                    Extent::Row => line,
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
        instruction: &BlockOp,
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
            BlockOp::Fill { out, with } => write(out).fill(T::from_f64(with)),
            BlockOp::Unary { op, out, x } => unary(op, write(out), read(x)),
            BlockOp::Binary { op, out, a, b } => {
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
            BlockOp::Choose { out, mask, a, b } => choose(write(out), read(mask), read(a), read(b)),
            BlockOp::Spread { out, x } => {
                let x = read(x);
                let each = write(out).len() / x.len();
                for (out, x) in write(out).chunks_exact_mut(each).zip(x) {
                    out.fill(*x);
                }
            }
            BlockOp::Reduce { op, out, x } => {
                // Not by an iterator's method with a closure, which would be a function of its own, without wide
                // vectors.
                for (out, row) in write(out).iter_mut().zip(read(x).chunks_exact(width)) {
                    *out = reduce(op, row);
                }
            }
            BlockOp::PlaceOf { out, x, of } => {
                let rows = read(x).chunks_exact(width).zip(read(of));
                for (out, (row, of)) in write(out).iter_mut().zip(rows) {
                    *out = T::from_f64(place_of(row, *of) as f64);
                }
            }
            BlockOp::Pick { out, x, index } => {
                let rows = read(x).chunks_exact(width).zip(read(index));
                write(out).iter_mut().zip(rows).for_each(|(out, (row, index))| *out = row[place(*index, width)]);
            }
            BlockOp::AddAt { out, x, index, add } => {
                let out = write(out);
                match (extent(x), read(x)) {
                    (Extent::Full, x) => out.copy_from_slice(x),
                    (Extent::Row, x) => out.chunks_exact_mut(width).zip(x).for_each(|(out, x)| out.fill(*x)),
                    (Extent::One, x) => out.fill(x[0]),
                }
                let added = read(index).iter().zip(read(add));
                for (row, (index, add)) in out.chunks_exact_mut(width).zip(added) {
                    let out = &mut row[place(*index, width)];
                    *out = out.add(*add);
                }
            }
            BlockOp::AddRows { sums, x } => {
                // SAFETY: each part has sums of its own.
                let sums = unsafe {
                    let sums = self.sums[sums].add(part * self.columns + column);
                    std::slice::from_raw_parts_mut(sums, width)
                };
                add_rows(sums, read(x), width);
            }
            BlockOp::Round { x, to } => T::round(write(x), to),
            BlockOp::Expect { x, above } => {
                let above = T::from_f64(above);
                if !read(x).iter().all(|x| *x > above) {
                    self.unexpected.store(true, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Where an index points to.
///
/// # Panics
/// If that is beyond the row, as burn does.
fn place<T: Native>(index: T, columns: usize) -> usize {
    let is = |place: &usize| T::from_f64(*place as f64) == index;
    let number = index.to_f64();
    let place = number as usize;
    // Larger ones are rounded.
    let about = if number.abs() < f64::from(1 << f32::MANTISSA_DIGITS) { "" } else { "about " };
    assert!(
        place < columns && is(&place),
        "index {about}{number} is not one of a row of {columns}: an id or a target beyond what there is, or one that stands for \
         nothing, as -100, and is to be replaced before it is looked up"
    );
    place
}

/// The elements of a value in a block of so many rows of so many elements.
fn count(extent: Extent, height: usize, width: usize) -> usize {
    match extent {
        Extent::One => 1,
        Extent::Row => height,
        Extent::Full => height * width,
    }
}
