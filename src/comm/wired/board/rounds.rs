//! The counters of a board: what each rank has shown to the others, and the decider's word.
//!
//! # Protocol
//!
//! Every rank owns a *slot* with two *sides* to write on, and a counter that only grows. It writes on a side, then *shows*
//! it: the counter goes up by one. All ranks of a group go through the same steps, so each knows by its own counter what the
//! others' must be for their sides to be there to be read.
//!
//! A *round* uses one side of every slot, and the next round the other. In every round each rank
//!
//! 1. writes on its side, if it has something to say, and shows it,
//! 2. waits until all have shown theirs, and reads them,
//! 3. if the round has a second part: writes what came out over a place on its side that nobody reads in the first part, shows
//!    that, waits for those whose results it wants, and reads them.
//!
//! **Who may write when?** A rank that begins round `r + 2` writes over what it showed in round `r`. It has waited in round
//! `r + 1` until all had shown theirs, and a rank shows its side of `r + 1` only when it is done with reading round `r`: the one
//! step in each round where everybody waits for everybody, or for somebody who has, keeps the two sides apart.
//!
//! **Committing.** The first round of a collective is a *meeting*: on its side a rank writes its call. Rank 0 of the group waits
//! for all, compares, and commits: it writes the number of its own step into a word of its own. The others wait for that
//! word, not for each other; they then know that all have shown their sides, for the decider has seen it.
//! What happens between a commit and the failure of a world is told in [`wired`](super::super).
//!
//! **Memory order.** What is shown is written before the counter (release), and read after the counter was seen (acquire). Who
//! sees the word has seen what the decider saw before it wrote it: all counters of this step.

use crossbeam_utils::CachePadded;

use super::sync::{AtomicU64, Ordering};

/// A counter, on a cache line of its own.
pub(super) type Line = CachePadded<AtomicU64>;

/// The counters of a board.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counters<'a> {
    /// The decider's word.
    pub word: &'a Line,
    /// What each rank has shown.
    pub shown: &'a [Line],
}

/// Where a rank is in the rounds of its group.
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

    /// The side of this round.
    pub fn side(&self) -> usize {
        (self.round % 2) as usize
    }

    /// Shows what this rank has written.
    pub(super) fn show(&mut self, counters: Counters<'_>) {
        self.step += 1;
        counters.shown[self.rank].store(self.step, Ordering::Release);
    }

    /// Whether all ranks have come as far as this one.
    pub(super) fn all_shown(&self, counters: Counters<'_>) -> bool {
        counters.shown.iter().all(|shown| shown.load(Ordering::Acquire) >= self.step)
    }

    /// The decider's word that this meeting takes place. It has seen that all have come.
    pub(super) fn commit(&self, counters: Counters<'_>) {
        counters.word.store(self.step, Ordering::Release);
    }

    /// Whether this meeting takes place: all ranks have come.
    pub(super) fn committed(&self, counters: Counters<'_>) -> bool {
        counters.word.load(Ordering::Acquire) >= self.step
    }

    /// Goes on to the next round, once all that is wanted of this one has been read.
    pub fn turn_over(&mut self) {
        self.round += 1;
    }
}
