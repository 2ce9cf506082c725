//! What a rank holds of a parameter that is saved.

use std::ops::Range;

use crate::Error;
use crate::tensor::PlainTensor;

/// What this rank holds of a parameter.
pub(super) struct HeldPart {
    pub(super) value: PlainTensor,
    pub(super) ranges: Vec<Range<usize>>,
    pub(super) adapter: Option<HeldAdapter>,
}

/// A product that is added to a weight: `scale * a @ b`. Of `a` and `b` there are those rows and columns, from the
/// first that is given on, that the part of the weight has.
pub(super) struct HeldAdapter {
    pub(super) a: (PlainTensor, usize),
    pub(super) b: (PlainTensor, usize),
    pub(super) scale: f64,
}

impl HeldAdapter {
    /// What the weight is in these rows and columns, of which `base` is the value without the adapter.
    pub(super) fn added(
        &self,
        base: PlainTensor,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<PlainTensor, Error> {
        let part = |(value, first): &(PlainTensor, usize), dim, range: Range<usize>| {
            value.clone().narrow(dim, range.start - first..range.end - first).float::<2>()
        };
        let delta = part(&self.a, 0, rows)?.matmul(part(&self.b, 1, columns)?).mul_scalar(self.scale);
        Ok(PlainTensor::from(base.float::<2>()?.cast(delta.dtype()) + delta))
    }
}
