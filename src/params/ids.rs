//! Gives the parameters of all ranks common ids, by which optimizers know their state.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

use super::walk::visit_params;
use crate::Error;
use crate::comm::Communicator;

/// New ids of parameters by their old ones; those that are not here stay.
#[derive(Debug, Default)]
pub(crate) struct Renamed(HashMap<u64, u64>);

impl Renamed {
    pub(crate) fn id(&self, id: ParamId) -> ParamId {
        self.0.get(&id.val()).map_or(id, |shared| ParamId::from(*shared))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Gives the parameters the ids that they have on the first rank, and says which are new. Lazy ones stay lazy. Every
/// rank brings the same module; whether it does is for the caller to find out before.
///
/// # Errors
/// Those of [`Communicator::broadcast`].
pub(crate) fn share_ids<M: Module>(module: M, group: &Communicator) -> Result<(M, Renamed), Error> {
    if group.size() == 1 {
        return Ok((module, Renamed::default()));
    }
    let found = ids_of(&module);
    let shared = group.broadcast(found.clone(), 0)?;
    if shared == found {
        return Ok((module, Renamed::default()));
    }
    // What two places share here, they share with the same one on the first rank.
    let mut renamed = Renamed(found.iter().copied().zip(shared).collect());
    let module = module.map(&mut renamed);
    // Running statistics keep their ids: no optimizer knows them.
    let changed = found.into_iter().zip(ids_of(&module)).filter(|(old, new)| old != new);
    Ok((module, Renamed(changed.collect())))
}

fn ids_of<M: Module>(module: &M) -> Vec<u64> {
    let mut ids = Vec::new();
    visit_params(module, &mut |param| ids.push(param.id().val()));
    ids
}

impl ModuleMapper for Renamed {
    fn map_float<const D: usize>(&mut self, mut param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.id = self.id(param.id);
        param
    }

    fn map_int<const D: usize>(&mut self, mut param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        param.id = self.id(param.id);
        param
    }

    fn map_bool<const D: usize>(&mut self, mut param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        param.id = self.id(param.id);
        param
    }
}
