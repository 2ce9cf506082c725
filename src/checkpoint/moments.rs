//! The state of optimizers and schedulers, in and out of burn's records.
//!
//! The fields of burn's records are private: they are read and made in burn's own file format, in memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::{ParamGroup, ParamId};
use burn::optim::{ModuleOptimizer, OptimizerRecord, SgdConfig};
use burn::tensor::{Bytes, DType, Device, TensorData};
use burn_pack::{Reader, Writer};

use super::checkpoint_error;
use super::contents::{Slice, SliceValue};
use super::index::{OptimizerParam, StoredTensor};
use super::params::ParamInfo;
use super::plan::TensorKey;
use super::scalar::StoredScalar;
use crate::Error;
use crate::comm::panic_message;
use crate::params::ParamSlice;
use crate::tensor::PlainTensor;

/// Bytes of parameters whose state is read out at once, unless one has more: of what burn makes of it there are two copies meanwhile.
pub(super) const PORTION: usize = 2 << 20;
/// Parameters whose state is read out at once, at most: burn looks through them for each that it forgets.
pub(super) const MOST: usize = 256;

/// The state of an optimizer on this rank, by path. Of its moments it is known what they are: they are [read](moments_of) as they are
/// written.
pub(super) struct Moments {
    pub(super) slices: Vec<Slice>,
    pub(super) scalars: BTreeMap<String, BTreeMap<String, StoredScalar>>,
}

fn unreadable(name: &str, problem: impl std::fmt::Display) -> Error {
    checkpoint_error(format!("the state of `{name}` cannot be read out of burn's record: {problem}"))
}

/// The state of the parameters of a group, as a file in memory.
///
/// burn writes out the state of all parameters at once. A new group makes an optimizer forget its parameters: here a copy, which
/// shares the tensors.
fn file_of(optimizer: &str, state: &ModuleOptimizer, forgets: ParamGroup) -> Result<Reader, Error> {
    let record = state.clone().with_group(forgets, SgdConfig::new().build(), None).to_record();
    let bytes = record.into_bytes().map_err(|why| unreadable(optimizer, why))?;
    Reader::from_bytes(bytes).map_err(|why| unreadable(optimizer, why))
}

fn file_of_some(optimizer: &str, state: &ModuleOptimizer, ids: Vec<ParamId>) -> Result<Reader, Error> {
    file_of(optimizer, state, ParamGroup::all().exclude(ParamGroup::from_ids(ids)))
}

/// A tensor of a file of moments: its parameter, the name of the moment, its dtype, dims and bytes.
fn moment_of(optimizer: &str, tensor: burn_pack::Tensor) -> Result<(ParamId, String, TensorData), Error> {
    let (name, dtype, shape, id, bytes) = tensor.into_parts().map_err(|why| unreadable(optimizer, why))?;
    let id = id.ok_or_else(|| unreadable(optimizer, format!("`{name}` is of no parameter")))?;
    let moment = name.split_once('.').map_or(name.as_str(), |(_, moment)| moment).to_owned();
    Ok((ParamId::from(id), moment, TensorData::from_bytes(bytes, shape, dtype)))
}

/// # Errors
/// [`Error::Checkpoint`] if it has moments of parameters that the model does not have, or of dims that do not fit theirs.
pub(super) fn of_optimizer(
    optimizer: &str,
    state: &ModuleOptimizer,
    infos: &[ParamInfo],
    held: &HashMap<ParamId, ParamSlice>,
) -> Result<Moments, Error> {
    let known = ParamGroup::from_ids(infos.iter().map(|info| info.id).collect());
    let strange = file_of(optimizer, state, known)?;
    if !strange.scalars().is_empty() || !strange.tensor_names().is_empty() {
        let problem =
            "it has moments of a parameter that the model does not have: save it with the model that it trains";
        return Err(checkpoint_error(format!("optimizer `{optimizer}`: {problem}")));
    }
    let mut moments = Moments { slices: Vec::new(), scalars: BTreeMap::new() };
    let size = |info: &ParamInfo| {
        held.get(&info.id).map_or(0, |slice| slice.local_dims.iter().product::<usize>() * info.dtype.size())
    };
    let mut rest = infos;
    while !rest.is_empty() {
        let mut bytes = 0;
        let more = |info: &&ParamInfo| {
            bytes += size(info);
            bytes <= PORTION
        };
        let (portion, behind) = rest.split_at(rest.iter().take_while(more).count().clamp(1, MOST));
        read_portion(optimizer, state, portion, held, &mut moments)?;
        rest = behind;
    }
    Ok(moments)
}

