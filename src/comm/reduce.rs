//! Reduces the contributions of the ranks in host memory, element by element, in rank order.
//!
//! Works on raw addresses: in an in-place all-reduce the results overwrite the contributions. A block of elements is
//! read from every rank before it is written to any, so outputs may be the inputs. Floats of 16 bits are reduced in
//! `f32`. The loops are plain, and compiled several times: for the widest vectors of the machine at hand.

use std::slice;

use burn::tensor::{DType, bf16, f16};
use half::slice::HalfFloatSliceExt;

use super::ReduceOp;
use super::transport::{BufferMut, BufferRef};
use crate::Error;
use crate::tensor::vectorized;

/// Elements folded at a time: a block of any type stays in the first-level cache.
const BLOCK: usize = 1024;

/// One rank's contribution.
#[derive(Clone, Copy)]
pub(crate) struct Contribution {
    pub data: *const u8,
    /// Multiplies every element, for [`ReduceOp::PreMulSum`].
    pub factor: f64,
}

/// Whether `op` means something for `dtype`.
pub(crate) fn check(op: ReduceOp, dtype: DType) -> Result<(), Error> {
    let refused = |advice| Err(Error::UnsupportedReduction { op, dtype, advice });
    match (dtype, op) {
        (DType::F64 | DType::F32 | DType::F16 | DType::BF16, _) => Ok(()),
        (dtype, ReduceOp::Max | ReduceOp::Min) if dtype.is_bool() => Ok(()),
        (dtype, _) if dtype.is_bool() => refused("use Max for logical or, Min for logical and"),
        (dtype, ReduceOp::Mean | ReduceOp::PreMulSum(_)) if dtype.is_int() || dtype.is_uint() => {
            refused("reduce with Sum and divide, or cast to a float dtype first")
        }
        (dtype, _) if dtype.is_int() || dtype.is_uint() => Ok(()),
        _ => refused("cast to a plain float, integer or bool dtype first"),
    }
}

