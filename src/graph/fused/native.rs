//! Elements that kernels compute with, and those of tensors that they stand for.

use std::ptr;

use burn::tensor::{BoolStore, DType};
use half::{bf16, f16};

use super::super::graph_error;
use super::functions::Float;
use super::loops::{Stored, round_to_bf16, round_to_f16};
use crate::error::Error;

/// An element type that kernels compute with, and those of the tensors that it stands for.
pub(super) trait Native: Float {
    const DTYPE: DType;

    /// Whether it stands for the elements of a tensor of a dtype.
    fn holds(dtype: DType) -> bool;

    /// Reads elements that are `stride` apart.
    ///
    /// # Safety
    /// They are there, of this dtype.
    unsafe fn gather(dtype: DType, base: *const u8, offset: isize, stride: isize, out: &mut [Self]);

    /// Writes elements one after the other.
    ///
    /// # Safety
    /// There is room for them, of this dtype.
    unsafe fn scatter(dtype: DType, base: *mut u8, offset: usize, x: *const Self, len: usize);

    /// Rounds to a dtype of 16 bits.
    fn round(x: &mut [Self], to: DType);
}

/// Bools, and indices.
fn is_other(dtype: DType) -> bool {
    matches!(dtype, DType::Bool(BoolStore::Native | BoolStore::U8) | DType::I64 | DType::I32)
}

/// Makes sure that all tensors are of dtypes that `T` stands for.
pub(super) fn check<T: Native>(dtypes: impl IntoIterator<Item = DType>) -> Result<(), Error> {
    match dtypes.into_iter().find(|dtype| !T::holds(*dtype)) {
        Some(dtype) => Err(graph_error(format!("a loop in {:?} was given a tensor of {dtype:?}", T::DTYPE))),
        None => Ok(()),
    }
}

#[inline(always)]
unsafe fn gather_as<T: Float, S: Stored<T>>(base: *const u8, offset: isize, stride: isize, out: &mut [T]) {
    // SAFETY: as the caller says.
    unsafe {
        let base = base.cast::<S>().offset(offset);
        match stride {
            1 => {
                let source = std::slice::from_raw_parts(base, out.len());
                for (out, x) in out.iter_mut().zip(source) {
                    *out = x.load();
                }
            }
            0 => out.fill((*base).load()),
            _ => {
                for (place, out) in out.iter_mut().enumerate() {
                    *out = (*base.offset(place as isize * stride)).load();
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn scatter_as<T: Float, S: Stored<T>>(base: *mut u8, offset: usize, x: *const T, len: usize) {
    // SAFETY: as the caller says; the elements are either at the same places as they go to, or elsewhere.
    unsafe {
        let base = base.cast::<S>().add(offset);
        if ptr::eq(base.cast::<T>(), x) {
            return;
        }
        let (x, out) = (std::slice::from_raw_parts(x, len), std::slice::from_raw_parts_mut(base, len));
        for (out, x) in out.iter_mut().zip(x) {
            *out = S::store(*x);
        }
    }
}

impl Native for f32 {
    const DTYPE: DType = DType::F32;

    fn holds(dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::BF16 | DType::F16) || is_other(dtype)
    }

    #[inline(always)]
    unsafe fn gather(dtype: DType, base: *const u8, offset: isize, stride: isize, out: &mut [Self]) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F32 => gather_as::<f32, f32>(base, offset, stride, out),
                DType::BF16 => gather_as::<f32, bf16>(base, offset, stride, out),
                DType::F16 => gather_as::<f32, f16>(base, offset, stride, out),
                DType::Bool(_) => gather_as::<f32, u8>(base, offset, stride, out),
                DType::I64 => gather_as::<f32, i64>(base, offset, stride, out),
                DType::I32 => gather_as::<f32, i32>(base, offset, stride, out),
                _ => unreachable!("{dtype:?} is not computed in f32"),
            }
        }
    }

    #[inline(always)]
    unsafe fn scatter(dtype: DType, base: *mut u8, offset: usize, x: *const Self, len: usize) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F32 => scatter_as::<f32, f32>(base, offset, x, len),
                DType::BF16 => scatter_as::<f32, bf16>(base, offset, x, len),
                DType::F16 => scatter_as::<f32, f16>(base, offset, x, len),
                DType::Bool(_) => scatter_as::<f32, u8>(base, offset, x, len),
                DType::I64 => scatter_as::<f32, i64>(base, offset, x, len),
                DType::I32 => scatter_as::<f32, i32>(base, offset, x, len),
                _ => unreachable!("{dtype:?} is not computed in f32"),
            }
        }
    }

    #[inline(always)]
    fn round(x: &mut [Self], to: DType) {
        match to {
            DType::BF16 => round_to_bf16(x),
            _ => round_to_f16(x),
        }
    }
}

impl Native for f64 {
    const DTYPE: DType = DType::F64;

    fn holds(dtype: DType) -> bool {
        dtype == DType::F64 || is_other(dtype)
    }

    #[inline(always)]
    unsafe fn gather(dtype: DType, base: *const u8, offset: isize, stride: isize, out: &mut [Self]) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F64 => gather_as::<f64, f64>(base, offset, stride, out),
                DType::Bool(_) => gather_as::<f64, u8>(base, offset, stride, out),
                DType::I64 => gather_as::<f64, i64>(base, offset, stride, out),
                DType::I32 => gather_as::<f64, i32>(base, offset, stride, out),
                _ => unreachable!("{dtype:?} is not computed in f64"),
            }
        }
    }

    #[inline(always)]
    unsafe fn scatter(dtype: DType, base: *mut u8, offset: usize, x: *const Self, len: usize) {
        // SAFETY: as the caller says.
        unsafe {
            match dtype {
                DType::F64 => scatter_as::<f64, f64>(base, offset, x, len),
                DType::Bool(_) => scatter_as::<f64, u8>(base, offset, x, len),
                DType::I64 => scatter_as::<f64, i64>(base, offset, x, len),
                DType::I32 => scatter_as::<f64, i32>(base, offset, x, len),
                _ => unreachable!("{dtype:?} is not computed in f64"),
            }
        }
    }

    fn round(_: &mut [Self], to: DType) {
        unreachable!("{to:?} is not computed in f64")
    }
}
