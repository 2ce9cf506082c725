//! Implements `Module` for a replica by delegating to what runs it.

use std::fmt;
use std::ops::{Deref, DerefMut};

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::Device;

use super::Replica;
use super::gathered::Logical;
use crate::Error;
use crate::error::throw;
use crate::graph::StepEngine;
use crate::nesting::{self, refuse_wrapping};
use crate::optimizer_mapper::{is_optimizer, refuse_at_once};
use crate::sharding::Sharding;

impl<E> Deref for Replica<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.engine
    }
}

impl<E> DerefMut for Replica<E> {
    fn deref_mut(&mut self) -> &mut E {
        &mut self.engine
    }
}

impl<E: StepEngine + fmt::Debug> fmt::Debug for Replica<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("engine", &self.engine).field("group", self.group()).finish()
    }
}

impl<E: fmt::Display> fmt::Display for Replica<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.engine.fmt(f)
    }
}

/// Paths and parameters are those of the model; of parameters that the replicas divide among themselves the values are
/// this rank's rows.
impl<E: StepEngine> Module for Replica<E> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.engine.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        self.change(|engine| engine.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.change(|engine| engine.to_device(device))
    }

    fn train(self) -> Self {
        self.change(E::train)
    }

    fn valid(&self) -> Self {
        let engine = self.engine.valid();
        self.clone().change(|_| engine)
    }

    fn materialize(self) -> Self {
        self.change(E::materialize)
    }

    /// # Panics
    /// If `LBFGS` looks at sharded replicas, for [`map`](Self::map) it is too late: the gradients of rows do not fit
    /// whole parameters.
    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        nesting::visited("Replica");
        if self.sharding() != Sharding::None {
            refuse_at_once::<Visitor>("Replica");
        }
        match self.engine.stand_ins() {
            Some(stand_ins) => self.engine.visit(&mut Logical { inner: visitor, stand_ins }),
            None => self.engine.visit(visitor),
        }
    }

    /// # Panics
    /// If an optimizer of burn steps sharded replicas by itself: it would update rows with the gradients of others, or
    /// not at all. [`optimize`](crate::train::ParallelModule::optimize) does it. The run ends with
    /// [`Error::Optimizer`](crate::Error::Optimizer).
    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        let sharding = self.sharding();
        if sharding != Sharding::None && is_optimizer::<Mapper>() {
            refuse_at_once::<Mapper>("Replica");
            let problem = format!(
                "`optim.step` was called on replicas whose sharding is \"{sharding}\": the gradients are those of this rank's rows, \
                 and the others must hear of the update; call `model.optimize(&mut optim, lr, step)` instead"
            );
            throw(Error::Optimizer { problem });
        }
        // A record may bring other ids; an optimizer brings none.
        let before = match is_optimizer::<Mapper>() {
            true => None,
            false => self.reducer().map(|reducer| reducer.unknown_params(&self.engine)),
        };
        let stand_ins = self.engine.stand_ins().cloned();
        let replica = self.change(|engine| match &stand_ins {
            Some(stand_ins) => engine.map(&mut Logical { inner: mapper, stand_ins }),
            None => engine.map(mapper),
        });
        if let (Some(reducer), Some(before)) = (replica.reducer(), before) {
            reducer.recognise(&replica.engine, &before);
        }
        replica
    }
}

refuse_wrapping!(Replica: tensor_parallel, pipeline_parallel, data_parallel, parallelize);
