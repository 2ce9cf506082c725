//! Rounds in which some ranks have no data: the first rank that has says what is gathered.

use super::gatherer::{GatherState, Gatherer};
use crate::Error;

/// What the leader says when its pass is over.
const OVER: u64 = 0;

impl Gatherer {
    /// Tells the ranks without data what is gathered, and makes sure that those with data gather the same.
    pub(super) fn announce(&self, state: &GatherState, number: u64) -> Result<(), Error> {
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
        // Ranks without data have kept nothing.
        state.end_pass();
        ended
    }

    /// Takes part in the gathers of the others, on a rank without data, until the leader says that they are over.
    ///
    /// # Errors
    /// Those of [`Communicator`](crate::comm::Communicator).
    pub fn follow(&self, leader: usize) -> Result<(), Error> {
        let shards = {
            let mut state = self.lock();
            state.end_pass();
            state.shards.clone()
        };
        let shard = |place: &usize| {
            shards[*place].clone().ok_or_else(|| Error::invalid("a sharded parameter", "its rows are not known"))
        };
        loop {
            let number = self.comms.control().broadcast(vec![OVER], leader)?[0];
            let Some(group) = number.checked_sub(1).map(|number| number as usize) else { return Ok(()) };
            match self.groups.get(group) {
                Some((members, pack)) => {
                    let (pool, comm) = (self.gathered.as_ref(), self.comms.parameters());
                    let shards = members.iter().map(shard).collect::<Result<_, _>>()?;
                    pack.gather_in(pool, shards, comm, self.numbers[group])?
                }
                None => {
                    let place = group - self.groups.len();
                    self.gather_alone(place, vec![shard(&place)?])?
                }
            };
        }
    }
}
