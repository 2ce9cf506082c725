//! A rank's file: the slices that it writes, one behind the other.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::Path;

use burn::backend::flex::FlexTensor;
use burn::module::ParamId;
use burn::tensor::Device;

use super::contents::{Contents, ParamScalars, Slice, SliceValue};
use super::index::{BLOCK_BYTES, StoredFile, checksum};
use super::moments::stored;
use super::plan::{PlannedTensor, TensorKey, WritePlan};
use super::{checkpoint_error, fault, file_problem, unreadable};
use crate::Error;
use crate::optim::{MOST_AT_ONCE, StateNames, portions};
use crate::tensor::PlainTensor;
use crate::tensor_file::{NewFile, NewTensor, PieceWriter};

/// Bytes that are written at once: whole blocks, few enough to be in the cache still when their checksums are known.
const PIECE: usize = 2 * BLOCK_BYTES;

/// The name of a rank's file.
pub(super) fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// Whether that is the name of the file of some rank.
pub(super) fn is_file_of_rank(name: &str) -> bool {
    let rank = name.strip_prefix("rank-").and_then(|rest| rest.strip_suffix(".safetensors")?.parse().ok());
    rank.is_some_and(|rank| file_name(rank) == name)
}

/// That the files of ranks are in a directory, as long as they were written.
///
/// # Errors
/// [`Error::Checkpoint`] with the first that is not.
pub(super) fn check_files(files: &[StoredFile], dir: &Path) -> Result<(), Error> {
    for file in files {
        let path = dir.join(&file.name);
        if !fs::metadata(&path).is_ok_and(|found| found.len() == file.bytes) {
            let problem =
                format!("is not there as it was written, with {} bytes: somebody else has changed it", file.bytes);
            return Err(file_problem(&path, problem));
        }
    }
    Ok(())
}

/// What came of a rank's file.
pub(super) enum Outcome {
    /// It is on the disk.
    Written(Written),
    /// An optimizer has other moments than it was known to have.
    Changed(Changed),
}

/// A parameter of which an optimizer has other moments than it was known to have.
pub(super) struct Changed {
    pub(super) optimizer: String,
    pub(super) path: String,
}

/// What a rank wrote.
#[derive(Default)]
pub(super) struct Written {
    /// The size of its file; `None` if there was nothing to write.
    pub(super) bytes: Option<u64>,
    /// The checksums of its slices, in the order of the plan.
    pub(super) checksums: Vec<Vec<String>>,
    /// The numbers of the parameters whose moments it wrote.
    pub(super) scalars: ParamScalars,
}

/// Writes what a rank is to write, if anything, and waits until it is on the disk. Beside its tensors a rank holds a
/// copy of one slice at most, where that is on a device or not contiguous, and of the moments of a [portion](portions)
/// of its parameters.
///
/// # Errors
/// [`Error::InvalidArgument`] if the disk refuses.
pub(super) fn write(contents: &Contents, plan: &WritePlan, rank: usize, dir: &Path) -> Result<Outcome, Error> {
    let mut tensors = Vec::new();
    for (key, tensor, ranges) in plan.of_rank(rank) {
        let dims = ranges.iter().map(Range::len).collect();
        tensors.push(NewTensor { name: key.name(ranges), dtype: tensor.dtype, dims });
    }
    if tensors.is_empty() {
        return Ok(Outcome::Written(Written::default()));
    }
    let about = BTreeMap::from([("format".to_owned(), "burn-parallel checkpoint".to_owned())]);
    let new_file = NewFile::new(&tensors, &about)?;
    let file = PieceWriter::create(&dir.join(file_name(rank)), &new_file)?;
    let mut held: HashMap<&TensorKey, Vec<&Slice>> = HashMap::new();
    contents.slices.iter().for_each(|slice| held.entry(&slice.key).or_default().push(slice));
    let mut moments = Portions::new(contents, &held);
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
            SliceValue::Moment(id, _) => match moments.take(key, *id, &mut plan.of_rank(rank).skip(place))? {
                Ok(value) => value,
                Err(changed) => return Ok(Outcome::Changed(changed)),
            },
        };
        let values = contiguous(value, &slice.ranges, ranges)?;
        let bytes = bytes_of(&values);
        let mut of_slice = Vec::with_capacity(bytes.len().div_ceil(BLOCK_BYTES));
        for (piece, bytes) in bytes.chunks(PIECE).enumerate() {
            of_slice.extend(bytes.chunks(BLOCK_BYTES).map(checksum));
            file.write_at(start + (piece * PIECE) as u64, bytes)?;
            contents.progress.wrote(bytes.len());
        }
        checksums.push(of_slice);
    }
    file.sync()?;
    Ok(Outcome::Written(Written { bytes: Some(new_file.size), checksums, scalars: moments.scalars }))
}

