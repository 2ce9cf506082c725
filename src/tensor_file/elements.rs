//! Memory that burn takes over as it is.

use burn::tensor::{Bytes, DType, TensorData};

/// Zeros for the elements of a tensor, to be filled and handed to burn. They are allocated as numbers of their size:
/// burn copies what was allocated as bytes.
pub(crate) enum Elements {
    One(Vec<u8>),
    Two(Vec<u16>),
    Four(Vec<u32>),
    Eight(Vec<u64>),
}

impl Elements {
    pub(crate) fn zeros(number: usize, dtype: DType) -> Self {
        match dtype.size() {
            2 => Self::Two(vec![0; number]),
            4 => Self::Four(vec![0; number]),
            8 => Self::Eight(vec![0; number]),
            size => Self::One(vec![0; number * size]),
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::One(elements) => elements,
            Self::Two(elements) => bytemuck::cast_slice_mut(elements),
            Self::Four(elements) => bytemuck::cast_slice_mut(elements),
            Self::Eight(elements) => bytemuck::cast_slice_mut(elements),
        }
    }

    /// A tensor of these dims and the dtype that the memory was made for.
    pub(crate) fn into_data(self, dims: Vec<usize>, dtype: DType) -> TensorData {
        let bytes = match self {
            Self::One(elements) => Bytes::from_elems(elements),
            Self::Two(elements) => Bytes::from_elems(elements),
            Self::Four(elements) => Bytes::from_elems(elements),
            Self::Eight(elements) => Bytes::from_elems(elements),
        };
        TensorData::from_bytes(bytes, dims, dtype)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{BoolStore, DType};

    use super::Elements;

    #[test]
    fn burn_takes_them_as_they_are() {
        for dtype in [DType::U8, DType::Bool(BoolStore::Native), DType::BF16, DType::F32, DType::I64] {
            let mut elements = Elements::zeros(6, dtype);
            elements.bytes_mut()[0] = 1;
            let place = elements.bytes_mut().as_ptr();
            let data = elements.into_data(vec![2, 3], dtype);
            assert_eq!((data.bytes().as_ptr(), data.bytes().len()), (place, 6 * dtype.size()), "{dtype:?}");
            assert_eq!(data.bytes()[0], 1);
        }
    }
}
