//! Who divides what with whom.

use crate::Error;
use crate::comm::{Communicator, Counters};

/// The communicators of sharded replicas. Each kind of traffic has one of its own, so that it is counted by itself and
/// runs in the background beside the others.
#[derive(Debug, Clone)]
pub struct ShardComms {
    /// Joins the ranks among which rows are divided; carries gathered parameters.
    parameters: Communicator,
    /// The same ranks; carries gradients.
    gradients: Communicator,
    /// The same ranks; carries a few numbers.
    control: Communicator,
    /// Joins the ranks that hold the same rows, if there are several.
    copies: Option<Communicator>,
    /// Carries what the ranks call first after an update.
    next: Communicator,
}

impl ShardComms {
    /// Divides rows among `ranks` neighbours of a group of replicas, and replicates them over the others; among all of
    /// the group without a number. Errors call the group that carries parameters by `name`. Collective.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `ranks` does not divide the group; those of [`Communicator::split`].
    pub(crate) fn new(group: &Communicator, ranks: Option<usize>, name: &str) -> Result<Self, Error> {
        let (rank, size) = (group.rank(), group.size());
        let ranks = ranks.unwrap_or(size);
        if ranks == 0 || !size.is_multiple_of(ranks) {
            let problem = format!(
                "rows are to be divided among {ranks} of the {size} replicas of group `{}`: set `sharding_ranks` to a number \
                 that divides {size}, or leave it out to divide them among all",
                group.group()
            );
            return Err(Error::invalid("data_parallel", problem));
        }
        let (color, key) = ((rank / ranks) as u64, rank as i64);
        let of_its_own = |name: &str| group.split_named(name, color, key);
        let (parameters, gradients, control) =
            (of_its_own(name)?, of_its_own("shard_gradients")?, of_its_own("shard_control")?);
        let copies = match ranks < size {
            true => Some(group.split_named("shard_copies", (rank % ranks) as u64, key)?),
            false => None,
        };
        let next = parameters.clone();
        Ok(Self { parameters, gradients, control, copies, next })
    }

    /// With a group that carries what the ranks call first after an update, if that is not to gather what was updated.
    pub(crate) fn with_next(self, next: &Communicator) -> Self {
        Self { next: next.clone(), ..self }
    }

    /// Carries what the ranks call first after an update. A rank that was given a new optimizer meets the others there,
    /// who must have been given one too: else they are where the call of this rank does not match theirs, and its name
    /// tells why.
    pub(crate) fn next(&self) -> &Communicator {
        &self.next
    }

    /// This rank among those that divide rows among themselves.
    pub(crate) fn rank(&self) -> usize {
        self.control.rank()
    }

    /// How many ranks divide rows among themselves.
    pub(crate) fn ranks(&self) -> usize {
        self.control.size()
    }

    /// Carries gathered parameters.
    pub(crate) fn parameters(&self) -> &Communicator {
        &self.parameters
    }

    /// Carries gradients.
    pub(crate) fn gradients(&self) -> &Communicator {
        &self.gradients
    }

    /// Carries a few numbers.
    pub(crate) fn control(&self) -> &Communicator {
        &self.control
    }

    /// Joins the ranks that hold the same rows, if there are several.
    pub(crate) fn copies(&self) -> Option<&Communicator> {
        self.copies.as_ref()
    }

    /// What gradients have cost.
    pub(crate) fn gradient_counters(&self) -> Counters {
        let copies = self.copies.as_ref().map(Communicator::counters).unwrap_or_default();
        self.gradients.counters() + copies
    }
}
