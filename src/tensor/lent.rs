//! A part of a tensor's memory, lent as a tensor of its own.
//!
//! Operations work in place on a tensor that nobody else holds. So what changes some rows of a large tensor is given
//! these rows where they lie, and neither they nor what becomes of them take memory of their own.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape, bf16, f16};
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty};

use super::PlainTensor;

/// Whoever lends a part of a tensor, which is not to be had before that part is back.
#[derive(Debug)]
pub(crate) struct Lender {
    memory: Arc<Lent>,
    elements: Range<usize>,
}

/// A tensor of which a part is lent.
#[derive(Debug)]
struct Lent {
    /// One run of memory that nobody else holds.
    whole: FlexTensor,
    /// Its first element.
    begin: *mut u8,
}

// SAFETY: the pointer leads into memory of the tensor, of which only the part that is lent is touched while it is lent,
// by whoever has that.
unsafe impl Send for Lent {}
// SAFETY: the same.
unsafe impl Sync for Lent {}

impl PlainTensor {
    /// Lends some elements as a tensor of the dims `part`. `dims` are those of the whole, which may be more than the
    /// tensor has, where its storage has room for them behind it: it comes back with these, and zeros there. Without a
    /// lender it is the tensor itself, which cannot lend them: one that is shared, strided, too short, or not of floats
    /// in host memory.
    pub(crate) fn lend(self, dims: &[usize], elements: Range<usize>, part: &[usize]) -> (Self, Option<Lender>) {
        if !self.on_flex() {
            return (self, None);
        }
        let Ok(mut whole) = self.into_flex() else { unreachable!("the tensor is in host memory") };
        let (dtype, start, size) = (whole.dtype(), whole.layout().start_offset(), whole.dtype().size());
        let (held, all) = (whole.layout().shape().num_elements(), dims.iter().product::<usize>());
        let end = start.checked_add(all).and_then(|end| end.checked_mul(size));
        let bytes = whole.bytes();
        let lies_well = bytes.as_ptr().addr().is_multiple_of(size) && bytes.len().is_multiple_of(size);
        let has_room = end.is_some_and(|end| end <= bytes.len()) && elements.end <= all && held <= all;
        let fits = part.iter().product::<usize>() == elements.len() && !elements.is_empty();
        if !(fits && has_room && lies_well && whole.is_contiguous() && whole.is_unique()) {
            return (Self::from_flex(whole), None);
        }
        let Some(storage) = first_byte(&mut whole) else { return (Self::from_flex(whole), None) };
        // SAFETY: the storage has more elements than that.
        let begin = unsafe { storage.add(start * size) };
        // What was cut off lies behind a slice, and belongs to nobody.
        // SAFETY: the storage has room for all, and nobody else holds it.
        unsafe { begin.add(held * size).write_bytes(0, (all - held) * size) };
        let shape = Shape::from(dims.to_vec());
        let strides = Layout::contiguous(shape.clone()).strides().to_vec();
        let memory = Arc::new(Lent { whole: whole.with_layout(Layout::new(shape, strides, start)), begin });
        let lender = Lender { memory, elements };
        let (place, bytes) = (lender.place(), lender.elements.len() * size);
        let lent = Part { _memory: lender.memory.clone(), place, bytes, align: size };
        // SAFETY: so many bytes of a tensor, which are set.
        let bytes = unsafe { Bytes::from_controller(Box::new(lent), bytes) };
        let lent = FlexTensor::new(bytes, Layout::contiguous(Shape::from(part.to_vec())), dtype);
        (Self::from_flex(lent), Some(lender))
    }
}

/// What there is once a part is back.
#[derive(Debug)]
pub(crate) enum Returned {
    /// The whole, with that part in it.
    Whole(PlainTensor),
    /// The part alone.
    Part(PlainTensor),
}

impl Lender {
    /// Where the part begins.
    fn place(&self) -> *mut u8 {
        // SAFETY: an element of the tensor.
        unsafe { self.memory.begin.add(self.elements.start * self.memory.whole.dtype().size()) }
    }

