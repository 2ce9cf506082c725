//! Gives an optimizer the state of a checkpoint.
//!
//! The fields of burn's record are private. One that is read from a file in memory keeps all of that file as long as
//! one tensor of it is there, though the optimizer has changed them all since. One that an optimizer gives out has
//! memory of its own for each. So the record is that of an optimizer of ours: asked for the state of a parameter, it
//! reads that from the checkpoint. Nothing is there twice.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use burn::module::ParamGroup;
use burn::optim::{
    DynOptimizer, DynState, LearningRate, ModuleOptimizer, OptimizerRecord, SgdConfig, StateSink, StateSource,
};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Bytes, DType, Device, TensorData};
use burn_pack::{Reader, Scalar, Writer};

use super::index::{OptimizerParam, StoredTensor};
use super::params::ParamInfo;
use super::plan::TensorKey;
use super::{checkpoint_error, unreadable};
use crate::Error;
use crate::comm::panic_message;
use crate::params::ParamSlice;
use crate::tensor_file::{Elements, Loop, Side, copy_strided, row_major};

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

/// An optimizer with the state of a checkpoint, of which `read` gives the part of a moment in some ranges. Beside the
/// state there is no more than one moment, if it is to be padded or cast.
///
/// # Errors
/// [`Error::Checkpoint`] if the optimizer is of another kind, or moments do not fit; those of `read`.
pub(super) fn restored(
    optimizer: &str,
    into: &ModuleOptimizer,
    params: &[Wanted<'_>],
    read: &ReadMoment,
) -> Result<ModuleOptimizer, Error> {
    let outline = outline(optimizer, params)?;
    let record = || OptimizerRecord::from_bytes(outline.clone()).map_err(|why| unreadable(optimizer, why));
    same_kind(optimizer, into, record()?, params)?;
    let mut states = HashMap::new();
    for wanted in params {
        states.insert(wanted.info.id.val().to_string(), wanted.stored(optimizer)?);
    }
    let failed = Arc::new(Mutex::new(None));
    let stored = Stored { states, read: read.clone(), failed: failed.clone() };
    let giver: ModuleOptimizer = SgdConfig::new().init();
    let record = giver.with_group(ParamGroup::all(), stored, None).load_record(record()?).to_record();
    if let Some(error) = failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error);
    }
    load(optimizer, into, record)
}

