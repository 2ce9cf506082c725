//! The step of an optimizer on a model whose parameters are split along axes: each rank updates its parts.

use std::collections::HashSet;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::Device;

use super::given::update_of;
use super::joined::Joined;
use super::meeting::{Meeting, fail_all, fail_here};
use super::moments::MomentDigests;
use super::other_ranks::{divided, groups_of, holders};
use super::own_parts::own_parts;
use super::panicked::Updated;
use super::update::update;
use super::{moments, parts};
use crate::Error;
use crate::comm::Communicator;
use crate::graph::{CheckedOptimizers, SplitParam};
use crate::params;
use crate::sharding::ShardParams;
use crate::step::AskedNorm;

/// One step of an optimizer on this rank's parts.
pub(in crate::train) struct SplitStep<'a> {
    pub optim: &'a mut ModuleOptimizer,
    pub lr: ModuleLearningRate,
    /// How the norm of the gradients was asked for.
    pub asked: Option<AskedNorm>,
    pub grads: GradientsParams,
    pub checked: CheckedOptimizers,
    /// The parameters of which this rank holds parts.
    pub split: Vec<SplitParam>,
    /// The groups whose ranks wait for this one.
    pub groups: Vec<Communicator>,
}

impl SplitStep<'_> {
    /// Updates the parameters that have gradients. Those that are split, and whose update depends on the whole of them,
    /// as Muon's does, are joined, each on one rank, which updates it and sends the others their parts. Collective over
    /// the ranks that hold parts of one parameter, if there are any such.
    ///
    /// # Errors
    /// [`Error::Optimizer`]; those of [`Communicator`](crate::comm::Communicator).
    pub fn run<M: Module, L: Module>(self, model: M, local: impl Fn(&M) -> &L) -> Result<M, Error> {
        let Self { optim, lr, asked, mut grads, checked, split, groups } = self;
        // The others may have updated theirs, and wait for this rank in this call or in the next step.
        let fail = |error: Error| fail_here(&groups, error);
        let fail_alike = |error: Error| fail_all(&groups, error);
        let ids: HashSet<ParamId> = split.iter().map(|param| param.id).collect();
        let another = !checked.is_known(optim);
        let mut new = another;
        let whole = checked.whole(optim, &ids, || {
            new = true;
            parts::whole(optim, local(&model), &split)
        });
        let whole = match new {
            true => Meeting { over: holders(&split), groups: &groups }.outcome(whole)?,
            false => whole?,
        };
        let parts = match whole.is_empty() {
            true => Vec::new(),
            false => own_parts(local(&model), &whole, &split, &mut grads).map_err(fail)?,
        };
        if parts.is_empty() {
            let moments = match new {
                true => check_moments(optim, local(&model), &grads, &split).map_err(fail_alike)?,
                false => MomentDigests::default(),
            };
            let compared = update_of(&lr, asked, another.then_some(&moments));
            let tried = new.then(|| Updated::of(local(&model), &grads));
            let updated = update(model, optim, lr, grads, tried).map_err(fail)?;
            checked.remember(optim);
            checked.updates().record(compared);
            return Ok(updated);
        }
        let (owned, joined) = Joined::join(parts, &split, &mut grads).map_err(fail)?;
        let all = WithOwned { owned, model };
        let moments = match new {
            true => check_moments(optim, &all, &grads, &split).map_err(fail_alike)?,
            false => MomentDigests::default(),
        };
        let compared = update_of(&lr, asked, another.then_some(&moments));
        let tried = new.then(|| Updated::of(&all, &grads));
        let WithOwned { owned, model } = update(all, optim, lr, grads, tried).map_err(fail)?;
        checked.remember(optim);
        checked.updates().record(compared);
        let divided = joined.divide(owned.0).map_err(fail)?;
        let values = divided.into_iter().map(|part| (part.param.id(), part.param.value())).collect();
        Ok(params::replace_values(model, values))
    }
}

/// Demands that an optimizer that is new here has moments of this rank's parts, and nothing else. Collective over the
/// ranks that hold parts of one parameter, which all get the error of one of them.
fn check_moments<M: Module>(
    optim: &ModuleOptimizer,
    local: &M,
    grads: &GradientsParams,
    split: &[SplitParam],
) -> Result<MomentDigests, Error> {
    let moments = moments::check(optim, local, []);
    // A rank that knows better already meets the others all the same: they wait for it.
    let divided = divided(split.iter().map(|param| (param.id, groups_of(param))));
    divided.iter().fold(moments, |moments, divided| divided.check(moments, (local, grads)))
}

/// A model, and before it the parameters that this rank updates as wholes: an optimizer gives each its gradient, and
/// finds none for the part that the model has of it.
#[derive(Debug, Clone)]
struct WithOwned<M> {
    owned: ShardParams,
    model: M,
}

impl<M: Module> Module for WithOwned<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.model.collect_devices(self.owned.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        Self { owned: self.owned.fork(device), model: self.model.fork(device) }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { owned: self.owned.to_device(device), model: self.model.to_device(device) }
    }

    fn train(self) -> Self {
        Self { owned: self.owned.train(), model: self.model.train() }
    }

    fn valid(&self) -> Self {
        Self { owned: self.owned.valid(), model: self.model.valid() }
    }

    fn materialize(self) -> Self {
        Self { owned: self.owned.materialize(), model: self.model.materialize() }
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        self.owned.visit(visitor);
        self.model.visit(visitor);
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        Self { owned: self.owned.map(mapper), model: self.model.map(mapper) }
    }
}
