//! Which of the ranks that hold a slice alike write it.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::DType;

use super::plan::{PlannedTensor, TensorKey, ToldSlice};
use super::{checkpoint_error, cover};
use crate::Error;
use crate::tensor_file::dtype_of;

/// Ranks that hold a slice alike write a part of it each, of so many bytes at least; of smaller ones one rank writes
/// all. So thousands of replicas do not make thousands of small slices.
const SHARED: u64 = 1 << 20;

/// All that the ranks hold.
#[derive(Default)]
pub(super) struct Held(BTreeMap<TensorKey, HeldTensor>);

/// A tensor, and who holds what of it, in order.
struct HeldTensor {
    dims: Vec<usize>,
    dtype: DType,
    slices: BTreeMap<Vec<(usize, usize)>, Vec<usize>>,
}

impl Held {
    /// These ranks hold a slice, as `rank` has told.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the tensor is of other dims or another dtype on another rank, or of a dtype that
    /// checkpoints lack.
    pub(super) fn add(&mut self, slice: ToldSlice, rank: usize, holders: &[usize]) -> Result<(), Error> {
        let ToldSlice { key, dims, dtype, ranges } = slice;
        let named = dtype_of(&dtype).ok_or_else(|| {
            checkpoint_error(format!(
                "rank {rank}: `{key}` is of a dtype that checkpoints do not hold: cast it to a plain one"
            ))
        })?;
        let nothing = || HeldTensor { dims: dims.clone(), dtype: named, slices: BTreeMap::new() };
        let tensor = self.0.entry(key.clone()).or_insert_with(nothing);
        if (&tensor.dims, tensor.dtype) != (&dims, named) {
            return Err(checkpoint_error(format!(
                "rank {rank} has `{key}` of dims {dims:?} and {named:?}, and another {:?} and {:?}: save one model",
                tensor.dims, tensor.dtype
            )));
        }
        if dims.contains(&0) {
            return Ok(());
        }
        let ranges = ranges.into_iter().map(|range| (range.start, range.end)).collect();
        let all = tensor.slices.entry(ranges).or_default();
        all.extend(holders);
        all.sort_unstable();
        Ok(())
    }

    /// Gives each slice to some of the ranks that hold it, so that all have about as much to write.
    ///
    /// burn gives out the moments of a parameter as a copy, all of them and whole. So they go to one rank, or to no
    /// more than it takes for none to have more than its share of everything. What is uneven then is filled up with
    /// parameters, of which rows are written where they are.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if slices overlap, or leave something out.
    pub(super) fn assigned(self, ranks: usize) -> Result<BTreeMap<TensorKey, PlannedTensor>, Error> {
        let share = self.0.values().map(HeldTensor::bytes).sum::<u64>().div_ceil(ranks as u64).max(1);
        let mut load = vec![0; ranks];
        let mut planned = BTreeMap::new();
        let (params, moments): (Vec<_>, Vec<_>) = self.0.into_iter().partition(|(key, _)| key.moments_of().is_none());
        for of_param in moments.chunk_by(|(a, _), (b, _)| a.moments_of() == b.moments_of()) {
            let mut bytes = BTreeMap::<&Vec<usize>, u64>::new();
            for (_, tensor) in of_param {
                tensor
                    .slices
                    .iter()
                    .for_each(|(of, holders)| *bytes.entry(holders).or_default() += tensor.bytes_of(of));
            }
            let mut writers = BTreeMap::new();
            for (holders, bytes) in bytes {
                writers.insert(holders, least(holders, bytes.div_ceil(share) as usize, &load));
            }
            for (key, tensor) in of_param {
                planned.insert(key.clone(), tensor.planned(key, &|holders| writers[holders].clone(), &mut load)?);
            }
        }
        for (key, tensor) in params {
            let tensor = tensor.planned(&key, &Vec::clone, &mut load)?;
            planned.insert(key, tensor);
        }
        Ok(planned)
    }
}

/// So many of these ranks, one at least, those that have least to write; what they have grows.
fn least(ranks: &[usize], many: usize, load: &[u64]) -> Vec<usize> {
    let by_load = |rank: &usize| (load[*rank], *rank);
    if many <= 1 {
        return ranks.iter().copied().min_by_key(by_load).into_iter().collect();
    }
    let mut least = ranks.to_vec();
    least.sort_by_key(by_load);
    least.truncate(many);
    least
}

