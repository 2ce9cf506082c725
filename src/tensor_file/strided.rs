//! Copies of parts of tensors, in whatever order their elements lie on either side, with a cast on the way.

use std::any::TypeId;
use std::marker::PhantomData;

use burn::tensor::{DType, bf16, f16};
use bytemuck::Pod;

use crate::Error;

/// One loop of a copy: how often, and how far the next element is on either side, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loop {
    pub(crate) len: usize,
    pub(crate) from: isize,
    pub(crate) to: isize,
}

/// The first element and the dtype on one side of a copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side {
    pub(crate) start: usize,
    pub(crate) dtype: DType,
}

/// Whether a tensor of these dims, each element of so many bits, can lie in memory: one without elements as well, whose
/// strides are numbers all the same.
pub(crate) fn can_lie_in_memory(dims: impl IntoIterator<Item = u64>, bits: u64) -> bool {
    let all = dims.into_iter().filter(|dim| *dim > 0).try_fold(bits, |product, dim| product.checked_mul(dim));
    all.is_some_and(|bits| bits / 8 <= isize::MAX as u64)
}

/// The strides of a row-major tensor of these dims, in elements.
pub(crate) fn row_major(dims: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; dims.len()];
    for dim in (1..dims.len()).rev() {
        strides[dim - 1] = strides[dim] * dims[dim] as isize;
    }
    strides
}

/// Rows and columns of a block that is transposed at once, in registers.
const BLOCK: usize = 4;

/// So many rows are read in blocks side by side before their next columns are: their lines stay in the cache until
/// then, and what is written is a few long runs.
const ROWS: usize = 512;

/// Copies the elements that the loops run over. Floats are cast to the dtype of `to`; what else there is must be of one
/// dtype.
///
/// # Errors
/// [`Error::UnsupportedDType`] if there is no cast; [`Error::InvalidArgument`] if an element is outside of a slice.
pub(crate) fn copy_strided(
    (from, at): (&[u8], Side),
    (to, into): (&mut [u8], Side),
    loops: &[Loop],
) -> Result<(), Error> {
    if loops.iter().any(|of| of.len == 0) {
        return Ok(());
    }
    within(from.len(), at, loops.iter().map(|of| (of.len, of.from)))?;
    within(to.len(), into, loops.iter().map(|of| (of.len, of.to)))?;
    let loops = ordered(loops);
    let (start, end) = (at.start as isize, into.start as isize);
    macro_rules! cast {
        ($from:ty, $to:ty, $cast:expr) => {
            Copy::<$from, $to, _> { from, to, cast: $cast, types: PhantomData }.run(start, end, &loops)
        };
    }
    match (at.dtype, into.dtype) {
        (same, other) if same == other => match same.size() {
            1 => cast!([u8; 1], [u8; 1], |x| x),
            2 => cast!([u8; 2], [u8; 2], |x| x),
            4 => cast!([u8; 4], [u8; 4], |x| x),
            8 => cast!([u8; 8], [u8; 8], |x| x),
            _ => return Err(Error::UnsupportedDType { operation: "a copy", dtype: same }),
        },
        (DType::BF16, DType::F16) => cast!(bf16, f16, |x: bf16| f16::from_f32(x.to_f32())),
        (DType::BF16, DType::F32) => cast!(bf16, f32, bf16::to_f32),
        (DType::BF16, DType::F64) => cast!(bf16, f64, bf16::to_f64),
        (DType::F16, DType::BF16) => cast!(f16, bf16, |x: f16| bf16::from_f32(x.to_f32())),
        (DType::F16, DType::F32) => cast!(f16, f32, f16::to_f32),
        (DType::F16, DType::F64) => cast!(f16, f64, f16::to_f64),
        (DType::F32, DType::BF16) => cast!(f32, bf16, bf16::from_f32),
        (DType::F32, DType::F16) => cast!(f32, f16, f16::from_f32),
        (DType::F32, DType::F64) => cast!(f32, f64, f64::from),
        (DType::F64, DType::BF16) => cast!(f64, bf16, bf16::from_f64),
        (DType::F64, DType::F16) => cast!(f64, f16, f16::from_f64),
        (DType::F64, DType::F32) => cast!(f64, f32, |x| x as f32),
        (dtype, _) => return Err(Error::UnsupportedDType { operation: "a cast between floats", dtype }),
    }
    Ok(())
}

