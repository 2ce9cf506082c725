//! Who divides what with whom.

use crate::Error;
use crate::comm::{Communicator, Counters, StepPart};

/// The communicators of sharded replicas. Each kind of traffic is counted by itself, and what runs in the background of
/// a step has a group of its own. What ranks call *between* two steps (the norm, the update) goes over the group in
/// which they begin the next one, where it joins the same ranks: one that is elsewhere than the others meets them
/// there, in a call that is not theirs, and all have an error at once. In groups of their own they would wait for each
/// other.
#[derive(Debug, Clone)]
pub struct ShardComms {
    /// Joins the ranks among which rows are divided; carries the parameters that steps gather, if they do.
    parameters: Option<Communicator>,
    /// The same ranks; carries gradients.
    gradients: Communicator,
    /// The same ranks; carries a few numbers in the middle of a step.
    control: Communicator,
    /// The same ranks; carries what they call between two steps.
    between: Communicator,
    /// Joins the ranks that hold the same rows, if there are several.
    copies: Option<Communicator>,
    /// Carries what the ranks call first after an update.
    next: Communicator,
    /// The number of the last step.
    step: u64,
}

impl ShardComms {
    /// Divides rows among `ranks` neighbours of a group of replicas, and replicates them over the others; among all of
    /// the group without a number. `steps` joins the replicas where they begin a step. With a name, by which errors
    /// call their group, steps gather parameters. Collective.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `ranks` does not divide the group; those of [`Communicator::split`].
    pub(crate) fn new(
        group: &Communicator,
        ranks: Option<usize>,
        steps: &Communicator,
        parameters: Option<&str>,
    ) -> Result<Self, Error> {
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
        let parameters = parameters.map(of_its_own).transpose()?;
        let (gradients, control) = (of_its_own("shard_gradients")?, of_its_own("shard_control")?);
        let (between, copies) = match ranks < size {
            true => {
                let copies = group.split_named("shard_copies", (rank % ranks) as u64, key)?;
                (control.counted_apart(), Some(copies))
            }
            false => (steps.counted_apart(), None),
        };
        // Without parameters to gather an update begins with those that it has changed.
        let next = if parameters.is_some() { steps.clone() } else { between.clone() };
        Ok(Self { parameters, gradients, control, between, copies, next, step: 0 })
    }

    /// The same after so many steps.
    pub(crate) fn after(self, step: u64) -> Self {
        Self { step, ..self }
    }

    /// Carries what the ranks call first after an update. A rank that was given a new optimizer meets the others there,
    /// who must have been given one too: else they are where the call of this rank does not match theirs, and its name
    /// tells why. It counts with parameters where steps gather them, else with what goes between steps.
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

    /// Carries the parameters that steps gather; what goes between steps, if they gather none.
    pub(crate) fn parameters(&self) -> &Communicator {
        self.parameters.as_ref().unwrap_or(&self.between)
    }

    /// Carries gradients.
    pub(crate) fn gradients(&self) -> &Communicator {
        &self.gradients
    }

    /// Carries a few numbers in the middle of a step.
    pub(crate) fn control(&self) -> &Communicator {
        &self.control
    }

    /// Carries what the ranks call between two steps: the norm of the gradient, and what an update gathers.
    pub(crate) fn between(&self) -> &Communicator {
        &self.between
    }

    /// The number on which calls of the update agree.
    pub(crate) fn update(&self) -> u64 {
        StepPart::Update.of(self.step)
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

    /// What parameters have cost, those of steps and of updates; with what else went between steps.
    pub(crate) fn parameter_counters(&self) -> Counters {
        self.parameters.as_ref().map(Communicator::counters).unwrap_or_default() + self.between.counters()
    }
}
