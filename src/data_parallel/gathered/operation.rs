//! The operation that gathers a parameter, as burn's autodiff knows it.
//!
//! It is marked as bound by memory and has a function that computes it again, whatever the device's strategy of
//! gradient checkpointing: so the operations that use its output do not keep that for backward, but ask for it then.
//! burn asks for it in this way only where the output is tracked; a frozen parameter is therefore tracked by a leaf of
//! one element that stands for it, and its gradient is thrown away.
//!
//! Vectors are kept: burn needs biases and the parameters of norms when it computes activations again, and those of one
//! layer need those of the layers before it, where residuals are added up. Gathering them again would be to gather the
//! groups of all layers once more before backward comes to them.

use std::fmt;
use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::retro_forward::RetroForward;
use burn::backend::autodiff::checkpoint::state::BackwardStates;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy, NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, GradientCheckpointingStrategy,
};
use burn::module::ParamId;
use burn::tensor::Tensor;

use super::Gatherer;
use crate::Error;
use crate::data_parallel::hook::{GradientArrival, anchor};
use crate::params::with_autodiff;
use crate::sharding::Keep;
use crate::tensor::{PlainTensor, with_backend};

/// Vectors of fewer bytes are kept from forward to backward.
const VECTOR_BYTES: usize = 256 << 10;

/// What is gathered: a parameter by its id.
#[derive(Clone)]
pub(super) struct GatheredParam {
    pub gatherer: Arc<Gatherer>,
    pub id: ParamId,
}

impl fmt::Debug for GatheredParam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GatheredParam({})", self.id)
    }
}

/// The whole of a parameter of which this rank has `shard`. `arrival` hears of its gradient; without it the parameter
/// is frozen.
///
/// # Errors
/// Those of [`Gatherer::full_param`].
pub(super) fn gather<const D: usize>(
    shard: Tensor<D>,
    source: &GatheredParam,
    arrival: Option<(GradientArrival, usize)>,
) -> Result<Tensor<D>, Error> {
    let plain = PlainTensor::from(shard.clone());
    let whole = source.gatherer.full_param(source.id, plain.clone())?;
    let Some(strategy) = shard.gradient_checkpointing_strategy() else { return whole.float() };
    let again =
        source.gatherer.keep() == Keep::Pass && !(D == 1 && whole.elements() * whole.dtype().size() < VECTOR_BYTES);
    if again {
        source.gatherer.used(source.id);
    } else if arrival.is_none() {
        return Ok(with_autodiff(whole.float()?, strategy));
    }
    let tracked = match arrival.is_some() {
        true => shard,
        false => Tensor::<D>::zeros([1; D], &shard.device()).require_grad(),
    };
    let device = tracked.device().inner();
    let again = again.then(|| GatherAgain { source: source.clone(), shard: plain, tracked: None });
    with_backend!(device, B => match strategy {
        GradientCheckpointingStrategy::Disabled => record::<D, B, NoCheckpointing>(tracked, whole, again, arrival),
        GradientCheckpointingStrategy::Balanced => record::<D, B, BalancedCheckpointing>(tracked, whole, again, arrival),
    }, otherwise Err(Error::invalid("a sharded parameter", format!("steps do not run on {device:?}"))))
}

fn record<const D: usize, B: Backend, C: CheckpointStrategy>(
    tracked: Tensor<D>,
    whole: PlainTensor,
    again: Option<GatherAgain>,
    arrival: Option<(GradientArrival, usize)>,
) -> Result<Tensor<D>, Error>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    let wrong = |what: &str| Error::invalid("a sharded parameter", format!("its rows are {what}"));
    let tracked = <DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::try_into_backend(tracked.into_dispatch());
    let Ok(BackendTensor::Float(tracked)) = tracked else { return Err(wrong("not on the device of the step")) };
    let Ok(BackendTensor::Float(whole)) = whole.into_backend::<B>() else { return Err(wrong("no floats")) };
    let order = arrival.as_ref().map_or(1, |(_, order)| *order);
    let state = arrival.map(|(arrival, _)| arrival);
    let nodes = [tracked.node(), anchor(order).node()];
    let prepared = Backward::<B, 2>::prepare::<BalancedCheckpointing>(Gather, nodes);
    let prepared = match again {
        Some(again) => prepared
            .memory_bound()
            .retro_forward(RetroGather::<B>::new(GatherAgain { tracked: Some(tracked.id()), ..again }))
            .parents([&tracked])
            .stateful(),
        None => prepared.compute_bound().stateful(),
    };
    let output = match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(state, whole),
        OpsKind::UnTracked(prepared) => prepared.finish(whole),
    };
    Ok(Tensor::from_dispatch(<DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::from_backend(
        BackendTensor::Float(output),
    )))
}

/// Gathers once more, in backward, of the rows that there were in forward.
#[derive(Debug, Clone)]
struct GatherAgain {
    source: GatheredParam,
    shard: PlainTensor,
    /// The node that the operation is tracked by.
    tracked: Option<NodeId>,
}

#[derive(Debug)]
struct RetroGather<B> {
    again: GatherAgain,
    backend: std::marker::PhantomData<fn() -> B>,
}

impl<B> RetroGather<B> {
    fn new(again: GatherAgain) -> Self {
        Self { again, backend: std::marker::PhantomData }
    }
}

impl<B: Backend> RetroForward for RetroGather<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let GatherAgain { source, shard, tracked } = &self.again;
        if let Some(tracked) = tracked {
            // It was kept for this only, and burn counts who has asked for it.
            drop(states.get_state::<B::FloatTensorPrimitive>(tracked));
        }
        let whole = source.gatherer.full_param(source.id, shard.clone()).unwrap_or_else(|_| {
            // No error can be returned from here: the gatherer keeps it, and whoever runs this backward returns it.
            let dims = source.gatherer.rows(source.id).map(|rows| rows.dims().to_vec()).unwrap_or_default();
            PlainTensor::zeros(dims, shard.dtype(), &shard.device())
        });
        if let Ok(BackendTensor::Float(whole)) = whole.into_backend::<B>() {
            states.save(output, whole);
        }
    }
}

/// Hands the gradient of the whole to the listener, if this is the backward of its own replica; else nobody wants it,
/// for no rank could do anything with the gradient of a whole.
#[derive(Debug)]
struct Gather;

impl<B: Backend> Backward<B, 2> for Gather
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = Option<GradientArrival>;

    fn backward(self, ops: Ops<Option<GradientArrival>, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        if let Some(arrival) = ops.state {
            arrival.deliver(PlainTensor::from_float::<B>(gradient));
        }
    }
}
