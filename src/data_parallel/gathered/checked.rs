//! Whether a module still holds rows where its replica does.
//!
//! A replica hands out its module to be changed. A layer from before the model was wrapped has whole parameters under
//! ids by which the replica gathers rows; one of another replica has rows that are gathered, and gradients that are
//! reduced, by that. Neither could train with the others.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use super::Gatherer;
use super::row_shard::last_visited;
use crate::Error;
use crate::params::{ModulePath, is_shard};
use crate::sharding::Rows;
use crate::tensor::PlainTensor;

/// This rank's rows of all parameters, as the module has them now. Makes sure that they are there as rows of this
/// replica.
///
/// # Errors
/// [`Error::InvalidArgument`], which names the first that is not.
pub(in crate::data_parallel) fn checked_rows<M: Module>(
    module: &M,
    gatherer: &Arc<Gatherer>,
) -> Result<HashMap<ParamId, PlainTensor>, Error> {
    let (path, rows) = (ModulePath::default(), HashMap::new());
    let mut check = Check { gatherer, path, entered: false, rows, problem: None };
    module.visit(&mut check);
    match check.problem {
        None => Ok(check.rows),
        Some(problem) => Err(Error::invalid(OPERATION, problem)),
    }
}

/// The error of rows of other dims than a replica holds.
pub(super) fn of_other_dims(path: &str, found: &[usize], rows: &Rows) -> Error {
    Error::invalid(OPERATION, problem_of_dims(path, found, rows))
}

fn problem_of_dims(path: &str, found: &[usize], rows: &Rows) -> String {
    let held = rows.shard_dims();
    format!(
        "`{path}` has the dims {found:?}, and this replica holds rows of it with the dims {held:?}: was a whole value given to \
         it? Load values with `load`, which reads the rows of each rank"
    )
}

/// What errors call the use of a parameter of which ranks hold rows.
const OPERATION: &str = "a sharded parameter";

struct Check<'a> {
    gatherer: &'a Arc<Gatherer>,
    path: ModulePath,
    /// Whether rows come next.
    entered: bool,
    rows: HashMap<ParamId, PlainTensor>,
    problem: Option<String>,
}

impl Check<'_> {
    fn problem_of<const D: usize>(&self, param: &Param<Tensor<D>>, are_rows: bool) -> Option<String> {
        let (path, rows) = (self.path.text(), self.gatherer.rows(param.id));
        let whole =
            "Make a new layer with `init`, whose parameters are whole on every rank, or load its values with `load`";
        match (rows, are_rows) {
            (None, false) => None,
            (Some(_), false) => Some(format!(
                "`{path}` is whole, and this replica holds rows of it (`sharding` is \"parameters\"): was a layer put in that is from \
                 before the model was wrapped? {whole}; or `assemble` the model, change that, and wrap it again"
            )),
            (_, true) if !std::ptr::eq(last_visited(), Arc::as_ptr(self.gatherer)) => Some(format!(
                "`{path}` is divided by another replica, which gathers it and reduces its gradient: was a layer of that put in? \
                 `assemble` the other model, and put in what a new layer was given of it"
            )),
            (None, true) => Some(format!(
                "the rows of `{path}` have an id that this replica does not know: was a record of another run loaded? Restore it \
                 with a `Checkpointer`, or load the values with `load`"
            )),
            (Some(rows), true) => {
                let found = param.lazy_shape();
                (found.as_slice() != rows.shard_dims()).then(|| problem_of_dims(&path, found.as_slice(), rows))
            }
        }
    }
}

impl ModuleVisitor for Check<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        match is_shard(name, container) {
            true => self.entered = true,
            false => self.path.enter(name, container),
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.exit();
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let are_rows = std::mem::take(&mut self.entered);
        if self.problem.is_none() {
            self.problem = self.problem_of(param, are_rows);
        }
        if are_rows && self.problem.is_none() {
            self.rows.entry(param.id).or_insert_with(|| param.base().into());
        }
    }
}
