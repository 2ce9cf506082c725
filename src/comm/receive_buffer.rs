//! An uninitialised buffer that a message is received into, and which then becomes a tensor.

use std::mem::ManuallyDrop;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};

use super::element::with_storage_type;
use super::host_buffer::normalize_bools;
use super::transport::BufferMut;
use crate::Error;

/// The memory of a tensor that is being received.
#[derive(Debug)]
pub(crate) struct ReceiveBuffer {
    /// Of a vector of the type that stores `dtype`, of this capacity and no elements.
    data: *mut u8,
    capacity: usize,
    dims: Vec<usize>,
    elements: usize,
    dtype: DType,
}

// SAFETY: the memory is the buffer's own.
unsafe impl Send for ReceiveBuffer {}
unsafe impl Sync for ReceiveBuffer {}

impl ReceiveBuffer {
    /// A buffer for a tensor of these dims, which come from another rank and may be wrong.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if this machine has no memory for it; [`Error::UnsupportedDType`].
    pub fn new(operation: &'static str, dims: &[usize], dtype: DType) -> Result<Self, Error> {
        let none = || Error::invalid(operation, format!("there is no memory for {dims:?} elements of {dtype:?}"));
        let elements = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim)).ok_or_else(none)?;
        let (data, capacity) = with_storage_type!(dtype, E => {
            let mut vector: Vec<E> = Vec::new();
            vector.try_reserve_exact(elements).map_err(|_| none())?;
            let mut vector = ManuallyDrop::new(vector);
            (vector.as_mut_ptr().cast(), vector.capacity())
        }, otherwise return Err(Error::UnsupportedDType { operation, dtype }));
        Ok(Self { data, capacity, dims: dims.to_vec(), elements, dtype })
    }

    /// The buffer, for writing.
    pub fn buffer_mut(&mut self) -> BufferMut<'_> {
        // SAFETY: as long as that, and borrowed.
        unsafe { BufferMut::from_raw(self.data, self.elements, self.dtype) }
    }

    /// The tensor, once all of it is written; `None` if a bool has an invalid value.
    ///
    /// # Safety
    /// All elements have been written.
    pub unsafe fn into_tensor(self) -> Option<FlexTensor> {
        // SAFETY: so many bytes are written, and the buffer's own.
        if self.dtype.is_bool() && unsafe { !normalize_bools(self.data, self.elements) } {
            return None;
        }
        let mut buffer = ManuallyDrop::new(self);
        let shape = Shape::from(std::mem::take(&mut buffer.dims));
        let bytes = with_storage_type!(buffer.dtype, E => {
            // SAFETY: the parts are those of `new`, and so many elements are written.
            Bytes::from_elems(unsafe { Vec::<E>::from_raw_parts(buffer.data.cast(), buffer.elements, buffer.capacity) })
        }, otherwise unreachable!("{:?} was refused before", buffer.dtype));
        Some(FlexTensor::new(bytes, Layout::contiguous(shape), buffer.dtype))
    }
}

impl Drop for ReceiveBuffer {
    fn drop(&mut self) {
        with_storage_type!(self.dtype, E => {
            // SAFETY: the parts are those of `new`; no elements are in it.
            drop(unsafe { Vec::<E>::from_raw_parts(self.data.cast(), 0, self.capacity) })
        }, otherwise ())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::BoolStore;

    use super::*;

    #[test]
    fn what_is_written_is_in_the_tensor() {
        let mut buffer = ReceiveBuffer::new("recv", &[2, 3], DType::I16).unwrap();
        let mut place = buffer.buffer_mut();
        assert_eq!((place.elements(), place.dtype()), (6, DType::I16));
        // SAFETY: there is room for six.
        let tensor = unsafe {
            [1i16, 2, 3, 4, 5, 6].as_ptr().copy_to_nonoverlapping(place.as_mut_ptr().cast(), 6);
            buffer.into_tensor().unwrap()
        };
        assert_eq!(tensor.into_data(), burn::tensor::TensorData::from([[1i16, 2, 3], [4, 5, 6]]));
        // SAFETY: nothing is to be written.
        let empty = unsafe { ReceiveBuffer::new("recv", &[0, 3], DType::F64).unwrap().into_tensor().unwrap() };
        assert_eq!(empty.into_data().shape().to_vec(), [0, 3]);
        drop(ReceiveBuffer::new("recv", &[1000], DType::BF16).unwrap());
    }

    #[test]
    fn bytes_that_are_no_bools_make_no_tensor() {
        for (byte, is_bool) in [(0u8, true), (1, true), (2, false), (255, false)] {
            let mut buffer = ReceiveBuffer::new("recv", &[3], DType::Bool(BoolStore::Native)).unwrap();
            // SAFETY: there is room for three.
            let tensor = unsafe {
                [1, byte, 0].as_ptr().copy_to_nonoverlapping(buffer.buffer_mut().as_mut_ptr(), 3);
                buffer.into_tensor()
            };
            assert_eq!(tensor.is_some(), is_bool, "{byte}");
        }
    }

    #[test]
    fn what_nobody_has_memory_for_is_refused() {
        for dims in [&[usize::MAX][..], &[usize::MAX / 2, 3], &[1 << 60], &[1 << 46]] {
            let error = ReceiveBuffer::new("recv", dims, DType::F32).unwrap_err();
            assert!(error.to_string().contains("there is no memory for"), "{error}");
        }
    }
}
