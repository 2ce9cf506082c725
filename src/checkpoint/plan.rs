//! Who writes what: a function of what the ranks hold, which each of them computes alike.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::agree::exchange;
use super::contents::{Contents, ParamScalars};
use super::{checkpoint_error, cover};
use crate::Error;
use crate::comm::{Communicator, part};
use crate::params::is_statistic;
use crate::tensor_file::{dtype_of, name_of};

/// Ranks that hold a slice alike write a part of it each, of so many bytes at least; of smaller ones one rank writes
/// all. So thousands of replicas do not make thousands of small slices.
const SHARED: usize = 1 << 20;

/// Which tensor of a checkpoint it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) enum TensorKey {
    Param(String),
    Moment { optimizer: String, path: String, moment: String },
}

impl TensorKey {
    pub(super) fn param(path: impl Into<String>) -> Self {
        Self::Param(path.into())
    }

    pub(super) fn moment(optimizer: &str, path: &str, moment: impl Into<String>) -> Self {
        Self::Moment { optimizer: optimizer.into(), path: path.into(), moment: moment.into() }
    }

    /// Whether replicas may differ in it.
    fn differs(&self) -> bool {
        matches!(self, Self::Param(path) if is_statistic(path))
    }

    /// The name of a slice in its file.
    pub(super) fn name(&self, ranges: &[Range<usize>]) -> String {
        let ranges: Vec<String> = ranges.iter().map(|range| format!("{}:{}", range.start, range.end)).collect();
        format!("{self}[{}]", ranges.join(","))
    }
}

impl fmt::Display for TensorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Param(path) => write!(f, "model/{path}"),
            Self::Moment { optimizer, path, moment } => write!(f, "optimizers/{optimizer}/{path}/{moment}"),
        }
    }
}

/// What a rank tells of what it has.
#[derive(Serialize, Deserialize)]
struct ToldContents {
    slices: Vec<ToldSlice>,
    scalars: ParamScalars,
}

#[derive(Serialize, Deserialize)]
struct ToldSlice {
    key: TensorKey,
    dims: Vec<usize>,
    dtype: String,
    ranges: Vec<Range<usize>>,
}

/// A tensor of the checkpoint.
pub(super) struct PlannedTensor {
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    /// Its slices, each with the rank that writes it.
    pub(super) slices: Vec<(Vec<Range<usize>>, usize)>,
}

/// All tensors of the checkpoint, and those numbers of optimizers that are known before they are read out.
pub(super) struct WritePlan {
    pub(super) tensors: BTreeMap<TensorKey, PlannedTensor>,
    pub(super) scalars: ParamScalars,
}

impl WritePlan {
    /// Collective. No rank fails alone, but for what is wrong with what it brings.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the ranks hold different models; those of the group.
    pub(super) fn new(own: &Contents, group: &Communicator) -> Result<Self, Error> {
        let slices = own.slices.iter().map(|slice| ToldSlice {
            key: slice.key.clone(),
            dims: slice.dims.clone(),
            dtype: name_of(slice.value.dtype()).unwrap_or_default().into(),
            ranges: slice.ranges.clone(),
        });
        let told = ToldContents { slices: slices.collect(), scalars: own.scalars.clone() };
        let told = serde_json::to_vec(&told).map_err(|why| checkpoint_error(why.to_string()))?;
        let shared = exchange(told, group)?;
        let mut held = BTreeMap::new();
        let mut scalars = ParamScalars::new();
        for (rank, told) in shared.distinct() {
            let told: ToldContents = serde_json::from_slice(told).map_err(|why| checkpoint_error(why.to_string()))?;
            let holders = shared.same_as(rank);
            for slice in told.slices {
                add(&mut held, slice, rank, &holders)?;
            }
            add_scalars(&mut scalars, told.scalars, rank)?;
        }
        let mut load = vec![0u64; group.size()];
        let tensors = held.into_iter().map(|(key, tensor)| Ok((key.clone(), tensor.assigned(&key, &mut load)?)));
        Ok(Self { tensors: tensors.collect::<Result<_, Error>>()?, scalars })
    }

    /// What a rank writes, in order.
    pub(super) fn of_rank(&self, rank: usize) -> impl Iterator<Item = (&TensorKey, &PlannedTensor, &[Range<usize>])> {
        self.tensors.iter().flat_map(move |(key, tensor)| {
            let own = tensor.slices.iter().filter(move |(_, writer)| *writer == rank);
            own.map(move |(ranges, _)| (key, tensor, ranges.as_slice()))
        })
    }
}

