//! A replica stands for its model wherever burn asks for a module.

use std::fmt;
use std::ops::{Deref, DerefMut};

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::Device;

use super::Replica;

impl<M> Deref for Replica<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M> DerefMut for Replica<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.module
    }
}

impl<M: fmt::Debug> fmt::Debug for Replica<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("module", &self.module).field("group", self.reducer.data()).finish()
    }
}

impl<M: fmt::Display> fmt::Display for Replica<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module.fmt(f)
    }
}

/// A replica is seen through: paths and parameters are those of the model.
impl<M: Module> Module for Replica<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.module.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        self.change(|module| module.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.change(|module| module.to_device(device))
    }

    fn train(self) -> Self {
        self.change(|module| module.train())
    }

    fn valid(&self) -> Self {
        self.with(self.module.valid())
    }

    fn materialize(self) -> Self {
        self.change(|module| module.materialize())
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        self.module.visit(visitor);
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        let before = self.reducer.strangers(&self.module);
        let replica = self.change(|module| module.map(mapper));
        replica.reducer.recognise(&replica.module, &before);
        replica
    }
}
