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
    /// # Errors
    /// Those of [`DistributedSampler::epoch`].
    pub fn rest(&self, sampler: &DistributedSampler) -> Result<Vec<usize>, Error> {
        sampler.epoch(self.epoch).map(|share| share.after(self.items))
    }

    /// After a step for which all replicas together took `items` items: goes on to the next epoch at the end of this
    /// one.
    pub fn advance(&mut self, items: usize, sampler: &DistributedSampler) {
        self.items += items;
        if self.items >= sampler.epoch_items() {
            *self = Self { epoch: self.epoch + 1, items: 0 };
        }
    }
}
