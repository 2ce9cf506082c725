//! Gathers parameters into the memory that they have.

use burn::tensor::DType;

use super::pack::flat;
use super::{Pack, Rows};
use crate::Error;
use crate::comm::Communicator;
use crate::tensor::PlainTensor;

/// What a rank has of a parameter that is to be gathered.
pub(crate) enum Brought {
    /// Its shard.
    Shard(PlainTensor),
    /// The whole with its shard in place, padded, in host memory: the shards of the others are to go there as well.
    Whole(PlainTensor),
}

impl Brought {
    fn dtype(&self) -> DType {
        let (Self::Shard(tensor) | Self::Whole(tensor)) = self;
        tensor.dtype()
    }

    fn shard(&self, rows: &Rows, rank: usize) -> PlainTensor {
        match self {
            Self::Shard(shard) => shard.clone(),
            Self::Whole(whole) => {
                let share = rows.rows_per_rank();
                whole.clone().narrow(0, rank * share..(rank + 1) * share)
            }
        }
    }
}

impl Pack {
    /// As [`gather_agreed`](Self::gather_agreed), of what each rank has of the parameters, which may be something else
    /// on each.
    ///
    /// # Errors
    /// Those of [`Communicator::all_gather`].
    pub(crate) fn gather_into(
        &self,
        brought: Vec<Brought>,
        group: &Communicator,
        number: u64,
    ) -> Result<Vec<PlainTensor>, Error> {
        self.in_collectives(brought, Brought::dtype, |pack, mut brought| {
            if let [rows] = &pack.members[..]
                && let Some(Brought::Whole(whole)) = brought.pop_if(|brought| matches!(brought, Brought::Whole(_)))
            {
                let (rank, share) = (group.rank(), rows.shard_elements());
                let whole = group.all_gather_around(flat(whole), rank * share..(rank + 1) * share, number)?;
                return Ok(vec![rows.without_padding(whole.reshape(rows.padded_dims()))]);
            }
            let shards = pack.members.iter().zip(&brought).map(|(rows, brought)| brought.shard(rows, group.rank()));
            let packed = group.all_gather_agreed(pack.pack_shards(shards.collect())?, number)?;
            pack.put_into(brought, packed, group.rank())
        })
    }

    /// What the other ranks have in a packed whole, put into what this rank has.
    fn put_into(&self, brought: Vec<Brought>, packed: PlainTensor, rank: usize) -> Result<Vec<PlainTensor>, Error> {
        let all = self.shard_elements();
        let by_rank = packed.clone().reshape([self.ranks, all]);
        let mut begin = 0;
        let put = |(rows, brought): (&Rows, Brought)| {
            let (from, share) = (begin, rows.shard_elements());
            begin += share;
            let padded = match brought {
                Brought::Shard(_) => by_rank.clone().narrow(1, from..from + share).packed()?,
                Brought::Whole(whole) => (0..self.ranks).filter(|other| *other != rank).fold(whole, |whole, other| {
                    let theirs = other * all + from..other * all + from + share;
                    whole.overwritten(other * share, &packed, theirs)
                }),
            };
            Ok(rows.without_padding(padded.reshape(rows.padded_dims())))
        };
        self.members.iter().zip(brought).map(put).collect()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::launch;

    fn numbers(first: usize, dims: &[usize]) -> PlainTensor {
        let values: Vec<f32> = (0..dims.iter().product()).map(|place| (first + place) as f32).collect();
        PlainTensor::from_data(TensorData::new(values, dims.to_vec()), &Device::flex())
    }

    fn values(tensor: PlainTensor) -> (Vec<usize>, Vec<f32>) {
        (tensor.shape().to_vec(), tensor.into_data().unwrap().try_to_vec().unwrap())
    }

    fn place(tensor: &PlainTensor) -> usize {
        tensor.clone().into_flex().unwrap().bytes().as_ptr().addr()
    }

    /// A parameter of which a rank has but its shard, in memory of its own or in that of the whole.
    fn brought(dims: &[usize], rank: usize, ranks: usize, in_place: bool) -> (Brought, Option<usize>) {
        let rows = Rows::new(dims, ranks).unwrap();
        let share = rows.shard_elements();
        let padded = rows.with_padding(numbers(7, dims)).unwrap();
        let mine = flat(padded).narrow(0, rank * share..(rank + 1) * share).packed().unwrap();
        if !in_place {
            return (Brought::Shard(mine.reshape(rows.shard_dims())), None);
        }
        let nothing = numbers(1000, &rows.padded_dims());
        let whole = nothing.overwritten(rank * share, &mine, 0..share);
        let place = place(&whole);
        (Brought::Whole(whole), Some(place))
    }

    /// Small parameters and large ones, whose rows the ranks divide or not, on ranks that have their shards in the
    /// memory of the whole, or not: the calls are the same, and memory that there is already is kept.
    #[test]
    fn what_is_gathered_lies_where_it_lay() {
        let dims: [&[usize]; 5] = [&[6, 2], &[5, 3], &[602, 512], &[7], &[601, 512]];
        for ranks in [2, 3] {
            for ways in [[true; 3], [false; 3], [true, false, true]] {
                launch::threads(ranks)
                    .run(|rank| {
                        let pack = Pack::new(dims.iter().map(|dims| Rows::new(dims, ranks).unwrap()).collect());
                        let (mine, places): (Vec<_>, Vec<_>) =
                            dims.iter().map(|dims| brought(dims, rank.rank(), ranks, ways[rank.rank()])).unzip();
                        let before = rank.counters();
                        let wholes = pack.gather_into(mine, &rank, 0)?;
                        let counted = rank.counters() - before;
                        let bytes = 4 * (ranks - 1) * pack.shard_elements();
                        let found = counted.of("all_gather");
                        assert_eq!((found.calls, found.bytes), (3, bytes as u64));
                        for ((whole, dims), was) in wholes.into_iter().zip(dims).zip(places) {
                            assert!(was.is_none_or(|was| was == place(&whole)), "{dims:?}");
                            assert_eq!(values(whole), values(numbers(7, dims)), "{dims:?} of {ranks}, {ways:?}");
                        }
                        Ok(())
                    })
                    .unwrap();
            }
        }
    }

    #[test]
    fn a_whole_of_another_length_fails_all_ranks() {
        let failed = launch::threads(2).run(|rank| {
            let whole = numbers(0, &[6 - rank.rank()]);
            rank.all_gather_around(whole, 0..3, 0).map(drop)
        });
        let error = failed.unwrap_err().to_string();
        assert!(error.contains("the output has room for 5 elements of F32, 6 of F32 came"), "{error}");
    }
}
