//! Makes whole parameters of the rows of all ranks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use burn::module::ParamId;

use super::backward_order::BackwardOrder;
use super::wants::Want;
use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::graph::same_buffer;
use crate::sharding::{Keep, Pack, Rows, ShardComms};
use crate::tensor::PlainTensor;

/// A parameter of which every rank holds its rows.
#[derive(Debug, Clone)]
pub(in crate::data_parallel) struct Gathered {
    pub id: ParamId,
    pub path: Arc<str>,
    pub rows: Rows,
    /// The scale of its adapter, if it has one.
    pub scale: Option<f64>,
}

/// Gathers the parameters of one model, a group of them at a time. Every rank makes the same calls in the same order, unless
/// they say what they [want](super::wants).
#[derive(Debug)]
pub(in crate::data_parallel) struct Gatherer {
    pub(super) comms: ShardComms,
    /// Carries what ranks want that may use different parameters.
    pub(super) wants: Option<Communicator>,
    keep: Keep,
    pub(super) params: Vec<Gathered>,
    places: HashMap<ParamId, usize>,
    /// Places of the parameters that are gathered together, and their pack.
    pub(super) groups: Vec<(Vec<usize>, Pack)>,
    /// The group of each parameter.
    group_of: Vec<usize>,
    /// What stands for the parameters in the module.
    stand_ins: OnceLock<HashSet<ParamId>>,
    state: Mutex<State>,
}

/// A parameter that was gathered, and the rows that it was gathered of.
#[derive(Debug, Clone)]
struct GatheredParam {
    shard: PlainTensor,
    whole: PlainTensor,
}

/// The parameters of a group.
type GatheredGroup = Vec<GatheredParam>;

#[derive(Debug, Default)]
pub(super) struct State {
    /// This rank's rows of every parameter, as the model had them when it was last looked at.
    pub shards: Vec<Option<PlainTensor>>,
    /// The groups that are whole now, by their numbers.
    live: BTreeMap<usize, GatheredGroup>,
    /// The group that is being gathered ahead of its use.
    ahead: Option<Ahead>,
    /// The group in use and the one before it, in this pass.
    recent: [Option<usize>; 2],
    /// Which groups a backward comes to.
    backward: BackwardOrder,
    /// Which group followed two others.
    follows: HashMap<[Option<usize>; 2], usize>,
    /// The rank that says what is gathered, while some have no data.
    leader: Option<usize>,
    pub failure: Option<Error>,
    /// How long this rank had nothing to do but wait for what is gathered.
    pub waited: Duration,
}

#[derive(Debug)]
struct Ahead {
    group: usize,
    shards: Vec<PlainTensor>,
    wholes: Pending<Vec<PlainTensor>>,
}

/// What the leader says when its pass is over.
const OVER: u64 = 0;

impl Gatherer {
    /// Of parameters in groups, which are places in `params`. With a communicator for what ranks want they may use different
    /// ones.
    pub fn new(
        comms: ShardComms,
        wants: Option<Communicator>,
        keep: Keep,
        params: Vec<Gathered>,
        groups: Vec<Vec<usize>>,
    ) -> Self {
        let mut group_of = vec![0; params.len()];
        for (number, group) in groups.iter().enumerate() {
            group.iter().for_each(|place| group_of[*place] = number);
        }
        let pack = |group: &[usize]| Pack::new(group.iter().map(|place| params[*place].rows.clone()).collect());
        let groups = groups.into_iter().map(|group| (group.clone(), pack(&group))).collect();
        let places = params.iter().enumerate().map(|(place, param)| (param.id, place)).collect();
        let state = State { shards: vec![None; params.len()], ..State::default() };
        let (stand_ins, state) = (OnceLock::new(), Mutex::new(state));
        Self { comms, wants, keep, params, places, groups, group_of, stand_ins, state }
    }

    pub fn keep(&self) -> Keep {
        self.keep
    }

    pub fn comms(&self) -> &ShardComms {
        &self.comms
    }

    /// Which rows of how many each rank holds of a parameter; `None` if it is whole on every rank.
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

