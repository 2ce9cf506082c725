//! Host tensors as input and output buffers of a transport.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};

use super::element::with_storage_type;
use super::transport::{BufferMut, BufferRef, OutputAllocator};
use super::{Call, CallShape, Communicator, Element};
use crate::Error;
use crate::tensor::Pool;

pub(crate) fn shape(tensor: &FlexTensor) -> CallShape {
    CallShape::new(tensor.shape().as_slice())
}

/// Refuses unsupported dtypes, so that no transport has to.
pub(crate) fn check_dtype(operation: &'static str, dtype: DType) -> Result<(), Error> {
    with_storage_type!(dtype, E => { let _ = size_of::<E>(); Ok(()) }, otherwise Err(Error::UnsupportedDType { operation, dtype }))
}

/// The tensor as one run of memory to which it holds the only handle. Copies only if it is strided, shared or
/// misaligned.
pub(crate) fn exclusive(tensor: FlexTensor) -> FlexTensor {
    let tensor = aligned(tensor);
    if tensor.is_contiguous() && tensor.is_unique() {
        return tensor;
    }
    if !tensor.is_contiguous() {
        let contiguous = tensor.to_contiguous();
        drop(tensor);
        return if contiguous.is_unique() { contiguous } else { contiguous_copy(&contiguous) };
    }
    contiguous_copy(&tensor)
}

/// The tensor as one run of memory. Copies only if it is strided or misaligned.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    let tensor = aligned(tensor);
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The tensor on memory that is aligned for its elements. What was mapped from a file, or cut out of other bytes, may
/// lie anywhere; neither burn nor a reduction may look at it as elements there.
fn aligned(tensor: FlexTensor) -> FlexTensor {
    let bytes = tensor.bytes();
    let is_aligned = with_storage_type!(tensor.dtype(), E => {
        bytes.as_ptr().cast::<E>().is_aligned() && bytes.len().is_multiple_of(size_of::<E>())
    }, otherwise true);
    match is_aligned {
        true => tensor,
        false => FlexTensor::new(copy(bytes, tensor.dtype()), tensor.layout().clone(), tensor.dtype()),
    }
}

/// A copy of a contiguous tensor.
fn contiguous_copy(tensor: &FlexTensor) -> FlexTensor {
    let bytes = read(tensor, |bytes| copy(bytes, tensor.dtype()));
    FlexTensor::new(bytes, Layout::contiguous(tensor.shape()), tensor.dtype())
}

/// The whole elements of some bytes, in memory that is aligned for them.
fn copy(bytes: &[u8], dtype: DType) -> Bytes {
    with_storage_type!(dtype, E => {
        let len = bytes.len() / size_of::<E>();
        let mut elements: Vec<E> = Vec::with_capacity(len);
        // SAFETY: there is room for so many elements of plain numbers, and they are copied before they are counted.
        unsafe {
            bytes.as_ptr().copy_to_nonoverlapping(elements.as_mut_ptr().cast(), len * size_of::<E>());
            elements.set_len(len);
        }
        Bytes::from_elems(elements)
    }, otherwise Bytes::from_bytes_vec(bytes.to_vec()))
}

/// The bytes of a contiguous tensor, wherever in its storage they begin.
fn read<R>(tensor: &FlexTensor, f: impl FnOnce(&[u8]) -> R) -> R {
    let size = tensor.dtype().size();
    let (start, len) = (tensor.layout().start_offset() * size, tensor.shape().num_elements() * size);
    f(&tensor.bytes()[start..start + len])
}

/// A [`contiguous`] tensor as a buffer for reading.
pub(crate) fn buffer_ref(tensor: &FlexTensor) -> BufferRef<'_> {
    // SAFETY: the bytes belong to the tensor, which is borrowed for as long.
    read(tensor, |bytes| unsafe { BufferRef::from_raw(bytes.as_ptr(), tensor.shape().num_elements(), tensor.dtype()) })
}

/// The elements of a buffer as a tensor of its own.
pub(crate) fn copied(buffer: BufferRef<'_>) -> FlexTensor {
    let (dtype, elements) = (buffer.dtype(), buffer.elements());
    // SAFETY: a buffer for reading.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), elements * dtype.size()) };
    FlexTensor::new(copy(bytes, dtype), Layout::contiguous([elements].into()), dtype)
}

