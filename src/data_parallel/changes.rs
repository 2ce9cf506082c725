//! Registers parameters that a model has come to train after it was wrapped.
//!
//! A model may come to train parameters that the replicas do not know: frozen ones that are trained now, and layers put
//! in after wrapping. Each rank sees it in its own model before a step. As all ranks run the same program, all of them
//! do; they meet, make sure of it, and know the parameters from then on.
//!
//! A rank whose model has not changed goes on: to the *head* of the step, the sum of the weights; or, where each
//! micro-batch is reduced, to the number of them first. So a rank whose model has changed takes part in that with what
//! is no weight, or no number, and all ranks learn of the change in a collective that they call in any case.

use std::collections::HashSet;

use burn::module::{Module, ParamId};

use super::known_params::{KnownParams, Next};
use super::reducer::Reducer;
use super::structure::{Structure, broadcast_some};
use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::read_found;
use crate::params::{FoundParams, ParamRef, agree, own_buffers, visit_floats};
use crate::tensor::PlainTensor;

/// Whether a forward has run already with the parameters as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForwardState {
    /// It is still to run: new parameters are given the values of rank 0.
    Pending,
    /// It has: the ranks must have brought equal ones.
    Done,
}

impl Reducer {
    /// Registers everything that `module` trains, in which `found` was found, with the reduction. Collective if it has
    /// changed, and then it returns the module to go on with. `next` is what ranks call whose module has not.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on all ranks, if it has not changed in the same way on all, or if a forward
    /// has run with new parameters of unequal values; [`Error::Graph`] if parameters of one id have different values;
    /// those of [`Communicator`].
    pub(crate) fn admit<M: Module>(
        &self,
        module: &M,
        found: &FoundParams,
        forward: ForwardState,
        next: Next,
    ) -> Result<Option<M>, Error> {
        let (changed, repeated) = find_changes(found, &self.known());
        if !repeated.is_empty() {
            // burn's optimizers would move one of them.
            read_found(found, module, &repeated).inspect_err(|error| self.control().fail(error.clone()))?;
        }
        if !changed {
            return Ok(None);
        }
        let (structure, group, mut module) = (Structure::of(module), self.control(), module.clone());
        if group.size() > 1 {
            let all = next.changed(group, self.agreed())?;
            let lines = self.known().lines_of(&structure, all);
            agree(&lines, group)?;
            let unknown: HashSet<ParamId> = {
                let known = self.known();
                structure.ids.iter().copied().filter(|id| !known.ids.contains(id)).collect()
            };
            match forward {
                _ if unknown.is_empty() => {}
                ForwardState::Done => equal(&module, &unknown, group)?,
                ForwardState::Pending => {
                    let trains = |id| structure.trained.iter().any(|param| param.id == id);
                    if !unknown.iter().all(|id| trains(*id)) {
                        // There may be running statistics among them.
                        module = own_buffers(module);
                    }
                    module = broadcast_some(module, group, &|id, _| unknown.contains(&id))?;
                }
            }
        }
        self.learn(|known| known.learn(structure));
        Ok(Some(module))
    }
}

/// Whether a module has what is not known, and the trained parameters that it holds in several places.
fn find_changes(found: &FoundParams, known: &KnownParams) -> (bool, HashSet<ParamId>) {
    let params: Vec<(ParamId, bool)> = found.floats().map(|param| (param.id(), param.is_trained())).collect();
    let changed = params.iter().any(|(id, trained)| known.is_new(*id, *trained));
    let mut seen = HashSet::new();
    let repeated = params.into_iter().filter(|(id, trained)| !seen.insert(*id) && *trained);
    (changed, repeated.map(|(id, _)| id).collect())
}

/// Demands that all ranks hold the same values of some float parameters.
///
/// # Errors
/// [`Error::ModelMismatch`], the same on all ranks, with the first parameter that differs; those of [`Communicator`].
fn equal<M: Module>(module: &M, wanted: &HashSet<ParamId>, group: &Communicator) -> Result<(), Error> {
    let (mut paths, mut different, mut failed) = (Vec::new(), None, None);
    visit_floats(module, &mut |param| {
        if failed.is_some() || !wanted.contains(&param.id()) {
            return;
        }
        match is_equal(&param, group) {
            Ok(true) => {}
            Ok(false) => drop(different.get_or_insert(paths.len())),
            Err(error) => failed = Some(error),
        }
        paths.push(param.path());
    });
    failed.map_or(Ok(()), Err)?;
    let (size, rank) = (group.size() as u64, group.rank() as u64);
    let mine = different.map_or(u64::MAX, |place| place as u64 * size + rank);
    let first = group.all_reduce(vec![mine], ReduceOp::Min)?[0];
    if first == u64::MAX {
        return Ok(());
    }
    let problem = "it was put in after wrapping, and its values are not those of rank 0: replicas that are trained by \
                   `backward` bring equal ones, `step` makes them equal before it runs the forward";
    let path = paths.into_iter().nth((first / size) as usize).unwrap_or_default();
    let error = Error::ModelMismatch {
        group: group.group().clone(),
        rank: (first % size) as usize,
        path,
        problem: problem.into(),
    };
    group.fail(error.clone());
    Err(error)
}

/// Whether this rank holds the value of rank 0.
fn is_equal(param: &ParamRef<'_>, group: &Communicator) -> Result<bool, Error> {
    let mine = PlainTensor::of(param.base(), "a parameter")?;
    let theirs = group.broadcast(mine.clone(), 0)?;
    Ok(mine.into_data()?.as_bytes() == theirs.into_data()?.as_bytes())
}
