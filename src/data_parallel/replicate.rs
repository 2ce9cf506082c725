//! Makes the modules of the ranks replicas of one model, with a reducer for their gradients.

use burn::module::Module;
use burn::tensor::Device;

use super::config::DataParallelConfig;
use super::reducer::Reducer;
use super::same_settings::agree_on_settings;
use super::structure::{self, Structure};
use crate::Error;
use crate::comm::Communicator;
use crate::params::{one_device, own_buffers};
use crate::sharding::Sharding;

/// Demands that all ranks bring the same module, gives it rank 0's ids by `share_ids` and its values, and makes a
/// reducer for its gradients.
///
/// # Errors
/// [`Error::ModelMismatch`] if the ranks' modules differ in structure; [`Error::InvalidArgument`] if parameters are on
/// several devices, or the ranks' settings differ; those of [`Communicator`].
pub(crate) fn replicate<M: Module>(
    module: M,
    group: &Communicator,
    config: DataParallelConfig,
    share_ids: impl FnOnce(M, &Communicator) -> Result<M, Error>,
) -> Result<(M, Reducer), Error> {
    config.check()?;
    agree_on_settings(&config, group)?;
    if config.sharding == Sharding::Parameters && group.size() > 1 {
        let problem =
            "parameters cannot be divided among replicas yet: set `sharding` to \"gradients\", or split the model";
        return Err(Error::invalid("data_parallel", problem));
    }
    let device = one_device(&module, "data_parallel")?.unwrap_or_else(Device::flex);
    // A single replica has nobody to give values to: what is lazy need not be made before it is loaded.
    let mut structure = if group.size() > 1 { Structure::of(&module) } else { Structure::unmade(&module) };
    let mut module = module;
    if group.size() > 1 {
        structure.agree(group)?;
        module = share_ids(module, group)?;
        structure = Structure::of(&module);
        module = structure::broadcast(own_buffers(module), group)?;
    }
    Ok((module, Reducer::new(structure, device, group, config)?))
}