/// An [`exclusive`] tensor as a buffer for reading and writing.
pub(crate) fn buffer_mut(tensor: &mut FlexTensor) -> BufferMut<'_> {
    let (dtype, elements, start) = (tensor.dtype(), tensor.shape().num_elements(), tensor.layout().start_offset());
    with_storage_type!(dtype, E => {
        let storage = tensor.storage_mut::<E>();
        let slice = &mut storage[start..start + elements];
        // SAFETY: the elements belong to the tensor, which is borrowed for as long.
        unsafe { BufferMut::from_raw(slice.as_mut_ptr().cast(), elements, dtype) }
    }, otherwise unreachable!("{dtype:?} was refused before"))
}

/// An output that becomes a tensor.
pub(crate) struct TensorOutput<'a> {
    /// The communicator and the call, for errors.
    receiver: (&'a Communicator, Call),
    expected: Option<DType>,
    /// The memory that it is made in, if it is not fresh.
    pool: Option<&'a Arc<Pool>>,
    tensor: Option<FlexTensor>,
}

impl<'a> TensorOutput<'a> {
    /// Accepts elements of dtype `expected`, or of any. A large tensor is made in memory of the pool, if there is one.
    pub fn new(comm: &'a Communicator, call: Call, expected: Option<DType>, pool: Option<&'a Arc<Pool>>) -> Self {
        Self { receiver: (comm, call), expected, pool, tensor: None }
    }

    /// The received tensor; `None` if nothing was received.
    pub fn into_tensor(self) -> Option<FlexTensor> {
        self.tensor
    }
}

impl OutputAllocator for TensorOutput<'_> {
    fn allocate(&mut self, dims: &[usize], dtype: DType) -> Result<BufferMut<'_>, Error> {
        if let Some(expected) = self.expected.filter(|expected| *expected != dtype) {
            return Err(Error::invalid("receive", format!("elements of {expected:?} were expected, {dtype:?} came")));
        }
        let tensor = match self.pool.and_then(|pool| pool.large_tensor(dims, dtype)) {
            Some(made) => made.ok(),
            None => zeros("receive", dims, dtype)?,
        };
        let tensor = tensor.ok_or_else(|| {
            let bytes = dims.iter().try_fold(dtype.size(), |bytes, dim| bytes.checked_mul(*dim)).unwrap_or(usize::MAX);
            let (comm, call) = &self.receiver;
            Error::OutOfMemory { group: comm.group().clone(), rank: comm.rank(), operation: call.to_string(), bytes }
        })?;
        Ok(buffer_mut(self.tensor.insert(tensor)))
    }
}

/// A tensor of zeros; `None` if there is no memory for it. Pages are not touched before they are written.
fn zeros(operation: &'static str, dims: &[usize], dtype: DType) -> Result<Option<FlexTensor>, Error> {
    let Some(elements) = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim)) else {
        return Ok(None);
    };
    let bytes = with_storage_type!(dtype, E => zeroed::<E>(elements).map(Bytes::from_elems),
        otherwise return Err(Error::UnsupportedDType { operation, dtype }));
    Ok(bytes.map(|bytes| FlexTensor::new(bytes, Layout::contiguous(Shape::from(dims.to_vec())), dtype)))
}

/// So many zeros, if there is memory for them.
pub(crate) fn zeroed<E: bytemuck::Zeroable>(elements: usize) -> Option<Vec<E>> {
    let layout = std::alloc::Layout::array::<E>(elements).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout is not empty.
    let data = unsafe { std::alloc::alloc_zeroed(layout) };
    // SAFETY: memory of the global allocator for so many elements, for which zeros are a value.
    (!data.is_null()).then(|| unsafe { Vec::from_raw_parts(data.cast(), elements, elements) })
}

/// Makes valid bools of received bytes: any other than 0 becomes 1. Returns whether all were valid.
///
/// # Safety
/// `len` initialised bytes, which nobody else touches.
pub(crate) unsafe fn normalize_bools(data: *mut u8, len: usize) -> bool {
    if len == 0 {
        return true;
    }
    // SAFETY: passed on.
    let bytes = unsafe { std::slice::from_raw_parts_mut(data, len) };
    if bytes.iter().fold(0, |all, byte| all | byte) <= 1 {
        return true;
    }
    bytes.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
    false
}

/// An output that is a slice of the caller's.
pub(crate) struct SliceOutput<'a, E>(pub &'a mut [E]);

