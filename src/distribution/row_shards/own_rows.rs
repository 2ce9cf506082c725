//! Visits the parameters that are divided by rows: which are trained, and this rank's rows of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::{FloatDType, Tensor};

use crate::Error;
use crate::params::{MapParams, MappedParam, ModulePath, stand_in};
use crate::sharding::{RankedParam, Rows, ShardParam, ShardParams};

/// A parameter that is divided.
#[derive(Debug, Clone)]
pub(super) struct RowParam {
    pub id: ParamId,
    pub path: Arc<str>,
    pub dtype: FloatDType,
    pub group: usize,
    pub rows: Rows,
}

/// The float parameters that are trained. Lazy ones count as trained: their settings show when they are made.
#[derive(Default)]
pub(super) struct Trained(pub HashSet<ParamId>);

impl ModuleVisitor for Trained {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_initialized() || param.base().is_require_grad() {
            self.0.insert(param.id);
        }
    }
}

/// Takes this rank's rows of the parameters that are trained, and leaves stand-ins.
pub(super) struct TakeRows<'a> {
    pub params: &'a [RowParam],
    /// The place of each among these.
    pub numbers: &'a HashMap<ParamId, usize>,
    /// The rank that updates each parameter, if its update depends on the whole of it.
    pub owners: Vec<usize>,
    pub taken: Result<ShardParams, Error>,
}

impl TakeRows<'_> {
    fn take<const D: usize>(&self, number: usize, param: &Param<Tensor<D>>) -> Result<ShardParam, Error> {
        let RowParam { path, rows, .. } = &self.params[number];
        let (path, rows, owner) = (path.to_string(), rows.clone(), self.owners[number]);
        match RankedParam::new(param.clone()) {
            Some(param) => Ok(ShardParam { path, rows, owner, param }),
            None => {
                let problem = format!("parameter `{path}` is of rank {D}, and optimizers take ranks 1 to 8");
                Err(Error::invalid("optimize", problem))
            }
        }
    }
}

impl MapParams for TakeRows<'_> {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        let Some(number) = self.numbers.get(&param.id) else { return MappedParam::Same(param) };
        // What another stage holds has no elements here.
        let nothing = param.lazy_shape().num_elements() == 0;
        if nothing || self.taken.is_err() || !param.val().is_require_grad() {
            return MappedParam::Same(param);
        }
        let taken = self.take(*number, &param).and_then(|taken| Ok((taken, stand_in(&param)?)));
        match (taken, &mut self.taken) {
            (Ok((one, stand_in)), Ok(taken)) => {
                taken.0.push(one);
                MappedParam::with_value(param, stand_in)
            }
            (Err(error), taken) => {
                *taken = Err(error);
                MappedParam::Same(param)
            }
            (Ok(_), Err(_)) => MappedParam::Same(param),
        }
    }
}
