//! Checks that the moments of an optimizer belong to the parameters of the model.

use std::collections::HashSet;

use burn::module::{Module, ParamGroup, ParamId};
use burn::optim::ModuleOptimizer;
use burn_pack::Reader;

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::optim::{StateNames, portions, without};
use crate::params::visit_floats;

/// A parameter that an optimizer may have moments of.
struct Param {
    id: ParamId,
    path: String,
    dims: Vec<usize>,
    bytes: usize,
}

/// Demands that an optimizer has moments of no other parameters than those of `local`, of their dims, and `others`.
/// Copies those of `local`, a few at a time, if there are any.
///
/// # Errors
/// [`Error::Optimizer`] with the first that does not fit.
pub(super) fn check<M: Module>(
    optim: &ModuleOptimizer,
    local: &M,
    others: impl IntoIterator<Item = ParamId>,
) -> Result<(), Error> {
    let (mut params, mut seen) = (Vec::new(), HashSet::new());
    visit_floats(local, &mut |param| {
        if seen.insert(param.id()) {
            let dims = param.dims();
            let bytes = dims.iter().product::<usize>() * param.dtype().size();
            params.push(Param { id: param.id(), path: param.path(), dims, bytes });
        }
    });
    let unreadable = |problem: String| optimizer_error(format!("its state cannot be read: {problem}"));
    let known = params.iter().map(|param| param.id).chain(others).collect();
    if let Some(path) = stranger(optim, known).map_err(unreadable)? {
        return Err(optimizer_error(format!(
            "it has moments of `{path}` by an id that no parameter here has: load the state that was saved with this model, into an \
             optimizer of its own for each rank of a split or a pipeline, and the model's record before the model is wrapped"
        )));
    }
    let mut names = StateNames::default();
    for portion in portions(&params, |param| param.bytes) {
        let ids: Vec<ParamId> = portion.iter().map(|param| param.id).collect();
        let states = names.read(optim, &ids).map_err(unreadable)?;
        for Param { id, path, dims, .. } in portion {
            for (moment, data) in states.get(id).into_iter().flat_map(|state| &state.moments) {
                let shape = data.shape().to_vec();
                // Factored moments have 1 where they are sums over a dim.
                let fits =
                    shape.len() == dims.len() && shape.iter().zip(dims).all(|(size, dim)| size == dim || *size == 1);
                if !fits {
                    return Err(optimizer_error(format!(
                        "its moment `{moment}` of `{path}` has dims {shape:?}, but this rank holds {dims:?} of that: each rank \
                         loads the state of its own parts"
                    )));
                }
            }
        }
    }
    Ok(())
}

/// The path of a parameter that is none of these, and of which an optimizer has moments.
fn stranger(optim: &ModuleOptimizer, known: Vec<ParamId>) -> Result<Option<String>, String> {
    let record = without(optim, ParamGroup::from_ids(known));
    if record.is_empty() {
        return Ok(None);
    }
    let bytes = record.into_bytes().map_err(|problem| problem.to_string())?;
    let reader = Reader::from_bytes(bytes).map_err(|problem| problem.to_string())?;
    let named =
        reader.tensor_names().into_iter().find_map(|name| reader.metadata().get(name.split_once('.')?.0).cloned());
    Ok(Some(named.unwrap_or_else(|| "a parameter without a path".into())))
}