fn read_portion(
    optimizer: &str,
    state: &ModuleOptimizer,
    infos: &[ParamInfo],
    held: &HashMap<ParamId, ParamSlice>,
    moments: &mut Moments,
) -> Result<(), Error> {
    let reader = file_of_some(optimizer, state, infos.iter().map(|info| info.id).collect())?;
    let of = |id: ParamId| {
        let found = infos.iter().find(|info| info.id == id);
        found.ok_or_else(|| unreadable(optimizer, format!("parameter {id} was not asked for")))
    };
    for (name, scalar) in reader.scalars() {
        let parts = name.split_once('.').and_then(|(id, name)| Some((id.parse::<u64>().ok()?, name)));
        let (id, name) = parts.ok_or_else(|| unreadable(optimizer, format!("a number is called `{name}`")))?;
        let path = of(id.into())?.path.clone();
        moments.scalars.entry(path).or_default().insert(name.into(), (*scalar).into());
    }
    for tensor in reader.into_tensors().map_err(|why| unreadable(optimizer, why))? {
        let (id, moment, data) = moment_of(optimizer, tensor)?;
        let info = of(id)?;
        let dims = data.shape().to_vec();
        let Some(slice) = held.get(&info.id) else { continue };
        let Some((dims, ranges)) = part(&dims, slice) else {
            let ParamSlice { local_dims, dims: whole, .. } = slice;
            return Err(checkpoint_error(format!(
                "optimizer `{optimizer}`: moment `{moment}` of `{}` has dims {dims:?}, of which it cannot be told what part of \
                 the whole it is: this rank holds {local_dims:?} of {whole:?}. Leave the parameter whole, or take another \
                 optimizer for it",
                info.path
            )));
        };
        if !ranges.iter().any(Range::is_empty) {
            let key = TensorKey::moment(optimizer, &info.path, moment);
            moments.slices.push(Slice { key, dims, ranges, value: SliceValue::Moment(info.id, data.dtype()) });
        }
    }
    Ok(())
}

/// The moments of some parameters, by parameter and name.
///
/// # Errors
/// [`Error::Checkpoint`] if burn's record is not what it was.
pub(super) fn moments_of(
    optimizer: &str,
    state: &ModuleOptimizer,
    ids: Vec<ParamId>,
) -> Result<HashMap<(ParamId, String), PlainTensor>, Error> {
    let tensors = file_of_some(optimizer, state, ids)?.into_tensors().map_err(|why| unreadable(optimizer, why))?;
    let values = tensors.into_iter().map(|tensor| {
        let (id, moment, data) = moment_of(optimizer, tensor)?;
        Ok(((id, moment), PlainTensor::from_data(data, &Device::flex())))
    });
    values.collect()
}

/// The dims of the whole of a moment of these dims, and which part of it this rank has; `None` if that cannot be told.
fn part(dims: &[usize], param: &ParamSlice) -> Option<(Vec<usize>, Vec<Range<usize>>)> {
    if dims == param.local_dims {
        return Some((param.dims.clone(), param.ranges.clone()));
    }
    let is_whole = |dim: usize| param.ranges[dim] == (0..param.dims[dim]);
    if (0..param.dims.len()).all(is_whole) {
        return Some((dims.to_vec(), dims.iter().map(|size| 0..*size).collect()));
    }
    // Factored moments have 1 where they are sums over a dim.
    let factored = dims.len() == param.dims.len()
        && dims.iter().enumerate().all(|(dim, size)| *size == param.local_dims[dim] || (*size == 1 && is_whole(dim)));
    factored.then(|| {
        let sides = dims.iter().enumerate().map(|(dim, size)| match *size == param.local_dims[dim] {
            true => (param.dims[dim], param.ranges[dim].clone()),
            false => (1, 0..1),
        });
        sides.unzip()
    })
}

/// What this rank is to read of a moment: its ranges, and the dims with zeros behind; `None` if it does not fit the parameter.
fn wanted(dims: &[usize], param: &ParamSlice) -> Option<(Vec<Range<usize>>, Vec<usize>)> {
    if dims == param.dims {
        return Some((param.ranges.clone(), param.local_dims.clone()));
    }
    let is_whole = |dim: usize| param.ranges[dim] == (0..param.dims[dim]);
    if (0..param.dims.len()).all(is_whole) {
        return Some((dims.iter().map(|size| 0..*size).collect(), dims.to_vec()));
    }
    let factored = dims.len() == param.dims.len()
        && dims
            .iter()
            .zip(&param.dims)
            .enumerate()
            .all(|(dim, (size, own))| size == own || (*size == 1 && is_whole(dim)));
    factored.then(|| {
        let sides = dims.iter().zip(&param.dims).enumerate().map(|(dim, (size, own))| match size == own {
            true => (param.ranges[dim].clone(), param.local_dims[dim]),
            false => (0..1, 1),
        });
        sides.unzip()
    })
}

