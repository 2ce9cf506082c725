//! The shards of several parameters in one buffer, as collectives carry them.
//!
//! In a packed shard the shards of the parameters lie one behind the other. In a packed whole the packed shards of all
//! ranks do, in rank order: what an all-gather makes of packed shards, and what a reduce-scatter divides into them. A
//! single parameter is packed as it is, without a copy, where the ranks divide its rows; so large ones travel by
//! themselves.

use std::sync::Arc;

use burn::tensor::{DType, Device};

use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::tensor::{PlainTensor, Pool};

use super::Rows;

/// The shards of several parameters in one buffer.
#[derive(Debug, Clone)]
pub(crate) struct Pack {
    pub(super) members: Vec<Rows>,
    pub(super) ranks: usize,
}

impl Pack {
    /// Of these parameters, all divided over as many ranks, at least one of them.
    pub(crate) fn new(members: Vec<Rows>) -> Self {
        let ranks = members.first().map_or(1, Rows::ranks);
        Self { members, ranks }
    }

    /// The elements of a packed shard.
    pub(crate) fn shard_elements(&self) -> usize {
        self.members.iter().map(Rows::shard_elements).sum()
    }

    /// A rank's shards as one flat tensor.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are none.
    pub(crate) fn pack_shards(&self, shards: Vec<PlainTensor>) -> Result<PlainTensor, Error> {
        one_of(shards.into_iter().map(flat).collect(), 0)
    }

    /// The shards of a packed shard: views of it.
    pub(crate) fn unpack_shards(&self, packed: PlainTensor) -> Vec<PlainTensor> {
        let mut begin = 0;
        let unpack = |rows: &Rows| {
            let end = begin + rows.shard_elements();
            let shard = packed.clone().narrow(0, begin..end).reshape(rows.shard_dims());
            begin = end;
            shard
        };
        self.members.iter().map(unpack).collect()
    }

    /// Whole tensors as one flat tensor, rank behind rank, with zeros behind their last rows.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are none.
    pub(crate) fn pack_wholes(&self, wholes: Vec<PlainTensor>) -> Result<PlainTensor, Error> {
        let by_rank = |(whole, rows): (PlainTensor, &Rows)| {
            Ok(rows.with_padding(whole)?.reshape([self.ranks, rows.shard_elements()]))
        };
        let by_rank: Vec<PlainTensor> =
            wholes.into_iter().zip(&self.members).map(by_rank).collect::<Result<_, Error>>()?;
        Ok(flat(one_of(by_rank, 1)?))
    }

    /// The whole tensors of a packed whole.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a tensor cannot be read.
    pub(crate) fn unpack_wholes(&self, packed: PlainTensor) -> Result<Vec<PlainTensor>, Error> {
        let by_rank = packed.reshape([self.ranks, self.shard_elements()]);
        let mut begin = 0;
        let unpack = |rows: &Rows| {
            let end = begin + rows.shard_elements();
            let mine = match self.members.len() {
                1 => by_rank.clone(),
                _ => by_rank.clone().narrow(1, begin..end).packed()?,
            };
            begin = end;
            Ok(rows.without_padding(mine.reshape(rows.padded_dims())))
        };
        self.members.iter().map(unpack).collect()
    }

    /// Gathers the shards of all ranks of a group into whole tensors: one collective, and one more for each large
    /// parameter. Moves `(n - 1) / n` of the bytes of the wholes, zeros included. All ranks must bring the same number:
    /// which parameters they gather.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`].
    pub(crate) fn gather_agreed(
        &self,
        shards: Vec<PlainTensor>,
        group: &Communicator,
        number: u64,
    ) -> Result<Vec<PlainTensor>, Error> {
        self.gather_in(None, shards, group, number)
    }

    /// As [`gather_agreed`](Self::gather_agreed), into memory of a pool what is not copied out of a pack.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`].
    pub(crate) fn gather_in(
        &self,
        pool: Option<&Arc<Pool>>,
        shards: Vec<PlainTensor>,
        group: &Communicator,
        number: u64,
    ) -> Result<Vec<PlainTensor>, Error> {
        self.in_collectives(shards, PlainTensor::dtype, |pack, shards| {
            let packed = pack.pack_shards(shards)?;
            pack.unpack_wholes(match pool.filter(|_| pack.members.len() == 1) {
                Some(pool) => group.all_gather_in(pool, packed, number)?,
                None => group.all_gather_agreed(packed, number)?,
            })
        })
    }

    /// As [`gather_agreed`](Self::gather_agreed), on one rank of the group; the others get nothing.
    ///
    /// # Errors
    /// Those of [`Communicator::gather`].
    pub(crate) fn gather_on(
        &self,
        root: usize,
        shards: Vec<PlainTensor>,
        group: &Communicator,
        number: u64,
    ) -> Result<Vec<PlainTensor>, Error> {
        match group.gather_agreed(self.pack_shards(shards)?, root, number)? {
            Some(packed) => self.unpack_wholes(packed),
            None => Ok(Vec::new()),
        }
    }

