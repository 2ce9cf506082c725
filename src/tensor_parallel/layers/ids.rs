//! Token ids of a vocabulary that is split over ranks.

use std::ops::Range;

use burn::tensor::{Bool, Int, Tensor};

use crate::Error;

/// Refuses ids that are not in the vocabulary. They are replicated: all ranks find the same.
pub(super) fn check_ids<const D: usize>(
    operation: &'static str,
    ids: &Tensor<D, Int>,
    vocabulary: usize,
) -> Result<(), Error> {
    if ids.shape().num_elements() == 0 {
        return Ok(());
    }
    let (least, most) = (ids.clone().min().into_scalar::<i64>(), ids.clone().max().into_scalar::<i64>());
    if least >= 0 && most < vocabulary as i64 {
        return Ok(());
    }
    let problem = format!("ids range from {least} to {most}, but the vocabulary has 0 to {}", vocabulary as i64 - 1);
    Err(Error::invalid(operation, problem))
}

/// Ids within a range, counted from its start, and where they are outside of it; there the id is 0.
pub(super) fn localize<const D: usize>(ids: Tensor<D, Int>, own: Range<usize>) -> (Tensor<D, Int>, Tensor<D, Bool>) {
    let below = ids.clone().lower_scalar(own.start as i64);
    let elsewhere = below.bool_or(ids.clone().greater_equal_scalar(own.end as i64));
    ((ids - own.start as i64).mask_fill(elsewhere.clone(), 0), elsewhere)
}
