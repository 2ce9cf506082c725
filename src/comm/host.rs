//! Tensors in host memory as buffers for a transport.

use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};

use super::element::with_storage_type;
use super::transport::{BufferMut, BufferRef, Output};
use super::{Element, Extent};
use crate::Error;

pub(crate) fn extent(tensor: &FlexTensor) -> Extent {
    Extent::new(tensor.shape().as_slice())
}

/// Refuses the dtypes that do not travel, so that everything below need not.
pub(crate) fn check_dtype(operation: &'static str, dtype: DType) -> Result<(), Error> {
    with_storage_type!(dtype, E => { let _ = size_of::<E>(); Ok(()) }, otherwise Err(Error::UnsupportedDType { operation, dtype }))
}

/// Refuses tensors that this machine has no memory for: another rank may ask for any.
pub(crate) fn check_room(operation: &'static str, dims: &[usize], dtype: DType) -> Result<(), Error> {
    /// What is smaller is simply taken.
    const LARGE: usize = 1 << 30;
    let bytes = dims.iter().try_fold(dtype.size(), |bytes, dim| bytes.checked_mul(*dim));
    let fits = bytes.filter(|bytes| *bytes <= LARGE || Vec::<u8>::new().try_reserve_exact(*bytes).is_ok());
    match fits {
        Some(_) => Ok(()),
        None => Err(Error::invalid(operation, format!("there is no memory for {dims:?} elements of {dtype:?}"))),
    }
}

/// The tensor as one run of memory that nobody else holds. Copies only if it is strided or shared.
pub(crate) fn exclusive(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() && tensor.is_unique() {
        return tensor;
    }
    let shape = tensor.shape();
    let dtype = tensor.dtype();
    let bytes = match tensor.is_contiguous() {
        true => read(&tensor, |bytes| bytes.to_vec()),
        false => {
            let packed = tensor.to_contiguous();
            drop(tensor);
            if packed.is_unique() {
                return packed;
            }
            read(&packed, |bytes| bytes.to_vec())
        }
    };
    FlexTensor::new(Bytes::from_bytes_vec(bytes), Layout::contiguous(shape), dtype)
}

/// The tensor as one run of memory. Copies only if it is strided.
pub(crate) fn packed(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The bytes of a contiguous tensor, wherever in its storage they begin.
fn read<R>(tensor: &FlexTensor, f: impl FnOnce(&[u8]) -> R) -> R {
    let size = tensor.dtype().size();
    let (start, len) = (tensor.layout().start_offset() * size, tensor.shape().num_elements() * size);
    f(&tensor.bytes()[start..start + len])
}

/// Lends a contiguous tensor for reading.
pub(crate) fn lend(tensor: &FlexTensor) -> BufferRef<'_> {
    // SAFETY: the bytes belong to the tensor, which is borrowed for as long.
    read(tensor, |bytes| unsafe { BufferRef::from_raw(bytes.as_ptr(), tensor.shape().num_elements(), tensor.dtype()) })
}

/// Lends an [`exclusive`] tensor for reading and writing.
pub(crate) fn lend_mut(tensor: &mut FlexTensor) -> BufferMut<'_> {
    let (dtype, elements, start) = (tensor.dtype(), tensor.shape().num_elements(), tensor.layout().start_offset());
    with_storage_type!(dtype, E => {
        let storage = tensor.storage_mut::<E>();
        let slice = &mut storage[start..start + elements];
        // SAFETY: the elements belong to the tensor, which is borrowed for as long.
        unsafe { BufferMut::from_raw(slice.as_mut_ptr().cast(), elements, dtype) }
    }, otherwise unreachable!("{dtype:?} was refused before"))
}

/// An output that becomes a tensor.
pub(crate) struct TensorOutput {
    expected: Option<DType>,
    tensor: Option<FlexTensor>,
}

impl TensorOutput {
    /// Takes elements of `expected`, or of whatever dtype comes.
    pub fn new(expected: Option<DType>) -> Self {
        Self { expected, tensor: None }
    }

    /// What was received; `None` if nothing was.
    pub fn into_tensor(self) -> Option<FlexTensor> {
        self.tensor
    }
}

impl Output for TensorOutput {
    fn allocate(&mut self, dims: &[usize], dtype: DType) -> Result<BufferMut<'_>, Error> {
        if let Some(expected) = self.expected.filter(|expected| *expected != dtype) {
            return Err(Error::invalid("receive", format!("elements of {expected:?} were expected, {dtype:?} came")));
        }
        check_room("receive", dims, dtype)?;
        let shape = Shape::from(dims.to_vec());
        let zeros = with_storage_type!(dtype, E => FlexTensor::filled_typed(shape, dtype, E::default()),
            otherwise return Err(Error::UnsupportedDType { operation: "receive", dtype }));
        Ok(lend_mut(self.tensor.insert(zeros)))
    }
}

/// An output that is a slice of the caller's.
pub(crate) struct SliceOutput<'a, E>(pub &'a mut [E]);

impl<E: Element> Output for SliceOutput<'_, E> {
    fn allocate(&mut self, dims: &[usize], dtype: DType) -> Result<BufferMut<'_>, Error> {
        let elements: usize = dims.iter().product();
        if dtype != E::DTYPE || elements != self.0.len() {
            let (room, wanted) = (self.0.len(), E::DTYPE);
            let problem =
                format!("the output has room for {room} elements of {wanted:?}, {elements} of {dtype:?} came");
            return Err(Error::invalid("receive", problem));
        }
        Ok(BufferMut::new(self.0))
    }
}
