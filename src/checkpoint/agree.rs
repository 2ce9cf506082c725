//! Errors that all ranks return alike, and texts that they tell each other.

use super::checkpoint_error;
use crate::Error;
use crate::comm::Communicator;
use crate::params;

/// What a rank does by itself: that it panics is an error like others.
pub(super) fn attempt<T>(run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    params::attempt(run, checkpoint_error)
}

/// What this rank has, if none of the group failed; else the error of the first that did.
///
/// # Errors
/// That one, on all ranks alike, with the rank; those of the group.
pub(super) fn together<T>(outcome: Result<T, Error>, group: &Communicator) -> Result<T, Error> {
    let words = |error| match error {
        Error::Checkpoint { problem } => problem,
        error => error.to_string(),
    };
    params::together(outcome, group, words, checkpoint_error)
}

/// The bytes of all ranks, in their order, on every rank. What several ranks bring alike travels once, and is the same
/// [`Shared::text`] then.
///
/// # Errors
/// Those of the group.
pub(super) fn exchange(bytes: Vec<u8>, group: &Communicator) -> Result<Shared, Error> {
    let digest = xxhash_rust::xxh3::xxh3_128(&bytes);
    let both = vec![digest as u64, (digest >> 64) as u64, bytes.len() as u64];
    let told = group.all_gather(both)?;
    let digests: Vec<&[u64]> = told.chunks_exact(3).collect();
    let first: Vec<usize> =
        digests.iter().map(|digest| digests.iter().position(|other| other == digest).unwrap_or_default()).collect();
    let own = if first[group.rank()] == group.rank() { bytes } else { Vec::new() };
    let mut rest = group.all_gather(own)?;
    let mut texts = vec![Vec::new(); digests.len()];
    for (rank, text) in texts.iter_mut().enumerate().filter(|(rank, _)| first[*rank] == *rank) {
        let behind = rest.split_off((digests[rank][2] as usize).min(rest.len()));
        *text = std::mem::replace(&mut rest, behind);
    }
    Ok(Shared { texts, first })
}

/// What the ranks of a group brought.
pub(super) struct Shared {
    texts: Vec<Vec<u8>>,
    first: Vec<usize>,
}

impl Shared {
    /// The ranks that brought what no rank before them did, each with that.
    pub(super) fn distinct(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let own = self.texts.iter().enumerate().filter(|(rank, _)| self.first[*rank] == *rank);
        own.map(|(rank, text)| (rank, text.as_slice()))
    }

    /// The ranks that brought the same as `rank`.
    pub(super) fn same_as(&self, rank: usize) -> Vec<usize> {
        (0..self.first.len()).filter(|other| self.first[*other] == self.first[rank]).collect()
    }
}

/// The bytes of every rank on rank 0, in their order; nothing on the others.
///
/// # Errors
/// Those of the group.
pub(super) fn gather(bytes: Vec<u8>, group: &Communicator) -> Result<Vec<Vec<u8>>, Error> {
    if group.rank() > 0 {
        group.send(bytes, 0, 0)?;
        return Ok(Vec::new());
    }
    std::iter::once(Ok(bytes)).chain((1..group.size()).map(|rank| group.recv(rank, 0))).collect()
}
