//! The memory that kernels write their results into.

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{DType, Shape};
use burn_ir::TensorIr;

use crate::graph::step_memory::StepMemory;
use crate::tensor::Room;

/// The memory of a result.
pub(super) enum Memory {
    /// Not set yet.
    Room(Room),
    /// That of an input.
    Taken(FlexTensor),
}

impl Memory {
    /// That of the result `out`, which has so many elements.
    pub(super) fn new(dtype: DType, elements: usize, out: &TensorIr, memory: &StepMemory) -> Self {
        let room = memory.room(out);
        assert_eq!(room.bytes(), elements * dtype.size(), "a kernel writes what its result has room for");
        Self::Room(room)
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