    /// The whole of a parameter of which this rank holds `shard`. Gathers its group if need be, and begins with the one
    /// that is likely next.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`](crate::comm::Communicator::all_gather).
    pub fn whole(&self, id: ParamId, shard: PlainTensor) -> Result<PlainTensor, Error> {
        let Some(&place) = self.places.get(&id) else {
            return Err(Error::invalid("a sharded parameter", "it is not one of those that were wrapped"));
        };
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
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

    /// Gathers what the backward that is over has not needed on this rank, and may need on others.
    ///
    /// # Errors
    /// What went wrong in the middle of the backward; those of [`Communicator::all_gather`](crate::comm::Communicator::all_gather).
    pub fn end_backward(&self) -> Result<(), Error> {
        let mut state = self.lock();
        match &state.failure {
            Some(error) => Err(error.clone()),
            None => {
                let rest = state.backward.rest();
                match self.wants {
                    // The others say themselves what they need.
                    Some(_) => Ok(()),
                    None => self.bring(&mut state, rest),
                }
            }
        }
    }

    /// Gathers groups that others may need, as if this rank did.
    fn bring(&self, state: &mut State, groups: Vec<usize>) -> Result<(), Error> {
        for group in groups {
            if !state.live.contains_key(&group) {
                let shards = self.groups[group].0.iter().map(|place| state.shards[*place].clone()).collect();
                let Some(shards) = shards else { continue };
                self.take(state, group, shards)?;
            }
            self.switch(state, group)?;
        }
        Ok(())
    }

    fn find(&self, state: &mut State, place: usize, shard: &PlainTensor) -> Result<PlainTensor, Error> {
        let group = self.group_of[place];
        let again = state.backward.has_passed(group);
        if self.wants.is_none() {
            let before = state.backward.until(group);
            self.bring(state, before)?;
        }
        let members = &self.groups[group].0;
        let index = members.iter().position(|member| *member == place).unwrap_or_default();
        if let Some(found) = state.live.get(&group).map(|wholes| &wholes[index])
            && same_buffer(&found.shard, shard)
        {
            let whole = found.whole.clone();
            // Others may not ask for it again: nothing is to follow from that.
            if !again {
                self.switch(state, group)?;
            }
            return Ok(whole);
        }
        let known = state.shards[place].as_ref().is_some_and(|known| same_buffer(known, shard));
        let all: Option<Vec<PlainTensor>> = members.iter().map(|member| state.shards[*member].clone()).collect();
        let Some(shards) = all.filter(|_| known) else {
            return self.alone(state, place, shard);
        };
        self.take(state, group, shards)?;
        let whole = state.live.get(&group).map(|wholes| wholes[index].whole.clone());
        self.switch(state, group)?;
        whole.ok_or_else(|| Error::invalid("a sharded parameter", "nothing was gathered"))
    }

    /// Makes a group whole in the place of others.
    fn take(&self, state: &mut State, group: usize, shards: Vec<PlainTensor>) -> Result<(), Error> {
        if self.keep != Keep::Step {
            // Before the next ones are made.
            let State { live, backward, .. } = &mut *state;
            live.retain(|group, _| backward.keeps(*group));
        }
        let began = Instant::now();
        let wholes = match (&self.wants, state.ahead.take()) {
            (Some(comm), _) => {
                let want = match state.backward.is_under_way() {
                    true => Want::Backward(group),
                    false => Want::Forward(group),
                };
                self.gather_wanted(state, comm, want, None)?
            }
            (None, Some(ahead)) if ahead.group == group && same_buffers(&ahead.shards, &shards) => {
                ahead.wholes.wait()?
            }
            (None, _) => self.start(state, group, shards.clone())?.wait()?,
        };
        state.waited += began.elapsed();
        let wholes = shards.into_iter().zip(wholes).map(|(shard, whole)| GatheredParam { shard, whole });
        state.live.insert(group, wholes.collect());
        Ok(())
    }

    /// Notes which group is in use, and starts the one that followed the last time.
    fn switch(&self, state: &mut State, group: usize) -> Result<(), Error> {
        if state.recent[1] == Some(group) {
            return Ok(());
        }
        state.follows.insert(state.recent, group);
        state.recent = [state.recent[1], Some(group)];
        // Of what a leader says, or the others want, nothing is known beforehand.
        if self.wants.is_some() || state.leader.is_some() || state.ahead.is_some() {
            return Ok(());
        }
        let Some(&next) = state.follows.get(&state.recent) else { return Ok(()) };
        if state.live.contains_key(&next) {
            return Ok(());
        }
        let shards: Option<Vec<PlainTensor>> =
            self.groups[next].0.iter().map(|place| state.shards[*place].clone()).collect();
        if let Some(shards) = shards {
            let wholes = self.start(state, next, shards.clone())?;
            state.ahead = Some(Ahead { group: next, shards, wholes });
        }
        Ok(())
    }

    /// Begins to gather a group.
    fn start(&self, state: &State, group: usize, shards: Vec<PlainTensor>) -> Result<Pending<Vec<PlainTensor>>, Error> {
        let number = group as u64 + 1;
        self.announce(state, number)?;
        let pack = self.groups[group].1.clone();
        Ok(self.comms.parameters().start(move |comm| pack.gather_agreed(shards, comm, number)))
    }

    /// Gathers a parameter by itself: its rows are not those that the model had when it was last looked at.
    fn alone(&self, state: &mut State, place: usize, shard: &PlainTensor) -> Result<PlainTensor, Error> {
        let began = Instant::now();
        let whole = match &self.wants {
            Some(comm) => self.gather_wanted(state, comm, Want::Alone(place), Some(shard))?,
            None => {
                let number = (self.groups.len() + place) as u64 + 1;
                self.announce(state, number)?;
                let pack = Pack::new(vec![self.params[place].rows.clone()]);
                pack.gather_agreed(vec![shard.clone()], self.comms.parameters(), number)?
            }
        };
        state.waited += began.elapsed();
        whole.into_iter().next().ok_or_else(|| Error::invalid("a sharded parameter", "nothing was gathered"))
    }

    /// Tells the ranks without data what is gathered, and makes sure that those with data gather the same.
    fn announce(&self, state: &State, number: u64) -> Result<(), Error> {
        let Some(leader) = state.leader else { return Ok(()) };
        let said = self.comms.control().broadcast(vec![number], leader)?[0];
        if said == number {
            return Ok(());
        }
        let name = |number: u64| match number.checked_sub(1).map(|number| number as usize) {
            None => "nothing more".to_owned(),
            Some(number) => self.name(number),
        };
        let (group, rank) = (self.comms.control().group().clone(), self.comms.rank());
        let problem = format!(
            "this rank uses {} where rank {leader} uses {}: set `allow_unused_parameters` if ranks may use different parameters \
             (`with_allow_unused_parameters(true)`; captured steps, `engine` \"captured\" in `parallelize`, allow it as they are); \
             without it, all run the same layers in the same order where parameters are divided",
            name(number),
            name(said)
        );
        let path = number.checked_sub(1).map(|number| self.name(number as usize)).unwrap_or_default();
        let error = Error::ModelMismatch { group, rank, path, problem };
        self.comms.control().fail(error.clone());
        Err(error)
    }

    /// What a number of a gather stands for.
    fn name(&self, number: usize) -> String {
        let place = match self.groups.get(number) {
            Some((members, _)) => members[0],
            None => number - self.groups.len(),
        };
        self.params[place].path.to_string()
    }

    /// Begins a round in which some ranks have no data; the leader is the first that has.
    pub fn begin_uneven(&self, leader: usize) {
        let mut state = self.lock();
        state.end_pass();
        state.leader = Some(leader);
    }

    /// Ends such a round on a rank with data.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`] if the leader gathers more; those of [`Communicator`](crate::comm::Communicator).
    pub fn end_uneven(&self) -> Result<(), Error> {
        let mut state = self.lock();
        let ended = self.announce(&state, OVER);
        state.leader = None;
        ended
    }

    /// Takes part in the gathers of the others, on a rank without data, until the leader says that they are over.
    ///
    /// # Errors
    /// Those of [`Communicator`](crate::comm::Communicator).
    pub fn follow(&self, leader: usize) -> Result<(), Error> {
        let shards = self.lock().shards.clone();
        let shard = |place: &usize| {
            shards[*place].clone().ok_or_else(|| Error::invalid("a sharded parameter", "its rows are not known"))
        };
        loop {
            let number = self.comms.control().broadcast(vec![OVER], leader)?[0];
            let Some(group) = number.checked_sub(1).map(|number| number as usize) else { return Ok(()) };
            let alone;
            let (members, pack) = match self.groups.get(group) {
                Some((members, pack)) => (members, pack),
                None => {
                    let place = group - self.groups.len();
                    alone = (vec![place], Pack::new(vec![self.params[place].rows.clone()]));
                    (&alone.0, &alone.1)
                }
            };
            let shards = members.iter().map(shard).collect::<Result<_, _>>()?;
            pack.gather_agreed(shards, self.comms.parameters(), number)?;
        }
    }

    /// How long this rank had nothing to do but wait for what is gathered.
    pub fn waited(&self) -> Duration {
        self.lock().waited
    }

    /// What went wrong in the middle of a pass, where no error can be returned.
    pub fn failure(&self) -> Option<Error> {
        self.lock().failure.clone()
    }

    /// Notes that the wholes of all groups are asked for, one after the other, and hands each to `take`.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`](crate::comm::Communicator::all_gather) and of `take`.
    pub fn all(&self, mut take: impl FnMut(ParamId, PlainTensor)) -> Result<(), Error> {
        let shards = self.lock().shards.clone();
        for (number, (members, pack)) in self.groups.iter().enumerate() {
            let shards: Option<Vec<PlainTensor>> = members.iter().map(|place| shards[*place].clone()).collect();
            let shards = shards.ok_or_else(|| Error::invalid("assemble", "the rows of a parameter are not known"))?;
            let wholes = pack.gather_agreed(shards, self.comms.parameters(), number as u64 + 1)?;
            members.iter().zip(wholes).for_each(|(place, whole)| take(self.params[*place].id, whole));
        }
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn end_pass(&mut self) {
        self.live.clear();
        self.ahead = None;
        self.recent = [None; 2];
        self.backward.clear();
    }
}

fn same_buffers(one: &[PlainTensor], other: &[PlainTensor]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same_buffer(one, other))
}
