//! A burn dataset of the items that one rank takes of another dataset.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use burn::data::dataset::Dataset;

use super::sampler::{DistributedSampler, Share};
use crate::Error;

/// A rank's share of a dataset in one epoch, itself a burn [`Dataset`]: what a [`DistributedSampler`] deals to this
/// rank.
///
/// It goes into burn's `DataLoaderBuilder`, which must not shuffle again (no `shuffle`): the order is the sampler's,
/// and [`epoch`](Self::epoch) brings the next one.
///
/// ```
/// use burn::data::dataloader::{DataLoaderBuilder, batcher::Batcher};
/// use burn::data::dataset::{Dataset, InMemDataset};
/// use burn::nn::LinearConfig;
/// use burn::optim::{ModuleOptimizer, SgdConfig};
/// use burn::tensor::{Device, Tensor};
/// use burn_parallel::prelude::*;
///
/// /// Makes a column of numbers.
/// struct Column;
///
/// impl Batcher<f32, Tensor<2>> for Column {
///     fn batch(&self, items: Vec<f32>, device: &Device) -> Tensor<2> {
///         Tensor::<1>::from_floats(items.as_slice(), device).unsqueeze_dim(1)
///     }
/// }
///
/// let losses = launch::threads(2).run(|rank| {
///     let device = rank.device().autodiff();
///     let mut model = LinearConfig::new(1, 1).init(&device).data_parallel(&rank, DataParallelConfig::new())?;
///     let mut optim: ModuleOptimizer = SgdConfig::new().init();
///
///     let numbers = InMemDataset::new((0..101).map(|i| i as f32 / 100.0).collect());
///     let sampler = DistributedSampler::new(numbers.len(), &rank).with_shuffle(rank.seed());
///     let dataset = DistributedDataset::new(numbers, sampler)?;
///
///     let mut loss = f64::NAN;
///     for epoch in 0..20 {
///         let loader = DataLoaderBuilder::new(Column)
///             .batch_size(5) // of this rank: 10 together
///             .num_workers(1)
///             .set_device(device.clone())
///             .build(dataset.epoch(epoch)?);
///         for batch in model.join(loader.iter()) {
///             let batch = batch?.transpose().map_err(Error::user)?;
///             let step = model.step_micro_batches(batch, |model, x| {
///                 let items = x.dims()[0] as f64;
///                 let error = model.forward(x.clone()) - x * 2.0; // learn to double
///                 Loss::mean((error.clone() * error).mean(), items)
///             })?;
///             loss = step.loss.item();
///             model = optim.step(0.2, model, step.grads);
///         }
///     }
///     Ok(loss)
/// })?;
/// assert!(losses[0] < 0.01 && losses[0] == losses[1]);
/// # Ok::<(), Error>(())
/// ```
pub struct DistributedDataset<D> {
    dataset: Arc<D>,
    share: Share,
}

impl<D> DistributedDataset<D> {
    /// This rank's share of `dataset` in epoch 0.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if the sampler was made for another number of items; the errors of
    /// [`DistributedSampler::epoch`].
    pub fn new<I, E>(dataset: D, sampler: DistributedSampler) -> Result<Self, Error>
    where
        D: Dataset<I, E>,
        E: StdError + Send + Sync + 'static,
    {
        let (items, expected) = (dataset.len(), sampler.items());
        if items != expected {
            let problem =
                format!("the dataset has {items} items, but its sampler was made for {expected}; give it both");
            return Err(Error::invalid("DistributedDataset::new", problem));
        }
        Ok(Self { dataset: Arc::new(dataset), share: sampler.epoch(0)? })
    }

    /// The same dataset in epoch number `epoch`. The dataset is shared, not copied.
    ///
    /// # Errors
    ///
    /// Those of [`DistributedSampler::epoch`].
    pub fn epoch(&self, epoch: usize) -> Result<Self, Error> {
        let share = if epoch == self.share.epoch() { self.share.clone() } else { self.share.sampler().epoch(epoch)? };
        Ok(Self { dataset: self.dataset.clone(), share })
    }

    /// The indices, in the whole dataset, of this rank's items.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// Index in the whole dataset of this rank's item `index`.
    ///
    /// # Panics
    ///
    /// If there is no such item, as [`Dataset::get`] wants it.
    fn item(&self, index: usize) -> usize {
        let len = self.share.len();
        self.share.get(index).unwrap_or_else(|| panic!("Index out of bounds for DistributedDataset: {index} >= {len}"))
    }
}

impl<D, I, E> Dataset<I, E> for DistributedDataset<D>
where
    D: Dataset<I, E>,
    E: StdError + Send + Sync + 'static,
{
    fn get(&self, index: usize) -> Result<I, E> {
        self.dataset.get(self.item(index))
    }

    fn get_many(&self, indexes: Vec<usize>) -> Result<Vec<I>, E> {
        self.dataset.get_many(indexes.into_iter().map(|index| self.item(index)).collect())
    }

    fn len(&self) -> usize {
        self.share.len()
    }
}

impl<D> Clone for DistributedDataset<D> {
    fn clone(&self) -> Self {
        Self { dataset: self.dataset.clone(), share: self.share.clone() }
    }
}

impl<D> fmt::Debug for DistributedDataset<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DistributedDataset({:?})", self.share)
    }
}
