//! Into how many pieces a multiplication is cut, and who carries the pieces to the other ranks.

use std::ops::Range;

use crate::comm::{Communicator, part};

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

    /// What is done for a product and its collective. The same on all ranks that have the same sizes.
    pub(super) fn plan(&self, size: Size, comm: &Communicator) -> Schedule {
        let background = self.background.unwrap_or(size.on_device || !comm.works_on_callers());
        let bytes = size.rows.saturating_mul(size.row_bytes);
        let chunks = match (self.chunks, background) {
            (Some(chunks), _) => chunks.min(size.rows),
            (None, false) => (bytes / IN_CACHE).min(8).min(size.rows / FEWEST_ROWS),
            (None, true) if size.on_device => (bytes / ON_DEVICE).min(size.flops() / HIDING_ON_DEVICE).min(4),
            (None, true) => (bytes / IN_FLIGHT).min(size.flops() / HIDING).min(4),
        };
        let chunks = chunks.max(1);
        // One chunk travels alone, unless something else is to be computed: another thread would only be one more wait.
        let hides = chunks > 1 || size.beside && (bytes >= IN_FLIGHT || self.background.is_some());
        Schedule { chunks, background: background && hides }
    }

    pub(super) fn runs_in_background(&self, comm: &Communicator) -> bool {
        self.background.unwrap_or(!comm.works_on_callers())
    }
}

/// Bytes of a chunk that is reduced in the thread that made it: with what the multiplication needs beside it, it stays in
/// the caches of a core. Smaller chunks win nothing, and each costs the packing of the weight.
const IN_CACHE: usize = 2 << 20;

/// Rows of such a chunk at least, for the same reason.
const FEWEST_ROWS: usize = 256;

/// Bytes of a chunk that travels beside the next multiplication.
const IN_FLIGHT: usize = 512 << 10;

/// Floating-point operations of a chunk in the time of which another may travel: 1 to 2 ms of a core. The thread that sends
/// it competes with those that compute and gets its turn within about that.
const HIDING: usize = 100_000_000;

/// The same for a GPU: bytes that keep its links busy, and work that keeps the device so for about 0.1 ms. By reckoning, not by
/// measurement.
const ON_DEVICE: usize = 4 << 20;
const HIDING_ON_DEVICE: usize = 10_000_000_000;

/// The size of a product whose rows travel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub rows: usize,
    /// Of what travels.
    pub row_bytes: usize,
    /// Multiplications for each row.
    pub row_work: usize,
    /// Whether something else can be computed while the last chunk travels.
    pub beside: bool,
    /// Whether it is computed on a device other than the host.
    pub on_device: bool,
}

impl Size {
    fn flops(&self) -> usize {
        2usize.saturating_mul(self.rows).saturating_mul(self.row_work)
    }
}

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
