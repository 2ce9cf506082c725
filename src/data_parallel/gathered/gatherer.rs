//! Makes full parameters of the rows of all ranks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use burn::module::ParamId;

use super::backward_order::BackwardOrder;
use super::checked::of_other_dims;
use super::group_numbers::{alone, group_numbers};
use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::graph::same_buffer;
use crate::lock::lock;
use crate::sharding::{Keep, Pack, Rows, ShardComms};
use crate::tensor::{PlainTensor, Pool};

/// A parameter of which every rank holds its rows.
#[derive(Debug, Clone)]
pub(in crate::data_parallel) struct Gathered {
    pub id: ParamId,
    pub path: Arc<str>,
    pub rows: Rows,
    /// The scale of its adapter, if it has one.
    pub scale: Option<f64>,
    /// On what the ranks agree that gather it by itself, once they have.
    alone: OnceLock<u64>,
}

impl Gathered {
    pub fn new(id: ParamId, path: Arc<str>, rows: Rows, scale: Option<f64>) -> Self {
        Self { id, path, rows, scale, alone: OnceLock::new() }
    }

    /// On what the ranks agree that gather it by itself: its name.
    pub(super) fn alone(&self) -> u64 {
        *self.alone.get_or_init(|| alone(&self.path))
    }
}

/// Gathers the parameters of one model, a group of them at a time. Every rank makes the same calls in the same order,
/// unless they say what they [want](super::wants).
#[derive(Debug)]
pub(in crate::data_parallel) struct Gatherer {
    pub(super) comms: ShardComms,
    /// Carries what ranks want that may use different parameters.
    pub(super) wants: Option<Communicator>,
    pub(super) keep: Keep,
    pub(super) params: Vec<Gathered>,
    pub(super) places: HashMap<ParamId, usize>,
    /// Places of the parameters that are gathered together, and their pack.
    pub(super) groups: Vec<(Vec<usize>, Pack)>,
    /// On what the ranks agree that gather a group: its name.
    pub(super) numbers: Vec<u64>,
    /// The group of each parameter.
    pub(super) group_of: Vec<usize>,
    /// The memory in which large parameters are gathered for a pass: that of the group in use, and of the next.
    pub(super) gathered: Option<Arc<Pool>>,
    /// What stands for the parameters in the module.
    stand_ins: OnceLock<HashSet<ParamId>>,
    state: Mutex<GatherState>,
}

/// A full parameter, and the rows that it was gathered of.
#[derive(Debug, Clone)]
pub(super) struct FullParam {
    pub shard: PlainTensor,
    pub full: PlainTensor,
}

/// A group that is being gathered ahead of its use.
#[derive(Debug)]
pub(super) struct Ahead {
    pub group: usize,
    pub shards: Vec<PlainTensor>,
    pub full: Pending<Vec<PlainTensor>>,
}

#[derive(Debug, Default)]
pub(super) struct GatherState {
    /// This rank's rows of every parameter, as the model had them when it was last looked at.
    pub shards: Vec<Option<PlainTensor>>,
    /// The full parameters of the groups that are gathered now, by their numbers.
    pub live: BTreeMap<usize, Vec<FullParam>>,
    pub ahead: Option<Ahead>,
    /// The group in use and the one before it, in this pass.
    pub recent: [Option<usize>; 2],
    /// Which groups a backward comes to.
    pub backward: BackwardOrder,
    /// The groups that some rank has needed in a backward.
    pub needed: HashSet<usize>,
    /// Which group followed two others.
    pub follows: HashMap<[Option<usize>; 2], usize>,
    /// The rank that says what is gathered, while some have no data.
    pub leader: Option<usize>,
    pub failure: Option<Error>,
    /// How long this rank had nothing to do but wait for what is gathered.
    pub waited: Duration,
}

impl Gatherer {
    /// Of parameters in groups, which are places in `params`, of so many bytes each when they are gathered. With a
    /// communicator for what ranks want they may use different ones.
    pub fn new(
        comms: ShardComms,
        wants: Option<Communicator>,
        keep: Keep,
        params: Vec<Gathered>,
        groups: Vec<Vec<usize>>,
        bytes: &[usize],
    ) -> Self {
        let mut group_of = vec![0; params.len()];
        for (number, group) in groups.iter().enumerate() {
            group.iter().for_each(|place| group_of[*place] = number);
        }
        let pack = |group: &[usize]| Pack::new(group.iter().map(|place| params[*place].rows.clone()).collect());
        let groups: Vec<(Vec<usize>, Pack)> = groups.into_iter().map(|group| (group.clone(), pack(&group))).collect();
        let paths =
            |(group, _): &(Vec<usize>, Pack)| group.iter().map(|place| &*params[*place].path).collect::<Vec<_>>();
        let numbers = group_numbers(groups.iter().map(paths));
        let places = params.iter().enumerate().map(|(place, param)| (param.id, place)).collect();
        let state = GatherState { shards: vec![None; params.len()], ..GatherState::default() };
        let (stand_ins, state) = (OnceLock::new(), Mutex::new(state));
        let mut sizes: Vec<usize> =
            groups.iter().map(|(group, _)| group.iter().map(|place| bytes[*place]).sum()).collect();
        sizes.sort_unstable_by(|one, other| other.cmp(one));
        // What burn keeps of more groups, as where one is used again, goes back to the system when it lets go of it.
        let gathered = (keep == Keep::Pass).then(|| Arc::new(Pool::keeping(sizes.iter().take(2).sum())));
        Self { comms, wants, keep, params, places, groups, numbers, group_of, gathered, stand_ins, state }
    }

