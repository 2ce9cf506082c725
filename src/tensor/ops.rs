//! Operations on tensors of any kind.

use std::ops::Range;

use burn::backend::flex::Layout;
use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::{Dispatch, DispatchTensor};
use burn::tensor::{DType, FloatDType, Scalar, Shape, Slice};

use super::{Kind, PlainTensor, by_kind};
use crate::Error;

impl PlainTensor {
    /// The same elements under other dims.
    pub(crate) fn reshape(self, dims: impl Into<Shape>) -> Self {
        let shape = dims.into();
        Self(by_kind!(Kind::of(self.dtype()), float_reshape | int_reshape | bool_reshape(self.0, shape)))
    }

    /// The dims in another order.
    pub(crate) fn permute(self, order: &[usize]) -> Self {
        Self(by_kind!(Kind::of(self.dtype()), float_permute | int_permute | bool_permute(self.0, order)))
    }

    /// One element in the place of many, without memory for them.
    pub(crate) fn expand(self, dims: impl Into<Shape>) -> Self {
        let shape = dims.into();
        Self(by_kind!(Kind::of(self.dtype()), float_expand | int_expand | bool_expand(self.0, shape)))
    }

    /// One dim as two, the first of which has `parts` entries: `parts` divides it. On Flex never a copy.
    pub(crate) fn split_dim(self, dim: usize, parts: usize) -> Result<Self, Error> {
        let mut dims = self.shape().to_vec();
        let share = dims[dim] / parts;
        dims.splice(dim..=dim, [parts, share]);
        if !self.on_flex() {
            return Ok(self.reshape(dims));
        }
        let tensor = self.into_flex()?;
        let layout = tensor.layout();
        let mut strides = layout.strides().to_vec();
        strides.insert(dim, strides[dim] * share as isize);
        let split = Layout::new(Shape::from(dims), strides, layout.start_offset());
        Ok(Self::from_flex(tensor.with_layout(split)))
    }

    /// Its elements in order, and on Flex no more memory than these take along the dims that were cut.
    pub(crate) fn packed(self) -> Result<Self, Error> {
        match self.on_flex() {
            true => Ok(Self::from_flex(self.into_flex()?.to_contiguous())),
            false => Ok(self),
        }
    }

    /// A range of one dim.
    pub(crate) fn narrow(self, dim: usize, range: Range<usize>) -> Self {
        let shape = self.shape();
        let whole = |(place, size): (usize, &usize)| if place == dim { range.clone() } else { 0..*size };
        let slices: Vec<Slice> = shape.iter().enumerate().map(|dim| Slice::from(whole(dim))).collect();
        Self(by_kind!(Kind::of(self.dtype()), float_slice | int_slice | bool_slice(self.0, &slices)))
    }

    /// Tensors of one kind one behind the other along a dim.
    ///
    /// # Errors
    /// [`Error::Graph`] if there is none.
    pub(crate) fn cat(tensors: Vec<Self>, dim: usize) -> Result<Self, Error> {
        let Some(first) = tensors.first() else {
            return Err(Error::Graph { problem: "no tensors can be put together".into() });
        };
        let kind = Kind::of(first.dtype());
        let tensors: Vec<DispatchTensor> = tensors.into_iter().map(|tensor| tensor.0).collect();
        Ok(Self(by_kind!(kind, float_cat | int_cat | bool_cat(tensors, dim))))
    }

    /// The sum with a float tensor of the same shape, dtype and device; in place, if this one has no other owner.
    ///
    /// # Panics
    /// If they are not.
    #[allow(clippy::should_implement_trait)]
    pub fn add(self, other: Self) -> Self {
        Self(Dispatch::float_add(self.0, other.0))
    }

    /// The same of int tensors.
    ///
    /// # Panics
    /// As [`add`](Self::add).
    pub(crate) fn add_ints(self, other: Self) -> Self {
        Self(Dispatch::int_add(self.0, other.0))
    }

    /// A float tensor in another float dtype; itself if it has it.
    ///
    /// # Panics
    /// If it is a tensor of another kind.
    pub(crate) fn cast(self, dtype: FloatDType) -> Self {
        match DType::from(dtype) == self.dtype() {
            true => self,
            false => Self(Dispatch::float_cast(self.0, dtype)),
        }
    }

    /// A float tensor times a number, in place, if it has no other owner; itself if the number is 1.
    ///
    /// # Panics
    /// If it is a tensor of another kind.
    pub fn scale(self, factor: f64) -> Self {
        match factor == 1.0 {
            true => self,
            false => Self(Dispatch::float_mul_scalar(self.0, Scalar::Float(factor))),
        }
    }
}