/// A parameter whose state is restored.
pub(super) struct Wanted<'a> {
    pub(super) info: &'a ParamInfo,
    /// What this rank holds of it.
    pub(super) slice: &'a ParamSlice,
    /// The dtype that the parameter had when it was saved.
    pub(super) saved_dtype: Option<DType>,
    pub(super) state: &'a OptimizerParam,
}

/// Gives the part of a moment in some ranges.
pub(super) type ReadMoment =
    Arc<dyn Fn(&TensorKey, &StoredTensor, &[Range<usize>]) -> Result<TensorData, Error> + Send + Sync>;

/// An optimizer with the state of a checkpoint, of which `read` gives the part of a moment in these ranges. No more than one moment is
/// there twice.
///
/// # Errors
/// [`Error::Checkpoint`] if the optimizer is of another kind, or moments do not fit; those of `read`.
pub(super) fn restored(
    optimizer: &str,
    into: &ModuleOptimizer,
    params: &[Wanted<'_>],
    read: &ReadMoment,
) -> Result<ModuleOptimizer, Error> {
    same_kind(optimizer, into, params)?;
    let mut record = Record::default();
    for Wanted { info, slice, saved_dtype, state } in params {
        record.param(info, state);
        for (moment, stored) in &state.moments {
            let Some((ranges, dims)) = wanted(&stored.dims, slice) else {
                return Err(checkpoint_error(format!(
                    "optimizer `{optimizer}`: moment `{moment}` of `{}` has dims {:?} in the checkpoint, which do not fit the part \
                     {:?} of {:?} that this rank holds: leave the parameter whole, or restore without this optimizer",
                    info.path, stored.dims, slice.ranges, slice.dims
                )));
            };
            let key = TensorKey::moment(optimizer, &info.path, moment.clone());
            let dtype = stored.burn_dtype()?;
            // Moments are of the dtype of their parameter, if they were.
            let dtype = if Some(dtype) == *saved_dtype { info.dtype } else { dtype };
            let (read, stored, to) = (read.clone(), stored.clone(), dims.clone());
            record.tensor(info, moment, (dims, dtype), move || {
                let data = match ranges.iter().any(Range::is_empty) {
                    true => None,
                    false => Some(read(&key, &stored, &ranges)?),
                };
                zero_padded(data, &to, dtype)
            });
        }
    }
    record.load(optimizer, into)
}

/// The values with zeros behind along each dim, up to these dims.
fn zero_padded(data: Option<TensorData>, dims: &[usize], dtype: DType) -> Result<TensorData, Error> {
    use crate::tensor_file::{Elements, Loop, Side, copy_strided, row_major};
    match data {
        Some(data) if data.shape().as_slice() == dims && data.dtype() == dtype => Ok(data),
        data => {
            let mut elements = Elements::zeros(dims.iter().product(), dtype);
            if let Some(data) = data {
                let lens = data.shape().to_vec();
                let strides = row_major(&lens).into_iter().zip(row_major(dims));
                let loops: Vec<Loop> =
                    lens.iter().zip(strides).map(|(len, (from, to))| Loop { len: *len, from, to }).collect();
                let from = Side { start: 0, dtype: data.dtype() };
                copy_strided((data.as_bytes(), from), (elements.bytes_mut(), Side { start: 0, dtype }), &loops)?;
            }
            Ok(elements.into_data(dims.to_vec(), dtype))
        }
    }
}

/// Demands that the optimizer takes all that there is: burn silently drops what does not fit. Tried out on a tensor of one element
/// for each moment.
fn same_kind(optimizer: &str, into: &ModuleOptimizer, params: &[Wanted<'_>]) -> Result<(), Error> {
    let mut record = Record::default();
    for Wanted { info, state, .. } in params {
        record.param(info, state);
        for (moment, stored) in &state.moments {
            let one = vec![1; stored.dims.len()];
            record
                .tensor(info, moment, (one.clone(), DType::F32), move || Ok(TensorData::new(vec![0f32], one.clone())));
        }
    }
    let tried = record.load(optimizer, into)?;
    let bytes = tried.to_record().into_bytes().map_err(|why| unreadable(optimizer, why))?;
    let reader = Reader::from_bytes(bytes).map_err(|why| unreadable(optimizer, why))?;
    let kept: std::collections::HashSet<&str> =
        reader.tensor_names().into_iter().chain(reader.scalars().keys().map(String::as_str)).collect();
    for Wanted { info, state, .. } in params {
        let names = state.moments.keys().chain(state.scalars.keys());
        for name in names {
            if !kept.contains(format!("{}.{name}", info.id.val()).as_str()) {
                return Err(checkpoint_error(format!(
                    "optimizer `{optimizer}` does not take `{name}` of `{}`, which the checkpoint has: it was saved of an optimizer \
                     of another kind. Take that one, or restore without this optimizer, which then begins anew",
                    info.path
                )));
            }
        }
    }
    Ok(())
}

/// A record of an optimizer in the making.
#[derive(Default)]
struct Record {
    tensors: Vec<burn_pack::Tensor>,
    scalars: Vec<(String, StoredScalar)>,
    paths: Vec<(String, String)>,
    /// Why a tensor could not be made.
    failed: Arc<Mutex<Option<Error>>>,
}

impl Record {
    fn param(&mut self, info: &ParamInfo, state: &OptimizerParam) {
        let id = info.id.val().to_string();
        for (name, scalar) in &state.scalars {
            self.scalars.push((format!("{id}.{name}"), scalar.clone()));
        }
        self.paths.push((id, info.path.clone()));
    }

    /// A moment whose values are made when it is its turn in the file.
    fn tensor(
        &mut self,
        info: &ParamInfo,
        moment: &str,
        (dims, dtype): (Vec<usize>, DType),
        make: impl Fn() -> Result<TensorData, Error> + Send + Sync + 'static,
    ) {
        let (id, failed) = (info.id.val(), self.failed.clone());
        let bytes = dims.iter().product::<usize>() * dtype.size();
        let make = move || match make() {
            Ok(data) => Ok(data.into_parts().0),
            Err(error) => {
                let said = burn_pack::Error::IoError(error.to_string());
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                Err(said)
            }
        };
        self.tensors.push(burn_pack::Tensor::deferred(format!("{id}.{moment}"), dtype, dims, Some(id), bytes, make));
    }

    fn load(self, optimizer: &str, into: &ModuleOptimizer) -> Result<ModuleOptimizer, Error> {
        let mut writer = Writer::new(self.tensors);
        for (name, scalar) in &self.scalars {
            let scalar = scalar.read().ok_or_else(|| {
                checkpoint_error(format!("optimizer `{optimizer}`: `{name}` is {scalar:?}, which is no number"))
            })?;
            writer = writer.with_scalar(name, scalar);
        }
        for (id, path) in &self.paths {
            writer = writer.with_metadata(id, path);
        }
        let bytes = writer.into_bytes().map_err(|why| {
            let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
            failed.unwrap_or_else(|| unreadable(optimizer, why))
        })?;
        let record = OptimizerRecord::from_bytes(bytes).map_err(|why| unreadable(optimizer, why))?;
        // burn panics where tensors are not of the rank that it is told.
        let loaded = catch_unwind(AssertUnwindSafe(|| into.clone().load_record(record)));
        loaded.map_err(|panic| {
            checkpoint_error(format!(
                "optimizer `{optimizer}` does not take what the checkpoint has of it: {}",
                panic_message(&*panic)
            ))
        })
    }
}

/// The numbers of a scheduler.
///
/// # Errors
/// [`Error::Checkpoint`] if burn cannot write them.
pub(super) fn of_scheduler(name: &str, scheduler: &ModuleLrScheduler) -> Result<BTreeMap<String, StoredScalar>, Error> {
    let bytes = scheduler.to_record().into_bytes().map_err(|why| unreadable(name, why))?;
    let reader = Reader::from_bytes(bytes).map_err(|why| unreadable(name, why))?;
    Ok(reader.scalars().iter().map(|(name, scalar)| (name.clone(), (*scalar).into())).collect())
}

/// A scheduler with the numbers of a checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] if it is of another kind.
pub(super) fn restored_scheduler(
    name: &str,
    into: &ModuleLrScheduler,
    numbers: &BTreeMap<String, StoredScalar>,
) -> Result<ModuleLrScheduler, Error> {
    let own = of_scheduler(name, into)?;
    if !own.keys().eq(numbers.keys()) {
        let list = |numbers: &BTreeMap<String, StoredScalar>| numbers.keys().cloned().collect::<Vec<_>>().join(", ");
        return Err(checkpoint_error(format!(
            "scheduler `{name}` keeps [{}], but the checkpoint has [{}] of it: take the kind that was saved, or restore without it",
            list(&own),
            list(numbers)
        )));
    }
    let mut writer = Writer::new(Vec::new());
    for (key, number) in numbers {
        let number = number.read().ok_or_else(|| {
            checkpoint_error(format!("scheduler `{name}`: `{key}` is {number:?}, which is no number"))
        })?;
        writer = writer.with_scalar(key, number);
    }
    let bytes: Bytes = writer.into_bytes().map_err(|why| unreadable(name, why))?;
    let record = LrSchedulerRecord::from_bytes(bytes).map_err(|why| unreadable(name, why))?;
    Ok(into.clone().load_record(record))
}