    pub fn keep(&self) -> Keep {
        self.keep
    }

    pub fn comms(&self) -> &ShardComms {
        &self.comms
    }

    /// Which rows of how many each rank holds of a parameter; `None` if every rank holds the full one.
    pub fn rows(&self, id: ParamId) -> Option<&Rows> {
        self.places.get(&id).map(|place| &self.params[*place].rows)
    }

    /// Says what stands for the parameters in the module.
    pub fn set_stand_ins(&self, stand_ins: HashSet<ParamId>) {
        let _ = self.stand_ins.set(stand_ins);
    }

    /// What stands for the parameters in the module.
    pub fn stand_ins(&self) -> Option<&HashSet<ParamId>> {
        self.stand_ins.get()
    }

    /// The scale of the adapter of a parameter.
    pub fn scale(&self, id: ParamId) -> Option<f64> {
        self.places.get(&id).and_then(|place| self.params[*place].scale)
    }

    /// Sets this rank's rows to those that the model has now. What was gathered of others is dropped.
    pub fn set_shards(&self, shards: HashMap<ParamId, PlainTensor>) {
        let mut state = self.lock();
        let mut changed = false;
        for (id, shard) in shards {
            let Some(place) = self.places.get(&id) else { continue };
            let known = &mut state.shards[*place];
            if !known.as_ref().is_some_and(|known| same_buffer(known, &shard)) {
                (*known, changed) = (Some(shard), true);
            }
        }
        if changed {
            state.end_pass();
        }
    }

    /// Forgets this rank's rows of some parameters, which are somewhere else. What is used meanwhile is gathered by
    /// itself.
    pub fn forget_shards(&self, params: &[ParamId]) {
        let mut state = self.lock();
        params.iter().filter_map(|id| self.places.get(id)).for_each(|place| state.shards[*place] = None);
        state.end_pass();
    }

    /// Drops what was gathered: nobody knows which parameters are used next.
    pub fn end_pass(&self) {
        self.lock().end_pass();
    }

    /// As [`end_pass`](Self::end_pass), at the end of a micro-batch; what is kept for the step stays.
    pub fn end_micro_batch(&self) {
        let mut state = self.lock();
        match self.keep {
            Keep::Step => state.recent = [None; 2],
            _ => state.end_pass(),
        }
    }

    /// The full parameter of which this rank holds `shard`. Gathers its group if need be, and begins with the one that
    /// is likely next.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`](crate::comm::Communicator::all_gather).
    pub fn full_param(&self, id: ParamId, shard: PlainTensor) -> Result<PlainTensor, Error> {
        let Some(&place) = self.places.get(&id) else {
            return Err(Error::invalid("a sharded parameter", "it is not one of those that were wrapped"));
        };
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let Gathered { path, rows, .. } = &self.params[place];
        if shard.shape().as_slice() != rows.shard_dims() {
            // In a forward of one's own, before any step looks at the model.
            let error = of_other_dims(path, shard.shape().as_slice(), rows);
            self.comms.control().fail(error.clone());
            return Err(state.failure.insert(error).clone());
        }
        let gathered = self.find(&mut state, place, &shard);
        gathered.inspect_err(|error| state.failure = Some(error.clone()))
    }

    /// A forward that may have a backward uses a parameter.
    pub fn used(&self, id: ParamId) {
        if let (Keep::Pass, Some(place)) = (self.keep, self.places.get(&id)) {
            self.lock().backward.used(self.group_of[*place]);
        }
    }

    /// A backward begins.
    pub fn begin_backward(&self) {
        self.lock().backward.begin();
    }

    /// Gathers what the backward that is over has not needed on this rank, and others may need.
    ///
    /// # Errors
    /// What went wrong in the middle of the backward; those of
    /// [`Communicator::all_gather`](crate::comm::Communicator::all_gather).
    pub fn end_backward(&self) -> Result<(), Error> {
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let rest = state.backward.rest();
        let ended = match self.wants {
            // The others say themselves what they need.
            Some(_) => Ok(()),
            None => self.bring(&mut state, rest),
        };
        state.backward.end();
        ended
    }

    /// How long this rank had nothing to do but wait for what is gathered.
    pub fn waited(&self) -> Duration {
        self.lock().waited
    }

    /// What went wrong in the middle of a pass, where no error can be returned.
    pub fn failure(&self) -> Option<Error> {
        self.lock().failure.clone()
    }

    /// Gathers all groups, one after the other, and hands each full parameter to `take`.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`](crate::comm::Communicator::all_gather) and of `take`.
    pub fn all(&self, mut take: impl FnMut(ParamId, PlainTensor)) -> Result<(), Error> {
        let shards = self.lock().shards.clone();
        for ((members, pack), number) in self.groups.iter().zip(&self.numbers) {
            let shards: Option<Vec<PlainTensor>> = members.iter().map(|place| shards[*place].clone()).collect();
            let shards = shards.ok_or_else(|| Error::invalid("assemble", "the rows of a parameter are not known"))?;
            let full = pack.gather_agreed(shards, self.comms.parameters(), *number)?;
            members.iter().zip(full).for_each(|(place, full)| take(self.params[*place].id, full));
        }
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, GatherState> {
        lock(&self.state)
    }
}

impl GatherState {
    pub fn end_pass(&mut self) {
        self.live.clear();
        self.ahead = None;
        self.recent = [None; 2];
        self.backward.clear();
    }
}
