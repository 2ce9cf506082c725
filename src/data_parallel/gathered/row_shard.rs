//! This rank's rows of a parameter, in its place in the module.

use std::sync::{Arc, Weak};

use burn::module::{
    Content, Devices, LoraAdapter, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
    Reparameterization,
};
use burn::tensor::{Device, Tensor};

use super::Gatherer;
use super::merge::merge;
use super::operation::{GatheredParam, gather};
use crate::data_parallel::hook::{GradientArrival, HookGroup};
use crate::data_parallel::reducer::Reducer;
use crate::error::throw;
use crate::params::SHARD;
use crate::sharding::{Keep, RankedParam};

/// The reparameterization of a parameter of which this rank holds its rows: its value is gathered. An adapter that the
/// parameter had is applied to that.
#[derive(Debug, Clone)]
pub(super) struct RowShard {
    pub shard: RankedParam,
    pub adapter: Option<LoraAdapter>,
    pub link: GathererHandle,
}

/// What gathers the parameter and hears of its gradient.
#[derive(Clone)]
pub(super) struct GathererHandle {
    pub gatherer: Arc<Gatherer>,
    pub reducer: Weak<Reducer>,
    pub hooks: HookGroup,
}

impl std::fmt::Debug for GathererHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GathererHandle")
    }
}

thread_local! {
    /// Whether parameters give their placeholders, with which their shards are taken off.
    static BARE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    /// What gathers the rows that a visitor has come to last.
    static LAST_VISITED: std::cell::Cell<*const Gatherer> = const { std::cell::Cell::new(std::ptr::null()) };
}

/// What gathers the rows that a visitor on this thread has come to last: a visitor itself sees the parameter alone. To
/// be compared, not followed.
pub(super) fn last_visited() -> *const Gatherer {
    LAST_VISITED.get()
}

/// Runs something in which sharded parameters are what stands in for them: burn takes a reparameterization off a
/// parameter only together with its value.
pub(super) fn bare<T>(run: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            BARE.set(self.0);
        }
    }
    let _restore = Restore(BARE.replace(true));
    run()
}

impl Reparameterization for RowShard {
    const NAME: &'static str = SHARD;

    /// # Panics
    /// If the rows of the others cannot be gathered: there is no other way out of a forward. The world has failed by
    /// then, and steps and evaluations return its error, as does the run if it was a forward of the user's own.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if BARE.get() {
            return base;
        }
        let Some(shard) = self.shard.get::<D>() else { return base };
        let (id, value) = (shard.id, shard.val());
        let arrival = value.is_require_grad().then(|| self.link.arrival(id)).flatten();
        let source = GatheredParam { gatherer: self.link.gatherer.clone(), id };
        let whole = gather(value, &source, arrival).unwrap_or_else(|error| throw(error));
        match &self.adapter {
            Some(adapter) if self.link.gatherer.keep() == Keep::Pass => merge(whole, adapter),
            Some(adapter) => adapter.apply(whole),
            None => whole,
        }
    }
}

impl GathererHandle {
    /// Who hears of the gradient of a use of a parameter, and the order in which it is to be computed.
    fn arrival(&self, id: burn::module::ParamId) -> Option<(GradientArrival, usize)> {
        let reducer = self.reducer.upgrade()?;
        let index = reducer.index_of(id)?;
        Some(GradientArrival::of_use(&reducer, self.hooks, index))
    }
}

impl RowShard {
    fn renew(
        self,
        shard: impl FnOnce(RankedParam) -> RankedParam,
        adapter: impl FnOnce(LoraAdapter) -> LoraAdapter,
    ) -> Self {
        Self { shard: shard(self.shard), adapter: self.adapter.map(adapter), ..self }
    }
}

/// How burn calls what is not a layer of a model.
const CONTAINER: &str = "Reparameterization";

impl Module for RowShard {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices = self.shard.collect_devices(devices);
        match &self.adapter {
            Some(adapter) => adapter.collect_devices(devices),
            None => devices,
        }
    }

    fn fork(self, device: &Device) -> Self {
        self.renew(|shard| shard.fork(device), |adapter| adapter.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.renew(|shard| shard.to_device(device), |adapter| adapter.to_device(device))
    }

    fn train(self) -> Self {
        self.renew(Module::train, Module::train)
    }

    fn valid(&self) -> Self {
        self.clone().renew(|shard| shard.valid(), |adapter| adapter.valid())
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        LAST_VISITED.set(Arc::as_ptr(&self.link.gatherer));
        self.shard.visit(visitor);
        if let Some(adapter) = &self.adapter {
            visitor.enter_module(LoraAdapter::NAME, CONTAINER);
            adapter.visit(visitor);
            visitor.exit_module(LoraAdapter::NAME, CONTAINER);
        }
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        let Self { shard, adapter, link } = self;
        let shard = shard.map(mapper);
        let adapter = adapter.map(|adapter| {
            mapper.enter_module(LoraAdapter::NAME, CONTAINER);
            let adapter = adapter.map(mapper);
            mapper.exit_module(LoraAdapter::NAME, CONTAINER);
            adapter
        });
        Self { shard, adapter, link }
    }
}

impl ModuleDisplayDefault for RowShard {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&format!("rows of {}", self.shard.id())).optional()
    }
}

impl ModuleDisplay for RowShard {}