/// A record with a tensor of one element for each moment, and the numbers and paths that there are to be.
fn outline(optimizer: &str, params: &[Wanted<'_>]) -> Result<Bytes, Error> {
    let (mut tensors, mut scalars, mut paths) = (Vec::new(), Vec::new(), Vec::new());
    for Wanted { info, state, .. } in params {
        let id = info.id.val();
        for (name, stored) in &state.moments {
            let one = Bytes::from_elems(vec![0f32]);
            let dims = vec![1; stored.dims.len()];
            tensors.push(burn_pack::Tensor::new(format!("{id}.{name}"), DType::F32, dims, Some(id), one));
        }
        for (name, scalar) in &state.scalars {
            let name = format!("{id}.{name}");
            let number = scalar.read().ok_or_else(|| {
                checkpoint_error(format!("optimizer `{optimizer}`: `{name}` is {scalar:?}, which is no number"))
            })?;
            scalars.push((name, number));
        }
        paths.push((id.to_string(), info.path.clone()));
    }
    let writer = scalars.iter().fold(Writer::new(tensors), |writer, (name, number)| writer.with_scalar(name, *number));
    let writer = paths.iter().fold(writer, |writer, (id, path)| writer.with_metadata(id, path));
    writer.into_bytes().map_err(|why| unreadable(optimizer, why))
}

/// Demands that the optimizer takes all that there is: burn silently drops what does not fit.
fn same_kind(
    optimizer: &str,
    into: &ModuleOptimizer,
    outline: OptimizerRecord,
    params: &[Wanted<'_>],
) -> Result<(), Error> {
    let tried = load(optimizer, into, outline)?;
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

fn load(optimizer: &str, into: &ModuleOptimizer, record: OptimizerRecord) -> Result<ModuleOptimizer, Error> {
    // burn panics where tensors are not of the rank that it is told.
    let loaded = catch_unwind(AssertUnwindSafe(|| into.clone().load_record(record)));
    loaded.map_err(|panic| {
        checkpoint_error(format!(
            "optimizer `{optimizer}` does not take what the checkpoint has of it: {}",
            panic_message(&*panic)
        ))
    })
}

impl Wanted<'_> {
    /// Where the state of this parameter is, and what this rank takes of it.
    fn stored(&self, optimizer: &str) -> Result<StoredState, Error> {
        let Self { info, slice, saved_dtype, state } = self;
        let mut moments = Vec::new();
        for (moment, stored) in &state.moments {
            let Some((ranges, dims)) = wanted(&stored.dims, slice) else {
                return Err(checkpoint_error(format!(
                    "optimizer `{optimizer}`: moment `{moment}` of `{}` has dims {:?} in the checkpoint, which do not fit the part \
                     {:?} of {:?} that this rank holds: leave the parameter whole, or restore without this optimizer",
                    info.path, stored.dims, slice.ranges, slice.dims
                )));
            };
            let dtype = stored.burn_dtype()?;
            // Moments are of the dtype of their parameter, if they were.
            let dtype = if Some(dtype) == *saved_dtype { info.dtype } else { dtype };
            let key = TensorKey::moment(optimizer, &info.path, moment.clone());
            moments.push(StoredMoment { name: moment.clone(), key, stored: stored.clone(), ranges, dims, dtype });
        }
        let scalars = state.scalars.iter().filter_map(|(name, scalar)| Some((name.clone(), scalar.read()?))).collect();
        Ok(StoredState { moments, scalars })
    }
}

/// What this rank is to read of a moment: its ranges, and the dims with zeros behind; `None` if it does not fit the
/// parameter.
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

/// The state of a parameter in the checkpoint.
struct StoredState {
    moments: Vec<StoredMoment>,
    scalars: Vec<(String, Scalar)>,
}

struct StoredMoment {
    name: String,
    key: TensorKey,
    stored: StoredTensor,
    ranges: Vec<Range<usize>>,
    dims: Vec<usize>,
    dtype: DType,
}

impl StoredMoment {
    fn read(&self, read: &ReadMoment) -> Result<TensorData, Error> {
        let data = match self.ranges.iter().any(Range::is_empty) {
            true => None,
            false => Some(read(&self.key, &self.stored, &self.ranges)?),
        };
        zero_padded(data, &self.dims, self.dtype)
    }
}

/// The values with zeros behind along each dim, up to these dims.
fn zero_padded(data: Option<TensorData>, dims: &[usize], dtype: DType) -> Result<TensorData, Error> {
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

/// An optimizer that gives out the states of a checkpoint as its own.
struct Stored {
    /// By the number of the parameter.
    states: HashMap<String, StoredState>,
    read: ReadMoment,
    /// Why a moment could not be read: nothing is read after that.
    failed: Arc<Mutex<Option<Error>>>,
}

impl DynOptimizer for Stored {
    fn step_dyn(
        &self,
        _: usize,
        _: LearningRate,
        tensor: BridgeTensor,
        _: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        (tensor, state)
    }

    fn to_device_dyn(&self, state: DynState, _: &Device) -> DynState {
        state
    }

    fn state_flatten(&self, prefix: &str, _: &DynState, into: &mut StateSink) {
        let Some(state) = self.states.get(prefix) else { return };
        for (name, scalar) in &state.scalars {
            into.push_scalar(prefix, name, *scalar);
        }
        for moment in &state.moments {
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            if failed.is_some() {
                return;
            }
            match moment.read(&self.read) {
                Ok(data) => into.push_tensor(prefix, &moment.name, data),
                Err(error) => *failed = Some(error),
            }
        }
    }

    fn state_unflatten(&self, rank: usize, _: &str, _: &mut StateSource, _: &Device) -> Option<DynState> {
        Some(DynState::create((), rank))
    }
}
