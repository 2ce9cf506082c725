//! Visits the parameters that are divided by rows: which are trained, and this rank's rows of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::{FloatDType, Tensor};

use crate::Error;
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

/// Takes this rank's rows of the parameters that are trained.
pub(super) struct OwnRows<'a> {
    pub params: &'a [RowParam],
    /// The place of each among these.
    pub numbers: &'a HashMap<ParamId, usize>,
    /// The rank that updates each parameter, if its update depends on the whole of it.
    pub owners: Vec<usize>,
    pub seen: HashSet<ParamId>,
    pub found: Result<ShardParams, Error>,
}

impl ModuleVisitor for OwnRows<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(number) = self.numbers.get(&param.id) else { return };
        // A parameter that the module holds in two places is one parameter; what another stage holds has no elements
        // here.
        let nothing = param.lazy_shape().num_elements() == 0;
        if nothing || !param.val().is_require_grad() || !self.seen.insert(param.id) {
            return;
        }
        let RowParam { path, rows, .. } = &self.params[*number];
        let (path, rows, owner) = (path.to_string(), rows.clone(), self.owners[*number]);
        match (RankedParam::new(param.clone()), &mut self.found) {
            (Some(param), Ok(found)) => found.0.push(ShardParam { path, rows, owner, param }),
            (None, found) => {
                let problem = format!("parameter `{path}` is of rank {D}, and optimizers take ranks 1 to 8");
                *found = Err(Error::invalid("optimize", problem));
            }
            _ => {}
        }
    }
}
