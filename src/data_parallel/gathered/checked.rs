//! Whether a module still holds rows where its replica does.
//!
//! A replica hands out its module to be changed. A layer from before the model was wrapped has whole parameters under
//! ids by which the replica gathers rows; one of another replica has rows that are gathered, and gradients that are
//! reduced, by that. Neither could train with the others.

use std::sync::Arc;

use burn::module::Module;

use super::Gatherer;
use super::kept::problem_of_kept;
use super::row_shard::last_visited;
use crate::Error;
use crate::params::{FoundParams, ParamRef};
use crate::sharding::Rows;

/// The parameters of a module, which are there as rows of this replica where they should be.
///
/// # Errors
/// [`Error::InvalidArgument`], which names the first that is not.
pub(in crate::data_parallel) fn checked_params<M: Module>(
    module: &M,
    gatherer: &Arc<Gatherer>,
) -> Result<FoundParams, Error> {
    let mut problem = None;
    let params = FoundParams::looking(module, &mut |param| {
        if param.is_float() && problem.is_none() {
            problem = problem_of(&param, gatherer);
        }
    });
    match problem {
        None => Ok(params),
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

fn problem_of(param: &ParamRef<'_>, gatherer: &Arc<Gatherer>) -> Option<String> {
    let (path, rows) = (param.path(), gatherer.rows(param.id()));
    let whole =
        "Make a new layer with `init`, whose parameters are whole on every rank, or load its values with `load`";
    match (rows, param.is_shard()) {
        (None, false) => None,
        (Some(_), false) => Some(format!(
            "`{path}` is whole, and this replica holds rows of it (`sharding` is \"parameters\"): was a layer put in that is from before \
             the model was wrapped? {whole}; or `assemble` the model, change that, and wrap it again"
        )),
        (_, true) if !std::ptr::eq(last_visited(), Arc::as_ptr(gatherer)) => Some(format!(
            "`{path}` is divided by another replica, which gathers it and reduces its gradient: was a layer of that put in? `assemble` \
             the other model, and put in what a new layer was given of it"
        )),
        (None, true) => Some(format!(
            "the rows of `{path}` have an id that this replica does not know: was a record of another run loaded? Restore it with a \
             `Checkpointer`, or load the values with `load`"
        )),
        (Some(rows), true) => {
            let found = param.dims();
            match found == rows.shard_dims() {
                true => problem_of_kept(param, gatherer.keep()),
                false => Some(problem_of_dims(&path, &found, rows)),
            }
        }
    }
}