impl HeldTensor {
    fn bytes_of(&self, ranges: &[(usize, usize)]) -> u64 {
        ranges.iter().map(|(start, end)| (end - start) as u64).product::<u64>() * self.dtype.size() as u64
    }

    fn bytes(&self) -> u64 {
        self.slices.keys().map(|ranges| self.bytes_of(ranges)).sum()
    }

    /// Has the slices written by those that `writers` says, of their holders.
    fn planned(
        &self,
        key: &TensorKey,
        writers: &dyn Fn(&Vec<usize>) -> Vec<usize>,
        load: &mut [u64],
    ) -> Result<PlannedTensor, Error> {
        let mut slices = Vec::new();
        for (ranges, holders) in &self.slices {
            let writers = match key.differs() || !self.dtype.is_float() {
                // What the first replica has counts.
                true => holders[..1].to_vec(),
                false => writers(holders),
            };
            let bytes = self.bytes_of(ranges);
            let ranges: Vec<Range<usize>> = ranges.iter().map(|(start, end)| *start..*end).collect();
            let rows = ranges.first().cloned().unwrap_or(0..1);
            for (share, writer) in shares(rows.len(), bytes, &writers, load) {
                let mut ranges = ranges.clone();
                if let Some(range) = ranges.first_mut() {
                    *range = rows.start + share.start..rows.start + share.end;
                }
                slices.push((ranges, writer));
            }
        }
        let all: Vec<&[Range<usize>]> = slices.iter().map(|(ranges, _)| ranges.as_slice()).collect();
        cover::check(&self.dims, &all)
            .map_err(|why| checkpoint_error(format!("`{key}`, as the ranks hold it: {why}")))?;
        Ok(PlannedTensor { dims: self.dims.clone(), dtype: self.dtype, slices })
    }
}

