//! Checks that the moments of an optimizer belong to the parameters of the model.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ParamGroup, ParamId};
use burn::optim::ModuleOptimizer;
use burn_pack::Reader;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::optim::{MOST_AT_ONCE, ParamState, StateNames, portions, without};
use crate::params::visit_floats;

/// A parameter that an optimizer may have moments of.
struct Param {
    id: ParamId,
    path: String,
    dims: Vec<usize>,
    bytes: usize,
}

/// A number for the moments that an optimizer has of each parameter of which it has any but zeros: equal ones have the
/// same.
#[derive(Debug, Default)]
pub(super) struct MomentDigests(Vec<MomentDigest>);

#[derive(Debug)]
struct MomentDigest {
    id: ParamId,
    /// A number for the path, 0 of a parameter that is elsewhere.
    path: u64,
    number: u64,
}

impl MomentDigest {
    /// The number of these moments of this parameter.
    fn of(&self, parameter: u64) -> u64 {
        xxh3_64_with_seed(&self.number.to_le_bytes(), parameter)
    }
}

/// Demands that an optimizer has moments of no other parameters than those of `local`, of their dims, and `others`.
/// Copies them, a few at a time, if there are any.
///
/// # Errors
/// [`Error::Optimizer`] with the first that does not fit.
pub(super) fn check<M: Module>(
    optim: &ModuleOptimizer,
    local: &M,
    others: impl IntoIterator<Item = ParamId>,
) -> Result<MomentDigests, Error> {
    let (mut params, mut seen) = (Vec::new(), HashSet::new());
    visit_floats(local, &mut |param| {
        if seen.insert(param.id()) {
            let dims = param.dims();
            let bytes = dims.iter().product::<usize>() * param.dtype().size();
            params.push(Param { id: param.id(), path: param.path(), dims, bytes });
        }
    });
    let others: Vec<ParamId> = others.into_iter().filter(|id| seen.insert(*id)).collect();
    let unreadable = |problem: String| optimizer_error(format!("its state cannot be read: {problem}"));
    let known = seen.into_iter().collect();
    if let Some(path) = unknown_param(optim, known).map_err(unreadable)? {
        return Err(optimizer_error(format!(
            "it has moments of `{path}` by an id that no parameter here has: load the state that was saved with this model, into an \
             optimizer of its own for each rank of a split or a pipeline, and the model's record before the model is wrapped"
        )));
    }
    let (mut names, mut moments) = (StateNames::default(), MomentDigests::default());
    let paths: HashMap<ParamId, u64> = params.iter().map(|param| (param.id, xxh3_64(param.path.as_bytes()))).collect();
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
                         loads the state of its own parts; of what it updates as a whole, as Muon does and what clips by their \
                         norm, one rank has the state of the whole, as a checkpoint gives it"
                    )));
                }
            }
        }
        moments.add(&states, &paths);
    }
    for ids in others.chunks(MOST_AT_ONCE) {
        moments.add(&names.read(optim, ids).map_err(unreadable)?, &paths);
    }
    Ok(moments)
}

impl MomentDigests {
    fn add<'a>(
        &mut self,
        states: impl IntoIterator<Item = (&'a ParamId, &'a ParamState)>,
        paths: &HashMap<ParamId, u64>,
    ) {
        for (id, state) in states {
            let mut number = None;
            for (name, data) in state.moments.iter().filter(|(_, data)| data.as_bytes().iter().any(|byte| *byte != 0)) {
                number =
                    Some(xxh3_64_with_seed(data.as_bytes(), number.unwrap_or_default() ^ xxh3_64(name.as_bytes())));
            }
            let path = paths.get(id).copied().unwrap_or_default();
            self.0.extend(number.map(|number| MomentDigest { id: *id, path, number }));
        }
    }

    /// A number for all of them, by the paths of their parameters, of which replicas may have ids of their own; 0 if
    /// there are none.
    pub fn all(&self) -> u64 {
        self.0.iter().fold(0, |all: u64, moment| all.wrapping_add(moment.of(moment.path)))
    }

    /// A number for the moments of some parameters, by ids that ranks share; 0 if there are none. Whatever the order.
    pub fn of(&self, ids: &HashSet<ParamId>) -> u64 {
        let mine = self.0.iter().filter(|moment| ids.contains(&moment.id));
        mine.fold(0, |all: u64, moment| all.wrapping_add(moment.of(moment.id.val())))
    }
}

/// The path of a parameter that is none of these, and of which an optimizer has moments.
fn unknown_param(optim: &ModuleOptimizer, known: Vec<ParamId>) -> Result<Option<String>, String> {
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
