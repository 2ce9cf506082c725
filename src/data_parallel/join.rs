//! Lets ranks with different numbers of batches finish together.

use burn::data::dataloader::{DataLoader, DataLoaderIterator};

use crate::Error;
use crate::comm::{BATCH_LEFT, Communicator, ReduceOp, agreed_number};

/// Iterates over the batches of a rank until *every* rank has run out: `Some(batch)` as long as this rank has one, then
/// `None` while others still do. Made by [`ParallelModule::join`](crate::train::ParallelModule::join).
#[derive(Debug)]
pub struct Join<I> {
    batches: Option<I>,
    /// None if all ranks have the same batches.
    control: Option<Communicator>,
}

impl<I> Join<I> {
    pub(crate) fn new(batches: I, control: Option<Communicator>) -> Self {
        Self { batches: Some(batches), control: control.filter(|control| control.size() > 1) }
    }

    /// `Some` or `None` as an item, until every rank has run out.
    fn all<B>(&mut self, batch: Option<B>) -> Option<Result<Option<B>, Error>> {
        let anyone = match &self.control {
            None => Ok(batch.is_some()),
            Some(control) => {
                let mine = vec![u8::from(batch.is_some())];
                let agreed = agreed_number(BATCH_LEFT);
                control.all_reduce_agreed(mine, ReduceOp::Max, agreed).map(|anyone| anyone != [0])
            }
        };
        match anyone {
            Ok(true) => Some(Ok(batch)),
            Ok(false) => {
                self.batches = None;
                None
            }
            Err(error) => {
                self.batches = None;
                Some(Err(error))
            }
        }
    }

    /// Ends all ranks with an error of this one.
    fn failed<B>(&mut self, error: Error) -> Option<Result<Option<B>, Error>> {
        self.batches = None;
        if let Some(control) = &self.control {
            control.fail(error.clone());
        }
        Some(Err(error))
    }
}

impl<I: Iterator> Iterator for Join<I> {
    type Item = Result<Option<I::Item>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.batches.as_mut()?.next();
        self.all(batch)
    }
}

/// As [`Join`], over one of burn's dataloaders. What its dataset could not give, and workers that ended before they had
/// given everything, are errors on all ranks. Made by
/// [`ParallelModule::join_loader`](crate::train::ParallelModule::join_loader).
pub struct JoinLoader<'a, O>(Join<Box<dyn DataLoaderIterator<O> + 'a>>);

impl<'a, O> JoinLoader<'a, O> {
    pub(crate) fn new(loader: &'a dyn DataLoader<O>, control: Option<Communicator>) -> Self {
        Self(Join::new(loader.iter(), control))
    }
}

impl<O> Iterator for JoinLoader<'_, O> {
    type Item = Result<Option<O>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let batches = self.0.batches.as_mut()?;
        match batches.next() {
            Some(Ok(batch)) => self.0.all(Some(batch)),
            Some(Err(cause)) => {
                self.0.failed(Error::invalid("join_loader", format!("the dataset gave an error: {cause}")))
            }
            None => {
                // A worker that panics ends its items without a word.
                let progress = batches.progress();
                if progress.is_completed() {
                    return self.0.all(None);
                }
                let (given, total) = (progress.items_processed, progress.items_total);
                let problem = format!(
                    "the dataloader ended after {given} of {total} items: one of its workers has panicked, whose message \
                     went to standard error"
                );
                self.0.failed(Error::invalid("join_loader", problem))
            }
        }
    }
}

impl<O> std::fmt::Debug for JoinLoader<'_, O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinLoader").field("control", &self.0.control).finish_non_exhaustive()
    }
}
