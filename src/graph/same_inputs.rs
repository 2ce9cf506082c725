//! Checks that ranks that share a model were given the same inputs, and have updated it alike.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use burn::tensor::DType;

use super::input_comparison::{ComparedRuns, InputComparison};
use super::updates::Updates;
use crate::Error;
use crate::comm::Communicator;
use crate::graph::named_tensors;
use crate::lock::lock;
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
    /// What the inputs were that were compared last, of each kind of run.
    last: Arc<Mutex<[Option<Outlines>; 2]>>,
}

/// Dims and dtype of each input.
type Outlines = Vec<(Vec<usize>, DType)>;

/// What is given inputs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ComparedCall {
    Step,
    Forward,
}

impl SameInputs {
    /// Collective over each of the groups. `every` so many steps; `None` for every step on CPUs, and fewer on devices.
    ///
    /// # Errors
    /// Those of [`Communicator::split_named`].
    pub(crate) fn new<'a>(groups: impl Iterator<Item = &'a Communicator>, every: Option<u64>) -> Result<Self, Error> {
        let groups = groups.filter(|group| group.size() > 1);
        let own = groups.map(|group| group.split_named("inputs", 0, group.rank() as i64));
        Ok(Self {
            groups: own.collect::<Result<Vec<_>, _>>()?.into(),
            every,
            runs: Arc::default(),
            last: Arc::default(),
        })
    }

    /// With more groups to compare over.
    ///
    /// # Errors
    /// Those of [`Communicator::split_named`].
    pub(crate) fn and(self, group: &Communicator) -> Result<Self, Error> {
        let more = Self::new(std::iter::once(group), self.every)?;
        Ok(Self { groups: self.groups.iter().chain(more.groups.iter()).cloned().collect(), ..self })
    }

    /// Begins to compare the inputs of a step or a forward, if it is the turn of this one, and the updates before it.
    ///
    /// # Errors
    /// [`Error::Graph`] if an input cannot be read.
    pub(crate) fn start<I: TensorTree + Clone>(
        &self,
        run: ComparedCall,
        inputs: &I,
        updates: &Updates,
    ) -> Result<InputComparison, Error> {
        let comparison = InputComparison::new(run, updates.clone());
        if self.groups.is_empty() {
            return Ok(comparison);
        }
        let number = self.runs[run as usize].fetch_add(1, Ordering::Relaxed);
        let inputs = named_tensors(inputs.clone())?;
        let on_host = inputs.iter().all(|(_, input)| input.on_flex());
        if !is_due(self.every, on_host, number) {
            return Ok(comparison);
        }
        let changed = {
            let own = Some(inputs.iter().map(|(_, input)| (input.shape().to_vec(), input.dtype())).collect());
            let last = std::mem::replace(&mut lock(&self.last)[run as usize], own.clone());
            last != own
        };
        let mut comparison = self.start_with(comparison, inputs, on_host)?;
        if changed {
            // With inputs of other dims ranks run other collectives. Of two that differ now one at least has changed.
            comparison.compare_inputs()?;
        }
        Ok(comparison)
    }

    /// The same for tensors by name, all on the host or not.
    fn start_with(
        &self,
        mut comparison: InputComparison,
        inputs: Vec<(String, PlainTensor)>,
        on_host: bool,
    ) -> Result<InputComparison, Error> {
        // How often is the same for all, or goes by where the inputs are.
        let runs = if self.every.is_none() && on_host { ComparedRuns::OnHost } else { ComparedRuns::Any };
        comparison.start(runs, inputs, &self.groups)?;
        Ok(comparison)
    }
}

/// Whether this run's inputs are compared, the first being number 0.
fn is_due(every: Option<u64>, on_host: bool, number: u64) -> bool {
    let every = every.unwrap_or(if on_host { 1 } else { DEVICE_EVERY });
    every != 0 && number.is_multiple_of(every)
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
                    let input = Tensor::<1>::from_floats([value], &Device::flex());
                    let comparison = same.start(run, &input, &Updates::default())?;
                    let looked = !comparison.is_empty();
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
                let comparison = InputComparison::new(ComparedCall::Step, Updates::default());
                let input = PlainTensor::from(Tensor::<1>::from_floats([1.0], &Device::flex()));
                same.start_with(comparison, vec![("x".into(), input)], rank.rank() == host)?.finish()
            });
            match outcome {
                Ok(_) => assert!(expected.is_empty()),
                Err(error) => assert!(!expected.is_empty() && error.to_string().contains(expected), "{error}"),
            }
        }
    }
}