/// Adds the numbers that a rank tells.
///
/// # Errors
/// [`Error::Checkpoint`] if another rank has told others of the same parameter.
pub(super) fn add_scalars(all: &mut ParamScalars, told: ParamScalars, rank: usize) -> Result<(), Error> {
    for (optimizer, params) in told {
        let all = all.entry(optimizer.clone()).or_default();
        for (path, numbers) in params {
            if all.get(&path).is_some_and(|known| *known != numbers) {
                let problem = format!(
                    "rank {rank} has other numbers of `{path}` in optimizer `{optimizer}` than another rank, as if they had made \
                     different numbers of steps"
                );
                return Err(checkpoint_error(problem));
            }
            all.insert(path, numbers);
        }
    }
    Ok(())
}

/// A tensor, and who holds what of it.
struct HeldTensor {
    dims: Vec<usize>,
    dtype: DType,
    slices: BTreeMap<Vec<(usize, usize)>, Vec<usize>>,
}

fn add(
    held: &mut BTreeMap<TensorKey, HeldTensor>,
    ToldSlice { key, dims, dtype, ranges }: ToldSlice,
    rank: usize,
    holders: &[usize],
) -> Result<(), Error> {
    let named = dtype_of(&dtype).ok_or_else(|| {
        checkpoint_error(format!(
            "rank {rank}: `{key}` is of a dtype that checkpoints do not hold: cast it to a plain one"
        ))
    })?;
    let tensor = held.entry(key.clone()).or_insert_with(|| HeldTensor {
        dims: dims.clone(),
        dtype: named,
        slices: BTreeMap::new(),
    });
    if (&tensor.dims, tensor.dtype) != (&dims, named) {
        return Err(checkpoint_error(format!(
            "rank {rank} has `{key}` of dims {dims:?} and {named:?}, and another {:?} and {:?}: save one model",
            tensor.dims, tensor.dtype
        )));
    }
    let ranges = ranges.into_iter().map(|range| (range.start, range.end)).collect();
    tensor.slices.entry(ranges).or_default().extend(holders);
    Ok(())
}

