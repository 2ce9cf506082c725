//! Where in the data training is.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::data_parallel::DistributedSampler;

/// Where in the data training is: an epoch, and how many of its items the replicas have taken together. Part of a
/// checkpoint, as a [value](super::TrainState::with_value): [`DistributedSampler`]'s order depends on seed and epoch
/// alone, so training goes on with the next item, none lost and none repeated, on any number of replicas.
///
/// ```
/// use burn_parallel::checkpoint::DataPosition;
/// use burn_parallel::prelude::*;
///
/// // Two replicas have taken two items each of the first epoch; three go on.
/// let position = DataPosition { epoch: 0, items: 4 };
/// let rest = launch::threads(3).run(|rank| position.rest(&DistributedSampler::new(11, &rank)))?;
/// assert_eq!(rest, [vec![6, 9], vec![4, 7, 10], vec![5, 8]]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPosition {
    /// The epoch.
    pub epoch: usize,
    /// The items of it that all replicas have taken together: the first so many of its order.
    pub items: usize,
}

impl DataPosition {
    /// The items of this epoch that this replica takes from here on, in turn.
    ///
    /// Nothing where replicas that are more than before leave out what is left ([`Remainder::Drop`]): an
    /// [`advance`](Self::advance) by 0 items before the first step goes on to the next epoch.
    ///
    /// [`Remainder::Drop`]: crate::data_parallel::Remainder::Drop
    ///
    /// # Errors
    /// Those of [`DistributedSampler::epoch`]; [`Error::InvalidArgument`] if more items were taken than there are. Data
    /// with another seed, or other data of as many items, goes unnoticed: save what tells them apart as a value too.
    pub fn rest(&self, sampler: &DistributedSampler) -> Result<Vec<usize>, Error> {
        if self.items > sampler.items() {
            let problem = format!(
                "{} items of epoch {} were taken, and the dataset has {}: it is another one; begin anew with \
                 `DataPosition::default()`",
                self.items,
                self.epoch,
                sampler.items()
            );
            return Err(Error::invalid("DataPosition::rest", problem));
        }
        sampler.epoch(self.epoch).map(|share| share.after(self.items))
    }

    /// After a step for which all replicas together took `items` items: goes on to the next epoch at the end of this
    /// one.
    pub fn advance(&mut self, items: usize, sampler: &DistributedSampler) {
        self.items = self.items.saturating_add(items);
        if self.items >= sampler.epoch_items() {
            *self = Self { epoch: self.epoch.saturating_add(1), items: 0 };
        }
    }
}