    /// Sends each rank of the group its shards of the whole tensors that one of them has; the others bring none.
    ///
    /// # Errors
    /// Those of [`Communicator::scatter`].
    pub(crate) fn scatter_from(
        &self,
        root: usize,
        wholes: Vec<PlainTensor>,
        (dtype, device): (DType, &Device),
        group: &Communicator,
    ) -> Result<Vec<PlainTensor>, Error> {
        let packed = match group.rank() == root {
            true => self.pack_wholes(wholes)?,
            false => PlainTensor::zeros([1], dtype, device),
        };
        Ok(self.unpack_shards(group.scatter_alike(packed, root)?))
    }

    /// Reduces the whole tensors of all ranks of a group into shards, in memory of a pool, if there is one: as many
    /// collectives as [`gather_agreed`](Self::gather_agreed), which move as many bytes. All ranks must bring the same
    /// number: which parameters these are of.
    ///
    /// # Errors
    /// Those of [`Communicator::reduce_scatter`].
    pub(crate) fn reduce_scatter_in(
        &self,
        pool: Option<&Arc<Pool>>,
        wholes: Vec<PlainTensor>,
        op: ReduceOp,
        group: &Communicator,
        number: u64,
    ) -> Result<Vec<PlainTensor>, Error> {
        self.in_collectives(wholes, PlainTensor::dtype, |pack, wholes| {
            Ok(pack.unpack_shards(group.reduce_scatter_in(pool, pack.pack_wholes(wholes)?, op, number)?))
        })
    }

    /// Runs a collective over the large parameters, each by itself, and then one over all others, of what this rank has
    /// of each parameter.
    pub(super) fn in_collectives<T>(
        &self,
        parts: Vec<T>,
        dtype: impl Fn(&T) -> DType,
        mut collective: impl FnMut(&Self, Vec<T>) -> Result<Vec<PlainTensor>, Error>,
    ) -> Result<Vec<PlainTensor>, Error> {
        let is_large =
            |(rows, part): (&Rows, &T)| rows.dims().iter().product::<usize>() * dtype(part).size() >= LARGE_BYTES;
        let large: Vec<bool> = self.members.iter().zip(&parts).map(is_large).collect();
        if self.members.len() == 1 || !large.contains(&true) {
            return collective(self, parts);
        }
        let mut results: Vec<Option<PlainTensor>> = vec![None; parts.len()];
        let mut rest = (Vec::new(), Vec::new(), Vec::new());
        for (place, (rows, part)) in self.members.iter().zip(parts).enumerate() {
            if large[place] {
                results[place] = collective(&Self::new(vec![rows.clone()]), vec![part])?.pop();
            } else {
                rest.0.push(place);
                rest.1.push(rows.clone());
                rest.2.push(part);
            }
        }
        let (places, members, parts) = rest;
        if !members.is_empty() {
            let found = collective(&Self::new(members), parts)?;
            places.into_iter().zip(found).for_each(|(place, found)| results[place] = Some(found));
        }
        Ok(results.into_iter().flatten().collect())
    }
}

/// A parameter that is at least so large is not packed with others: one collective more costs less than to copy it into
/// the pack, and out of it again.
const LARGE_BYTES: usize = 1 << 20;

pub(super) fn flat(tensor: PlainTensor) -> PlainTensor {
    let elements = tensor.elements();
    tensor.reshape([elements])
}

