//! The memory that kernels write their results into.

use std::sync::Arc;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{DType, Shape};

use crate::tensor::{Pool, Room};

/// The memory of a result.
pub(super) enum Memory {
    /// Not set yet.
    Room(Room),
    /// That of an input.
    Taken(FlexTensor),
}

impl Memory {
    pub(super) fn new(dtype: DType, elements: usize, pool: &Arc<Pool>) -> Self {
        Self::Room(pool.room(elements * dtype.size()))
    }

    pub(super) fn pointer(&mut self) -> *mut u8 {
        match self {
            Self::Room(room) => room.pointer(),
            Self::Taken(tensor) => match tensor.dtype() {
                DType::F64 => tensor.storage_mut::<f64>().as_mut_ptr().cast(),
                _ => tensor.storage_mut::<f32>().as_mut_ptr().cast(),
            },
        }
    }

    /// # Safety
    /// All elements have been written.
    pub(super) unsafe fn filled(self, dims: &[usize], dtype: DType) -> FlexTensor {
        let layout = Layout::contiguous(Shape::from(dims.to_vec()));
        match self {
            Self::Taken(tensor) => tensor.with_layout(layout),
            // SAFETY: as the caller says.
            Self::Room(room) => FlexTensor::new(unsafe { room.filled() }, layout, dtype),
        }
    }
}
