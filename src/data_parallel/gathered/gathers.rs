//! Gathers groups of parameters when they are needed, and the next one ahead.

use std::time::Instant;

use super::gatherer::{Ahead, FullParam, GatherState, Gatherer};
use super::wants::Want;
use crate::Error;
use crate::comm::{Pending, ReduceOp};
use crate::graph::same_buffer;
use crate::sharding::{Keep, Pack};
use crate::tensor::PlainTensor;

impl Gatherer {
    /// Gathers groups that others may need, as if this rank did.
    pub(super) fn bring(&self, state: &mut GatherState, groups: Vec<usize>) -> Result<(), Error> {
        for group in groups {
            if !self.is_needed(state, group, false)? {
                continue;
            }
            if !state.live.contains_key(&group) {
                let shards = self.groups[group].0.iter().map(|place| state.shards[*place].clone()).collect();
                let Some(shards) = shards else { continue };
                self.take(state, group, shards)?;
            }
            self.switch(state, group)?;
        }
        Ok(())
    }

    /// Whether any rank needs a group to which a backward has come. The ranks ask each other, in a small message, in
    /// front of the first gather of a group in a backward, and of those that none has needed so far: an embedding, or a
    /// layer whose inputs have no gradient.
    ///
    /// # Errors
    /// Those of [`Communicator::all_reduce`](crate::comm::Communicator::all_reduce).
    pub(super) fn is_needed(&self, state: &mut GatherState, group: usize, here: bool) -> Result<bool, Error> {
        let there = state.live.contains_key(&group) || state.ahead.as_ref().is_some_and(|ahead| ahead.group == group);
        // Ranks without data answer nothing.
        let unasked = there || state.leader.is_some() || state.backward.keeps(group);
        if unasked || state.needed.contains(&group) {
            return Ok(true);
        }
        let began = Instant::now();
        let needed = self.comms.control().all_reduce(vec![u64::from(here)], ReduceOp::Max)?[0] > 0;
        state.waited += began.elapsed();
        if needed {
            state.needed.insert(group);
        }
        Ok(needed)
    }

    pub(super) fn find(
        &self,
        state: &mut GatherState,
        place: usize,
        shard: &PlainTensor,
    ) -> Result<PlainTensor, Error> {
        let group = self.group_of[place];
        let again = state.backward.has_passed(group);
        if self.wants.is_none() && state.backward.comes_to(group) {
            let before = state.backward.until(group);
            self.bring(state, before)?;
            self.is_needed(state, group, true)?;
        }
        let members = &self.groups[group].0;
        let index = members.iter().position(|member| *member == place).unwrap_or_default();
        if let Some(found) = state.live.get(&group).map(|params| &params[index])
            && same_buffer(&found.shard, shard)
        {
            let full = found.full.clone();
            // Others may not ask for it again: nothing is to follow from that.
            if !again {
                self.switch(state, group)?;
            }
            return Ok(full);
        }
        let known = state.shards[place].as_ref().is_some_and(|known| same_buffer(known, shard));
        let all: Option<Vec<PlainTensor>> = members.iter().map(|member| state.shards[*member].clone()).collect();
        let Some(shards) = all.filter(|_| known) else {
            return self.alone(state, place, shard);
        };
        self.take(state, group, shards)?;
        let full = state.live.get(&group).map(|params| params[index].full.clone());
        self.switch(state, group)?;
        full.ok_or_else(|| Error::invalid("a sharded parameter", "nothing was gathered"))
    }

    /// Gathers a group in the place of others.
    fn take(&self, state: &mut GatherState, group: usize, shards: Vec<PlainTensor>) -> Result<(), Error> {
        if self.keep != Keep::Step {
            // Before the next ones are made.
            let GatherState { live, backward, .. } = &mut *state;
            live.retain(|group, _| backward.keeps(*group));
        }
        let began = Instant::now();
        let full = match (&self.wants, state.ahead.take()) {
            (Some(comm), _) => {
                let want = match state.backward.is_under_way() {
                    true => Want::Backward(group),
                    false => Want::Forward(group),
                };
                self.gather_wanted(state, comm, want, None)?
            }
            (None, Some(ahead)) if ahead.group == group && same_buffers(&ahead.shards, &shards) => ahead.full.wait()?,
            (None, _) => self.start(state, group, shards.clone())?.wait()?,
        };
        state.waited += began.elapsed();
        let params = shards.into_iter().zip(full).map(|(shard, full)| FullParam { shard, full });
        state.live.insert(group, params.collect());
        Ok(())
    }

    /// Notes which group is in use, and starts the one that followed the last time.
    fn switch(&self, state: &mut GatherState, group: usize) -> Result<(), Error> {
        if state.recent[1] == Some(group) {
            return Ok(());
        }
        if state.leader.is_none() {
            // Ranks without data learn nothing, and all must expect the same.
            state.follows.insert(state.recent, group);
        }
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
            let full = self.start(state, next, shards.clone())?;
            state.ahead = Some(Ahead { group: next, shards, full });
        }
        Ok(())
    }

    /// Begins to gather a group.
    fn start(
        &self,
        state: &GatherState,
        group: usize,
        shards: Vec<PlainTensor>,
    ) -> Result<Pending<Vec<PlainTensor>>, Error> {
        self.announce(state, group as u64 + 1)?;
        let (pack, number, pool) = (self.groups[group].1.clone(), self.numbers[group], self.gathered.clone());
        Ok(self.comms.parameters().start(move |comm| pack.gather_in(pool.as_ref(), shards, comm, number)))
    }

    /// Gathers a parameter by itself: its rows are not those that the model had when it was last looked at.
    fn alone(&self, state: &mut GatherState, place: usize, shard: &PlainTensor) -> Result<PlainTensor, Error> {
        let began = Instant::now();
        let full = match &self.wants {
            Some(comm) => self.gather_wanted(state, comm, Want::Alone(place), Some(shard))?,
            None => {
                self.announce(state, (self.groups.len() + place) as u64 + 1)?;
                self.gather_alone(place, vec![shard.clone()])?
            }
        };
        state.waited += began.elapsed();
        full.into_iter().next().ok_or_else(|| Error::invalid("a sharded parameter", "nothing was gathered"))
    }

    /// The gather of one parameter, of these rows of it.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`](crate::comm::Communicator::all_gather).
    pub(super) fn gather_alone(&self, place: usize, shards: Vec<PlainTensor>) -> Result<Vec<PlainTensor>, Error> {
        let param = &self.params[place];
        let pack = Pack::new(vec![param.rows.clone()]);
        pack.gather_in(self.gathered.as_ref(), shards, self.comms.parameters(), param.alone())
    }
}

fn same_buffers(one: &[PlainTensor], other: &[PlainTensor]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same_buffer(one, other))
}
