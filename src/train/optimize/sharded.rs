//! The step of an optimizer on sharded replicas: each rank updates its rows.

use std::collections::{HashMap, HashSet};

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::ParamId;
use burn::optim::{GradientsParams, ModuleOptimizer};

use super::given::update_of;
use super::joined::{Joined, PartWithGradient};
use super::meeting::{Meeting, fail_all, fail_here};
use super::moments::MomentDigests;
use super::other_ranks::{Divided, divided, groups_of, holders};
use super::panicked::Updated;
use super::update::update;
use super::whole::{Dealt, OwnUpdate};
use super::{moments, parts};
use crate::Error;
use crate::comm::Communicator;
use crate::graph::{CheckedOptimizers, SplitParam};
use crate::sharding::{ShardComms, ShardParam, ShardParams, UpdatedShards};
use crate::step::AskedNorm;

/// One step of an optimizer on this rank's rows.
pub(in crate::train) struct ShardedStep<'a> {
    pub optim: &'a mut ModuleOptimizer,
    pub lr: ModuleLearningRate,
    /// How the norm of the gradients was asked for.
    pub asked: Option<AskedNorm>,
    /// Those of this rank's rows.
    pub grads: GradientsParams,
    pub checked: CheckedOptimizers,
    /// The parameters of which the rows are parts of parts, for they are split along another axis as well.
    pub split: Vec<SplitParam>,
    /// The groups whose ranks wait for this one.
    pub groups: Vec<Communicator>,
}

impl ShardedStep<'_> {
    /// Updates the rows of the parameters that have gradients: in place those that nobody else holds. Parameters whose
    /// update depends on the whole of them, as Muon's does, are dealt out: each is gathered on one rank, over the
    /// replicas and then over the axes that split it, updated there, and its rows are sent back. Collective.
    ///
    /// # Errors
    /// [`Error::Optimizer`]; those of [`Communicator`](crate::comm::Communicator).
    pub fn run(self, shards: ShardParams, comms: &ShardComms) -> Result<UpdatedShards, Error> {
        let Self { optim, lr, asked, mut grads, checked, split, groups } = self;
        let held: Vec<ParamId> = shards.0.iter().map(|shard| shard.param.id()).collect();
        let mut gradients = Vec::new();
        let mut with_gradient = |shard: &ShardParam| match shard.param.take_gradient(&mut grads) {
            Some(gradient) => {
                gradients.push(gradient);
                true
            }
            None => false,
        };
        let (shards, unchanged): (Vec<_>, Vec<_>) = shards.0.into_iter().partition(|shard| with_gradient(shard));
        let (shards, unchanged) = (ShardParams(shards), ShardParams(unchanged));
        let ids: HashSet<ParamId> = shards.0.iter().map(|shard| shard.param.id()).collect();
        let another = !checked.is_known(optim);
        let mut new = another;
        let whole = checked.whole(optim, &ids, || {
            new = true;
            find_whole(optim, &shards, &split)
        });
        // The others wait for what this rank updates.
        let fail = |error: Error| fail_here(&groups, error);
        let fail_alike = |error: Error| fail_all(&groups, error);
        let whole = match new {
            true => {
                let over = std::iter::once(comms.next()).chain(holders(&split)).collect();
                Meeting { over, groups: &groups }.outcome(whole)?
            }
            false => whole?,
        };
        let (mut work, dealt) = Dealt::deal(shards, gradients, &whole, comms).map_err(fail)?;
        let (parts, rest) = take_parts(&mut work, &whole, &split);
        let (owned, joined) = Joined::join(parts, &split, &mut work.grads).map_err(fail)?;
        let ours: HashSet<ParamId> = owned.0.iter().map(|shard| shard.param.id()).collect();
        let all = ShardParams(owned.0.into_iter().chain(rest).collect());
        if new {
            let moments = moments::check(optim, &all, held.iter().copied());
            let axes: HashMap<ParamId, Vec<&Communicator>> =
                split.iter().map(|param| (param.id, groups_of(param))).collect();
            let divided_over = |id: &ParamId| {
                let others = axes.get(id).into_iter().flatten().copied();
                (*id, std::iter::once(comms.control()).chain(others).collect::<Vec<_>>())
            };
            let divided = divided(held.iter().map(divided_over));
            let all_have = |moments, divided: &Divided<'_>| divided.check(moments, (&all, &work.grads));
            divided.iter().fold(moments, all_have).map_err(fail_alike)?;
        }
        // Each rank has moments of its own rows.
        let compared = update_of(&lr, asked, another.then_some(&MomentDigests::default()));
        let tried = new.then(|| Updated::of(&all, &work.grads));
        let updated = update(all, optim, lr, work.grads, tried).map_err(fail)?;
        checked.remember(optim);
        checked.updates().record(compared);
        let (owned, rest): (Vec<_>, Vec<_>) = updated.0.into_iter().partition(|shard| ours.contains(&shard.param.id()));
        let parts = joined.divide(owned).map_err(fail)?;
        let updated = dealt.collect(ShardParams(parts.into_iter().chain(rest).collect()), comms).map_err(fail)?;
        Ok(UpdatedShards { updated, unchanged })
    }
}

/// Takes out of the work of this rank what is to be updated as a whole, but is a part of a parameter that other axes
/// split as well; with the rest of the work.
fn take_parts(
    work: &mut OwnUpdate,
    whole: &HashSet<ParamId>,
    split: &[SplitParam],
) -> (Vec<PartWithGradient>, Vec<ShardParam>) {
    let split: HashSet<ParamId> = split.iter().map(|param| param.id).collect();
    let (mut parts, mut rest) = (Vec::new(), Vec::new());
    for shard in std::mem::take(&mut work.params).0 {
        let id = shard.param.id();
        match (whole.contains(&id) && split.contains(&id)).then(|| shard.param.take_gradient(&mut work.grads)).flatten()
        {
            Some(gradient) => parts.push((shard, gradient)),
            None => rest.push(shard),
        }
    }
    (parts, rest)
}

/// The parameters whose update depends on the whole of them, by rows or along the dims that other axes split.
pub(super) fn find_whole(
    optim: &ModuleOptimizer,
    shards: &ShardParams,
    split: &[SplitParam],
) -> Result<HashSet<ParamId>, Error> {
    let by_rows = |shard: &ShardParam| SplitParam {
        id: shard.param.id(),
        path: shard.path.clone(),
        dims: shard.rows.shard_dims(),
        split: vec![0],
        over: None,
    };
    let mut whole = parts::whole(optim, shards, &shards.0.iter().map(by_rows).collect::<Vec<_>>())?;
    whole.extend(parts::whole(optim, shards, split)?);
    Ok(whole)
}
