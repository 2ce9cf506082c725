//! Starts a backward pass from the gradients of a stage's outputs.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy, NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, GradientCheckpointingStrategy,
    TensorMetadata,
};
use burn::tensor::{DType, Shape, Tensor};

use crate::tensor::{PlainTensor, with_backend};

/// A zero of dtype `dtype` whose backward gives `output` this gradient, on the same device: burn's backward begins at
/// one number, and the sum of such zeros is one. Nothing is computed with the output itself, unlike with `(output *
/// gradient).sum()`.
///
/// `D` is not looked at. `None` if the output is not on a tape.
pub(super) fn seed<const D: usize>(output: Tensor<D>, gradient: PlainTensor, dtype: DType) -> Option<Tensor<1>> {
    let strategy = output.gradient_checkpointing_strategy()?;
    with_backend!(output.device().inner(), B => match strategy {
        GradientCheckpointingStrategy::Disabled => record::<D, B, NoCheckpointing>(output, gradient, dtype),
        GradientCheckpointingStrategy::Balanced => record::<D, B, BalancedCheckpointing>(output, gradient, dtype),
    }, otherwise None)
}

fn record<const D: usize, B: Backend, C: CheckpointStrategy>(
    output: Tensor<D>,
    gradient: PlainTensor,
    dtype: DType,
) -> Option<Tensor<1>>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    let output = <DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::try_into_backend(output.into_dispatch());
    let (Ok(BackendTensor::Float(output)), Ok(BackendTensor::Float(gradient))) = (output, gradient.into_backend::<B>())
    else {
        return None;
    };
    let (value, node) = output.into_parts();
    let zero = B::float_zeros(Shape::from(vec![1]), &value.device(), dtype.into());
    match Backward::<B, 1>::prepare::<C>(Seed, [node]).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            let seed = BackendTensor::Float(prepared.finish(gradient, zero));
            Some(Tensor::from_dispatch(<DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::from_backend(seed)))
        }
        OpsKind::UnTracked(_) => None,
    }
}

#[derive(Debug)]
struct Seed;

impl<B: Backend> Backward<B, 1> for Seed {
    type State = B::FloatTensorPrimitive;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |_| gradient);
    }
}
