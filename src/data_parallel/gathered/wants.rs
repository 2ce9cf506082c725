//! How ranks that use different parameters agree on what they gather (`allow_unused_parameters`).
//!
//! A gather takes all ranks. Where the data or the rank decide which blocks a model runs (mixture of experts, early
//! exit, layer drop), no rank knows what the others need. So each says before each gather what it *wants* next: 8 bytes
//! from each rank, in one all-gather. All choose the same of that: what a forward wants, the first group in the order
//! of the module; when no forward wants anything, what a backward wants, the last group. A rank that wants another one
//! brings its rows, drops what was gathered, and says again what it wants; one that has all it needs says so, and goes
//! on taking part until all say it. By this order a rank that skips blocks waits for those that do not, and a block
//! that several use is gathered for all of them at once.
//!
//! A rank says that it wants nothing before it waits for the others in any other way: before the reduction of a step is
//! finished, in which all gradients are reduced in an order that does not depend on who has which.

use std::time::Instant;

use super::gatherer::{GatherState, Gatherer};
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::tensor::PlainTensor;

/// What a rank wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// A group, for a forward.
    Forward(usize),
    /// A group, for a backward.
    Backward(usize),
    /// A parameter by itself, of rows that the other ranks do not know.
    Alone(usize),
    Nothing,
}

/// What all ranks do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Agreed {
    /// They gather a group.
    Group(usize),
    /// They gather a parameter by itself, which all want.
    Alone(usize),
    /// None wants anything.
    Over,
    /// The first of two ranks wants a parameter by itself, which the second does not.
    Never { place: usize, rank: usize, other: usize },
}

impl Want {
    /// What is said of it, of so many groups; what is gathered first is the smallest.
    fn number(self, groups: usize) -> u64 {
        match self {
            Self::Forward(group) => group as u64,
            Self::Backward(group) => (2 * groups - 1 - group) as u64,
            Self::Alone(place) => (2 * groups + place) as u64,
            Self::Nothing => u64::MAX,
        }
    }

    fn of_number(number: u64, groups: usize) -> Self {
        match number as usize {
            _ if number == u64::MAX => Self::Nothing,
            group if group < groups => Self::Forward(group),
            number if number < 2 * groups => Self::Backward(2 * groups - 1 - number),
            number => Self::Alone(number - 2 * groups),
        }
    }

    fn is_of(self, wanted: usize) -> bool {
        matches!(self, Self::Forward(group) | Self::Backward(group) if group == wanted)
    }
}

/// What is done about what all ranks have said, in rank order.
fn agreed(said: &[u64], groups: usize) -> Agreed {
    let first = said.iter().copied().min().unwrap_or(u64::MAX);
    match Want::of_number(first, groups) {
        Want::Nothing => Agreed::Over,
        Want::Forward(group) | Want::Backward(group) => Agreed::Group(group),
        Want::Alone(place) => {
            let rank = said.iter().position(|number| *number == first).unwrap_or_default();
            match said.iter().position(|number| *number != first) {
                None => Agreed::Alone(place),
                Some(other) => Agreed::Never { place, rank, other },
            }
        }
    }
}

impl Gatherer {
    /// Whether ranks may use different parameters, and say what they want.
    pub fn says_what_it_wants(&self) -> bool {
        self.wants.is_some()
    }

    /// What that has cost in communication.
    pub fn wants_counters(&self) -> Counters {
        self.wants.as_ref().map(Communicator::counters).unwrap_or_default()
    }

    /// Takes part in what the ranks gather until none of them wants anything. Nothing, unless they may use different
    /// parameters.
    ///
    /// # Errors
    /// Those of [`full_param`](Self::full_param).
    pub fn end_gathers(&self) -> Result<(), Error> {
        let Some(comm) = &self.wants else { return Ok(()) };
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let began = Instant::now();
        let ended = self.gather_wanted(&state, comm, Want::Nothing, None).map(drop);
        state.waited += began.elapsed();
        ended.inspect_err(|error| state.failure = Some(error.clone()))
    }

    /// Takes part in what the ranks gather until this one has what it wants, which is returned: a group, or a parameter
    /// of which it holds `own` rows. If it wants nothing, until none of them does.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], the same on all ranks, if one wants a parameter by itself, and others do not; those
    /// of [`Communicator`].
    pub(super) fn gather_wanted(
        &self,
        state: &GatherState,
        comm: &Communicator,
        want: Want,
        own: Option<&PlainTensor>,
    ) -> Result<Vec<PlainTensor>, Error> {
        let groups = self.groups.len();
        loop {
            let said = comm.all_gather(vec![want.number(groups)])?;
            match agreed(&said, groups) {
                Agreed::Over => return Ok(Vec::new()),
                Agreed::Group(group) => {
                    let (members, pack) = &self.groups[group];
                    let shards: Option<Vec<PlainTensor>> =
                        members.iter().map(|place| state.shards[*place].clone()).collect();
                    let shards =
                        shards.ok_or_else(|| Error::invalid("a sharded parameter", "its rows are not known"))?;
                    let (pool, number) = (self.gathered.as_ref(), self.numbers[group]);
                    let full = pack.gather_in(pool, shards, self.comms.parameters(), number)?;
                    if want.is_of(group) {
                        return Ok(full);
                    }
                }
                Agreed::Alone(place) => {
                    return self.gather_alone(place, own.cloned().into_iter().collect());
                }
                Agreed::Never { place, rank, other } => return Err(self.refuse_alone(place, rank, other)),
            }
        }
    }

