//! Tensors beside each other in one, in memory that was used before: each is copied once, from where it lies.

use std::mem::MaybeUninit;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{DType, Element, Shape};
use burn_ir::CatOpIr;
use half::{bf16, f16};

use super::multiply::offset;
use crate::tensor::Room;

/// Whether [`assemble`] puts them together. What is beside nothing needs no copy.
pub(crate) fn assembles(op: &CatOpIr) -> bool {
    matches!(op.out.dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16) && op.tensors.len() > 1
}

/// Tensors beside each other along a dim, which have the dims `dims` together, in `room`.
///
/// # Panics
/// If dims do not fit each other, which burn has checked when they were recorded.
pub(crate) fn assemble(parts: &[FlexTensor], dim: usize, dims: &[usize], dtype: DType, room: Room) -> FlexTensor {
    let assemble = match dtype {
        DType::F64 => assemble_as::<f64>,
        DType::F16 => assemble_as::<f16>,
        DType::BF16 => assemble_as::<bf16>,
        _ => assemble_as::<f32>,
    };
    assemble(parts, dim, dims, room)
}

fn assemble_as<T: Element + bytemuck::Pod>(parts: &[FlexTensor], dim: usize, dims: &[usize], room: Room) -> FlexTensor {
    let shape = Shape::from(dims.to_vec());
    let elements = shape.num_elements();
    assert_eq!(room.bytes(), elements * size_of::<T>(), "a tensor has room for its elements");
    // SAFETY: the room has so many elements, for which it is aligned, and nothing else refers to it.
    let out = unsafe { std::slice::from_raw_parts_mut(room.pointer().cast::<MaybeUninit<T>>(), elements) };
    let (behind, mut from) = (dims[dim + 1..].iter().product::<usize>(), 0);
    for part in parts {
        let size = part.layout().shape()[dim];
        let fits = |(at, (own, whole)): (usize, (&usize, &usize))| own == whole || at == dim;
        let own: &[usize] = part.layout().shape();
        assert!(own.len() == dims.len() && own.iter().zip(dims).enumerate().all(fits) && from + size <= dims[dim]);
        // Of no elements there is no chunk.
        let to =
            out.chunks_exact_mut((dims[dim] * behind).max(1)).map(|out| &mut out[from * behind..][..size * behind]);
        copy::<T>(part, dim, to);
        from += size;
    }
    assert_eq!(from, dims[dim], "all of a tensor is written");
    // SAFETY: every element has been written.
    let bytes = unsafe { room.filled() };
    FlexTensor::new(bytes, Layout::contiguous(shape), T::dtype())
}

/// Copies a tensor, for each place along its dims before `dim` to the next of `to`.
fn copy<'a, T: Element + bytemuck::Pod>(
    tensor: &FlexTensor,
    dim: usize,
    to: impl Iterator<Item = &'a mut [MaybeUninit<T>]>,
) {
    let (dims, strides): (&[usize], &[isize]) = (tensor.layout().shape(), tensor.layout().strides());
    let (data, start) = (tensor.storage::<T>(), tensor.layout().start_offset() as isize);
    let (Some((width, of_lines)), Some((stride, of_strides))) = (dims.split_last(), strides.split_last()) else {
        return;
    };
    if dims.contains(&0) {
        return;
    }
    let lines: usize = of_lines[dim.min(of_lines.len())..].iter().product();
    for (number, to) in to.enumerate() {
        for (line, to) in to.chunks_exact_mut(*width).enumerate() {
            let from = start + offset(number * lines + line, of_lines, of_strides);
            if *stride == 1 {
                to.write_copy_of_slice(&data[from as usize..][..*width]);
                continue;
            }
            for (place, to) in to.iter_mut().enumerate() {
                to.write(data[(from + place as isize * stride) as usize]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::tensor::{PlainTensor, Pool};

    fn numbers(dims: [usize; 3], dtype: DType) -> Tensor<3> {
        let all = Tensor::<1, burn::tensor::Int>::arange(0..dims.iter().product::<usize>() as i64, &Device::flex());
        all.float().reshape(dims).cast(dtype)
    }

    /// As burn puts them, whatever they are views of.
    #[test]
    fn parts_lie_beside_each_other() {
        let pool = Pool::of_thread();
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let whole = numbers([4, 6, 5], dtype);
            let views = [
                whole.clone(),
                whole.clone().slice([1..3, 2..5, 0..4]),
                whole.clone().swap_dims(0, 1),
                whole.clone().swap_dims(1, 2).slice([0..4, 1..4, 2..6]),
                whole.clone().flip([0, 2]),
                whole.slice([0..4, 0..1, 0..5]).expand([4, 3, 5]),
            ];
            for (dim, view) in (0..3).flat_map(|dim| views.iter().map(move |view| (dim, view))) {
                let mut dims = view.dims();
                dims[dim] = 3;
                let parts = vec![view.clone(), numbers(dims, dtype), view.clone() + 1.0];
                let expected = Tensor::cat(parts.clone(), dim);
                let room = pool.room(expected.shape().num_elements() * dtype.size());
                let flex = parts.into_iter().map(|part| PlainTensor::from(part).into_flex().unwrap());
                let found = assemble(&flex.collect::<Vec<_>>(), dim, &expected.dims(), dtype, room);
                let found: Tensor<3> = PlainTensor::from_flex(found).float().unwrap();
                assert_eq!(found.into_data(), expected.into_data(), "{dtype:?}, dim {dim}");
            }
        }
    }
}
