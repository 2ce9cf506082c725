//! A module of rows as those see it from outside who do not know of rows: each parameter once, at its own path and
//! under its own id, with this rank's rows for its value. So patterns of paths, frozen groups and visitors find what
//! they look for.

use std::collections::HashSet;

use burn::module::{Flag, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

use crate::params::is_shard;

/// A visitor or mapper that is shown a module without placeholders.
pub(in crate::data_parallel) struct Logical<'a, T> {
    pub inner: &'a mut T,
    pub stand_ins: &'a HashSet<ParamId>,
}

impl<V: ModuleVisitor> ModuleVisitor for Logical<'_, V> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.stand_ins.contains(&param.id) {
            self.inner.visit_float(param);
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.inner.visit_int(param);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.inner.visit_bool(param);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.inner.visit_flag(flag);
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.inner.enter_module(name, container);
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.inner.exit_module(name, container);
        }
    }
}

impl<M: ModuleMapper> ModuleMapper for Logical<'_, M> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.stand_ins.contains(&param.id) {
            true => param,
            false => self.inner.map_float(param),
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        self.inner.map_int(param)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        self.inner.map_bool(param)
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.inner.map_flag(flag)
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.inner.enter_module(name, container);
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.inner.exit_module(name, container);
        }
    }
}