fn within(inner: &[Range<usize>], outer: &[Range<usize>]) -> bool {
    inner.iter().zip(outer).all(|(inner, outer)| outer.start <= inner.start && inner.end <= outer.end)
}

/// Moments of parameters that are written one behind the other.
struct Portions<'a> {
    contents: &'a Contents,
    held: &'a HashMap<&'a TensorKey, Vec<&'a Slice>>,
    /// Of this optimizer, which has these names.
    of: String,
    names: StateNames,
    there: HashMap<(ParamId, String), PlainTensor>,
    /// The numbers of all parameters that were read out.
    scalars: ParamScalars,
}

impl<'a> Portions<'a> {
    fn new(contents: &'a Contents, held: &'a HashMap<&'a TensorKey, Vec<&'a Slice>>) -> Self {
        let (of, names, there) = (String::new(), StateNames::default(), HashMap::new());
        Self { contents, held, of, names, there, scalars: ParamScalars::new() }
    }

    /// A moment of a parameter, which is `first` of those `next` to be written, if the optimizer has those that were
    /// known. What was there is dropped, if it is not among it.
    fn take<'b>(
        &mut self,
        first: &TensorKey,
        id: ParamId,
        next: &mut dyn Iterator<Item = (&'b TensorKey, &'b PlannedTensor, &'b [Range<usize>])>,
    ) -> Result<Result<PlainTensor, Changed>, Error> {
        let TensorKey::Moment { optimizer, moment, .. } = first else {
            return Err(checkpoint_error(format!("`{first}` is no moment")));
        };
        let place = (id, moment.clone());
        if self.of != *optimizer || !self.there.contains_key(&place) {
            let mut params = Vec::<(ParamId, &str, usize)>::new();
            for (key, ..) in next {
                let TensorKey::Moment { optimizer: of, path, .. } = key else { break };
                let Some(slice) = self.held.get(key).and_then(|slices| slices.first()) else { break };
                let Slice { value: SliceValue::Moment(id, dtype), ranges, .. } = slice else { break };
                let bytes = ranges.iter().map(Range::len).product::<usize>() * dtype.size();
                let many = of != optimizer || params.len() > MOST_AT_ONCE;
                match params.last_mut() {
                    _ if many => break,
                    Some((last, _, before)) if last == id => *before += bytes,
                    _ => params.push((*id, path, bytes)),
                }
            }
            let params = portions(&params, |(.., bytes)| *bytes).next().unwrap_or_default();
            if let Some(path) = self.read(optimizer, params)? {
                return Ok(Err(Changed { optimizer: optimizer.clone(), path }));
            }
        }
        let lost = || checkpoint_error(format!("`{first}` is not in the optimizer any more"));
        self.there.get(&place).cloned().ok_or_else(lost).map(Ok)
    }

    /// Reads out the state of some parameters. Returns the path of one whose state is not what was known.
    fn read(&mut self, optimizer: &str, params: &[(ParamId, &str, usize)]) -> Result<Option<String>, Error> {
        // The old ones go first.
        self.there.clear();
        let held = self.contents.optimizers.get(optimizer);
        let held = held.ok_or_else(|| checkpoint_error(format!("optimizer `{optimizer}` is gone")))?;
        if self.of != *optimizer {
            self.of = optimizer.into();
            self.names.clone_from(&held.known.names);
        }
        let ids: Vec<ParamId> = params.iter().map(|(id, ..)| *id).collect();
        let mut states = self.names.read(&held.state, &ids).map_err(|why| unreadable(optimizer, why))?;
        let scalars = self.scalars.entry(optimizer.into()).or_default();
        for (id, path, _) in params {
            let Some(state) = states.remove(id).filter(|state| held.known.is(*id, Some(state))) else {
                return Ok(Some((*path).into()));
            };
            scalars.insert((*path).into(), stored(state.scalars));
            let values = state.moments.into_iter();
            self.there
                .extend(values.map(|(moment, data)| ((*id, moment), PlainTensor::from_data(data, &Device::flex()))));
        }
        Ok(None)
    }
}

/// The elements of a value in these ranges of the whole, of which it is the part `own`, row-major in host memory: where
/// they are, if they are so there.
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
