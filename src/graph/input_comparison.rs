//! One comparison of the inputs of ranks that share a model.

use super::same_inputs::ComparedCall;
use super::updates::{Compared, Updates};
use crate::Error;
use crate::comm::{Communicator, Pending};
use crate::tensor::PlainTensor;

/// How many numbers a rank tells before the digests of its inputs: its turn, their number, and that of its updates.
const HEAD: usize = 3;

/// Which runs a rank compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Those that all ranks do.
    Any,
    /// More, since its inputs are on the host.
    OnHost,
}

/// A comparison that is still running.
pub(crate) struct InputComparison {
    run: ComparedCall,
    updates: Updates,
    /// The path and dims of each input.
    inputs: Vec<(String, Vec<usize>)>,
    found: Vec<(Communicator, Pending<Vec<u64>>)>,
}

impl InputComparison {
    /// One in which nothing is compared.
    pub(super) fn new(run: ComparedCall, updates: Updates) -> Self {
        Self { run, updates, inputs: Vec::new(), found: Vec::new() }
    }

    /// Tells the ranks of some groups what this one has.
    ///
    /// # Errors
    /// [`Error::Graph`] if an input cannot be read.
    pub(super) fn start(
        &mut self,
        turn: Turn,
        inputs: Vec<(String, PlainTensor)>,
        groups: &[Communicator],
    ) -> Result<(), Error> {
        let mut told = Vec::with_capacity(HEAD + inputs.len());
        told.extend([turn as u64, inputs.len() as u64, self.updates.digest(Compared::Parts)]);
        for (path, input) in inputs {
            self.inputs.push((path, input.shape().to_vec()));
            told.push(input.digest()?);
        }
        for group in groups {
            let mine = told.clone();
            self.found.push((group.clone(), group.start(move |group| group.all_gather(mine))));
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn is_running(&self) -> bool {
        !self.found.is_empty()
    }

    /// Waits for the others.
    ///
    /// # Errors
    /// On all ranks of a group: [`Error::InvalidArgument`] with the first rank and input that differ;
    /// [`Error::Optimizer`] with what differs in the updates before; those of [`Communicator`].
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let (mut outcome, found) = (Ok(()), std::mem::take(&mut self.found));
        let several = found.len() > 1;
        for (group, found) in found {
            let compared = self.compare(&group, &found.wait()?);
            // Ranks of other groups may wait for one of these.
            outcome = outcome.and(compared.inspect_err(|error| {
                if several {
                    group.fail(error.clone())
                }
            }));
        }
        outcome
    }

    /// Compares what the ranks of a group have told. Collective, if it is not the same.
    fn compare(&self, group: &Communicator, told: &[u64]) -> Result<(), Error> {
        let ranks = by_rank(told);
        let Some(first) = ranks.first() else { return Ok(()) };
        if ranks.iter().any(|told| told.updates != first.updates) {
            self.updates.explain(Compared::Parts, group)?;
        }
        for (rank, told) in ranks.iter().enumerate() {
            let problem = if told.turn != first.turn {
                let of = |turn| if turn == Turn::OnHost as u64 { "the host alone" } else { "a device" };
                format!(
                    "rank {rank} of group `{}` was given inputs on {}, and rank 0 on {}: the ranks that share a model compute on \
                     devices of one kind, and make their inputs there",
                    group.group(),
                    of(told.turn),
                    of(first.turn),
                )
            } else if told.digests.len() != first.digests.len() {
                format!(
                    "rank {rank} of group `{}` was given {} inputs, and rank 0 {}: {SAME}",
                    group.group(),
                    told.digests.len(),
                    first.digests.len(),
                )
            } else if let Some(input) =
                (0..told.digests.len()).find(|input| told.digests[*input] != first.digests[*input])
            {
                let dims = self.dims_of(input, rank, group)?;
                let path = self.inputs.get(input).map_or("", |(path, _)| path);
                let group = group.group();
                format!("rank {rank} of group `{group}` was given another input `{path}` than rank 0{dims}: {SAME}")
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

    /// The dims of an input on a rank and on the first, in words, if they are not the same. Collective.
    fn dims_of(&self, input: usize, rank: usize, group: &Communicator) -> Result<String, Error> {
        /// More dims than tensors have.
        const MOST: usize = 16;
        let own = self.inputs.get(input).map(|(_, dims)| dims.as_slice()).unwrap_or_default();
        let mut told = vec![u64::MAX; MOST];
        told.iter_mut().zip(own).for_each(|(told, dim)| *told = *dim as u64);
        let all = group.all_gather(told)?;
        let dims = |rank: usize| -> Vec<u64> {
            all.chunks(MOST).nth(rank).into_iter().flatten().copied().take_while(|dim| *dim != u64::MAX).collect()
        };
        let (theirs, first) = (dims(rank), dims(0));
        Ok(if theirs == first { String::new() } else { format!(", of dims {theirs:?} and not {first:?}") })
    }
}

const SAME: &str = "the ranks that share a model pass the same whole inputs, each of them; replicas with inputs of their own are along \
                    another axis";

/// What a rank has told.
struct Told<'a> {
    turn: u64,
    updates: u64,
    digests: &'a [u64],
}

fn by_rank(mut told: &[u64]) -> Vec<Told<'_>> {
    let mut ranks = Vec::new();
    while let [turn, inputs, updates, rest @ ..] = told {
        let (digests, others) = rest.split_at((*inputs as usize).min(rest.len()));
        ranks.push(Told { turn: *turn, updates: *updates, digests });
        told = others;
    }
    ranks
}