    /// Fails the world because of a parameter that only some ranks want by itself.
    fn refuse_alone(&self, place: usize, rank: usize, other: usize) -> Error {
        let path = &self.params[place].path;
        let problem = format!(
            "rank {rank} uses `{path}` with other rows than the replica holds, and rank {other} does not. With \
             `allow_unused_parameters` ranks may use different parameters of the replica itself; of a copy of it from before a \
             step, or with other values, all of them use the same: evaluate the replica by `forward_with`, or `assemble` the copy"
        );
        let error = Error::invalid("a sharded parameter", problem);
        self.comms.control().fail(error.clone());
        error
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Want::{Alone, Backward, Forward, Nothing};
    use super::*;

    const GROUPS: usize = 5;

    /// What ranks gather that want these, one behind the other.
    fn run(wants: &[Vec<Want>]) -> (Vec<usize>, Agreed) {
        let mut left: Vec<_> = wants.iter().map(|wants| wants.iter().copied().peekable()).collect();
        let mut gathered = Vec::new();
        loop {
            let said: Vec<u64> =
                left.iter_mut().map(|wants| wants.peek().copied().unwrap_or(Nothing).number(GROUPS)).collect();
            match agreed(&said, GROUPS) {
                Agreed::Group(group) => {
                    gathered.push(group);
                    for wants in &mut left {
                        wants.next_if(|want| want.is_of(group));
                    }
                }
                Agreed::Alone(_) => {
                    for wants in &mut left {
                        wants.next();
                    }
                }
                end => return (gathered, end),
            }
        }
    }

    #[test]
    fn what_several_use_is_gathered_once() {
        let pass = |groups: &[usize]| {
            let forward = groups.iter().map(|group| Forward(*group));
            forward.chain(groups.iter().rev().skip(1).map(|group| Backward(*group))).collect::<Vec<_>>()
        };
        // Blocks that are skipped, a forward that ends early, and a rank without data.
        let (gathered, end) = run(&[pass(&[0, 1, 2, 3, 4]), pass(&[0, 2, 4]), pass(&[0, 1]), vec![]]);
        assert_eq!((gathered, end), (vec![0, 1, 2, 3, 4, 3, 2, 1, 0], Agreed::Over));
        // Experts: each its own.
        let (gathered, _) = run(&[pass(&[0, 1, 4]), pass(&[0, 2, 4]), pass(&[0, 3, 4])]);
        assert_eq!(gathered, [0, 1, 2, 3, 4, 3, 2, 1, 0]);
        // What a forward wants is there for a backward as well.
        assert_eq!(run(&[vec![Forward(1), Forward(2)], vec![Backward(2)]]).0, [1, 2]);
    }

    #[test]
    fn rows_of_ones_own_are_for_all_or_none() {
        assert_eq!(run(&[vec![Forward(1), Alone(3)], vec![Alone(3), Forward(0)]]), (vec![1, 0], Agreed::Over));
        let never = |place, rank, other| Agreed::Never { place, rank, other };
        assert_eq!(run(&[vec![], vec![Alone(2)]]).1, never(2, 1, 0));
        assert_eq!(run(&[vec![Alone(2)], vec![Alone(2)], vec![Alone(3)]]).1, never(2, 0, 2));
    }

    proptest! {
        /// Whatever ranks want in whatever order, each gets it, and nothing is gathered that none wants.
        #[test]
        fn all_get_what_they_want(
            wants in proptest::collection::vec(proptest::collection::vec((0..GROUPS, any::<bool>()), 0..8), 1..5)
        ) {
            let want = |(group, forward)| if forward { Forward(group) } else { Backward(group) };
            let wants: Vec<Vec<Want>> = wants.into_iter().map(|wants| wants.into_iter().map(want).collect()).collect();
            for want in wants.iter().flatten() {
                prop_assert_eq!(Want::of_number(want.number(GROUPS), GROUPS), *want);
            }
            let (gathered, end) = run(&wants);
            prop_assert_eq!(end, Agreed::Over);
            prop_assert!(gathered.len() <= wants.iter().map(Vec::len).sum());
        }
    }
}