/// Reduces the contributions of all ranks, given in rank order, into `output`, as every [`Transport`](super::Transport)
/// must: in rank order, floats of 16 bits in `f32` with one rounding at the end, and with NaN kept in `Max` and `Min`.
/// Each contribution comes with the reduction that its rank has called; ranks may differ in the factor of
/// [`ReduceOp::PreMulSum`].
///
/// # Errors
/// [`Error::UnsupportedReduction`]; [`Error::InvalidArgument`] if there is no contribution, or if their dtypes, lengths
/// or reductions differ from each other or from the output.
pub fn reduce_contributions(
    contributions: &[(BufferRef<'_>, ReduceOp)],
    output: &mut BufferMut<'_>,
) -> Result<(), Error> {
    let none = || Error::invalid("reduce_contributions", "there is no contribution");
    let &(_, op) = contributions.first().ok_or_else(none)?;
    let (dtype, elements) = (output.dtype(), output.elements());
    check(op, dtype)?;
    for (rank, (buffer, other)) in contributions.iter().enumerate() {
        if buffer.dtype() != dtype || buffer.elements() != elements || !other.agrees(op) {
            let found = format!("rank {rank} contributes {} elements of {:?}", buffer.elements(), buffer.dtype());
            let problem = format!("{found} to {other:?}, the output takes {elements} of {dtype:?} from {op:?}");
            return Err(Error::invalid("reduce_contributions", problem));
        }
    }
    let source = |&(buffer, op): &(BufferRef<'_>, ReduceOp)| Contribution {
        data: buffer.as_ptr(),
        factor: if let ReduceOp::PreMulSum(factor) = op { factor } else { 1.0 },
    };
    let sources: Vec<Contribution> = contributions.iter().map(source).collect();
    // SAFETY: all are of one dtype and length, and the output is borrowed for writing, so it overlaps no contribution.
    unsafe { fold(dtype, op, &sources, &[output.as_mut_ptr()], elements) };
    Ok(())
}

/// Folds `sources` and writes the result to every output.
///
/// # Safety
///
/// `op` passed [`check`] for `dtype`. Every source is readable and every output writable for `len` elements of `dtype`.
/// Outputs do not overlap each other; one may be a source, then at the same place.
pub(crate) unsafe fn fold(dtype: DType, op: ReduceOp, sources: &[Contribution], outputs: &[*mut u8], len: usize) {
    use burn::tensor::BoolStore;
    // SAFETY: passed on.
    unsafe {
        match dtype {
            DType::F32 => float::<f32>(op, sources, outputs, len),
            DType::F64 => float::<f64>(op, sources, outputs, len),
            DType::F16 => half::<f16>(op, sources, outputs, len),
            DType::BF16 => half::<bf16>(op, sources, outputs, len),
            DType::I64 => integer::<i64>(op, sources, outputs, len),
            DType::I32 => integer::<i32>(op, sources, outputs, len),
            DType::I16 => integer::<i16>(op, sources, outputs, len),
            DType::I8 => integer::<i8>(op, sources, outputs, len),
            DType::U64 => integer::<u64>(op, sources, outputs, len),
            DType::U32 => integer::<u32>(op, sources, outputs, len),
            DType::U16 => integer::<u16>(op, sources, outputs, len),
            DType::U8 | DType::Bool(BoolStore::Native | BoolStore::U8) => integer::<u8>(op, sources, outputs, len),
            other => unreachable!("{other:?} was refused before the collective began"),
        }
    }
}

trait Arithmetic: Copy + Default + PartialOrd + 'static {
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn is_nan(self) -> bool;
}

trait FloatArithmetic: Arithmetic {
    fn from_f64(value: f64) -> Self;
    fn div(self, other: Self) -> Self;
}

macro_rules! numbers {
    (floats $($float:ty),*; integers $($int:ty),*) => {
        $(
            impl Arithmetic for $float {
                #[inline(always)]
                fn add(self, other: Self) -> Self { self + other }
                #[inline(always)]
                fn mul(self, other: Self) -> Self { self * other }
                #[inline(always)]
                fn is_nan(self) -> bool { <$float>::is_nan(self) }
            }
            impl FloatArithmetic for $float {
                #[inline(always)]
                fn from_f64(value: f64) -> Self { value as $float }
                #[inline(always)]
                fn div(self, other: Self) -> Self { self / other }
            }
        )*
        $(
            impl Arithmetic for $int {
                #[inline(always)]
                fn add(self, other: Self) -> Self { self.wrapping_add(other) }
                #[inline(always)]
                fn mul(self, other: Self) -> Self { self.wrapping_mul(other) }
                #[inline(always)]
                fn is_nan(self) -> bool { false }
            }
        )*
    };
}
numbers!(floats f32, f64; integers i64, i32, i16, i8, u64, u32, u16, u8);

#[inline(always)]
fn larger<T: Arithmetic>(a: T, b: T) -> T {
    if a > b || a.is_nan() { a } else { b }
}

#[inline(always)]
fn smaller<T: Arithmetic>(a: T, b: T) -> T {
    if a < b || a.is_nan() { a } else { b }
}

unsafe fn float<T: FloatArithmetic>(op: ReduceOp, sources: &[Contribution], outputs: &[*mut u8], len: usize) {
    // SAFETY: passed on.
    unsafe {
        match op {
            ReduceOp::Mean => {
                let n = T::from_f64(sources.len() as f64);
                blocks::<T>(sources, outputs, len, |acc, x, _| acc.add(x), |x, _| x, |x| x.div(n))
            }
            ReduceOp::PreMulSum(_) => blocks::<T>(
                sources,
                outputs,
                len,
                |acc, x, factor| acc.add(x.mul(T::from_f64(factor))),
                |x, factor| x.mul(T::from_f64(factor)),
                |x| x,
            ),
            _ => integer::<T>(op, sources, outputs, len),
        }
    }
}

/// The reductions that need no division or factor.
unsafe fn integer<T: Arithmetic>(op: ReduceOp, sources: &[Contribution], outputs: &[*mut u8], len: usize) {
    let (first, last) = (|x: T, _: f64| x, |x: T| x);
    // SAFETY: passed on.
    unsafe {
        match op {
            ReduceOp::Max => blocks::<T>(sources, outputs, len, |acc, x, _| larger(acc, x), first, last),
            ReduceOp::Min => blocks::<T>(sources, outputs, len, |acc, x, _| smaller(acc, x), first, last),
            ReduceOp::Product => blocks::<T>(sources, outputs, len, |acc, x, _| acc.mul(x), first, last),
            _ => blocks::<T>(sources, outputs, len, |acc, x, _| acc.add(x), first, last),
        }
    }
}

/// Folds in `T`. `first` opens the accumulator, `combine` adds to it, `last` closes it.
#[inline(always)]
unsafe fn blocks<T: Arithmetic>(
    sources: &[Contribution],
    outputs: &[*mut u8],
    len: usize,
    combine: impl Fn(T, T, f64) -> T,
    first: impl Fn(T, f64) -> T,
    last: impl Fn(T) -> T,
) {
    // SAFETY: passed on; a pair is of two ranks' buffers, which are two borrows and do not overlap.
    unsafe {
        match (sources, outputs) {
            // Two ranks, one of which folds into its own contribution.
            (&[a, b], &[x]) if a.data.cast_mut() == x || b.data.cast_mut() == x => vectorized(
                #[inline(always)]
                || {
                    let folded = |l: T, r: T| last(combine(first(l, a.factor), r, b.factor));
                    let output = slice::from_raw_parts_mut(x.cast::<T>(), len);
                    if a.data.cast_mut() == x {
                        let other = slice::from_raw_parts(b.data.cast::<T>(), len);
                        output.iter_mut().zip(other).for_each(|(l, r)| *l = folded(*l, *r));
                    } else {
                        let other = slice::from_raw_parts(a.data.cast::<T>(), len);
                        output.iter_mut().zip(other).for_each(|(r, l)| *r = folded(*l, *r));
                    }
                },
            ),
            (&[a, b], &[x, y]) if a.data.cast_mut() == x && b.data.cast_mut() == y => vectorized(
                #[inline(always)]
                || {
                    let (left, right) = (x.cast::<T>(), y.cast::<T>());
                    // The second run begins at a cache line, so that no vector lies across two.
                    let head = left.align_offset(64).min(len);
                    for (start, len) in [(0, head), (head, len - head)] {
                        let left = slice::from_raw_parts_mut(left.add(start), len);
                        let right = slice::from_raw_parts_mut(right.add(start), len);
                        for (l, r) in left.iter_mut().zip(right) {
                            let folded = last(combine(first(*l, a.factor), *r, b.factor));
                            (*l, *r) = (folded, folded);
                        }
                    }
                },
            ),
            _ => vectorized(
                #[inline(always)]
                || {
                    let mut accumulator = [T::default(); BLOCK];
                    let mut done = 0;
                    while done < len {
                        let n = BLOCK.min(len - done);
                        let acc = &mut accumulator[..n];
                        for (order, source) in sources.iter().enumerate() {
                            // Nothing is written while this slice lives.
                            let block = slice::from_raw_parts(source.data.cast::<T>().add(done), n);
                            if order == 0 {
                                acc.iter_mut().zip(block).for_each(|(acc, x)| *acc = first(*x, source.factor));
                            } else {
                                let factor = source.factor;
                                acc.iter_mut().zip(block).for_each(|(acc, x)| *acc = combine(*acc, *x, factor));
                            }
                        }
                        acc.iter_mut().for_each(|x| *x = last(*x));
                        for output in outputs {
                            // The accumulator is memory of our own.
                            acc.as_ptr().copy_to_nonoverlapping(output.cast::<T>().add(done), n);
                        }
                        done += n;
                    }
                },
            ),
        }
    }
}

/// Folds 16-bit floats in `f32`, rounding once.
unsafe fn half<H: Copy + Default>(op: ReduceOp, sources: &[Contribution], outputs: &[*mut u8], len: usize)
where
    [H]: HalfFloatSliceExt,
{
    let mut narrow = [H::default(); BLOCK];
    // One wide block for the accumulator and one for the contribution at hand; the fold below sees them as two ranks.
    let (mut total, mut wide) = ([0f32; BLOCK], [0f32; BLOCK]);
    let scaled = matches!(op, ReduceOp::PreMulSum(_));
    let pairwise = match op {
        ReduceOp::Mean | ReduceOp::PreMulSum(_) => ReduceOp::Sum,
        other => other,
    };
    let mut done = 0;
    while done < len {
        let n = BLOCK.min(len - done);
        for (order, source) in sources.iter().enumerate() {
            let into = if order == 0 { &mut total } else { &mut wide };
            // SAFETY: readable, and nothing is written while this slice lives.
            unsafe { slice::from_raw_parts(source.data.cast::<H>().add(done), n) }.convert_to_f32_slice(&mut into[..n]);
            if scaled {
                into[..n].iter_mut().for_each(|x| *x *= source.factor as f32);
            }
            if order > 0 {
                let result = total.as_mut_ptr();
                let pair =
                    [result.cast_const(), wide.as_ptr()].map(|data| Contribution { data: data.cast(), factor: 1.0 });
                // SAFETY: both are blocks of our own; the result goes over the first.
                unsafe { float::<f32>(pairwise, &pair, &[result.cast()], n) };
            }
        }
        if matches!(op, ReduceOp::Mean) {
            total[..n].iter_mut().for_each(|x| *x /= sources.len() as f32);
        }
        narrow[..n].convert_from_f32_slice(&total[..n]);
        for output in outputs {
            // SAFETY: writable; `narrow` is memory of our own.
            unsafe { narrow.as_ptr().copy_to_nonoverlapping(output.cast::<H>().add(done), n) };
        }
        done += n;
    }
}
