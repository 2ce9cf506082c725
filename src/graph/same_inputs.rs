//! Checks that ranks that share a model were given the same inputs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::graph::named_tensors;
use crate::tensor::TensorTree;

/// How often inputs are compared that must be read back from a device.
const DEVICE_EVERY: u64 = 100;

/// Compares the inputs of steps and of forwards, over groups of its own: the comparison runs in the background while the step does.
#[derive(Debug, Clone)]
pub(crate) struct SameInputs {
    groups: Arc<[Communicator]>,
    every: Option<u64>,
    /// How many of each kind there were.
    runs: Arc<[AtomicU64; 2]>,
}

/// What is given inputs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Run {
    Step,
    Forward,
}

/// A comparison that is still running.
pub(crate) struct Comparison {
    run: Run,
    paths: Vec<String>,
    found: Vec<(Communicator, Pending<Vec<u64>>)>,
}

impl SameInputs {
    /// Collective over each of the groups. `every` so many steps; `None` for every step on CPUs, and fewer on devices.
    ///
    /// # Errors
    /// Those of [`Communicator::split_named`].
    pub(crate) fn new<'a>(groups: impl Iterator<Item = &'a Communicator>, every: Option<u64>) -> Result<Self, Error> {
        let groups = groups.filter(|group| group.size() > 1);
        let own = groups.map(|group| group.split_named("inputs", 0, group.rank() as i64));
        Ok(Self { groups: own.collect::<Result<Vec<_>, _>>()?.into(), every, runs: Arc::default() })
    }

    /// With more groups to compare over.
    ///
    /// # Errors
    /// Those of [`Communicator::split_named`].
    pub(crate) fn and(self, group: &Communicator) -> Result<Self, Error> {
        let more = Self::new(std::iter::once(group), self.every)?;
        Ok(Self { groups: self.groups.iter().chain(more.groups.iter()).cloned().collect(), ..self })
    }

    /// Begins to compare the inputs of a step or a forward, if it is the turn of this one.
    ///
    /// # Errors
    /// [`Error::Graph`] if an input cannot be read.
    pub(crate) fn start<I: TensorTree + Clone>(&self, run: Run, inputs: &I) -> Result<Comparison, Error> {
        let mut comparison = Comparison { run, paths: Vec::new(), found: Vec::new() };
        if self.groups.is_empty() {
            return Ok(comparison);
        }
        let number = self.runs[run as usize].fetch_add(1, Ordering::Relaxed);
        let inputs = named_tensors(inputs.clone())?;
        let on_host = inputs.iter().all(|(_, input)| input.on_flex());
        let every = self.every.unwrap_or(if on_host { 1 } else { DEVICE_EVERY });
        if every == 0 || !number.is_multiple_of(every) {
            return Ok(comparison);
        }
        let mut digests = Vec::with_capacity(inputs.len());
        for (path, input) in inputs {
            comparison.paths.push(path);
            digests.push(input.digest()?);
        }
        for group in self.groups.iter() {
            let mine = digests.clone();
            comparison.found.push((group.clone(), group.start(move |group| group.all_gather(mine))));
        }
        Ok(comparison)
    }
}

impl Comparison {
    /// Waits for the others.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on all ranks, with the first rank and input that differ; those of [`Communicator`].
    pub(crate) fn finish(self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for (group, found) in self.found {
            let found = found.wait()?;
            let inputs = self.paths.len().max(1);
            let differs = found.chunks(inputs).enumerate().find_map(|(rank, digests)| {
                (0..digests.len()).find(|place| digests[*place] != found[*place]).map(|place| (rank, place))
            });
            if let Some((rank, place)) = differs {
                let problem = format!(
                    "rank {rank} of group `{}` was given another input `{}` than rank 0: the ranks that share a model pass the \
                     same whole inputs, each of them; replicas with inputs of their own are along another axis",
                    group.group(),
                    self.paths[place],
                );
                let operation = match self.run {
                    Run::Step => "step",
                    Run::Forward => "forward_with",
                };
                outcome = outcome.and(Err(Error::invalid(operation, problem)));
            }
        }
        outcome
    }
}
