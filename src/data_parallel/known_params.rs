//! The parameters of a model, as its replicas know them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use burn::module::ParamId;

use super::structure::{NOT_TRAINED, Structure, TrainedParam};
use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::{Compared, Updates};
use crate::params::agree;

/// What a rank whose model has changed brings to the sum of the weights, which are not negative.
const CHANGED: f64 = -1e300;

/// What a rank calls first in a step if its model has not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// [`head`].
    Head,
    /// [`count_rounds`].
    Rounds,
}

impl Next {
    /// Takes part in that on a rank whose model has changed. Returns whether those of all have. Calls of this step
    /// agree on a number.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn changed(self, control: &Communicator, agreed: u64) -> Result<bool, Error> {
        match self {
            Self::Head => {
                let sum = control.all_reduce_agreed(vec![CHANGED, 0.0], ReduceOp::Sum, agreed)?[0];
                Ok((sum / CHANGED).round() as usize == control.size())
            }
            Self::Rounds => Ok(control.all_reduce_agreed(ROUNDS_CHANGED.to_vec(), ReduceOp::Max, agreed)?[2] == 0),
        }
    }
}

/// What a rank whose model has changed says where others say how many micro-batches they have, and that theirs has not.
const ROUNDS_CHANGED: [u64; 3] = [0, 1, 0];

/// What is said of a parameter that came after wrapping, where ranks compare what they have.
const NEW: &str = ", trained or put in after wrapping";

/// What ranks compare: a path, and what is there.
pub(super) type ParamDescriptions = Arc<Vec<(String, String)>>;

/// The parameters of a model, as its replicas know it.
#[derive(Default)]
pub(super) struct KnownParams {
    /// Everything that was ever trained. A number stays what it is.
    pub params: Vec<TrainedParam>,
    pub indices: HashMap<ParamId, usize>,
    /// Whether each of these is reduced.
    pub reduced: Vec<bool>,
    /// The ids of all tensors of the model.
    pub ids: HashSet<ParamId>,
    /// What this rank compares with ranks that have changed. Whether something is trained is no part of it: it may have
    /// been frozen since.
    pub lines: ParamDescriptions,
}

impl KnownParams {
    pub fn new(structure: Structure) -> Self {
        let mut known = Self::default();
        known.learn(structure);
        known
    }

    /// Takes a model in. What it trains is reduced from now on, and still what it has frozen since: a model that trains
    /// one part and then another, in turn, changes once.
    pub fn learn(&mut self, structure: Structure) {
        let ids: HashSet<ParamId> = structure.ids.into_iter().collect();
        let mut held = vec![false; self.params.len()];
        self.indices.iter().for_each(|(id, number)| held[*number] |= ids.contains(id));
        self.reduced.iter_mut().zip(held).for_each(|(reduced, held)| *reduced &= held);
        for param in structure.trained {
            let next = self.params.len();
            let number = *self.indices.entry(param.id).or_insert(next);
            if number == next {
                self.params.push(param);
                self.reduced.push(true);
            }
            self.reduced[number] = true;
        }
        let lines = structure.lines.into_iter().map(|(path, what)| (path, without_training(what))).collect();
        (self.ids, self.lines) = (ids, Arc::new(lines));
    }

    /// Learns the ids that a record has brought to known paths.
    pub fn recognise(&mut self, unknown: Vec<(ParamId, String)>) {
        for (id, path) in unknown {
            if self.lines.iter().any(|(known, _)| *known == path) {
                self.ids.insert(id);
            }
            if let Some(number) = self.params.iter().rposition(|known| *known.path == *path) {
                self.indices.insert(id, number);
            }
        }
    }

    /// Whether a parameter is here for the first time, or trained for the first time.
    pub fn is_new(&self, id: ParamId, trained: bool) -> bool {
        let reduced = || self.indices.get(&id).is_some_and(|number| self.reduced[*number]);
        !self.ids.contains(&id) || trained && !reduced()
    }

    /// What a rank that has changed compares: with `all` ranks, if they all have, also what is trained.
    pub fn lines_of(&self, changed: &Structure, all: bool) -> Vec<(String, String)> {
        let trained: HashSet<ParamId> = changed.trained.iter().map(|param| param.id).collect();
        let line = |((path, what), id): (&(String, String), &ParamId)| {
            let what = if all { what.clone() } else { without_training(what.clone()) };
            let new = if self.is_new(*id, trained.contains(id)) { NEW } else { "" };
            (path.clone(), what + new)
        };
        changed.lines.iter().zip(&changed.ids).map(line).collect()
    }
}

fn without_training(what: String) -> String {
    what.strip_suffix(NOT_TRAINED).map_or(what.clone(), Into::into)
}

/// The head of a step on a rank whose model has not changed: the sum of the weights of all ranks, who find out with it
/// whether all have updated it alike. Calls of this step agree on a number.
///
/// # Errors
/// The same on all ranks: [`Error::ModelMismatch`] if the model has changed on others; [`Error::Optimizer`] if it was
/// updated in another way; those of [`Communicator`].
pub(super) fn head(
    weight: f64,
    lines: &ParamDescriptions,
    updates: &Updates,
    (control, agreed): (&Communicator, u64),
) -> Result<f64, Error> {
    let balance = balance(updates.digest(Compared::Replicas), control);
    let sums = control.all_reduce_agreed(vec![weight, balance], ReduceOp::Sum, agreed)?;
    if sums[0] <= CHANGED / 2.0 {
        return Err(changed_elsewhere(lines, control));
    }
    if sums[1] != 0.0 {
        updates.explain(Compared::Replicas, control)?;
    }
    Ok(sums[0])
}

/// What this rank adds to a sum that is 0 if all ranks have the same number: the first of them adds its own once for
/// each of the others, who take theirs away. Of the number so many bits count that the sum is exact.
fn balance(number: u64, group: &Communicator) -> f64 {
    let ranks = group.size() as u64;
    let number = number >> (u64::BITS - 52 + ranks.ilog2());
    match group.rank() {
        0 => ((ranks - 1) * number) as f64,
        _ => -(number as f64),
    }
}

/// The most micro-batches that a rank has in a step whose micro-batches are reduced one by one, on a rank whose model
/// has not changed.
///
/// # Errors
/// As [`head`].
pub(super) fn count_rounds(
    mine: usize,
    lines: &ParamDescriptions,
    (control, agreed): (&Communicator, u64),
) -> Result<u64, Error> {
    match control.all_reduce_agreed(vec![mine as u64, 0, 1], ReduceOp::Max, agreed)?[..] {
        [most, 0, _] => Ok(most),
        _ => Err(changed_elsewhere(lines, control)),
    }
}

/// The error on a rank whose model has not changed as those of others have.
fn changed_elsewhere(lines: &ParamDescriptions, control: &Communicator) -> Error {
    let differs = || Error::invalid("DataParallel", "some ranks train another model than the others");
    agree(lines, control).err().unwrap_or_else(differs)
}
