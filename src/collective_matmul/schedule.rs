//! Into how many chunks a product is cut, and which thread runs their collectives.

use std::ops::Range;

use crate::Error;
use crate::comm::{Communicator, ReduceOp, part};

/// How a multiplication and its collective are cut into chunks that overlap.
///
/// All ranks of the group must choose the same. Without a choice it is made by size: one chunk, the plain
/// multiplication and then the collective, where cutting costs more than it hides. Where that depends on the weights,
/// of which ranks may have unlike parts, they ask each other first: one number of each, and only if so many bytes
/// travel that it may be worth it. The layers know all parts and do not ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overlap {
    chunks: Option<usize>,
    background: Option<bool>,
    split: Option<usize>,
}

impl Overlap {
    /// Chooses by size and by transport.
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

    /// Whether collectives run on the communicator's background thread ([`Communicator::start`]) while the next chunk
    /// is multiplied, or in the rank's thread right behind their chunk, while it is in the cache. The latter is chosen
    /// for transports whose collectives are the work of the calling threads themselves
    /// ([`Transport::works_on_callers`](crate::comm::Transport::works_on_callers)): there is nothing to wait for, and a
    /// second thread would take the core from the first.
    #[must_use]
    pub fn in_background(mut self, background: bool) -> Self {
        self.background = Some(background);
        self
    }

    /// Says how large the dim of the weights along which they are split is over all ranks: then these need not ask each
    /// other.
    #[must_use]
    pub(crate) fn over(mut self, split: usize) -> Self {
        self.split = Some(split);
        self
    }

    /// What is done for a product and its collective: the same on all ranks. `even` says that they have parts of the
    /// same size.
    pub(super) fn plan(&self, mut size: Size, even: bool, comm: &Communicator) -> Result<ChunkSchedule, Error> {
        let background = self.background.unwrap_or(size.on_device || !comm.works_on_callers());
        let bytes = size.rows.saturating_mul(size.row_bytes);
        let (travels, hiding) = if size.on_device { (ON_DEVICE, HIDING_ON_DEVICE) } else { (IN_FLIGHT, HIDING) };
        let chunks = match (self.chunks, background) {
            (Some(chunks), _) => chunks.min(size.rows),
            (None, false) => (bytes / IN_CACHE).min(8).min(size.rows / FEWEST_ROWS),
            (None, true) => {
                let most = (bytes / travels).min(4);
                match self.split {
                    _ if even || most < 2 => {}
                    Some(split) => size.split = split / comm.size(),
                    None => size.split = least(size.split, comm)?,
                }
                most.min(size.flops() / hiding)
            }
        };
        let chunks = chunks.max(1);
        // One chunk travels alone, unless something else is to be computed: another thread would only be one more wait.
        let hides = chunks > 1 || size.beside && (bytes >= IN_FLIGHT || self.background.is_some());
        Ok(ChunkSchedule { chunks, background: background && hides })
    }

    pub(super) fn runs_in_background(&self, comm: &Communicator) -> bool {
        self.background.unwrap_or(!comm.works_on_callers())
    }
}

/// The smallest of what the ranks have.
fn least(own: usize, comm: &Communicator) -> Result<usize, Error> {
    let least = comm.all_reduce(vec![own as u64], ReduceOp::Min)?;
    Ok(least.first().map_or(own, |least| *least as usize))
}

/// Bytes of a chunk that is reduced in the thread that made it: with what the multiplication needs beside it, it stays
/// in the caches of a core. Smaller chunks win nothing, and each costs the packing of the weight.
const IN_CACHE: usize = 2 << 20;

/// Rows of such a chunk at least, for the same reason.
const FEWEST_ROWS: usize = 256;

/// Bytes of a chunk that travels beside the next multiplication.
const IN_FLIGHT: usize = 512 << 10;

/// Floating-point operations of a chunk in the time of which another may travel: 1 to 2 ms of a core. The thread that
/// sends it competes with those that compute and gets its turn within about that.
const HIDING: usize = 100_000_000;

/// The same for a GPU: bytes that keep its links busy, and work that keeps the device so for about 0.1 ms. By
/// reckoning, not by measurement.
const ON_DEVICE: usize = 4 << 20;
const HIDING_ON_DEVICE: usize = 10_000_000_000;

/// The size of a product whose rows travel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub rows: usize,
    /// Of what travels.
    pub row_bytes: usize,
    /// Features that each multiplication of a row has in common: all ranks have as many.
    pub across: usize,
    /// What this rank has of the split dim, over all factors.
    pub split: usize,
    /// Whether something else can be computed while the last chunk travels.
    pub beside: bool,
    /// Whether it is computed on a device other than the host.
    pub on_device: bool,
}

impl Size {
    fn flops(&self) -> usize {
        2usize.saturating_mul(self.rows).saturating_mul(self.across).saturating_mul(self.split)
    }
}

/// What [`Overlap`] comes to for a multiplication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkSchedule {
    pub chunks: usize,
    pub background: bool,
}

impl ChunkSchedule {
    /// The chunks of `len` rows or positions, in order.
    pub fn cut(&self, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let chunks = self.chunks;
        (0..chunks).map(move |chunk| part(len, chunks, chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch;

    /// A rank that has more may choose more chunks.
    #[test]
    fn ranks_of_unlike_parts_plan_alike() {
        let rows = 512;
        let ask = Overlap::auto().in_background(true);
        let run = launch::threads(3).run(|rank| {
            let mut unlike = 0;
            for total in 900..3400 {
                for (on_device, across) in [(false, 512), (true, 20_000)] {
                    let split = part(total, 3, rank.rank()).len();
                    let size = Size { rows, row_bytes: across * 4, across, split, beside: false, on_device };
                    let before = rank.counters().total().calls;
                    let asked = ask.plan(size, false, &rank)?.chunks;
                    assert_eq!(rank.counters().total().calls - before, 1);
                    let known = ask.over(total).plan(size, false, &rank)?.chunks;
                    let alone = ask.plan(size, true, &rank)?.chunks;
                    assert_eq!(rank.counters().total().calls - before, 1, "nothing to ask");
                    let all = rank.all_gather(vec![asked as u64, known as u64, alone as u64])?;
                    assert!(all.chunks(3).all(|of| of[..2] == [asked as u64, known as u64]), "{all:?} of {total}");
                    unlike += usize::from(all[2] != all[8]);
                }
            }
            assert!(unlike > 0, "or this tests nothing");
            // What does not depend on it is not asked.
            let size = Size { rows, row_bytes: 512, across: 128, split: 40, beside: false, on_device: false };
            let before = rank.counters().total().calls;
            for overlap in [ask, ask.with_chunks(4), Overlap::auto()] {
                overlap.plan(size, false, &rank)?;
            }
            Overlap::auto().plan(Size { row_bytes: 1 << 20, ..size }, false, &rank)?;
            assert_eq!(rank.counters().total().calls, before);
            Ok(())
        });
        run.unwrap();
    }
}
