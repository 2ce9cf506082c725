//! Sharded products in host memory, on tensors of `Device::flex()`.

mod matrix;
mod product;
mod window;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, bf16, f16};

use super::tape::{Job, Products};
use crate::Error;

/// Runs `$body` with `$T` bound to the type of the elements.
macro_rules! with_real {
    ($name:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F64 => {
                type $T = f64;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            dtype => Err(Error::UnsupportedDType { operation: $name, dtype }),
        }
    };
}

impl Products for Flex {
    fn product(x: FlexTensor, weight: FlexTensor, job: &Job) -> Result<(FlexTensor, FlexTensor), Error> {
        with_real!(job.name, x.dtype(), T => product::forward::<T>(ahead(x), ahead(weight), job))
    }

    fn gradients(
        gradient: FlexTensor,
        x: FlexTensor,
        weight: FlexTensor,
        wanted: [bool; 2],
        job: &Job,
    ) -> Result<[Option<FlexTensor>; 2], Error> {
        with_real!(job.name, x.dtype(), T => {
            product::backward::<T>(ahead(gradient), x, ahead(weight), wanted, job)
        })
    }
}

/// The tensor, copied if it is a flip: views here only run ahead.
fn ahead(tensor: FlexTensor) -> FlexTensor {
    match tensor.layout().strides().iter().any(|stride| *stride < 0) {
        true => tensor.to_contiguous(),
        false => tensor,
    }
}
