//! Autodiff of a product by the rows of a weight.
//!
//! The collective of the product belongs to the forward, its conjugate to the backward.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, ExtensionType, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

use super::failed::{check_shape, zeros_instead};
use crate::Error;
use crate::collective_matmul::{PendingProduct, ProductCall, ShardedProducts};

/// Puts `sum over r of x_r A_r` on the tape; `scattered` along the dim of the call.
pub(super) fn multiply<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    scattered: bool,
    call: ProductCall,
) -> Result<Tensor<D>, Error> {
    let made = <Dispatch as RowProducts>::row_product(x.into_dispatch(), weight.into_dispatch(), scattered, call);
    match made.error {
        None => Ok(Tensor::from_dispatch(made.tensor)),
        Some(error) => Err(error),
    }
}

/// A product: a tensor that means something only if there is no error.
#[derive(ExtensionType)]
struct ProductResult<B: Backend> {
    tensor: FloatTensor<B>,
    error: Option<Error>,
}

#[backend_extension(Flex, Cube: cfg(feature = "cubecl"), Autodiff)]
trait RowProducts: Backend {
    fn row_product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        scattered: bool,
        call: ProductCall,
    ) -> ProductResult<Self>;
}

fn make<B: ShardedProducts>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    scattered: bool,
    call: &ProductCall,
) -> ProductResult<B> {
    // Given back in place of what could not be made.
    let placeholders = x.clone();
    let sum = match scattered {
        true => B::scatter(vec![[x, weight]], call, false),
        false => B::sum(vec![[x, weight]], call, false),
    };
    match sum.and_then(PendingProduct::wait) {
        Ok(tensor) => ProductResult { tensor, error: None },
        Err(error) => ProductResult { tensor: placeholders, error: Some(error) },
    }
}

impl RowProducts for Flex {
    fn row_product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        scattered: bool,
        call: ProductCall,
    ) -> ProductResult<Self> {
        make::<Self>(x, weight, scattered, &call)
    }
}

#[cfg(feature = "cubecl")]
impl RowProducts for burn_cubecl::Cube {
    fn row_product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        scattered: bool,
        call: ProductCall,
    ) -> ProductResult<Self> {
        make::<Self>(x, weight, scattered, &call)
    }
}

impl<B: ShardedProducts + RowProducts, C: CheckpointStrategy> RowProducts for Autodiff<B, C> {
    fn row_product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        scattered: bool,
        call: ProductCall,
    ) -> ProductResult<Self> {
        let ((x, of_x), (weight, of_weight)) = (x.into_parts(), weight.into_parts());
        // Compute-bound: checkpointing must never repeat a collective, which the peers would not take part in.
        match RowGradients.prepare::<C>([of_x, of_weight]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let made = make::<B>(x.clone(), weight.clone(), scattered, &call);
                ProductResult { tensor: prep.finish((x, weight, scattered, call), made.tensor), error: made.error }
            }
            OpsKind::UnTracked(prep) => {
                let made = make::<B>(x, weight, scattered, &call);
                ProductResult { tensor: prep.finish(made.tensor), error: made.error }
            }
        }
    }
}

/// The gradients of a product by rows: `dx_r = dy A_r^T`, `dA_r = x_r^T dy`.
#[derive(Debug)]
struct RowGradients;

impl<B: ShardedProducts + RowProducts> Backward<B, 2> for RowGradients {
    type State = (FloatTensor<B>, FloatTensor<B>, bool, ProductCall);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, weight, scattered, call) = ops.state;
        let gradient = grads.consume::<B>(&ops.node);
        let [wants_x, wants_weight] = ops.parents.each_ref().map(Option::is_some);
        let (like, shapes) = (gradient.clone(), [x.shape(), weight.shape()]);
        let make = || {
            let transposed = B::transposed(weight);
            let (of_x, whole) = match (scattered, wants_x) {
                (true, _) => {
                    let rights = if wants_x { vec![transposed] } else { Vec::new() };
                    let (mut made, whole) = B::gather(gradient, rights, &call)?;
                    (made.pop(), whole)
                }
                (false, true) => (Some(B::multiply(gradient.clone(), transposed, call.name)?), gradient),
                (false, false) => (None, gradient),
            };
            if let Some(of_x) = &of_x {
                check_shape(&of_x.shape(), &shapes[0], &call)?;
            }
            let of_weight = wants_weight.then(|| B::multiply_rows(x, whole, call.name)).transpose()?;
            Ok([of_x, of_weight])
        };
        let made: Result<_, Error> = make();
        let gradients = made.unwrap_or_else(|error| {
            call.comm.fail(error);
            shapes.map(|shape| Some(zeros_instead::<B>(shape, &like)))
        });
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
