//! Beginning a backward in the middle of a model.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy, NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::flex::FlexTensor;
use burn::backend::{Autodiff, DispatchKindConversion, DispatchTensor, Flex, GradientCheckpointingStrategy};
use burn::tensor::{DType, Shape, Tensor};

/// A zero of dtype `dtype` whose backward gives `output` this gradient: burn's backward begins at one number, and the sum of
/// such zeros is one. Nothing is computed with the output itself, unlike with `(output * gradient).sum()`.
///
/// `D` is not looked at. `None` if the output is not on a tape.
pub(super) fn seed<const D: usize>(output: Tensor<D>, gradient: FlexTensor, dtype: DType) -> Option<Tensor<1>> {
    match output.gradient_checkpointing_strategy()? {
        GradientCheckpointingStrategy::Disabled => record::<D, NoCheckpointing>(output, gradient, dtype),
        GradientCheckpointingStrategy::Balanced => record::<D, BalancedCheckpointing>(output, gradient, dtype),
    }
}

fn record<const D: usize, C: CheckpointStrategy>(
    output: Tensor<D>,
    gradient: FlexTensor,
    dtype: DType,
) -> Option<Tensor<1>>
where
    DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
{
    let output = output.try_into_primitive::<Autodiff<Flex, C>>().ok()?;
    let (_, node) = output.into_parts();
    let zero = FlexTensor::zeros(Shape::from(vec![1]), dtype);
    match Seed.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            Some(Tensor::from_primitive::<Autodiff<Flex, C>>(prepared.finish(gradient, zero)))
        }
        OpsKind::UnTracked(_) => None,
    }
}

#[derive(Debug)]
struct Seed;

impl Backward<Flex, 1> for Seed {
    type State = FlexTensor;

    fn backward(self, ops: Ops<FlexTensor, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = ops.state;
        unary::<Flex, _>(ops.parents, ops.node, grads, |_| gradient);
    }
}
