//! Ranks with different numbers of batches.

use crate::Error;
use crate::comm::{Communicator, ReduceOp};

/// Iterates over the batches of a rank until *every* rank has run out: `Some(batch)` as long as this rank has one, then
/// `None` while others still do. Made by [`Replica::join`](super::Replica::join).
#[derive(Debug)]
pub struct Join<I> {
    batches: Option<I>,
    control: Communicator,
}

impl<I> Join<I> {
    pub(super) fn new(batches: I, control: Communicator) -> Self {
        Self { batches: Some(batches), control }
    }
}

impl<I: Iterator> Iterator for Join<I> {
    type Item = Result<Option<I::Item>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let batches = self.batches.as_mut()?;
        let batch = batches.next();
        match self.control.all_reduce(vec![u8::from(batch.is_some())], ReduceOp::Max) {
            Ok(anyone) if anyone == [0] => {
                self.batches = None;
                None
            }
            Ok(_) => Some(Ok(batch)),
            Err(error) => {
                self.batches = None;
                Some(Err(error))
            }
        }
    }
}