    /// The whole, with `part` in the place of what was lent: there it is, if that was worked on in place, else it is
    /// copied. There is no whole any more if somebody still holds what was lent, or if `part` is of another dtype or
    /// size.
    pub(crate) fn take_back(self, part: PlainTensor) -> Returned {
        let place = self.place();
        let Self { memory, elements } = self;
        if !part.on_flex() || part.dtype() != memory.whole.dtype() || part.elements() != elements.len() {
            return Returned::Part(part);
        }
        let Ok(part) = part.into_flex() else { unreachable!("the part is in host memory") };
        let is_there =
            part.is_contiguous() && part.layout().start_offset() == 0 && part.bytes().as_ptr() == place.cast_const();
        let part = match is_there && part.is_unique() {
            true => {
                drop(part);
                None
            }
            false => Some(PlainTensor::from_flex(part)),
        };
        match (Arc::try_unwrap(memory), part) {
            (Ok(lent), None) => Returned::Whole(PlainTensor::from_flex(lent.whole)),
            (Ok(lent), Some(part)) => {
                let whole = PlainTensor::from_flex(lent.whole);
                Returned::Whole(whole.overwritten(elements.start, &part, 0..elements.len()))
            }
            (Err(_), Some(part)) => Returned::Part(part),
            (Err(_), None) => unreachable!("the part was the only one, and it is back"),
        }
    }
}

impl PlainTensor {
    /// A tensor of floats whose elements from `start` on are some of those of another of its dtype: in place, if nobody
    /// else holds it. Both are contiguous and in host memory.
    ///
    /// # Panics
    /// If they are not, or are too short.
    pub(crate) fn overwritten(self, start: usize, with: &Self, range: Range<usize>) -> Self {
        let (Ok(whole), Ok(with)) = (self.into_flex(), with.clone().into_flex()) else {
            unreachable!("tensors in host memory")
        };
        let (mut whole, with) = (whole, with.to_contiguous());
        assert!(whole.is_contiguous() && whole.dtype() == with.dtype(), "tensors of one dtype, in order");
        let (from, to) = (with.layout().start_offset(), whole.layout().start_offset() + start);
        let (from, to) = (from + range.start..from + range.end, to..to + range.len());
        match whole.dtype() {
            DType::F64 => whole.storage_mut::<f64>()[to].copy_from_slice(&with.storage::<f64>()[from]),
            DType::F32 => whole.storage_mut::<f32>()[to].copy_from_slice(&with.storage::<f32>()[from]),
            DType::F16 => whole.storage_mut::<f16>()[to].copy_from_slice(&with.storage::<f16>()[from]),
            DType::BF16 => whole.storage_mut::<bf16>()[to].copy_from_slice(&with.storage::<bf16>()[from]),
            dtype => panic!("parameters are floats, and this is {dtype:?}"),
        }
        Self::from_flex(whole)
    }
}

/// Where the storage of a tensor begins that nobody else holds; `None` of one that is not of plain floats.
fn first_byte(tensor: &mut FlexTensor) -> Option<*mut u8> {
    Some(match tensor.dtype() {
        DType::F64 => tensor.storage_mut::<f64>().as_mut_ptr().cast(),
        DType::F32 => tensor.storage_mut::<f32>().as_mut_ptr().cast(),
        DType::F16 => tensor.storage_mut::<f16>().as_mut_ptr().cast(),
        DType::BF16 => tensor.storage_mut::<bf16>().as_mut_ptr().cast(),
        _ => return None,
    })
}

/// A part that is lent, as memory of a tensor.
#[derive(Debug)]
struct Part {
    /// Stays for as long.
    _memory: Arc<Lent>,
    place: *mut u8,
    bytes: usize,
    align: usize,
}

// SAFETY: nobody else touches these bytes.
unsafe impl Send for Part {}
// SAFETY: the same; they are changed through `&mut` only.
unsafe impl Sync for Part {}