impl HeldTensor {
    /// Gives each slice to those that hold it and have least to write.
    fn assigned(self, key: &TensorKey, load: &mut [u64]) -> Result<PlannedTensor, Error> {
        let Self { dims, dtype, slices } = self;
        let mut planned = Vec::new();
        for (ranges, mut holders) in slices {
            holders.sort_unstable();
            let ranges: Vec<Range<usize>> = ranges.into_iter().map(|(start, end)| start..end).collect();
            let bytes = ranges.iter().map(Range::len).product::<usize>() * dtype.size();
            let rows = ranges.first().cloned().unwrap_or(0..1);
            if key.differs() || !dtype.is_float() {
                // What the first replica has counts.
                planned.push((ranges, holders[0]));
            } else if bytes >= SHARED && rows.len() >= holders.len().min(bytes / SHARED) {
                holders.sort_by_key(|rank| (load[*rank], *rank));
                holders.truncate(bytes / SHARED);
                holders.sort_unstable();
                for (index, holder) in holders.iter().enumerate() {
                    let share = part(rows.len(), holders.len(), index);
                    let mut ranges = ranges.clone();
                    ranges[0] = rows.start + share.start..rows.start + share.end;
                    load[*holder] += (bytes / rows.len() * share.len()) as u64;
                    planned.push((ranges, *holder));
                }
            } else {
                let writer = holders.into_iter().min_by_key(|rank| load[*rank]).unwrap_or_default();
                load[writer] += bytes as u64;
                planned.push((ranges, writer));
            }
        }
        let all: Vec<&[Range<usize>]> = planned.iter().map(|(ranges, _)| ranges.as_slice()).collect();
        cover::check(&dims, &all).map_err(|why| checkpoint_error(format!("`{key}`, as the ranks hold it: {why}")))?;
        Ok(PlannedTensor { dims, dtype, slices: planned })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(
        slices: &[(Range<usize>, &[usize])],
        rows: usize,
        columns: usize,
    ) -> Result<Vec<(Range<usize>, usize)>, Error> {
        let mut all = BTreeMap::new();
        for (range, holders) in slices {
            let ranges = vec![range.clone(), 0..columns];
            let slice =
                ToldSlice { key: TensorKey::param("a"), dims: vec![rows, columns], dtype: "F32".into(), ranges };
            add(&mut all, slice, holders[0], holders)?;
        }
        let (key, tensor) = all.pop_first().unwrap();
        let planned = tensor.assigned(&key, &mut [0; 8])?;
        Ok(planned.slices.into_iter().map(|(ranges, rank)| (ranges[0].clone(), rank)).collect())
    }

    #[test]
    fn the_work_is_shared() {
        // A small one is written by one rank, a large one by all that hold it.
        assert_eq!(held(&[(0..4, &[0, 1])], 4, 2).unwrap(), [(0..4, 0)]);
        assert_eq!(held(&[(0..5, &[2, 1])], 5, 1 << 18).unwrap(), [(0..3, 1), (3..5, 2)]);
        // No more of them than it has MiB.
        assert_eq!(held(&[(0..5, &[0, 1, 2, 3])], 5, 1 << 17).unwrap(), [(0..3, 0), (3..5, 1)]);
        let split: &[(Range<usize>, &[usize])] = &[(0..2, &[0, 2]), (2..4, &[1, 3])];
        assert_eq!(held(split, 4, 1).unwrap(), [(0..2, 0), (2..4, 1)]);
        assert_eq!(held(split, 4, 1 << 18).unwrap(), [(0..1, 0), (1..2, 2), (2..3, 1), (3..4, 3)]);
        let said = held(&[(0..2, &[0]), (1..4, &[1])], 4, 1).unwrap_err().to_string();
        assert!(said.contains("`model/a`") && said.contains("overlaps"), "{said}");
        assert!(held(&[(0..2, &[0])], 4, 1).unwrap_err().to_string().contains("leave some"));
    }

    /// On thousands of ranks: files, entries of the index and its bytes for each of them, as docs/checkpoints.md has
    /// them.
    #[test]
    fn what_is_told_of_a_rank_does_not_grow_with_ranks() {
        use crate::checkpoint::index::{BLOCK_BYTES, StoredSlice};

        const WIDTH: usize = 4096;
        const SPLIT: usize = 8;
        // A layer of a Llama with the moments of AdamW, split over eight ranks.
        let wide = [("q", WIDTH, WIDTH), ("k", WIDTH, WIDTH / 4), ("v", WIDTH, WIDTH / 4), ("o", WIDTH, WIDTH)];
        let all = wide.into_iter().chain([("gate", WIDTH, 14_336), ("up", WIDTH, 14_336), ("down", 14_336, WIDTH)]);
        let shapes: Vec<(String, [usize; 2])> =
            all.map(|(name, a, b)| (format!("layers.0.{name}.weight"), [a, b])).collect();
        let of = |replicas: usize| {
            let mut held = BTreeMap::new();
            for (path, [rows, columns]) in &shapes {
                for key in [
                    TensorKey::param(path),
                    TensorKey::moment("adamw", path, "1"),
                    TensorKey::moment("adamw", path, "2"),
                ] {
                    for place in 0..SPLIT {
                        let holders: Vec<usize> = (0..replicas).map(|replica| replica * SPLIT + place).collect();
                        let share = part(*columns, SPLIT, place);
                        let (dims, ranges) = (vec![*rows, *columns], vec![0..*rows, share]);
                        let slice = ToldSlice { key: key.clone(), dims, dtype: "F32".into(), ranges };
                        add(&mut held, slice, holders[0], &holders).unwrap();
                    }
                }
            }
            let mut load = vec![0; SPLIT * replicas];
            let (mut entries, mut bytes) = (vec![0; load.len()], 0);
            for (key, tensor) in held {
                let planned = tensor.assigned(&key, &mut load).unwrap();
                for (ranges, writer) in planned.slices {
                    entries[writer] += 1;
                    let blocks = (ranges.iter().map(Range::len).product::<usize>() * 4).div_ceil(BLOCK_BYTES);
                    let sums = vec!["0123456789abcdef".to_owned(); blocks];
                    let stored = StoredSlice::new(writer, key.name(&ranges), &ranges, sums);
                    bytes += serde_json::to_vec(&stored).unwrap().len() + 1;
                }
            }
            (*entries.iter().max().unwrap(), bytes / 1000)
        };
        // The most entries of a rank, and the kilobytes of all.
        assert_eq!([1, 8, 64, 512].map(of), [(21, 66), (17, 179), (5, 359), (1, 361)]);
    }
}
