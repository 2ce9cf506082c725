//! The step of an optimizer on sharded replicas: each rank updates its rows.

use std::collections::HashSet;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::ParamId;
use burn::optim::{GradientsParams, ModuleOptimizer};

use super::clipping::clips_parts;
use super::update::update;
use super::whole::Dealt;
use super::{moments, parts};
use crate::Error;
use crate::graph::{CheckedOptimizers, SplitParam};
use crate::sharding::{ShardComms, ShardParam, ShardParams};

/// One step of an optimizer on this rank's rows.
pub(in crate::train) struct ShardedStep<'a> {
    pub optim: &'a mut ModuleOptimizer,
    pub lr: ModuleLearningRate,
    /// Those of this rank's rows.
    pub grads: GradientsParams,
    pub checked: CheckedOptimizers,
    /// The parameters of which the rows are parts of parts, for they are split along another axis as well.
    pub split: Vec<SplitParam>,
}

impl ShardedStep<'_> {
    /// Updates the rows of the parameters that have gradients, and returns these. Parameters whose update depends on the whole of
    /// them, as Muon's does, are dealt out: each is gathered on one rank, updated there, and its rows are sent back. Collective.
    ///
    /// # Errors
    /// [`Error::Optimizer`]; those of [`Communicator`](crate::comm::Communicator).
    pub fn run(self, shards: ShardParams, comms: &ShardComms) -> Result<ShardParams, Error> {
        let Self { optim, lr, mut grads, checked, split } = self;
        let mut gradients = Vec::new();
        let mut with_gradient = |shard: &ShardParam| match shard.param.take_gradient(&mut grads) {
            Some(gradient) => {
                gradients.push(gradient);
                true
            }
            None => false,
        };
        let shards = ShardParams(shards.0.into_iter().filter(|shard| with_gradient(shard)).collect());
        let ids: HashSet<ParamId> = shards.0.iter().map(|shard| shard.param.id()).collect();
        let mut new = false;
        let whole = checked.whole(std::ptr::from_ref(optim).addr(), &ids, || {
            new = true;
            find_whole(optim, &shards, &split)
        })?;
        let (work, dealt) = Dealt::deal(shards, gradients, &whole, comms)?;
        // The others wait for what this rank updates.
        let fail = |error: &Error| comms.control().fail(error.clone());
        if new {
            moments::check(optim, &work.params).inspect_err(fail)?;
        }
        let updated = update(work.params, optim, lr, work.grads).inspect_err(fail)?;
        dealt.collect(updated, comms)
    }
}

/// The parameters whose update depends on the whole of them. Of those that are split along another axis too nobody has the
/// whole.
pub(super) fn find_whole(
    optim: &ModuleOptimizer,
    shards: &ShardParams,
    split: &[SplitParam],
) -> Result<HashSet<ParamId>, Error> {
    clips_parts(optim, split)?;
    parts::check(optim, shards, split)?;
    let by_rows = |shard: &ShardParam| SplitParam {
        id: shard.param.id(),
        path: shard.path.clone(),
        dims: shard.rows.shard_dims(),
        split: vec![0],
    };
    parts::whole(optim, shards, &shards.0.iter().map(by_rows).collect::<Vec<_>>())
}