fn within(bytes: usize, side: Side, loops: impl Iterator<Item = (usize, isize)>) -> Result<(), Error> {
    let (mut low, mut high) = (side.start as i128, side.start as i128);
    for (len, stride) in loops {
        let last = (len as i128 - 1) * stride as i128;
        (low, high) = (low + last.min(0), high + last.max(0));
    }
    if low < 0 || (high + 1) * side.dtype.size() as i128 > bytes as i128 {
        let problem = format!("elements {low} to {high} of {:?} are not all in {bytes} bytes", side.dtype);
        return Err(Error::invalid("a copy of a part of a tensor", problem));
    }
    Ok(())
}

/// The loops in the order of the memory that is written, those that are one made one.
fn ordered(loops: &[Loop]) -> Vec<Loop> {
    let mut loops: Vec<Loop> = loops.iter().copied().filter(|of| of.len != 1).collect();
    loops.sort_by_key(|of| std::cmp::Reverse(of.to.unsigned_abs()));
    let mut merged: Vec<Loop> = Vec::new();
    for inner in loops {
        match merged.last_mut() {
            Some(outer)
                if outer.from == inner.from * inner.len as isize && outer.to == inner.to * inner.len as isize =>
            {
                *outer = Loop { len: outer.len * inner.len, ..inner };
            }
            _ => merged.push(inner),
        }
    }
    // Of a transposed tensor the loop along which it is read comes next to the one along which it is written.
    if merged.last().is_some_and(|inner| inner.from != 1)
        && let Some(read) = merged.iter().position(|of| of.from == 1)
    {
        let read = merged.remove(read);
        merged.insert(merged.len() - 1, read);
    }
    merged
}

struct Copy<'a, S, D, F> {
    from: &'a [u8],
    to: &'a mut [u8],
    cast: F,
    types: PhantomData<(S, D)>,
}

