//! Sharded products in host memory, on tensors of `Device::flex()`.

mod disjoint;
mod gather;
mod matrix;
mod matrix_batch;
mod product;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::{PendingProduct, ProductCall, ShardedProducts};
use crate::Error;
use crate::comm::element::with_float_type;

/// Runs `$body` with `$T` bound to the type of the elements.
macro_rules! with_elements {
    ($name:expr, $dtype:expr, $T:ident => $body:expr) => {{
        let dtype = $dtype;
        with_float_type!(dtype, $T => $body, otherwise Err(Error::UnsupportedDType { operation: $name, dtype }))
    }};
}

fn dtype_of(terms: &[[FlexTensor; 2]], call: &ProductCall) -> Result<DType, Error> {
    terms.first().map(|[left, _]| left.dtype()).ok_or_else(|| call.no_terms())
}

impl ShardedProducts for Flex {
    fn sum(terms: Vec<[FlexTensor; 2]>, call: &ProductCall, beside: bool) -> Result<PendingProduct<FlexTensor>, Error> {
        with_elements!(call.name, dtype_of(&terms, call)?, T => product::sum::<T>(ahead(terms), call, beside))
    }

    fn scatter(
        terms: Vec<[FlexTensor; 2]>,
        call: &ProductCall,
        beside: bool,
    ) -> Result<PendingProduct<FlexTensor>, Error> {
        with_elements!(call.name, dtype_of(&terms, call)?, T => product::scatter::<T>(ahead(terms), call, beside))
    }

    fn gather(
        left: FlexTensor,
        rights: Vec<FlexTensor>,
        call: &ProductCall,
    ) -> Result<(Vec<FlexTensor>, FlexTensor), Error> {
        let rights: Vec<_> = rights.into_iter().map(running_ahead).collect();
        with_elements!(call.name, left.dtype(), T => gather::gather::<T>(left, &rights, call))
    }

    fn multiply(left: FlexTensor, right: FlexTensor, name: &'static str) -> Result<FlexTensor, Error> {
        with_elements!(name, left.dtype(), T => Ok(product::multiply_own::<T>(left, &running_ahead(right))))
    }

    fn multiply_rows(left: FlexTensor, right: FlexTensor, name: &'static str) -> Result<FlexTensor, Error> {
        with_elements!(name, left.dtype(), T => Ok(product::multiply_rows::<T>(left, right)))
    }

    fn transposed(right: FlexTensor) -> FlexTensor {
        let rank = right.layout().shape().num_dims();
        right.transpose(rank - 2, rank - 1)
    }
}

fn ahead(terms: Vec<[FlexTensor; 2]>) -> Vec<[FlexTensor; 2]> {
    terms.into_iter().map(|[left, right]| [left, running_ahead(right)]).collect()
}

/// The right factor, copied if it is a flip: views here only run ahead.
fn running_ahead(right: FlexTensor) -> FlexTensor {
    match right.layout().strides().iter().any(|stride| *stride < 0) {
        true => right.to_contiguous(),
        false => right,
    }
}