impl AllocationController for Part {
    fn alloc_align(&self) -> usize {
        self.align
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        // SAFETY: so many bytes of the tensor, of which nobody else has these.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.place.cast(), self.bytes) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        // SAFETY: so many bytes of the tensor, which nobody else changes.
        Ok(unsafe { std::slice::from_raw_parts(self.place.cast(), self.bytes) })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn numbers(count: usize) -> PlainTensor {
        let values: Vec<f32> = (0..count).map(|number| number as f32).collect();
        PlainTensor::from_data(TensorData::new(values, [count]), &Device::flex())
    }

    fn values(tensor: &PlainTensor) -> Vec<f32> {
        tensor.clone().into_data().unwrap().try_to_vec().unwrap()
    }

    fn place(tensor: &PlainTensor) -> usize {
        let tensor = tensor.clone().into_flex().unwrap();
        tensor.bytes().as_ptr().addr() + 4 * tensor.layout().start_offset()
    }

    fn lend(tensor: PlainTensor, dims: &[usize], elements: Range<usize>, part: &[usize]) -> (PlainTensor, Lender) {
        let (part, lender) = tensor.lend(dims, elements, part);
        (part, lender.unwrap())
    }

    fn whole(returned: Returned) -> PlainTensor {
        match returned {
            Returned::Whole(whole) => whole,
            Returned::Part(part) => panic!("{part:?} alone came back"),
        }
    }

    #[test]
    fn what_is_lent_is_changed_where_it_lies() {
        let tensor = numbers(12).reshape([4, 3]);
        let began = place(&tensor);
        let (part, lender) = lend(tensor, &[4, 3], 6..12, &[2, 3]);
        assert_eq!((place(&part), values(&part)), (began + 24, vec![6., 7., 8., 9., 10., 11.]));
        let part = part.scale(2.0);
        assert_eq!(place(&part), began + 24);
        let back = whole(lender.take_back(part));
        assert_eq!((place(&back), back.shape().to_vec()), (began, vec![4, 3]));
        assert_eq!(values(&back), [0., 1., 2., 3., 4., 5., 12., 14., 16., 18., 20., 22.]);
    }

    #[test]
    fn what_came_to_lie_elsewhere_is_copied() {
        let (part, lender) = lend(numbers(6), &[6], 2..4, &[1, 2]);
        let elsewhere = part.clone().add(part);
        assert_eq!(values(&whole(lender.take_back(elsewhere))), [0., 1., 4., 6., 4., 5.]);
    }

    #[test]
    fn what_is_held_by_somebody_is_not_changed() {
        // The part itself, as it comes back or as it was, by an optimizer that keeps it.
        for changed in [false, true] {
            let (part, lender) = lend(numbers(4), &[4], 1..3, &[2]);
            let kept = part.clone();
            let back = if changed { part.scale(3.0) } else { part };
            let Returned::Part(back) = lender.take_back(back) else { panic!("it is held") };
            assert_eq!(values(&kept), [1., 2.]);
            assert_eq!(values(&back), if changed { [3., 6.] } else { [1., 2.] });
        }
        // The whole.
        let kept = numbers(4);
        let (tensor, lender) = kept.clone().lend(&[4], 1..3, &[2]);
        assert!(lender.is_none() && values(&tensor) == values(&kept));
    }

    #[test]
    fn only_runs_of_floats_are_lent_that_are_there() {
        let turned = numbers(6).reshape([2, 3]).permute(&[1, 0]);
        assert!(turned.lend(&[3, 2], 0..2, &[1, 2]).1.is_none());
        assert!(numbers(6).lend(&[6], 6..6, &[0]).1.is_none());
        assert!(numbers(6).lend(&[8], 4..8, &[4]).1.is_none());
        let ints = PlainTensor::from_data(TensorData::new(vec![1i32, 2], [2]), &Device::flex());
        assert!(ints.lend(&[2], 0..1, &[1]).1.is_none());
        // Rows behind the last one become zeros where the storage has room for them, whatever was cut off there.
        let three = numbers(8).reshape([4, 2]).narrow(0, 0..3);
        let began = place(&three);
        let (part, lender) = lend(three, &[4, 2], 4..8, &[2, 2]);
        let back = whole(lender.take_back(part.scale(10.0)));
        assert_eq!((place(&back), back.shape().to_vec()), (began, vec![4, 2]));
        assert_eq!(values(&back), [0., 1., 2., 3., 40., 50., 0., 0.]);
        // From its first element on, wherever its storage begins.
        let behind = numbers(8).narrow(0, 2..8);
        let (part, lender) = lend(behind, &[6], 3..6, &[3]);
        assert_eq!(values(&part), [5., 6., 7.]);
        assert_eq!(values(&whole(lender.take_back(part.scale(0.0)))), [2., 3., 4., 0., 0., 0.]);
    }

    #[test]
    fn some_elements_are_written_over() {
        let tensor = numbers(6).reshape([3, 2]);
        let began = place(&tensor);
        let tensor = tensor.overwritten(2, &numbers(9), 5..8);
        assert_eq!((place(&tensor), values(&tensor)), (began, vec![0., 1., 5., 6., 7., 5.]));
    }
}
