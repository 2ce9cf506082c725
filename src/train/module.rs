//! Replicas are modules as their engine is.

use std::fmt;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::Device;

use super::{GraphEngine, Replicas};

impl<E: fmt::Debug> fmt::Debug for Replicas<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicas").field("engine", &self.engine).field("group", self.reducer.data()).finish()
    }
}

impl<E: fmt::Display> fmt::Display for Replicas<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.engine.fmt(f)
    }
}

impl<E: GraphEngine> Module for Replicas<E> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.engine.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { engine: self.engine.fork(device), ..self }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { engine: self.engine.to_device(device), ..self }
    }

    fn train(self) -> Self {
        Self { engine: self.engine.train(), ..self }
    }

    fn valid(&self) -> Self {
        Self { engine: self.engine.valid(), ..self.clone() }
    }

    fn materialize(self) -> Self {
        Self { engine: self.engine.materialize(), ..self }
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        self.engine.visit(visitor);
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        let replicas = Self { engine: self.engine.map(mapper), ..self };
        replicas.reducer.recognise(&replicas.engine);
        replicas
    }
}
