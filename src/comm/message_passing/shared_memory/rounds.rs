//! The counters that order access to the slots: what each rank has published, and what the group root has committed.
//!
//! # Protocol
//!
//! Every rank owns two *slots*, and a counter that only grows. It writes into a slot, then *publishes* it: the counter
//! goes up by one. All ranks of a group go through the same steps, so each knows by its own counter what the others'
//! must be for their slots to be readable.
//!
//! A *round* uses one slot of every rank, and the next round the other. In every round each rank
//!
//! 1. writes into its slot, if it contributes anything, and publishes it,
//! 2. waits until all have published theirs, and reads them,
//! 3. if the round has a second part: writes its result into a part of its slot that nobody reads in the first part,
//!    publishes that, waits for the ranks whose results it wants, and reads them.
//!
//! **Who may write when?** A rank that begins round `r + 2` overwrites what it published in round `r`. It has waited in
//! round `r + 1` until all had published theirs, and a rank publishes its slot of `r + 1` only when it is done with
//! reading round `r`: the one step in each round where every rank waits for every other, or for one that has, keeps the
//! two slots apart.
//!
//! **Committing.** The first round of a collective is the *agreement*: a rank writes its call. Rank 0 of the group, the
//! group root, waits for all, compares, and commits: it writes the number of its own step into a counter of its own.
//! The others wait for that counter, not for each other; they then know that all have published their slots, for the
//! group root has seen it. [`message_passing`](super::super) describes what happens between a commit and the failure of
//! a world.
//!
//! **Memory order.** Data is written before it is published (release), and read after the counter was seen (acquire). A
//! rank that sees the commit has seen what the group root saw before it wrote it: all counters of this step.

use crossbeam_utils::CachePadded;

use super::sync::{AtomicU64, Ordering};

/// A counter, on a cache line of its own.
pub(super) type Counter = CachePadded<AtomicU64>;

/// The counters of a group.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoundCounters<'a> {
    /// The last step that the group root has committed.
    pub committed: &'a Counter,
    /// The last step that each rank has published.
    pub published: &'a [Counter],
}

/// The position of a rank in the rounds of its group.
#[derive(Debug)]
pub struct Rounds {
    rank: usize,
    round: u64,
    step: u64,
}

impl Rounds {
    pub fn new(rank: usize) -> Self {
        Self { rank, round: 0, step: 0 }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Which of its two slots each rank uses in this round.
    pub fn slot(&self) -> usize {
        (self.round % 2) as usize
    }

    /// Publishes what this rank has written.
    pub(super) fn publish(&mut self, counters: RoundCounters<'_>) {
        self.step += 1;
        counters.published[self.rank].store(self.step, Ordering::Release);
    }

    /// Whether all ranks have published this step.
    pub(super) fn all_published(&self, counters: RoundCounters<'_>) -> bool {
        counters.published.iter().all(|published| published.load(Ordering::Acquire) >= self.step)
    }

    /// The group root commits this step. It has seen that all ranks have called.
    pub(super) fn commit(&self, counters: RoundCounters<'_>) {
        counters.committed.store(self.step, Ordering::Release);
    }

    /// Whether the collective is committed: all ranks have called.
    pub(super) fn committed(&self, counters: RoundCounters<'_>) -> bool {
        counters.committed.load(Ordering::Acquire) >= self.step
    }

    /// Goes on to the next round, once this rank has read all that it wants of this one.
    pub fn next_round(&mut self) {
        self.round += 1;
    }
}
