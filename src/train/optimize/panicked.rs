//! The error of an optimizer that panics, with the parameter: burn's message says what does not suit it, and not where.
//!
//! Small parameters of the same ids, paths and numbers of dims are updated one by one to find out.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor};

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::error::catch_quietly;
use crate::graph::SplitParam;
use crate::sharding::{RankedParam, Rows, ShardParam, ShardParams};

/// The size of every dim of a small parameter.
const SIZE: usize = 4;

/// The parameters that an optimizer updates.
#[derive(Debug, Default)]
pub(in crate::train) struct Updated(Vec<One>);

#[derive(Debug)]
struct One {
    id: ParamId,
    path: String,
    dims: usize,
}

impl Updated {
    /// Those of a module that have gradients.
    pub fn of<M: Module>(module: &M, grads: &GradientsParams) -> Self {
        let mut with = WithGradient { grads, path: Vec::new(), found: Vec::new() };
        module.visit(&mut with);
        Self(with.found)
    }

    /// Those that are split.
    pub fn of_parts(split: &[SplitParam]) -> Self {
        let one = |param: &SplitParam| One { id: param.id, path: param.path.clone(), dims: param.dims.len() };
        Self(split.iter().map(one).collect())
    }

    /// The error of an optimizer that panicked on them, saying this.
    pub fn error(&self, optim: &ModuleOptimizer, said: &str) -> Error {
        match self.0.iter().find(|one| one.panics(optim)) {
            Some(One { path, dims, .. }) => optimizer_error(format!(
                "it panicked on `{path}`, a parameter of {dims} {}: {said}: give that one another optimizer, as by \
                 `ModuleOptimizer::with_group`",
                if *dims == 1 { "dim" } else { "dims" }
            )),
            None => optimizer_error(format!("it panicked: {said}")),
        }
    }
}

impl One {
    fn panics(&self, optim: &ModuleOptimizer) -> bool {
        let step = || match self.dims {
            1 => self.step::<1>(optim),
            2 => self.step::<2>(optim),
            3 => self.step::<3>(optim),
            4 => self.step::<4>(optim),
            5 => self.step::<5>(optim),
            6 => self.step::<6>(optim),
            7 => self.step::<7>(optim),
            8 => self.step::<8>(optim),
            _ => {}
        };
        catch_quietly(|_| true, step).is_err()
    }

    /// Updates a small parameter in the place of this one.
    fn step<const D: usize>(&self, optim: &ModuleOptimizer) {
        let ones = || Tensor::<D>::ones([SIZE; D], &Device::flex());
        let param = RankedParam::new(Param::initialized(self.id, ones().autodiff().require_grad()));
        let (Some(param), Some(rows)) = (param, Rows::new(&[SIZE; D], 1)) else { return };
        let model = ShardParams(vec![ShardParam { path: self.path.clone(), rows, owner: 0, param }]);
        let mut grads = GradientsParams::new();
        grads.register(self.id, ones());
        // The same groups without moments.
        drop(optim.clone().load_record(OptimizerRecord::default()).step(0.1, model, grads));
    }
}

struct WithGradient<'a> {
    grads: &'a GradientsParams,
    path: Vec<String>,
    found: Vec<One>,
}

impl ModuleVisitor for WithGradient<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.grads.get::<D>(param.id).is_some() {
            self.found.push(One { id: param.id, path: self.path.join("."), dims: D });
        }
    }
}
