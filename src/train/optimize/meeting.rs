//! What the ranks that are given a new optimizer tell each other before any of them goes on: whether it suits their
//! parts, or with what error it was refused. A rank that left by itself would have the others wait for it.

use super::optimizer_error::optimizer_error;
use crate::Error;
use crate::comm::{Communicator, NEW_OPTIMIZER, agreed_number};

/// Begins what another rank has found.
const ON_RANK: &str = "on rank ";

/// Ranks that have found out, each by itself, whether an optimizer suits their parts.
pub(super) struct Meeting<'a> {
    /// The groups over which they meet, one behind the other.
    pub over: Vec<&'a Communicator>,
    /// Those whose ranks wait for this one.
    pub groups: &'a [Communicator],
}

impl Meeting<'_> {
    /// What this rank has found out, if all have found that the optimizer suits them. If some of the ranks have an
    /// error, or others wait that do not meet here, the world fails with it. Collective over the groups.
    ///
    /// # Errors
    /// [`Error::Optimizer`], with the rank, of the first that has one; that of this rank, if all have; those of
    /// [`Communicator`].
    pub fn outcome<T>(&self, mine: Result<T, Error>) -> Result<T, Error> {
        let Some(first) = self.over.iter().find(|group| group.size() > 1) else {
            return mine.map_err(|error| fail_here(self.groups, error));
        };
        let failed = if mine.is_err() { 1 + first.world_rank() as u64 } else { 0 };
        let tell = |all, group: &&Communicator| group.all_gather_agreed(all, agreed_number(NEW_OPTIMIZER));
        let all = self.over.iter().try_fold(vec![failed], tell)?;
        let Some(failed) = all.iter().find(|failed| **failed > 0) else { return mine };
        let ranks = |groups: &mut dyn Iterator<Item = &Communicator>| groups.map(Communicator::size).product::<usize>();
        let all_are_here = ranks(&mut self.over.iter().copied()) >= ranks(&mut self.groups.iter());
        match mine {
            // Nobody waits for another, and the world goes on.
            Err(error) if all_are_here && !all.contains(&0) => Err(error),
            mine => Err(fail_all(self.groups, error_of(&self.over, failed - 1, mine.err())?)),
        }
    }
}

/// The error that a rank of the world has found, for all ranks of these groups. Collective.
pub(super) fn error_of(groups: &[&Communicator], rank: u64, own: Option<Error>) -> Result<Error, Error> {
    let is_it = groups.iter().any(|group| group.world_rank() as u64 == rank);
    let said = own.filter(|_| is_it).map(what_it_says).unwrap_or_default().into_bytes();
    let said = groups.iter().try_fold(said, |all, group| group.all_gather(all))?;
    Ok(on_rank(rank, &String::from_utf8_lossy(&said)))
}

/// Fails the world of these groups, if others are in it. Returns what all have then: ranks that do not meet may have
/// failed it before, with an error of theirs.
pub(super) fn fail_all(groups: &[Communicator], error: Error) -> Error {
    groups.iter().filter(|group| group.size() > 1).fold(error, |error, group| group.fail_with(error))
}

/// The same with an error of this rank alone, which names the rank.
pub(super) fn fail_here(groups: &[Communicator], error: Error) -> Error {
    let error = match (groups.iter().find(|group| group.size() > 1), error) {
        (Some(group), Error::Optimizer { problem }) => on_rank(group.world_rank() as u64, &problem),
        (_, error) => error,
    };
    fail_all(groups, error)
}

/// What a rank has found, with the rank. Those that meet over other groups as well may have it of that one already.
fn on_rank(rank: u64, said: &str) -> Error {
    match said.starts_with(ON_RANK) {
        true => optimizer_error(said.into()),
        false => optimizer_error(format!("{ON_RANK}{rank} of the world {said}")),
    }
}

fn what_it_says(error: Error) -> String {
    match error {
        Error::Optimizer { problem } => problem,
        error => error.to_string(),
    }
}
