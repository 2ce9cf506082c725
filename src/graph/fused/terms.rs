//! Terms of a sum that wait while others of it become one operation.

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::super::operation::build;

/// The tensor that is `sum` once the terms are added to it, and the operations that add them. New tensors are numbered
/// from `next_id`.
pub(super) fn without_terms(
    sum: &TensorIr,
    terms: &[TensorIr],
    next_id: &mut u64,
) -> (TensorIr, impl Iterator<Item = OperationIr> + use<>) {
    let (mut rest, mut added) = (sum.clone(), Vec::with_capacity(terms.len()));
    for term in terms.iter().rev() {
        let less = TensorIr::uninit(TensorId::new(*next_id), sum.shape.clone(), sum.dtype);
        *next_id += 1;
        added.push(build::add(term.clone(), less.clone(), rest));
        rest = less;
    }
    (rest, added.into_iter().rev())
}
