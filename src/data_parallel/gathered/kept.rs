//! Whether burn lets go of what is gathered for a pass.
//!
//! Without gradient checkpointing it keeps for backward what a product multiplies by, and a view of a weight keeps all
//! of it: of layers that make one, as `Linear` does for inputs of three dims, every weight would stay whole from
//! forward to backward.

use burn::backend::{DispatchAutodiffContext, DispatchTensor, GradientCheckpointingStrategy};
use burn::module::Module;

use crate::Error;
use crate::comm::{Communicator, panic_message};
use crate::params::{FoundParams, ParamRef, visit_floats};
use crate::sharding::Keep;
use crate::tensor::TensorMapper;

/// How the words of burn begin when it panics as an operation has tensors that are made for different devices.
const MISMATCH: &str = "Gradient checkpointing strategy mismatch";

/// What is to be done where burn would keep more than two groups.
const INSTEAD: &str = "without gradient checkpointing, where burn keeps more than the two groups of parameters that `keep` \"pass\" leaves \
                       whole: make it on `device.autodiff().gradient_checkpointing()`, or let `parallelize` capture its steps (`engine` \
                       \"auto\"), or set `keep` to \"micro_batch\" or \"step\", which hold all parameters";

/// Demands that burn lets go of parameters as `keep` says, on all ranks. Collective.
///
/// # Errors
/// [`Error::InvalidArgument`], the same on all ranks; those of [`Communicator`].
pub(super) fn check_kept<M: Module>(module: &M, keep: Keep, group: &Communicator) -> Result<(), Error> {
    if keep != Keep::Pass {
        return Ok(());
    }
    let mut views_stay = false;
    visit_floats(module, &mut |param| views_stay |= keeps_views(&param));
    let all = group.all_gather(vec![u8::from(views_stay)])?;
    let Some(rank) = all.iter().position(|stay| *stay == 1) else { return Ok(()) };
    let on_rank =
        if all.contains(&0) { format!(" of rank {rank} of group `{}`", group.group()) } else { String::new() };
    Err(Error::invalid("data_parallel", format!("the model{on_rank} is on a device {INSTEAD}")))
}

/// What is wrong with a parameter that burn would keep for longer than `keep` says: its model may have been given back
/// to training by something that does not know of gradient checkpointing.
pub(super) fn problem_of_kept(param: &ParamRef<'_>, keep: Keep) -> Option<String> {
    (keep == Keep::Pass && keeps_views(param)).then(|| format!("`{}` is now on a device {INSTEAD}", param.path()))
}

fn keeps_views(param: &ParamRef<'_>) -> bool {
    param.checkpointing() == Some(GradientCheckpointingStrategy::Disabled)
}

/// Whether these are the words of a panic of burn about tensors with and without gradient checkpointing.
pub(in crate::data_parallel) fn is_of_two_devices(said: &str) -> bool {
    said.contains(MISMATCH)
}

/// The error of a forward in which that has happened.
pub(in crate::data_parallel) fn of_two_devices(panic: &(dyn std::any::Any + Send)) -> Option<Error> {
    is_of_two_devices(&panic_message(panic)).then(|| {
        let problem = "the forward uses tensors with and without gradient checkpointing in one operation: make the model, and \
                       what its closure uses beside the inputs, on the same device (`device.autodiff().gradient_checkpointing()`)";
        Error::invalid("step", problem)
    })
}

/// Has the inputs of a step take part in gradient checkpointing as the parameters do, wherever they were made.
pub(in crate::data_parallel) struct OnDeviceOf(Option<GradientCheckpointingStrategy>);

impl OnDeviceOf {
    /// Of these parameters.
    pub fn params(params: &FoundParams) -> Self {
        Self(params.floats().find_map(|param| param.checkpointing()))
    }
}

impl TensorMapper for OnDeviceOf {
    fn map(&mut self, mut tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        if let (Some(strategy), DispatchAutodiffContext::Enabled(_)) = (self.0, tensor.autodiff) {
            tensor.autodiff = DispatchAutodiffContext::Enabled(strategy);
        }
        Ok(tensor)
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}
