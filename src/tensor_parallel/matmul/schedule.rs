//! Into how many pieces a multiplication is cut, and who carries the pieces to the other ranks.

use std::ops::Range;

use crate::comm::{Communicator, part};

/// Rows of a chunk at least: with fewer, a multiplication is slower for what it does, as the weight is packed anew for each.
const FEWEST_ROWS: usize = 64;

/// How a multiplication and its collective are cut into chunks that overlap.
///
/// All ranks of the group must choose the same. Without a choice it is made by size: one chunk, the plain multiplication
/// and then the collective, where cutting costs more than it hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overlap {
    chunks: Option<usize>,
    background: Option<bool>,
}

impl Overlap {
    /// Chooses by size and by engine.
    pub fn auto() -> Self {
        Self::default()
    }

    /// No overlap: the whole multiplication, then the whole collective.
    pub fn none() -> Self {
        Self::auto().with_chunks(1).in_background(false)
    }

    /// Cuts into this many chunks, or fewer if there are fewer rows; 0 counts as 1.
    #[must_use]
    pub fn with_chunks(mut self, chunks: usize) -> Self {
        self.chunks = Some(chunks.max(1));
        self
    }

    /// Whether collectives run on the communicator's background thread ([`Communicator::start`]) while the next chunk is
    /// multiplied, or in the rank's thread right behind their chunk, while it is in the cache. The latter is chosen for
    /// engines whose collectives are the work of the calling threads themselves
    /// ([`Transport::works_on_callers`](crate::comm::Transport::works_on_callers)): there is nothing to wait for, and a
    /// second thread would take the core from the first.
    #[must_use]
    pub fn in_background(mut self, background: bool) -> Self {
        self.background = Some(background);
        self
    }

    /// What is done for a collective over `rows` rows of `row_bytes` bytes each. The same on all ranks that have the same
    /// rows.
    pub(super) fn plan(&self, rows: usize, row_bytes: usize, comm: &Communicator) -> Schedule {
        let background = self.runs_in_background(comm);
        let bytes = rows.saturating_mul(row_bytes);
        let chunks = match (self.chunks, background) {
            (Some(chunks), _) => chunks.min(rows),
            // In the cache: a chunk and what the multiplication needs beside it fit the second level.
            (None, false) => (bytes / IN_CACHE).clamp(1, 16).min(rows / FEWEST_ROWS),
            (None, true) => (bytes / IN_FLIGHT).clamp(1, 4).min(rows / FEWEST_ROWS),
        };
        Schedule { chunks: chunks.max(1), background }
    }

    pub(super) fn runs_in_background(&self, comm: &Communicator) -> bool {
        self.background.unwrap_or(!comm.works_on_callers())
    }
}

/// Bytes of a chunk that is reduced in the thread that made it.
const IN_CACHE: usize = 1 << 20;

/// Bytes of a chunk that travels beside the next multiplication.
const IN_FLIGHT: usize = 128 << 10;

/// What [`Overlap`] comes to for a multiplication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Schedule {
    pub chunks: usize,
    pub background: bool,
}

impl Schedule {
    /// The chunks of `len` rows or positions, in order.
    pub fn cut(&self, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let chunks = self.chunks;
        (0..chunks).map(move |chunk| part(len, chunks, chunk))
    }
}
