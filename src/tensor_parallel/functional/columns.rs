//! Autodiff of products of one input by the columns of weights.
//!
//! The gradient of the input is one sum over all ranks and all weights, reduced once. So it is made when those of all
//! products are there: their operations lay them down, and the *shared input*, an operation below them all that stands
//! for the input and makes nothing, picks them up. It is above the input and the weights, whose gradients it computes
//! beside the collective:
//!
//! ```text
//! y_0 = x A_0    y_1 = x A_1    y_2 = x A_2        lay down dy_0, dy_1, dy_2
//!           \         |         /
//!                   shared input                  dx = sum over ranks and i of dy_i A_i^T, dA_i = x^T dy_i
//!           /     /   |   \
//!          x    A_0  A_1  A_2
//! ```

use std::sync::{Arc, Mutex};

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, ExtensionType, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Shape, Tensor};

use super::failed::{check_shape, zeros_instead};
use super::tensor_list::TensorList;
use crate::Error;
use crate::collective_matmul::{PendingProduct, ProductCall, ShardedProducts};
use crate::lock::lock;

/// Most weights on one input: an operation of burn's tape has as many parents as its type says.
const MOST: usize = 3;

/// Puts `x A_i` on the tape; of the `gathered` input, along the dim of the call.
pub(super) fn multiply<const D: usize, const N: usize>(
    x: Tensor<D>,
    weights: [Tensor<2>; N],
    gathered: bool,
    call: ProductCall,
) -> Result<[Tensor<D>; N], Error> {
    if !(1..=MOST).contains(&N) {
        let problem =
            format!("it takes 1 to {MOST} weights on one input, not {N}: put weights together with `Tensor::cat`");
        return Err(Error::invalid(call.name, problem));
    }
    let (name, weights) = (call.name, TensorList(weights.into_iter().map(Tensor::into_dispatch).collect()));
    let made = <Dispatch as ColumnProducts>::column_products(x.into_dispatch(), weights, gathered, call);
    if let Some(error) = made.error {
        return Err(error);
    }
    let tensors: Vec<Tensor<D>> = made.tensors.0.into_iter().map(Tensor::from_dispatch).collect();
    tensors.try_into().map_err(|_| Error::invalid(name, "a product is missing"))
}

/// Products: tensors that mean something only if there is no error.
#[derive(ExtensionType)]
struct ProductResult<B: Backend> {
    #[extension_type]
    tensors: TensorList<B>,
    error: Option<Error>,
}

#[backend_extension(Flex, Cube: cfg(feature = "cubecl"), Autodiff)]
trait ColumnProducts: Backend {
    fn column_products(
        x: FloatTensor<Self>,
        #[extension_type] weights: TensorList<Self>,
        gathered: bool,
        call: ProductCall,
    ) -> ProductResult<Self>;
}

/// The products, and the input that the gradients of the weights need.
fn make<B: ShardedProducts>(
    x: FloatTensor<B>,
    weights: Vec<FloatTensor<B>>,
    gathered: bool,
    call: &ProductCall,
) -> (ProductResult<B>, FloatTensor<B>) {
    // Given back in place of what could not be made.
    let placeholders = vec![x.clone(); weights.len()];
    let made = match gathered {
        true => B::gather(x.clone(), weights, call),
        false => {
            let each = weights.into_iter().map(|weight| B::multiply(x.clone(), weight, call.name));
            each.collect::<Result<_, _>>().map(|made| (made, x.clone()))
        }
    };
    match made {
        Ok((tensors, x)) => (ProductResult { tensors: TensorList(tensors), error: None }, x),
        Err(error) => (ProductResult { tensors: TensorList(placeholders), error: Some(error) }, x),
    }
}

impl ColumnProducts for Flex {
    fn column_products(
        x: FloatTensor<Self>,
        weights: TensorList<Self>,
        gathered: bool,
        call: ProductCall,
    ) -> ProductResult<Self> {
        make::<Self>(x, weights.0, gathered, &call).0
    }
}

#[cfg(feature = "cubecl")]
impl ColumnProducts for burn_cubecl::Cube {
    fn column_products(
        x: FloatTensor<Self>,
        weights: TensorList<Self>,
        gathered: bool,
        call: ProductCall,
    ) -> ProductResult<Self> {
        make::<Self>(x, weights.0, gathered, &call).0
    }
}

