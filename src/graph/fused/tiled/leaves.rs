//! Products as they leave tiles: where their elements go, and how the parts of a sum are added up.

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::Shape;
use burn_ir::TensorIr;

use super::super::multiply::{Factor, offset};
use super::super::native::Native;
use super::Leaving;
use crate::graph::step_memory::StepMemory;
use crate::tensor::{Multiplied, Room, Strided};

/// A product as it leaves.
pub(super) struct Leaves<'a, T> {
    pub(super) leaving: &'a Leaving,
    pub(super) other: Factor<'a, T>,
    pub(super) out: *mut T,
    pub(super) strides: Vec<isize>,
    /// Where the parts of a matrix but its first add up, one behind the other; null if each row gives elements of its
    /// own.
    pub(super) sums: *mut T,
}

impl<T: Native + Multiplied> Leaves<'_, T> {
    /// Where a part of one of the batch goes.
    pub(super) fn matrix(&self, number: usize, batch: &[usize], part: usize, parts: usize) -> Strided<T> {
        let [.., row, column] = self.strides[..] else { panic!("a product has rows and columns") };
        let [.., rows, columns] = self.leaving.dims[..] else { panic!("a product has rows and columns") };
        match part.checked_sub(1) {
            Some(beside) if self.leaving.adds_up() => {
                let at = (number * (parts - 1) + beside) * rows * columns;
                Strided { first: self.sums.wrapping_add(at), row: columns as isize, column: 1 }
            }
            _ => Strided { first: self.out.wrapping_offset(offset(number, batch, &self.strides)), row, column },
        }
    }

    /// Sets all elements of a part to 0.
    pub(super) fn clear(&self, Strided { first, row, column }: Strided<T>) {
        let [.., rows, columns] = self.leaving.dims[..] else { return };
        for line in 0..rows as isize {
            for place in 0..columns as isize {
                // SAFETY: the result has this element, and only this thread has this part of it.
                unsafe { *first.cast_mut().offset(line * row + place * column) = T::ZERO };
            }
        }
    }

    /// Adds the parts of each matrix to its first, in their order.
    pub(super) fn add_parts(&self, batch: &[usize], parts: usize) {
        let [.., rows, columns] = self.leaving.dims[..] else { return };
        let beside = if self.leaving.adds_up() { 1..parts } else { 0..0 };
        for (number, part) in
            (0..batch.iter().product()).flat_map(|number| beside.clone().map(move |part| (number, part)))
        {
            let [sum, other] = [0, part].map(|part| self.matrix(number, batch, part, parts));
            for (line, place) in
                (0..rows as isize).flat_map(|line| (0..columns as isize).map(move |place| (line, place)))
            {
                // SAFETY: both have this element, which is written, and no other thread has them any more.
                unsafe {
                    let sum = sum.first.cast_mut().offset(line * sum.row + place * sum.column);
                    *sum = *sum + *other.first.offset(line * other.row + place * other.column);
                }
            }
        }
    }
}

impl Leaving {
    pub(super) fn strides(&self) -> Vec<isize> {
        let mut strides = vec![0; self.dims.len()];
        let mut step = 1;
        for dim in self.order.iter().rev() {
            strides[*dim] = step;
            step *= self.dims[*dim] as isize;
        }
        strides
    }

    /// # Safety
    /// All elements have been written.
    pub(super) unsafe fn filled<T: Native>(&self, room: Room, out: &TensorIr, memory: &StepMemory) -> FlexTensor {
        let layout = Layout::new(Shape::from(self.dims.clone()), self.strides(), 0);
        if self.dtype == T::DTYPE {
            // SAFETY: as the caller says.
            return FlexTensor::new(unsafe { room.filled() }, layout, self.dtype);
        }
        let elements = self.dims.iter().product::<usize>();
        let rounded = memory.room(out);
        assert_eq!(rounded.bytes(), elements * self.dtype.size(), "a product has room for its elements");
        // SAFETY: both have so many elements.
        let bytes = unsafe {
            T::scatter(self.dtype, rounded.pointer(), 0, room.pointer().cast::<T>(), elements);
            rounded.filled()
        };
        FlexTensor::new(bytes, layout, self.dtype)
    }
}
