//! Who receives how much in a collective whose data goes to others as it is.
//!
//! Each call has been found to make sense by itself; together they may still claim more than there are addresses for. So
//! everything that is worked out from several of them is worked out here, checked, and before memory is asked for.

use std::ops::Range;

use crate::comm::{Call, Operation, part};

/// The rows that go from rank to rank, by the calls of all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shares<'a>(pub &'a [Call]);

impl Shares<'_> {
    /// The rows of what `from` brings that go to `to`.
    pub fn rows(self, from: usize, to: usize) -> Range<usize> {
        let (rows, n) = (self.0[from].extent.rows(), self.0.len());
        match self.0[to].operation {
            Operation::AllGather => 0..rows,
            Operation::Gather { root } if root == to => 0..rows,
            Operation::Scatter { root } if root == from => part(rows, n, to),
            Operation::AllToAll => part(rows, n, to),
            _ => 0..0,
        }
    }

    /// The rank whose rows and dtype those are that `to` receives.
    pub fn source(self, to: usize) -> usize {
        match self.0[to].operation {
            Operation::Scatter { root } => root,
            _ => to,
        }
    }

    /// The bytes of a row that `to` receives. That of a single call has been checked.
    pub fn row(self, to: usize) -> usize {
        let Call { dtype, extent, .. } = &self.0[self.source(to)];
        extent.width() * dtype.map_or(0, |dtype| dtype.size())
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

    /// Who brings most, and how many bytes: `usize::MAX` if they are more than that.
    pub fn largest(self) -> (usize, usize) {
        let bytes = |call: &Call| {
            let size = call.dtype.map_or(0, |dtype| dtype.size());
            call.extent.dims().iter().fold(size, |bytes, dim| bytes.saturating_mul(*dim))
        };
        let brought = self.0.iter().map(bytes).enumerate();
        brought.rev().max_by_key(|(_, bytes)| *bytes).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::comm::Extent;
    use crate::comm::wired::codec::{Reader, Writer};

    fn calls(operation: Operation, rows: &[usize], width: usize) -> Vec<Call> {
        // Over the wire and back: what is refused there never comes here.
        let call = |rows: &usize| {
            let mut writer = Writer::default();
            writer.call(&Call::new(operation, Some(DType::F64), Extent::new(&[*rows, width])));
            Reader(&writer.0).call()
        };
        rows.iter().map(|rows| call(rows).expect("each call makes sense by itself")).collect()
    }

    #[test]
    fn ranks_receive_what_the_others_bring_them() {
        let gathered = calls(Operation::AllGather, &[3, 0, 5], 2);
        assert_eq!((Shares(&gathered).received(1), Shares(&gathered).most()), (Some(8), Ok(128)));
        let at_root = calls(Operation::Gather { root: 2 }, &[3, 0, 5], 2);
        assert_eq!([0, 1, 2].map(|to| Shares(&at_root).received(to)), [Some(0), Some(0), Some(8)]);
        let scattered = calls(Operation::Scatter { root: 1 }, &[9, 7, 9], 3);
        assert_eq!([0, 1, 2].map(|to| Shares(&scattered).received(to)), [Some(3), Some(2), Some(2)]);
        let exchanged = calls(Operation::AllToAll, &[3, 4, 5], 1);
        assert_eq!([0, 1, 2].map(|to| Shares(&exchanged).received(to)), [Some(5), Some(4), Some(3)]);
        assert_eq!(Shares(&exchanged).largest(), (2, 40));
    }

    /// Twice 2^63 bytes and a few more are a few bytes, to whoever does not look.
    #[test]
    fn what_wraps_around_is_too_much() {
        let half = (1 << 60) - 1;
        for operation in [Operation::AllGather, Operation::Gather { root: 0 }] {
            let forged = calls(operation, &[2, half, half], 1);
            assert_eq!((Shares(&forged).received(0), Shares(&forged).most()), (None, Err(0)));
            assert_eq!(Shares(&forged).largest(), (1, 8 * half));
        }
        let rows = [1, 1 << 59, 1 << 59, 1 << 59, 1 << 59, 1 << 59];
        assert_eq!(Shares(&calls(Operation::AllGather, &rows, 1)).most(), Err(0));
        // Nothing, however often.
        let nothing = calls(Operation::AllGather, &[1 << 59; 3], 0);
        assert_eq!(Shares(&nothing).most(), Ok(0));
        let sums = calls(Operation::AllGather, &[1 << 59; 40], 0);
        assert_eq!(Shares(&sums).most(), Err(0), "the rows themselves cannot be counted");
    }
}
