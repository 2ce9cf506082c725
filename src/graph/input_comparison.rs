//! One comparison of the inputs of ranks that share a model.

use super::same_inputs::ComparedCall;
use super::updates::{Compared, Updates};
use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::tensor::PlainTensor;

/// Which runs a rank compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ComparedRuns {
    /// Those that all ranks do.
    Any,
    /// More, since its inputs are on the host.
    OnHost,
}

/// A comparison that is still running.
pub(crate) struct InputComparison {
    run: ComparedCall,
    updates: Updates,
    /// The path of each input.
    paths: Vec<String>,
    /// What the ranks of groups have told, and of others what they are telling.
    told: Vec<(Communicator, Vec<u64>)>,
    running: Vec<(Communicator, Pending<Vec<u64>>)>,
}

impl InputComparison {
    /// One in which nothing is compared.
    pub(super) fn new(run: ComparedCall, updates: Updates) -> Self {
        Self { run, updates, paths: Vec::new(), told: Vec::new(), running: Vec::new() }
    }

    /// Tells the ranks of some groups what this one has.
    ///
    /// # Errors
    /// [`Error::Graph`] if an input cannot be read.
    pub(super) fn start(
        &mut self,
        runs: ComparedRuns,
        inputs: Vec<(String, PlainTensor)>,
        groups: &[Communicator],
    ) -> Result<(), Error> {
        let mut told = vec![runs as u64, self.updates.digest(Compared::Parts), inputs.len() as u64];
        for (path, input) in inputs {
            self.paths.push(path);
            told.push(input.shape().len() as u64);
            told.extend(input.shape().iter().map(|dim| *dim as u64));
            told.push(input.digest()?);
        }
        for group in groups {
            let mine = told.clone();
            self.running.push((group.clone(), group.start(move |group| group.all_gather(mine))));
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.told.is_empty()
    }

    /// Waits for the others, and compares inputs alone: for more the others would have to be here.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub(super) fn compare_inputs(&mut self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for (group, running) in std::mem::take(&mut self.running) {
            let told = running.wait()?;
            // They run the step already, and wait for this rank in it.
            outcome = outcome.and(self.same_inputs(&group, &told).inspect_err(|error| group.fail(error.clone())));
            self.told.push((group, told));
        }
        outcome
    }

    /// Waits for the others.
    ///
    /// # Errors
    /// On all ranks of a group: [`Error::InvalidArgument`] with the first rank and input that differ;
    /// [`Error::Optimizer`] with what differs in the updates before; those of [`Communicator`].
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        for (group, running) in std::mem::take(&mut self.running) {
            self.told.push((group, running.wait()?));
        }
        let (mut outcome, several) = (Ok(()), self.told.len() > 1);
        for (group, told) in &self.told {
            let ranks = by_rank(told);
            let alike = ranks.iter().all(|told| told.updates == ranks[0].updates);
            let updated = if alike { Ok(()) } else { self.updates.explain(Compared::Parts, group) };
            let compared = updated.and_then(|()| self.same_inputs(group, told));
            // Ranks of other groups may wait for one of these.
            outcome = outcome.and(compared.inspect_err(|error| {
                if several {
                    group.fail(error.clone())
                }
            }));
        }
        outcome
    }

    /// Demands that the ranks of a group have told of the same inputs.
    fn same_inputs(&self, group: &Communicator, told: &[u64]) -> Result<(), Error> {
        let (ranks, name) = (by_rank(told), group.group());
        let Some(first) = ranks.first() else { return Ok(()) };
        for (rank, told) in ranks.iter().enumerate() {
            let problem = if told.runs != first.runs {
                let of = |runs| if runs == ComparedRuns::OnHost as u64 { "the host alone" } else { "a device" };
                format!(
                    "rank {rank} of group `{name}` was given inputs on {}, and rank 0 on {}: the ranks that share a model compute on \
                     devices of one kind, and make their inputs there",
                    of(told.runs),
                    of(first.runs),
                )
            } else if told.inputs.len() != first.inputs.len() {
                let [theirs, firsts] = [told, first].map(|told| told.inputs.len());
                format!("rank {rank} of group `{name}` was given {theirs} inputs, and rank 0 {firsts}: {SAME}")
            } else if let Some(place) = (0..told.inputs.len()).find(|place| told.inputs[*place] != first.inputs[*place])
            {
                let path = self.paths.get(place).map_or("", String::as_str);
                let [(theirs, _), (firsts, _)] = [told.inputs[place], first.inputs[place]];
                let dims = match theirs == firsts {
                    true => String::new(),
                    false => format!(", of dims {theirs:?} and not {firsts:?}"),
                };
                format!("rank {rank} of group `{name}` was given another input `{path}` than rank 0{dims}: {SAME}")
            } else {
                continue;
            };
            let operation = match self.run {
                ComparedCall::Step => "step",
                ComparedCall::Forward => "forward_with",
            };
            return Err(Error::invalid(operation, problem));
        }
        Ok(())
    }
}

const SAME: &str = "the ranks that share a model pass the same whole inputs, each of them; replicas with inputs of their own are along \
                    another axis";

/// What a rank has told.
struct ToldInputs<'a> {
    runs: u64,
    updates: u64,
    /// The dims and the digest of each input.
    inputs: Vec<(&'a [u64], u64)>,
}

fn by_rank(mut told: &[u64]) -> Vec<ToldInputs<'_>> {
    let mut ranks = Vec::new();
    while let [runs, updates, count, rest @ ..] = told {
        let (mut inputs, mut rest) = (Vec::new(), rest);
        while inputs.len() < *count as usize
            && let Some((rank, behind)) = rest.split_first()
        {
            let (dims, behind) = behind.split_at((*rank as usize).min(behind.len()));
            let (digest, behind) = behind.split_first().map_or((0, behind), |(digest, behind)| (*digest, behind));
            inputs.push((dims, digest));
            rest = behind;
        }
        ranks.push(ToldInputs { runs: *runs, updates: *updates, inputs });
        told = rest;
    }
    ranks
}
