//! A rank's file: the slices that it writes, one behind the other.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use burn::backend::flex::FlexTensor;
use burn::module::ParamId;

use super::contents::{Contents, Slice, SliceValue};
use super::index::{BLOCK_BYTES, checksum};
use super::moments::{MOST, PORTION, moments_of};
use super::plan::{PlannedTensor, TensorKey, WritePlan};
use super::{checkpoint_error, fault};
use crate::Error;
use crate::tensor::PlainTensor;
use crate::tensor_file::{NewFile, NewTensor, PieceWriter};

/// Bytes that are written at once: whole blocks, few enough to be in the cache still when their checksums are known.
const PIECE: usize = 2 * BLOCK_BYTES;

/// The name of a rank's file.
pub(super) fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// What a rank wrote.
pub(super) struct Written {
    /// The size of its file.
    pub(super) bytes: u64,
    /// The checksums of its slices, in the order of the plan.
    pub(super) checksums: Vec<Vec<String>>,
}

/// Writes what a rank is to write, if anything, and waits until it is on the disk. Beside its tensors a rank holds a copy of one
/// slice at most, where that is on a device or not contiguous, and of a [`PORTION`] of its moments.
///
/// # Errors
/// [`Error::InvalidArgument`] if the disk refuses.
pub(super) fn write(contents: &Contents, plan: &WritePlan, rank: usize, dir: &Path) -> Result<Option<Written>, Error> {
    let mut tensors = Vec::new();
    for (key, tensor, ranges) in plan.of_rank(rank) {
        let dims = ranges.iter().map(Range::len).collect();
        tensors.push(NewTensor { name: key.name(ranges), dtype: tensor.dtype, dims });
    }
    if tensors.is_empty() {
        return Ok(None);
    }
    let about = BTreeMap::from([("format".to_owned(), "burn-parallel checkpoint".to_owned())]);
    let new_file = NewFile::new(&tensors, &about)?;
    let file = PieceWriter::create(&dir.join(file_name(rank)), &new_file)?;
    let mut held: HashMap<&TensorKey, Vec<&Slice>> = HashMap::new();
    contents.slices.iter().for_each(|slice| held.entry(&slice.key).or_default().push(slice));
    let mut moments = Portions { contents, held: &held, of: String::new(), there: HashMap::new() };
    let mut checksums = Vec::with_capacity(tensors.len());
    for (place, ((key, _, ranges), start)) in plan.of_rank(rank).zip(&new_file.starts).enumerate() {
        if place == tensors.len() / 2 {
            fault::point("half written");
        }
        let own = held.get(key).into_iter().flatten().find(|slice| within(ranges, &slice.ranges));
        let Some(slice) = own else {
            return Err(checkpoint_error(format!(
                "rank {rank} is to write {ranges:?} of `{key}`, which it does not have"
            )));
        };
        let value = match &slice.value {
            SliceValue::There(value) => value.clone(),
            SliceValue::Moment(id, _) => moments.take(key, *id, &mut plan.of_rank(rank).skip(place))?,
        };
        let values = contiguous(value, &slice.ranges, ranges)?;
        let bytes = bytes_of(&values);
        let mut of_slice = Vec::with_capacity(bytes.len().div_ceil(BLOCK_BYTES));
        for (piece, bytes) in bytes.chunks(PIECE).enumerate() {
            of_slice.extend(bytes.chunks(BLOCK_BYTES).map(checksum));
            file.write_at(start + (piece * PIECE) as u64, bytes)?;
        }
        checksums.push(of_slice);
    }
    file.sync()?;
    Ok(Some(Written { bytes: new_file.size, checksums }))
}

fn within(inner: &[Range<usize>], outer: &[Range<usize>]) -> bool {
    inner.iter().zip(outer).all(|(inner, outer)| outer.start <= inner.start && inner.end <= outer.end)
}

/// Moments of parameters that are written one behind the other.
struct Portions<'a> {
    contents: &'a Contents,
    held: &'a HashMap<&'a TensorKey, Vec<&'a Slice>>,
    /// Of this optimizer.
    of: String,
    there: HashMap<(ParamId, String), PlainTensor>,
}

impl Portions<'_> {
    /// A moment of a parameter, which is `first` of those `next` to be written. What was there is dropped, if it is not among it.
    fn take<'b>(
        &mut self,
        first: &TensorKey,
        id: ParamId,
        next: &mut dyn Iterator<Item = (&'b TensorKey, &'b PlannedTensor, &'b [Range<usize>])>,
    ) -> Result<PlainTensor, Error> {
        let TensorKey::Moment { optimizer, moment, .. } = first else {
            return Err(checkpoint_error(format!("`{first}` is no moment")));
        };
        let place = (id, moment.clone());
        if self.of != *optimizer || !self.there.contains_key(&place) {
            let (mut ids, mut bytes) = (vec![id], 0);
            for (key, ..) in next {
                let TensorKey::Moment { optimizer: of, .. } = key else { break };
                let Some(slice) = self.held.get(key).and_then(|slices| slices.first()) else { break };
                let Slice { value: SliceValue::Moment(id, dtype), ranges, .. } = slice else { break };
                bytes += ranges.iter().map(Range::len).product::<usize>() * dtype.size();
                let another = ids.last() != Some(id);
                if of != optimizer || another && (bytes > PORTION || ids.len() == MOST) {
                    break;
                }
                ids.extend(another.then_some(*id));
            }
            // The old ones go first.
            self.there.clear();
            let state = self.contents.optimizers.get(optimizer);
            let state = state.ok_or_else(|| checkpoint_error(format!("optimizer `{optimizer}` is gone")))?;
            self.there = moments_of(optimizer, state, ids)?;
            self.of.clone_from(optimizer);
        }
        let lost = || checkpoint_error(format!("`{first}` is not in the optimizer any more"));
        self.there.get(&place).cloned().ok_or_else(lost)
    }
}

/// The elements of a value in these ranges of the whole, of which it is the part `own`, row-major in host memory: where they are, if
/// they are so there.
fn contiguous(mut value: PlainTensor, own: &[Range<usize>], ranges: &[Range<usize>]) -> Result<FlexTensor, Error> {
    for (dim, (range, own)) in ranges.iter().zip(own).enumerate() {
        let local = range.start - own.start..range.end - own.start;
        if local != (0..value.shape()[dim]) {
            value = value.narrow(dim, local);
        }
    }
    let value = value.into_flex()?;
    Ok(if value.is_contiguous() { value } else { value.to_contiguous() })
}

fn bytes_of(tensor: &FlexTensor) -> &[u8] {
    let (size, layout) = (tensor.dtype().size(), tensor.layout());
    &tensor.bytes()[layout.start_offset() * size..][..layout.num_elements() * size]
}
