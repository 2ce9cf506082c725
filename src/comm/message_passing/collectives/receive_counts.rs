//! Counts what each rank receives in gathers, scatters and all-to-all.
//!
//! Each call is valid by itself; together they may still claim more bytes than an address has bits for. So everything
//! that is computed from several of them is computed here, checked, and before memory is allocated.

use std::ops::Range;

use crate::comm::{Call, Operation, part};

/// The rows that go from rank to rank, by the calls of all.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReceiveCounts<'a>(pub &'a [Call]);

impl ReceiveCounts<'_> {
    /// The rows of the contribution of `from` that go to `to`.
    pub fn rows(self, from: usize, to: usize) -> Range<usize> {
        let (rows, n) = (self.0[from].shape.rows(), self.0.len());
        match self.0[to].operation {
            Operation::AllGather => 0..rows,
            Operation::Gather { root } if root == to => 0..rows,
            Operation::Scatter { root } if root == from => part(rows, n, to),
            Operation::AllToAll => part(rows, n, to),
            _ => 0..0,
        }
    }

    /// The rank whose row size and dtype `to` receives.
    pub fn source(self, to: usize) -> usize {
        match self.0[to].operation {
            Operation::Scatter { root } => root,
            _ => to,
        }
    }

    /// The bytes of a row that `to` receives. Those of a single call have been checked.
    pub fn row(self, to: usize) -> usize {
        let Call { dtype, shape, .. } = &self.0[self.source(to)];
        shape.width() * dtype.map_or(0, |dtype| dtype.size())
    }

    /// The rows that `to` receives; `None` if they are more than there are addresses for.
    pub fn received(self, to: usize) -> Option<usize> {
        let rows = (0..self.0.len()).try_fold(0usize, |sum, from| sum.checked_add(self.rows(from, to).len()))?;
        let bytes = rows.checked_mul(self.row(to))?;
        (bytes <= isize::MAX as usize).then_some(rows)
    }

    /// The most bytes that a rank receives, or the first rank that would receive more than there are addresses for.
    pub fn most(self) -> Result<usize, usize> {
        let bytes = |to: usize| self.received(to).map(|rows| rows * self.row(to)).ok_or(to);
        (0..self.0.len()).try_fold(0, |most, to| Ok(bytes(to)?.max(most)))
    }

    /// The rank with the largest contribution, and its bytes: `usize::MAX` if they are more than that.
    pub fn largest(self) -> (usize, usize) {
        let bytes = |call: &Call| {
            let size = call.dtype.map_or(0, |dtype| dtype.size());
            call.shape.dims().iter().fold(size, |bytes, dim| bytes.saturating_mul(*dim))
        };
        let contributed = self.0.iter().map(bytes).enumerate();
        contributed.rev().max_by_key(|(_, bytes)| *bytes).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::comm::CallShape;
    use crate::comm::message_passing::codec::{Reader, Writer};

    fn calls(operation: Operation, rows: &[usize], width: usize) -> Vec<Call> {
        // Encoded and decoded: what the codec refuses never gets here.
        let call = |rows: &usize| {
            let mut writer = Writer::default();
            writer.call(&Call::new(operation, Some(DType::F64), CallShape::new(&[*rows, width])));
            Reader(&writer.0).call()
        };
        rows.iter().map(|rows| call(rows).expect("each call makes sense by itself")).collect()
    }

    #[test]
    fn ranks_receive_what_the_others_bring_them() {
        let gathered = calls(Operation::AllGather, &[3, 0, 5], 2);
        assert_eq!((ReceiveCounts(&gathered).received(1), ReceiveCounts(&gathered).most()), (Some(8), Ok(128)));
        let at_root = calls(Operation::Gather { root: 2 }, &[3, 0, 5], 2);
        assert_eq!([0, 1, 2].map(|to| ReceiveCounts(&at_root).received(to)), [Some(0), Some(0), Some(8)]);
        let scattered = calls(Operation::Scatter { root: 1 }, &[9, 7, 9], 3);
        assert_eq!([0, 1, 2].map(|to| ReceiveCounts(&scattered).received(to)), [Some(3), Some(2), Some(2)]);
        let exchanged = calls(Operation::AllToAll, &[3, 4, 5], 1);
        assert_eq!([0, 1, 2].map(|to| ReceiveCounts(&exchanged).received(to)), [Some(5), Some(4), Some(3)]);
        assert_eq!(ReceiveCounts(&exchanged).largest(), (2, 40));
    }

    /// Twice 2^63 bytes and a few more wrap around to a few bytes.
    #[test]
    fn what_wraps_around_is_too_much() {
        let half = (1 << 60) - 1;
        for operation in [Operation::AllGather, Operation::Gather { root: 0 }] {
            let forged = calls(operation, &[2, half, half], 1);
            assert_eq!((ReceiveCounts(&forged).received(0), ReceiveCounts(&forged).most()), (None, Err(0)));
            assert_eq!(ReceiveCounts(&forged).largest(), (1, 8 * half));
        }
        let rows = [1, 1 << 59, 1 << 59, 1 << 59, 1 << 59, 1 << 59];
        assert_eq!(ReceiveCounts(&calls(Operation::AllGather, &rows, 1)).most(), Err(0));
        // Nothing, however often.
        let nothing = calls(Operation::AllGather, &[1 << 59; 3], 0);
        assert_eq!(ReceiveCounts(&nothing).most(), Ok(0));
        let sums = calls(Operation::AllGather, &[1 << 59; 40], 0);
        assert_eq!(ReceiveCounts(&sums).most(), Err(0), "the rows themselves cannot be counted");
    }
}