impl<B: ShardedProducts + ColumnProducts, C: CheckpointStrategy> ColumnProducts for Autodiff<B, C> {
    fn column_products(
        x: FloatTensor<Self>,
        weights: TensorList<Self>,
        gathered: bool,
        call: ProductCall,
    ) -> ProductResult<Self> {
        let (x, of_x) = x.into_parts();
        let (weights, of_weights): (Vec<_>, Vec<_>) = weights.0.into_iter().map(|weight| weight.into_parts()).unzip();
        let shape = x.shape();
        let (ProductResult { tensors, error }, x) = make::<B>(x, weights.clone(), gathered, &call);
        let saved = Arc::new(Mutex::new(vec![None; weights.len()]));
        let state = SharedInput::<B> { x, shape, weights, gathered, saved: saved.clone(), call };
        let mut of_weights = of_weights.into_iter();
        let shared = match (of_weights.next(), of_weights.next(), of_weights.next()) {
            (Some(a), Some(b), Some(c)) => state.on_tape::<C, 4>([of_x, a, b, c]),
            (Some(a), Some(b), None) => state.on_tape::<C, 3>([of_x, a, b]),
            (Some(a), ..) => state.on_tape::<C, 2>([of_x, a]),
            _ => state.on_tape::<C, 1>([of_x]),
        };
        // Compute-bound, here and below: checkpointing must never repeat a collective, which the peers would not take
        // part in.
        let product = |(place, y)| match SaveGradient.prepare::<C>([shared.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((saved.clone(), place), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        ProductResult { tensors: TensorList(tensors.0.into_iter().enumerate().map(product).collect()), error }
    }
}

/// The gradients of products, by their places.
type SavedGradients<B> = Arc<Mutex<Vec<Option<FloatTensor<B>>>>>;

/// Lays down the gradient of a product for the shared input.
#[derive(Debug)]
struct SaveGradient;

impl<B: ShardedProducts + ColumnProducts> Backward<B, 1> for SaveGradient {
    type State = (SavedGradients<B>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (saved, place) = ops.state;
        let gradient = grads.consume::<B>(&ops.node);
        let mut saved = lock(&saved);
        // The tape wants a gradient of the shared input, whatever that is.
        if let ([Some(shared)], true) = (ops.parents, saved.iter().all(Option::is_none)) {
            grads.register::<B>(shared.id, gradient.clone());
        }
        if let Some(slot) = saved.get_mut(place) {
            *slot = Some(gradient);
        }
    }
}

/// What the products have in common.
#[derive(Debug)]
struct SharedInput<B: Backend> {
    /// The input as the gradients of the weights need it.
    x: FloatTensor<B>,
    /// Dims of the input as it came.
    shape: Shape,
    weights: Vec<FloatTensor<B>>,
    gathered: bool,
    saved: SavedGradients<B>,
    call: ProductCall,
}

impl<B: Backend> Clone for SharedInput<B> {
    fn clone(&self) -> Self {
        let Self { x, shape, weights, gathered, saved, call } = self;
        let (x, shape, weights) = (x.clone(), shape.clone(), weights.clone());
        Self { x, shape, weights, gathered: *gathered, saved: saved.clone(), call: call.clone() }
    }
}

impl<B: ShardedProducts + ColumnProducts> SharedInput<B> {
    /// Puts it there, above the input and the weights.
    fn on_tape<C: CheckpointStrategy, const N: usize>(self, below: [NodeGuard; N]) -> FloatTensor<Autodiff<B, C>> {
        let nothing = self.x.clone();
        match InputAndWeightGradients.prepare::<C>(below).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(self, nothing),
            OpsKind::UnTracked(prep) => prep.finish(nothing),
        }
    }

    /// The gradients of the input and of the weights, if wanted.
    fn gradients(self, wanted: &[bool]) -> Result<Vec<Option<FloatTensor<B>>>, Error> {
        let Self { x, shape, weights, gathered, saved, call } = self;
        let saved = std::mem::take(&mut *lock(&saved));
        let (wants_x, wanted) = wanted.split_first().map_or((false, wanted), |(first, others)| (*first, others));
        let sum = |beside: bool| {
            let terms = saved.iter().zip(&weights);
            let terms = terms.filter_map(|(dy, weight)| Some([dy.clone()?, B::transposed(weight.clone())])).collect();
            match gathered {
                true => B::scatter(terms, &call, beside),
                false => B::sum(terms, &call, beside),
            }
        };
        let pending = wants_x.then(|| sum(wanted.contains(&true))).transpose()?;
        let of_weight = |((wanted, dy), weight): ((&bool, Option<FloatTensor<B>>), &FloatTensor<B>)| match dy {
            _ if !wanted => Ok(None),
            Some(dy) => B::multiply_rows(x.clone(), dy, call.name).map(Some),
            // Its product was not used.
            None => Ok(Some(zeros_instead::<B>(weight.shape(), weight))),
        };
        let of_weights =
            wanted.iter().zip(saved.clone()).zip(&weights).map(of_weight).collect::<Result<Vec<_>, Error>>()?;
        let of_x = pending.map(PendingProduct::wait).transpose()?;
        if let Some(of_x) = &of_x {
            check_shape(&of_x.shape(), &shape, &call)?;
        }
        Ok([of_x].into_iter().chain(of_weights).collect())
    }
}

/// Computes what the shared input has below it from what the products have laid down.
#[derive(Debug)]
struct InputAndWeightGradients;

impl<B: ShardedProducts + ColumnProducts, const N: usize> Backward<B, N> for InputAndWeightGradients {
    type State = SharedInput<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        drop(grads.consume::<B>(&ops.node));
        let shared = ops.state;
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let (like, comm) = (shared.x.clone(), shared.call.comm.clone());
        let shapes: Vec<Shape> =
            [shared.shape.clone()].into_iter().chain(shared.weights.iter().map(TensorMetadata::shape)).collect();
        let gradients = shared.gradients(&wanted).unwrap_or_else(|error| {
            comm.fail(error);
            shapes.into_iter().map(|shape| Some(zeros_instead::<B>(shape, &like))).collect()
        });
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