/// Gives rows of so many bytes to those of the `writers` that have least to write, so that these have as much as each
/// other afterwards; [`SHARED`] bytes at least to each, or else all to one. Adds that to the load.
fn shares(rows: usize, bytes: u64, writers: &[usize], load: &mut [u64]) -> Vec<(Range<usize>, usize)> {
    let most = usize::try_from(bytes / SHARED).unwrap_or(usize::MAX);
    let least = least(writers, most, load);
    // What all have afterwards, of the first so many.
    let (mut many, mut sum) = (0, bytes);
    for rank in &least {
        let level = (sum + load[*rank]) / (many as u64 + 1);
        if many > 0 && level < load[*rank] + SHARED {
            break;
        }
        (many, sum) = (many + 1, sum + load[*rank]);
    }
    let (level, mut sharing) = (sum / many.max(1) as u64, least[..many].to_vec());
    sharing.sort_unstable();
    let (mut shares, mut given, mut begin) = (Vec::new(), 0, 0);
    for (place, rank) in sharing.into_iter().enumerate() {
        given += level.saturating_sub(load[rank]);
        // To the nearest row.
        let end = match place + 1 == many {
            true => rows,
            false => (2 * u128::from(given) * rows as u128 / u128::from(bytes)).div_ceil(2) as usize,
        };
        if begin < end || many == 1 {
            load[rank] += bytes / rows.max(1) as u64 * (end - begin) as u64;
            shares.push((begin..end, rank));
        }
        begin = end;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::part;

    fn slice(key: TensorKey, dims: [usize; 2], ranges: [Range<usize>; 2]) -> ToldSlice {
        ToldSlice { key, dims: dims.into(), dtype: "F32".into(), ranges: ranges.into() }
    }

    /// Who writes which rows.
    type Rows = Vec<(Range<usize>, usize)>;

    fn rows(planned: &PlannedTensor) -> Rows {
        planned.slices.iter().map(|(ranges, rank)| (ranges[0].clone(), *rank)).collect()
    }

    fn held(slices: &[(Range<usize>, &[usize])], rows: usize, columns: usize) -> Result<Rows, Error> {
        let mut all = Held::default();
        for (range, holders) in slices {
            let ranges = [range.clone(), 0..columns];
            all.add(slice(TensorKey::param("a"), [rows, columns], ranges), holders[0], holders)?;
        }
        Ok(self::rows(&all.assigned(8)?[&TensorKey::param("a")]))
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

    /// As burn gives them out as a whole, those of a parameter go to one rank; its rows go to who has less.
    #[test]
    fn moments_of_a_parameter_stay_together() {
        let mib = 1 << 18;
        let planned = |params: &[(&str, usize)], ranks: usize| {
            let (mut all, holders) = (Held::default(), (0..ranks).collect::<Vec<_>>());
            for (path, rows) in params {
                let moment = |name: &str| TensorKey::moment("adamw", path, name);
                for key in [TensorKey::param(*path), moment("1"), moment("2")] {
                    all.add(slice(key, [*rows, mib], [0..*rows, 0..mib]), 0, &holders).unwrap();
                }
            }
            all.assigned(ranks).unwrap()
        };
        let moments = |planned: &BTreeMap<TensorKey, PlannedTensor>, path: &str| {
            let of = |name: &str| rows(&planned[&TensorKey::moment("adamw", path, name)]);
            assert_eq!(of("1"), of("2"), "{path}");
            of("1")
        };
        let even = planned(&[("a", 8), ("b", 8)], 2);
        assert_eq!((moments(&even, "a"), moments(&even, "b")), (vec![(0..8, 0)], vec![(0..8, 1)]));
        assert_eq!(rows(&even[&TensorKey::param("a")]), [(0..4, 0), (4..8, 1)]);
        // 48 MiB of moments and 24 of parameters for three ranks, 24 each.
        let uneven = planned(&[("a", 10), ("b", 10), ("c", 4)], 3);
        assert_eq!(["a", "b", "c"].map(|path| moments(&uneven, path)), [[(0..10, 0)], [(0..10, 1)], [(0..4, 2)]]);
        let mut written = [0; 3];
        for (range, rank) in uneven.values().flat_map(rows) {
            written[rank] += range.len();
        }
        assert_eq!(written, [24; 3]);
        // More than one rank's share of everything goes to several.
        let large = planned(&[("a", 60), ("b", 2)], 4);
        assert_eq!(moments(&large, "a"), [(0..20, 0), (20..40, 1), (40..60, 2)]);
        assert_eq!(moments(&large, "b"), [(0..2, 3)]);
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
            let mut held = Held::default();
            for (path, [rows, columns]) in &shapes {
                for key in [
                    TensorKey::param(path),
                    TensorKey::moment("adamw", path, "1"),
                    TensorKey::moment("adamw", path, "2"),
                ] {
                    for place in 0..SPLIT {
                        let holders: Vec<usize> = (0..replicas).map(|replica| replica * SPLIT + place).collect();
                        let share = part(*columns, SPLIT, place);
                        let slice = slice(key.clone(), [*rows, *columns], [0..*rows, share]);
                        held.add(slice, holders[0], &holders).unwrap();
                    }
                }
            }
            let (mut entries, mut written, mut bytes) = (vec![0; SPLIT * replicas], vec![0; SPLIT * replicas], 0);
            for (key, planned) in held.assigned(SPLIT * replicas).unwrap() {
                for (ranges, writer) in planned.slices {
                    entries[writer] += 1;
                    written[writer] += ranges.iter().map(Range::len).product::<usize>() * 4;
                    let blocks = (ranges.iter().map(Range::len).product::<usize>() * 4).div_ceil(BLOCK_BYTES);
                    let sums = vec!["0123456789abcdef".to_owned(); blocks];
                    let stored = StoredSlice::new(writer, key.name(&ranges), &ranges, sums);
                    bytes += serde_json::to_vec(&stored).unwrap().len() + 1;
                }
            }
            let (most, mean) = (*written.iter().max().unwrap(), written.iter().sum::<usize>() / written.len());
            assert!(
                most <= mean + mean / 10 || mean < 1 << 20,
                "of {replicas} replicas a rank writes {most} bytes, not {mean}"
            );
            (*entries.iter().max().unwrap(), bytes / 1000)
        };
        // The most entries of a rank, and the kilobytes of all.
        assert_eq!([1, 8, 64, 512].map(of), [(21, 66), (9, 105), (4, 223), (1, 361)]);
    }
}