impl<S: Pod, D: Pod, F: Fn(S) -> D> Copy<'_, S, D, F> {
    fn run(&mut self, from: isize, to: isize, loops: &[Loop]) {
        match loops {
            [] => self.one(from, to),
            [Loop { len, from: 1, to: 1 }] => self.line(from as usize, to as usize, *len),
            [outer, inner] if outer.from == 1 && inner.to == 1 => self.transposed(from, to, *outer, *inner),
            [outer, inner @ ..] => {
                for index in 0..outer.len as isize {
                    self.run(from + index * outer.from, to + index * outer.to, inner);
                }
            }
        }
    }

    #[inline]
    fn one(&mut self, from: isize, to: isize) {
        let (read, wrote) = (from as usize * size_of::<S>(), to as usize * size_of::<D>());
        let value = bytemuck::pod_read_unaligned::<S>(&self.from[read..read + size_of::<S>()]);
        let value = (self.cast)(value);
        self.to[wrote..wrote + size_of::<D>()].copy_from_slice(bytemuck::bytes_of(&value));
    }

    fn line(&mut self, from: usize, to: usize, len: usize) {
        let from = &self.from[from * size_of::<S>()..(from + len) * size_of::<S>()];
        let to = &mut self.to[to * size_of::<D>()..(to + len) * size_of::<D>()];
        if TypeId::of::<S>() == TypeId::of::<D>() {
            return to.copy_from_slice(from);
        }
        for (from, to) in from.chunks_exact(size_of::<S>()).zip(to.chunks_exact_mut(size_of::<D>())) {
            to.copy_from_slice(bytemuck::bytes_of(&(self.cast)(bytemuck::pod_read_unaligned::<S>(from))));
        }
    }

    /// A block at a time.
    fn transposed(&mut self, from: isize, to: isize, outer: Loop, inner: Loop) {
        for first in (0..inner.len).step_by(ROWS) {
            let end = (first + ROWS).min(inner.len);
            for row in (0..outer.len).step_by(BLOCK) {
                for column in (first..end).step_by(BLOCK) {
                    let (from, to) = (
                        from + row as isize + column as isize * inner.from,
                        to + row as isize * outer.to + column as isize,
                    );
                    let (rows, columns) = ((outer.len - row).min(BLOCK), (end - column).min(BLOCK));
                    if rows == BLOCK && columns == BLOCK {
                        self.block(from, to, outer.to, inner.from);
                        continue;
                    }
                    for row in 0..rows as isize {
                        for column in 0..columns as isize {
                            self.one(from + row + column * inner.from, to + row * outer.to + column);
                        }
                    }
                }
            }
        }
    }

    /// A block through registers.
    #[inline]
    fn block(&mut self, from: isize, to: isize, to_stride: isize, from_stride: isize) {
        let mut lines = [[S::zeroed(); BLOCK]; BLOCK];
        for (line, values) in lines.iter_mut().enumerate() {
            let start = (from + line as isize * from_stride) as usize * size_of::<S>();
            *values = bytemuck::pod_read_unaligned(&self.from[start..start + BLOCK * size_of::<S>()]);
        }
        for row in 0..BLOCK {
            let mut turned = [D::zeroed(); BLOCK];
            for (value, line) in turned.iter_mut().zip(&lines) {
                *value = (self.cast)(line[row]);
            }
            let start = (to + row as isize * to_stride) as usize * size_of::<D>();
            self.to[start..start + BLOCK * size_of::<D>()].copy_from_slice(bytemuck::bytes_of(&turned));
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, bf16};
    use proptest::prelude::*;

    use super::{Loop, Side, copy_strided, row_major};

    fn side(start: usize, dtype: DType) -> Side {
        Side { start, dtype }
    }

    proptest! {
        #[test]
        fn any_order_of_any_part(
            dims in prop::collection::vec(1usize..70, 1..4),
            turn in 0usize..6,
            cuts in prop::collection::vec((0usize..70, 0usize..70), 3),
        ) {
            let rank = dims.len();
            let all: usize = dims.iter().product();
            let from: Vec<f32> = (0..all).map(|x| x as f32).collect();
            let strides = row_major(&dims);
            let ranges: Vec<_> = dims.iter().zip(&cuts).map(|(size, (a, b))| (a % size).min(b % size)..(a % size).max(b % size) + 1).collect();
            let mut order: Vec<usize> = (0..rank).collect();
            order.rotate_left(turn % rank);
            if turn > 2 { order.reverse(); }
            let lens: Vec<usize> = order.iter().map(|dim| ranges[*dim].len()).collect();
            let to_strides = row_major(&lens);
            let loops: Vec<Loop> = order.iter().zip(&to_strides).map(|(dim, to)| Loop { len: ranges[*dim].len(), from: strides[*dim], to: *to }).collect();
            let start: usize = ranges.iter().zip(&strides).map(|(range, stride)| range.start * *stride as usize).sum();
            let mut to = vec![0f32; lens.iter().product()];
            copy_strided(
                (bytemuck::cast_slice(&from), side(start, DType::F32)),
                (bytemuck::cast_slice_mut(&mut to), side(0, DType::F32)),
                &loops,
            ).unwrap();
            let mut half = vec![bf16::ZERO; to.len()];
            copy_strided(
                (bytemuck::cast_slice(&from), side(start, DType::F32)),
                (bytemuck::cast_slice_mut(&mut half), side(0, DType::BF16)),
                &loops,
            ).unwrap();
            for (place, (value, half)) in to.iter().zip(&half).enumerate() {
                let mut rest = place;
                let mut read = start;
                for (dim, stride) in order.iter().zip(&to_strides) {
                    read += rest / *stride as usize * strides[*dim] as usize;
                    rest %= *stride as usize;
                }
                prop_assert_eq!(*value, read as f32);
                prop_assert_eq!(*half, bf16::from_f32(read as f32));
            }
        }
    }

    #[test]
    fn nothing_outside_is_touched() {
        let (from, mut to) = ([1u8; 8], [0u8; 8]);
        let mut copy = |start, len, stride, dtype| {
            let loops = [Loop { len, from: stride, to: 1 }];
            copy_strided((&from, side(start, dtype)), (&mut to, side(0, dtype)), &loops)
                .map_err(|error| error.to_string())
        };
        assert!(copy(4, 5, 1, DType::U8).unwrap_err().contains("elements 4 to 8 of U8 are not all in 8 bytes"));
        assert!(copy(1, 3, -1, DType::U8).unwrap_err().contains("elements -1 to 1"));
        assert!(copy(usize::MAX, 0, 1, DType::U8).is_ok());
        assert!(copy(7, 8, -1, DType::U8).is_ok());
    }

    #[test]
    fn only_floats_are_cast() {
        let loops = [Loop { len: 2, from: 1, to: 1 }];
        let mut to = [0u8; 16];
        let cast = copy_strided((&[0; 8], side(0, DType::I32)), (&mut to, side(0, DType::I64)), &loops);
        assert!(cast.unwrap_err().to_string().contains("I32"));
    }
}