/// The tensors one behind the other along a dim; one alone as it is.
fn one_of(mut tensors: Vec<PlainTensor>, dim: usize) -> Result<PlainTensor, Error> {
    match tensors.len() {
        1 => Ok(tensors.remove(0)),
        _ => PlainTensor::cat(tensors, dim),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, TensorData};

    use super::*;
    use crate::launch;

    fn numbers(first: f32, dims: &[usize]) -> PlainTensor {
        let count = dims.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|place| first + place as f32).collect();
        PlainTensor::from_data(TensorData::new(values, dims.to_vec()), &Device::flex())
    }

    fn values(tensor: PlainTensor) -> (Vec<usize>, Vec<f32>) {
        let shape = tensor.shape().to_vec();
        let data = tensor.into_data().unwrap();
        (shape, data.try_to_vec().unwrap())
    }

    fn reduce_scatter(pack: &Pack, wholes: Vec<PlainTensor>, rank: &Communicator) -> Result<Vec<PlainTensor>, Error> {
        pack.reduce_scatter_in(None, wholes, ReduceOp::Sum, rank, 0)
    }

    #[test]
    fn what_is_scattered_is_gathered_again() {
        let all: [&[&[usize]]; 4] = [&[&[8, 3]], &[&[5, 2]], &[&[5, 2], &[3], &[1], &[2, 3, 2]], &[&[1], &[16, 4]]];
        for members in all {
            for ranks in [1, 2, 3, 4, 8] {
                launch::threads(ranks)
                    .run(|rank| {
                        let rows = members.iter().map(|dims| Rows::new(dims, ranks).unwrap()).collect();
                        let pack = Pack::new(rows);
                        let whole = |by: f32| -> Vec<PlainTensor> {
                            members.iter().map(|dims| numbers(10.0, dims).scale(by.into())).collect()
                        };
                        let before = rank.counters();
                        let shards = reduce_scatter(&pack, whole(1.0 + rank.rank() as f32), &rank)?;
                        for (shard, rows) in shards.iter().zip(&pack.members) {
                            assert_eq!(shard.shape().to_vec(), rows.shard_dims());
                        }
                        let wholes = pack.gather_agreed(shards, &rank, 0)?;
                        let counted = rank.counters() - before;
                        let bytes = ((ranks - 1) * pack.shard_elements() * 4) as u64;
                        for operation in ["reduce_scatter", "all_gather"] {
                            assert_eq!(counted.of(operation).calls, 1);
                            assert_eq!(counted.of(operation).bytes, bytes, "{operation} over {ranks}");
                        }
                        let sum = (ranks * (ranks + 1) / 2) as f32;
                        for (found, expected) in wholes.into_iter().zip(whole(sum)) {
                            assert_eq!(values(found), values(expected), "{members:?} over {ranks}");
                        }
                        Ok(())
                    })
                    .unwrap();
            }
        }
    }

    #[test]
    fn large_parameters_travel_by_themselves() {
        let dims: [&[usize]; 4] = [&[5, 2], &[601, 512], &[3], &[1024, 256]];
        launch::threads(2)
            .run(|rank| {
                let pack = Pack::new(dims.iter().map(|dims| Rows::new(dims, 2).unwrap()).collect());
                let wholes = || dims.iter().map(|dims| numbers(10.0, dims)).collect::<Vec<_>>();
                let before = rank.counters();
                let shards = reduce_scatter(&pack, wholes(), &rank)?;
                let found = pack.gather_agreed(shards, &rank, 0)?;
                let counted = rank.counters() - before;
                for operation in ["reduce_scatter", "all_gather"] {
                    assert_eq!(counted.of(operation).calls, 3);
                    assert_eq!(counted.of(operation).bytes, pack.shard_elements() as u64 * 4);
                }
                for (found, expected) in found.into_iter().zip(wholes()) {
                    assert_eq!(values(found), values(expected.scale(2.0)));
                }
                Ok(())
            })
            .unwrap();
    }

    /// What was gathered before is written over, whatever of it is padding, and no more is held than was at once.
    #[test]
    fn memory_of_a_pool_is_used_again() {
        for dims in [[602, 512], [601, 512]] {
            launch::threads(3)
                .run(|rank| {
                    let (pool, rows) = (Arc::<Pool>::default(), Rows::new(&dims, 3).unwrap());
                    let bytes = rows.padded_dims().iter().product::<usize>() * 4;
                    let pack = Pack::new(vec![rows]);
                    let scatter = |pool: Option<&Arc<Pool>>, first| {
                        pack.reduce_scatter_in(pool, vec![numbers(first, &dims)], ReduceOp::Max, &rank, 1)
                    };
                    let shards = |first| scatter(None, first);
                    let gather =
                        |first| Ok::<_, Error>(pack.gather_in(Some(&pool), shards(first)?, &rank, 1)?.remove(0));
                    let (one, two) = (gather(1.0)?, gather(2.0)?);
                    assert_eq!(pool.free(), 0);
                    drop(one);
                    assert_eq!(pool.free(), bytes);
                    let three = gather(3.0)?;
                    assert_eq!((pool.free(), values(three)), (0, values(numbers(3.0, &dims))));
                    assert_eq!((pool.free(), values(two)), (bytes, values(numbers(2.0, &dims))));
                    drop((gather(4.0)?, gather(5.0)?));
                    assert_eq!(pool.free(), 2 * bytes);
                    // Of what is scattered a third is left, in memory that is used again as well.
                    let sums = Arc::<Pool>::default();
                    let (one, two) = (scatter(Some(&sums), 6.0)?.remove(0), scatter(Some(&sums), 7.0)?.remove(0));
                    assert_eq!((sums.free(), values(one)), (0, values(scatter(None, 6.0)?.remove(0))));
                    assert_eq!(sums.free(), bytes / 3);
                    let three = scatter(Some(&sums), 8.0)?.remove(0);
                    assert_eq!((sums.free(), values(three)), (0, values(scatter(None, 8.0)?.remove(0))));
                    assert_eq!(values(two), values(scatter(None, 7.0)?.remove(0)));
                    Ok(())
                })
                .unwrap();
        }
    }

    #[test]
    fn one_parameter_is_packed_without_a_copy() {
        let whole = Tensor::<2>::zeros([8, 3], &Device::flex());
        let pack = Pack::new(vec![Rows::new(&[8, 3], 4).unwrap()]);
        let packed = pack.pack_wholes(vec![PlainTensor::from(whole.clone())]).unwrap();
        assert!(crate::graph::same_buffer(&packed, &PlainTensor::from(whole).reshape([24])));
    }
}
