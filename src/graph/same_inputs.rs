//! Checks that ranks that share a model were given the same inputs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::graph::named_tensors;
use crate::tensor::{PlainTensor, TensorTree};

/// How often inputs are compared that must be read back from a device.
const DEVICE_EVERY: u64 = 100;

/// Compares the inputs of steps and of forwards, over groups of its own: the comparison runs in the background while
/// the step does.
#[derive(Debug, Clone)]
pub(crate) struct SameInputs {
    groups: Arc<[Communicator]>,
    every: Option<u64>,
    /// How many of each kind there were.
    runs: Arc<[AtomicU64; 2]>,
}

/// What a rank tells of inputs that are on the host, before their digests.
const ON_HOST: u64 = 1;

/// What is given inputs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ComparedCall {
    Step,
    Forward,
}

/// A comparison that is still running.
pub(crate) struct RunningComparison {
    run: ComparedCall,
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
    pub(crate) fn start<I: TensorTree + Clone>(
        &self,
        run: ComparedCall,
        inputs: &I,
    ) -> Result<RunningComparison, Error> {
        let comparison = RunningComparison { run, paths: Vec::new(), found: Vec::new() };
        if self.groups.is_empty() {
            return Ok(comparison);
        }
        let number = self.runs[run as usize].fetch_add(1, Ordering::Relaxed);
        let inputs = named_tensors(inputs.clone())?;
        let on_host = inputs.iter().all(|(_, input)| input.on_flex());
        self.start_with(comparison, inputs, (on_host, number))
    }

    /// The same for tensors by name, all on the host or not, of this run.
    fn start_with(
        &self,
        mut comparison: RunningComparison,
        inputs: Vec<(String, PlainTensor)>,
        (on_host, number): (bool, u64),
    ) -> Result<RunningComparison, Error> {
        if !is_due(self.every, on_host, number) {
            return Ok(comparison);
        }
        // How often is the same for all, or goes by where the inputs are.
        let turn = if self.every.is_none() && on_host { ON_HOST } else { 0 };
        let mut digests = Vec::with_capacity(1 + inputs.len());
        digests.push(turn);
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

/// Whether this run's inputs are compared, the first being number 0.
fn is_due(every: Option<u64>, on_host: bool, number: u64) -> bool {
    let every = every.unwrap_or(if on_host { 1 } else { DEVICE_EVERY });
    every != 0 && number.is_multiple_of(every)
}

impl RunningComparison {
    /// Waits for the others.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on all ranks, with the first rank and input that differ; those of [`Communicator`].
    pub(crate) fn finish(self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for (group, found) in self.found {
            let found = found.wait()?;
            let differs = found.chunks(1 + self.paths.len()).enumerate().find_map(|(rank, digests)| {
                (0..digests.len()).find(|place| digests[*place] != found[*place]).map(|place| (rank, place))
            });
            if let Some((rank, place)) = differs {
                let group = group.group();
                let problem = match place.checked_sub(1) {
                    Some(input) => format!(
                        "rank {rank} of group `{group}` was given another input `{}` than rank 0: the ranks that share a model pass \
                         the same whole inputs, each of them; replicas with inputs of their own are along another axis",
                        self.paths[input],
                    ),
                    None => {
                        let places = ["the host alone", "a device"];
                        let [first, other] = if found[0] == ON_HOST { [0, 1] } else { [1, 0] };
                        format!(
                            "rank {rank} of group `{group}` was given inputs on {}, and rank 0 on {}: the ranks that share a model \
                             compute on devices of one kind, and make their inputs there",
                            places[other], places[first],
                        )
                    }
                };
                let operation = match self.run {
                    ComparedCall::Step => "step",
                    ComparedCall::Forward => "forward_with",
                };
                outcome = outcome.and(Err(Error::invalid(operation, problem)));
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::launch;

    #[test]
    fn inputs_on_devices_are_compared_every_so_many_runs() {
        let due = |every, on_host| (0..=200).filter(|number| is_due(every, on_host, *number)).collect::<Vec<_>>();
        assert_eq!(due(None, true).len(), 201);
        assert_eq!(due(None, false), [0, 100, 200]);
        for on_host in [true, false] {
            assert_eq!(due(Some(64), on_host), [0, 64, 128, 192]);
            assert!(due(Some(0), on_host).is_empty());
        }
    }

    /// Steps and forwards have their turns apart, and a difference is found in its turn.
    #[test]
    fn a_difference_is_found_in_its_turn() {
        for size in [2, 4] {
            let outcome = launch::threads(size).run(|rank| {
                let same = SameInputs::new(std::iter::once(&*rank), Some(3))?;
                let compared = |run, value: f32| {
                    let comparison = same.start(run, &Tensor::<1>::from_floats([value], &Device::flex()))?;
                    let looked = !comparison.found.is_empty();
                    comparison.finish().map(|()| looked)
                };
                let others = (rank.rank() == size - 1) as u8 as f32;
                assert!(compared(ComparedCall::Step, 1.0)?);
                assert!(compared(ComparedCall::Forward, 1.0)?);
                assert!(!compared(ComparedCall::Step, others)?);
                assert!(!compared(ComparedCall::Step, others)?);
                compared(ComparedCall::Step, others).map(drop)
            });
            let error = outcome.unwrap_err().to_string();
            let words = [format!("rank {} of group", size - 1), "another input".into(), "step: ".into()];
            assert!(words.iter().all(|words| error.contains(words)), "{error}");
        }
    }

    /// Ranks would compare at different steps, and wait for each other: the first step says so. It does not matter
    /// where that is set.
    #[test]
    fn inputs_on_the_host_and_on_devices_do_not_go_together() {
        for (every, host, expected) in [
            (None, 0, "on a device, and rank 0 on the host"),
            (None, 1, "on the host alone, and rank 0 on a device"),
            (Some(1), 1, ""),
        ] {
            let outcome = launch::threads(2).run(|rank| {
                let same = SameInputs::new(std::iter::once(&*rank), every)?;
                let comparison = RunningComparison { run: ComparedCall::Step, paths: Vec::new(), found: Vec::new() };
                let input = PlainTensor::from(Tensor::<1>::from_floats([1.0], &Device::flex()));
                same.start_with(comparison, vec![("x".into(), input)], (rank.rank() == host, 0))?.finish()
            });
            match outcome {
                Ok(_) => assert!(expected.is_empty()),
                Err(error) => assert!(!expected.is_empty() && error.to_string().contains(expected), "{error}"),
            }
        }
    }
}
