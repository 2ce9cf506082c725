//! The value of a gathered parameter with an adapter, as burn's autodiff knows it.
//!
//! burn's own sum of a weight and its adapter would be kept from forward to backward by whatever multiplies by it: as
//! many bytes as the weight. This one is computed again in backward, of the weight that is gathered again then.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::retro_forward::RetroForward;
use burn::backend::autodiff::checkpoint::state::BackwardStates;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy, NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, GradientCheckpointingStrategy,
    TensorMetadata,
};
use burn::module::{LoraAdapter, Reparameterization};
use burn::tensor::{FloatDType, Scalar, Tensor};

use crate::tensor::with_backend;

/// `whole + scale * a b`, in the dtype of the factors.
pub(super) fn merge<const D: usize>(whole: Tensor<D>, adapter: &LoraAdapter) -> Tensor<D> {
    let [a, b] = [&adapter.a, &adapter.b].map(|factor| factor.val());
    let strategy = whole.gradient_checkpointing_strategy();
    let tracked = whole.is_tracked() && a.is_tracked() && b.is_tracked();
    let same = [a.gradient_checkpointing_strategy(), b.gradient_checkpointing_strategy()] == [strategy; 2];
    let Some(strategy) = strategy.filter(|_| tracked && same && D == 2) else { return adapter.apply(whole) };
    let kept = whole.clone();
    let merged = with_backend!(whole.device().inner(), B => match strategy {
        GradientCheckpointingStrategy::Disabled => record::<D, B, NoCheckpointing>(whole, a, b, adapter.scale),
        GradientCheckpointingStrategy::Balanced => record::<D, B, BalancedCheckpointing>(whole, a, b, adapter.scale),
    }, otherwise None);
    merged.unwrap_or_else(|| adapter.apply(kept))
}

fn record<const D: usize, B: Backend, C: CheckpointStrategy>(
    whole: Tensor<D>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Option<Tensor<D>>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    let float =
        |tensor: DispatchTensor| match <DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::try_into_backend(
            tensor,
        ) {
            Ok(BackendTensor::Float(tensor)) => Some(tensor),
            _ => None,
        };
    let (whole, a, b) = (float(whole.into_dispatch())?, float(a.into_dispatch())?, float(b.into_dispatch())?);
    let ids = [whole.id(), a.id(), b.id()];
    let dtype: FloatDType = whole.dtype().into();
    let nodes = [whole.node(), a.node(), b.node()];
    let value = |tensor: &FloatTensor<Autodiff<B, C>>| tensor.clone().into_parts().0;
    let merged = merged::<B>(value(&whole), value(&a), value(&b), scale);
    let again = RetroMerge::<B> { ids, scale, backend: std::marker::PhantomData };
    let prepared = Backward::<B, 3>::prepare::<BalancedCheckpointing>(Merge, nodes)
        .memory_bound()
        .retro_forward(again)
        .parents([&whole, &a, &b])
        .stateful();
    let output = match prepared {
        OpsKind::Tracked(mut prepared) => {
            let factors = [prepared.checkpoint(&a), prepared.checkpoint(&b)];
            prepared.finish(MergeState { factors, scale, dtype }, merged)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(merged),
    };
    Some(Tensor::from_dispatch(<DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::from_backend(
        BackendTensor::Float(output),
    )))
}

/// What burn computes, step by step.
fn merged<B: Backend>(whole: FloatTensor<B>, a: FloatTensor<B>, b: FloatTensor<B>, scale: f64) -> FloatTensor<B> {
    let dtype: FloatDType = a.dtype().into();
    let delta = B::float_mul_scalar(B::float_matmul(a, b), Scalar::Float(scale));
    B::float_add(cast::<B>(whole, dtype), delta)
}

fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
    match FloatDType::from(tensor.dtype()) == dtype {
        true => tensor,
        false => B::float_cast(tensor, dtype),
    }
}

/// Merges once more, in backward.
#[derive(Debug)]
struct RetroMerge<B> {
    /// The nodes of the whole and of the factors.
    ids: [NodeId; 3],
    scale: f64,
    backend: std::marker::PhantomData<fn() -> B>,
}

impl<B: Backend> RetroForward for RetroMerge<B> {
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let [whole, a, b] = self.ids.map(|id| states.get_state::<FloatTensor<B>>(&id));
        states.save(output, merged::<B>(whole, a, b, self.scale));
    }
}

#[derive(Debug, Clone)]
struct MergeState {
    factors: [NodeId; 2],
    scale: f64,
    /// Of the whole.
    dtype: FloatDType,
}

#[derive(Debug)]
struct Merge;

impl<B: Backend> Backward<B, 3> for Merge {
    type State = MergeState;

    fn backward(self, ops: Ops<MergeState, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let MergeState { factors, scale, dtype } = ops.state;
        let [a, b] = factors.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let gradient = grads.consume::<B>(&ops.node);
        let [whole, of_a, of_b] = ops.parents;
        let product = |x, y| B::float_mul_scalar(B::float_matmul(x, y), Scalar::Float(scale));
        if let Some(node) = of_a {
            grads.register::<B>(node.id, product(gradient.clone(), B::float_transpose(b)));
        }
        if let Some(node) = of_b {
            grads.register::<B>(node.id, product(B::float_transpose(a), gradient.clone()));
        }
        if let Some(node) = whole {
            grads.register::<B>(node.id, cast::<B>(gradient, dtype));
        }
    }
}
