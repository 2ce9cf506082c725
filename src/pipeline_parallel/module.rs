//! A pipelined model is a module as the model is.

use std::fmt;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::Device;

use super::Pipelined;

impl<M: fmt::Debug> fmt::Debug for Pipelined<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipelined").field("local", &self.local).field("group", &self.group).finish()
    }
}

impl<M: fmt::Display> fmt::Display for Pipelined<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.local.fmt(f)
    }
}

impl<M: Module> Module for Pipelined<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.local.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { local: self.local.fork(device), ..self }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { local: self.local.to_device(device), ..self }
    }

    fn train(self) -> Self {
        Self { local: self.local.train(), ..self }
    }

    fn valid(&self) -> Self {
        Self { local: self.local.valid(), ..self.clone() }
    }

    fn materialize(self) -> Self {
        Self { local: self.local.materialize(), ..self }
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        self.local.visit(visitor);
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        Self { local: self.local.map(mapper), ..self }
    }
}
