//! The rows of a parameter, divided over ranks.

use std::ops::Range;

use crate::Error;
use crate::params::ParamSlice;
use crate::tensor::{Lender, PlainTensor};

/// How the rows (dim 0) of a tensor are divided over ranks: evenly, in rank order, with zeros behind the last row where
/// the ranks do not divide them.
///
/// A tensor with fewer rows than ranks is divided as well: the last ranks hold nothing but zeros. What a rank allocates
/// for it is one row, and not `1 / ranks` of it.
///
/// ```
/// use burn_parallel::sharding::Rows;
/// let rows = Rows::new(&[10, 3], 4).unwrap();
/// assert_eq!(rows.shard_dims(), [3, 3]);
/// assert_eq!((0..4).map(|rank| rows.rows(rank)).collect::<Vec<_>>(), [0..3, 3..6, 6..9, 9..10]);
/// assert!(Rows::new(&[], 4).is_none()); // a tensor of no dims has no rows
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Rows {
    dims: Vec<usize>,
    ranks: usize,
}

impl Rows {
    /// Divides a tensor of these dims over so many ranks, at least one. `None` if it has no dims.
    pub fn new(dims: &[usize], ranks: usize) -> Option<Self> {
        (!dims.is_empty()).then(|| Self { dims: dims.to_vec(), ranks: ranks.max(1) })
    }

    /// The dims of the whole.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The rows of a shard, zeros included.
    pub fn rows_per_rank(&self) -> usize {
        self.dims[0].div_ceil(self.ranks)
    }

    /// The rows of the whole that a rank holds, zeros behind the last one not included.
    pub fn rows(&self, rank: usize) -> Range<usize> {
        let (share, all) = (self.rows_per_rank(), self.dims[0]);
        rank.saturating_mul(share).min(all)..(rank + 1).saturating_mul(share).min(all)
    }

    /// The part of the whole that a rank holds, a range for each dim.
    pub fn ranges(&self, rank: usize) -> Vec<Range<usize>> {
        std::iter::once(self.rows(rank)).chain(self.dims[1..].iter().map(|size| 0..*size)).collect()
    }

    /// The dims of every rank's shard, zeros included.
    pub fn shard_dims(&self) -> Vec<usize> {
        self.with_rows(self.rows_per_rank())
    }

    /// The dims of all shards one behind the other.
    pub fn padded_dims(&self) -> Vec<usize> {
        self.with_rows(self.rows_per_rank() * self.ranks)
    }

    /// The elements of a shard, zeros included.
    pub fn shard_elements(&self) -> usize {
        self.shard_dims().iter().product()
    }

    fn with_rows(&self, rows: usize) -> Vec<usize> {
        let mut dims = self.dims.clone();
        dims[0] = rows;
        dims
    }

    /// What a rank holds, as a store of whole parameters is asked for it.
    pub(crate) fn held(&self, rank: usize) -> ParamSlice {
        ParamSlice { dims: self.dims.clone(), ranges: self.ranges(rank), local_dims: self.shard_dims() }
    }

    /// A rank's shard of a tensor of the whole dims, in memory of its own.
    ///
    /// # Errors
    /// [`Error::Graph`] if zeros cannot be put behind it.
    pub(crate) fn shard(&self, whole: PlainTensor, rank: usize) -> Result<PlainTensor, Error> {
        let (rows, share) = (self.rows(rank), self.rows_per_rank());
        let zeros = |rows| PlainTensor::zeros(self.with_rows(rows), whole.dtype(), &whole.device());
        match rows.len() {
            0 => Ok(zeros(share)),
            some if some < share => PlainTensor::cat(vec![whole.clone().narrow(0, rows), zeros(share - some)], 0),
            _ => whole.narrow(0, rows).packed(),
        }
    }

    /// Lends a rank's shard of a tensor of the whole dims as [`PlainTensor::lend`] does: padded, it comes back so as
    /// well.
    pub(crate) fn lend(&self, whole: PlainTensor, rank: usize) -> (PlainTensor, Option<Lender>) {
        let share = self.shard_elements();
        whole.lend(&self.padded_dims(), rank * share..(rank + 1) * share, &self.shard_dims())
    }

    /// The tensor without the zeros behind its last row.
    pub(crate) fn without_padding(&self, padded: PlainTensor) -> PlainTensor {
        match padded.shape().as_slice().first() {
            Some(rows) if *rows > self.dims[0] => padded.narrow(0, 0..self.dims[0]),
            _ => padded,
        }
    }

    /// The tensor with zeros behind its last row, up to a multiple of the ranks.
    ///
    /// # Errors
    /// [`Error::Graph`] if zeros cannot be put behind it.
    pub(crate) fn with_padding(&self, whole: PlainTensor) -> Result<PlainTensor, Error> {
        let missing = self.rows_per_rank() * self.ranks - self.dims[0];
        if missing == 0 {
            return Ok(whole);
        }
        let zeros = PlainTensor::zeros(self.with_rows(missing), whole.dtype(), &whole.device());
        match self.dims[0] {
            0 => Ok(zeros),
            _ => PlainTensor::cat(vec![whole, zeros], 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use super::*;

    #[test]
    fn every_row_is_on_one_rank() {
        for rows in [0, 1, 2, 3, 5, 7, 8, 9, 64] {
            for ranks in [1, 2, 3, 4, 8] {
                let shards = Rows::new(&[rows, 3], ranks).unwrap();
                let held: Vec<usize> = (0..ranks).flat_map(|rank| shards.rows(rank)).collect();
                assert_eq!(held, (0..rows).collect::<Vec<_>>(), "{rows} rows over {ranks}");
                assert_eq!(shards.padded_dims()[0], shards.rows_per_rank() * ranks);
                assert!(shards.padded_dims()[0] < rows + ranks);
            }
        }
    }

    #[test]
    fn a_shard_is_its_rows_and_zeros() {
        let whole =
            Tensor::<2>::from_data(TensorData::new((0..15).map(|x| x as f32).collect(), [5, 3]), &Device::flex());
        let shards = Rows::new(&[5, 3], 4).unwrap();
        let values =
            |rank| shards.shard(whole.clone().into(), rank).unwrap().into_data().unwrap().try_to_vec::<f32>().unwrap();
        assert_eq!(values(0), [0., 1., 2., 3., 4., 5.]);
        assert_eq!(values(2), [12., 13., 14., 0., 0., 0.]);
        assert_eq!(values(3), [0.; 6]);
        let padded = shards.with_padding(PlainTensor::from(whole.clone())).unwrap();
        assert_eq!(padded.shape().as_slice(), [8, 3]);
        let back = shards.without_padding(padded).float::<2>().unwrap();
        assert_eq!(back.into_data(), whole.into_data());
    }
}
