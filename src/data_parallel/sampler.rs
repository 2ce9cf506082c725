//! Which items of a dataset each rank takes, in which order.

use std::fmt;
use std::sync::Arc;

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Error;
use crate::comm::Communicator;

/// Deals the items of a dataset to the ranks of a group, anew in every epoch.
///
/// An epoch has one order of all items, the same on every rank: that of the dataset, or
/// [shuffled](Self::with_shuffle). The items are dealt like cards: rank `r` of `n` takes the places `r`, `r + n`,
/// `r + 2n`, ... of it.
///
/// So **batches do not depend on the size of the group**: with `B / n` items a batch on each of `n` ranks, the ranks'
/// `b`-th batches together are the places from `b * B` to `(b + 1) * B`, the last batch with whatever is left, for
/// every `n` that divides `B`. (As long as each rank takes its batches in order. burn's `DataLoaderBuilder` does with
/// `num_workers` 0 or 1; more workers deliver the same batches in the order in which they are ready.)
///
/// Nothing is communicated, and every rank must choose the same settings.
/// [`DistributedDataset`](super::DistributedDataset) brings a sampler and a dataset into burn's dataloaders.
///
/// ```
/// use burn_parallel::prelude::*;
///
/// let shares = launch::threads(3).run(|rank| {
///     let sampler = DistributedSampler::new(10, &rank).with_shuffle(42);
///     Ok(sampler.epoch(0)?.iter().collect::<Vec<_>>())
/// })?;
/// assert_eq!(shares, [vec![0, 1, 4, 3], vec![9, 2, 8], vec![6, 5, 7]]);
/// # Ok::<(), Error>(())
/// ```
///
/// # The shuffled order
///
/// It depends on the number of items, the seed and the epoch, and on nothing else: not on the rank, the size of the
/// group, the machine or the version of this crate. No other generator is read or moved by it. The random numbers are
/// the output of ChaCha with 8 rounds, stream 0, in little-endian words of 64 bits, under the key: seed and epoch, each
/// in 8 little-endian bytes, then the 16 bytes `burn-parallel v1`. The order is Fisher and Yates's (Durstenfeld 1964,
/// doi:10.1145/364520.364540): start from that of the dataset; for `i` from the last place down to 1, take the next
/// number `x` and swap place `i` with place `(x * (i + 1)) >> 64`, the product in 128 bits.
///
/// Making it takes time and memory in proportion to the number of items: 4 bytes for each, from 2^32 items on 8, of
/// which this rank's share is kept. Without shuffling, an epoch takes none of either, however long the dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DistributedSampler {
    items: usize,
    rank: usize,
    size: usize,
    shuffle: Option<u64>,
    remainder: Remainder,
}

/// What becomes of the last items of an epoch when the ranks are not equally many to share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Remainder {
    /// Every item once; the first ranks have one more than the others. Ranks may then have different numbers of
    /// batches, and [`ParallelModule::join`](crate::train::ParallelModule::join) ends them together.
    #[default]
    Uneven,
    /// All ranks have equally many: as many items as are missing are repeated, from the start of the epoch's order (and
    /// again from there, if they are fewer than that). An empty dataset stays empty.
    Pad,
    /// All ranks have equally many: the last items of the epoch's order, fewer than there are ranks, are left out. With
    /// a shuffled order they are others in each epoch.
    Drop,
}

impl DistributedSampler {
    /// Deals a dataset of `items` items to the ranks of `group`, in the order of the dataset.
    pub fn new(items: usize, group: &Communicator) -> Self {
        Self { items, rank: group.rank(), size: group.size(), shuffle: None, remainder: Remainder::default() }
    }

    /// Puts the items in another order in every epoch. `seed` must be the same on every rank, as
    /// [`Rank::seed`](crate::launch::Rank::seed) is: with different ones, items are lost and repeated.
    pub fn with_shuffle(mut self, seed: u64) -> Self {
        self.shuffle = Some(seed);
        self
    }

    /// Sets what happens when the items cannot be shared equally. Default [`Remainder::Uneven`].
    pub fn with_remainder(mut self, remainder: Remainder) -> Self {
        self.remainder = remainder;
        self
    }

    /// Number of items of the whole dataset.
    pub fn items(&self) -> usize {
        self.items
    }

    /// Number of items that this rank takes in an epoch.
    pub fn len(&self) -> usize {
        let (share, left) = (self.items / self.size, self.items % self.size);
        match self.remainder {
            Remainder::Uneven => share + usize::from(self.rank < left),
            Remainder::Pad => share + usize::from(left > 0),
            Remainder::Drop => share,
        }
    }