impl<E: Element> OutputAllocator for SliceOutput<'_, E> {
    fn allocate(&mut self, dims: &[usize], dtype: DType) -> Result<BufferMut<'_>, Error> {
        check_room((self.0.len(), E::DTYPE), dims, dtype)?;
        Ok(BufferMut::new(self.0))
    }
}

/// An output that there is already, of which this rank contributes a part that stays where it is.
pub(crate) struct TakenOutput<'a>(BufferMut<'a>);

impl<'a> TakenOutput<'a> {
    pub fn new(buffer: BufferMut<'a>) -> Self {
        Self(buffer)
    }

    /// The part that this rank contributes.
    ///
    /// # Panics
    /// If it is not within the output.
    pub fn part(&self, elements: Range<usize>) -> BufferRef<'a> {
        assert!(
            elements.start <= elements.end && elements.end <= self.0.elements,
            "what a rank has lies in its tensor"
        );
        let (dtype, len) = (self.0.dtype, elements.len());
        // SAFETY: elements of the buffer, where a transport writes nothing else than what they are.
        unsafe { BufferRef::from_raw(self.0.data.add(elements.start * dtype.size()), len, dtype) }
    }
}

impl OutputAllocator for TakenOutput<'_> {
    fn allocate(&mut self, dims: &[usize], dtype: DType) -> Result<BufferMut<'_>, Error> {
        check_room((self.0.elements, self.0.dtype), dims, dtype)?;
        // SAFETY: the buffer, borrowed for as long.
        Ok(unsafe { BufferMut::from_raw(self.0.data, self.0.elements, dtype) })
    }
}

/// Demands that what comes is as long as its output, and of its dtype.
fn check_room((room, wanted): (usize, DType), dims: &[usize], dtype: DType) -> Result<(), Error> {
    let elements = dims.iter().fold(1usize, |product, dim| product.saturating_mul(*dim));
    if dtype == wanted && elements == room {
        return Ok(());
    }
    let problem = format!("the output has room for {room} elements of {wanted:?}, {elements} of {dtype:?} came");
    Err(Error::invalid("receive", problem))
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;

    /// Numbers at a misaligned address.
    fn misaligned(numbers: &[f32], layout: Layout) -> FlexTensor {
        let whole = Bytes::from_bytes_vec([&[0u8; 1][..], bytemuck::cast_slice(numbers)].concat()).shared();
        let left = whole.view(1, whole.len()).unwrap();
        assert_ne!(left.as_ptr().addr() % 4, 0);
        FlexTensor::new(left, layout, DType::F32)
    }

    #[test]
    fn what_lies_anywhere_is_lent_where_elements_may_lie() {
        let numbers = [1.0f32, -2.0, 3.5, f32::MAX, 5.0, 6.0];
        let forms = [Layout::contiguous([2, 3].into()), Layout::contiguous([3, 2].into()).transpose(0, 1)];
        for (layout, expected) in
            forms.into_iter().zip([[1.0, -2.0, 3.5, f32::MAX, 5.0, 6.0], [1.0, 3.5, 5.0, -2.0, f32::MAX, 6.0]])
        {
            for lent in [contiguous, exclusive] {
                let tensor = lent(misaligned(&numbers, layout.clone()));
                assert!(buffer_ref(&tensor).as_ptr().cast::<f32>().is_aligned());
                assert_eq!(tensor.into_data(), TensorData::new(expected.to_vec(), [2, 3]));
            }
        }
    }

    #[test]
    fn bytes_that_are_no_bools_are_found_out() {
        let settled = |mut bytes: Vec<u8>| {
            // SAFETY: the vector's own.
            (unsafe { normalize_bools(bytes.as_mut_ptr(), bytes.len()) }, bytes)
        };
        assert_eq!(settled(vec![]), (true, vec![]));
        assert_eq!(settled(vec![0, 1, 1]), (true, vec![0, 1, 1]));
        assert_eq!(settled(vec![0, 1, 2, 255]), (false, vec![0, 1, 1, 1]));
    }

    #[test]
    fn there_is_memory_or_there_is_not() {
        assert_eq!(zeroed::<u64>(3), Some(vec![0; 3]));
        assert_eq!(zeroed::<f64>(0), Some(vec![]));
        for elements in [usize::MAX, usize::MAX / 8, 1 << 58, 1 << 45] {
            assert_eq!(zeroed::<u64>(elements), None, "{elements}");
        }
    }
}