    /// Number of items of the dataset that all ranks take in an epoch, those that are repeated not counted.
    pub(crate) fn epoch_items(&self) -> usize {
        match self.remainder {
            Remainder::Drop => self.len() * self.size,
            Remainder::Uneven | Remainder::Pad => self.items,
        }
    }

    /// Whether this rank takes no items, which happens when there are fewer of them than ranks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What this rank takes in epoch number `epoch`, of which any may be asked for at any time.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if there is no memory for a shuffled order of so many items.
    pub fn epoch(&self, epoch: usize) -> Result<Share, Error> {
        let order = match self.shuffle {
            None => ItemOrder::AsIs,
            Some(seed) if u32::try_from(self.items).is_ok() => {
                ItemOrder::Narrow(self.shuffled(seed, epoch, |item| item as u32)?)
            }
            Some(seed) => ItemOrder::Wide(self.shuffled(seed, epoch, |item| item)?),
        };
        Ok(Share { sampler: *self, epoch, order })
    }

    /// This rank's share of the shuffled items, each as a `T`.
    fn shuffled<T: Copy>(&self, seed: u64, epoch: usize, item: fn(usize) -> T) -> Result<Arc<[T]>, Error> {
        let mut order = Vec::new();
        order.try_reserve_exact(self.items).map_err(|problem| {
            let problem = format!(
                "no memory for the shuffled order of {} items ({problem}); shuffle groups of items, or leave the dataset \
                 in its order",
                self.items
            );
            Error::invalid("DistributedSampler::epoch", problem)
        })?;
        order.extend((0..self.items).map(item));
        shuffle(&mut order, seed, epoch);
        Ok((0..self.len()).map(|turn| order[self.place(turn)]).collect())
    }

    /// The place, in the epoch's order, of the item that this rank takes in its `turn`, which is below [`Self::len`].
    fn place(&self, turn: usize) -> usize {
        let dealt = turn * self.size;
        let left = self.items - dealt;
        if self.rank < left { dealt + self.rank } else { (self.rank - left) % self.items }
    }
}

/// Fisher and Yates's shuffle on ChaCha8, as [`DistributedSampler`] promises it.
fn shuffle<T>(order: &mut [T], seed: u64, epoch: usize) {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
    key[16..].copy_from_slice(b"burn-parallel v1");
    let mut rng = ChaCha8Rng::from_seed(key);
    for last in (1..order.len()).rev() {
        let other = (u128::from(rng.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
}

/// The items that one rank takes in one epoch, as indices into the dataset. Made by [`DistributedSampler::epoch`];
/// cheap to clone and to ask.
#[derive(Clone)]
pub struct Share {
    sampler: DistributedSampler,
    epoch: usize,
    order: ItemOrder,
}

/// The items of a rank in its turns.
#[derive(Clone)]
enum ItemOrder {
    /// Those at its places.
    AsIs,
    /// These, all indices below 2^32.
    Narrow(Arc<[u32]>),
    /// These.
    Wide(Arc<[usize]>),
}

impl Share {
    /// Number of items.
    pub fn len(&self) -> usize {
        self.sampler.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sampler.is_empty()
    }

    /// The epoch that it belongs to.
    pub fn epoch(&self) -> usize {
        self.epoch
    }

    /// Index of the item that comes `turn`-th; none from [`len`](Self::len) on.
    pub fn get(&self, turn: usize) -> Option<usize> {
        match &self.order {
            ItemOrder::AsIs => (turn < self.len()).then(|| self.sampler.place(turn)),
            ItemOrder::Narrow(items) => items.get(turn).map(|item| *item as usize),
            ItemOrder::Wide(items) => items.get(turn).copied(),
        }
    }

    /// The indices in turn.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.len()).map_while(|turn| self.get(turn))
    }

    /// The indices of what is left for this rank when the first `items` of the epoch's order have been taken by all
    /// ranks together, however many these were: when training goes on in the middle of an epoch.
    pub fn after(&self, items: usize) -> Vec<usize> {
        let DistributedSampler { rank, size, .. } = self.sampler;
        let first = items.saturating_sub(rank).div_ceil(size);
        (first..self.len()).map_while(|turn| self.get(turn)).collect()
    }

    pub(super) fn sampler(&self) -> &DistributedSampler {
        &self.sampler
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Share(epoch {}: {} items of {:?})", self.epoch, self.len(), self.sampler)
    }
}
