//! Gives an optimizer the state of a checkpoint.
//!
//! The record that it loads is that of an optimizer which, asked for the state of a parameter, reads that from the
//! checkpoint. Nothing is there twice.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Mutex;

use burn::module::{ParamGroup, ParamId};
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, DType, TensorData};
use burn_pack::{Reader, Scalar, Writer};

use super::index::{OptimizerParam, StoredTensor};
use super::params::ParamInfo;
use super::plan::TensorKey;
use super::{checkpoint_error, unreadable};
use crate::Error;
use crate::comm::panic_message;
use crate::error::catch_quietly;
use crate::lock::lock;
use crate::optim::{ASKED, ParamState, StateNames, Widened, record_of};
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
pub(super) type ReadMoment<'a> =
    dyn FnMut(&TensorKey, &StoredTensor, &[Range<usize>]) -> Result<TensorData, Error> + 'a;

/// An optimizer with the state of a checkpoint, of which `read` gives the part of a moment in some ranges, in the order
/// of the files. Beside the state there is no more than one moment, if it is to be padded or cast.
///
/// Moments are of the dtype of their parameter, as burn's optimizers make them, but where the optimizer cannot load
/// such: they are what it loads, if the parameter's numbers are all numbers of that, and the parameter is updated in
/// it.
///
/// # Errors
/// [`Error::Checkpoint`] if the optimizer is of another kind, or moments do not fit; those of `read`.
pub(super) fn restored(
    optimizer: &str,
    into: &ModuleOptimizer,
    params: &[Wanted<'_>],
    read: &mut ReadMoment<'_>,
) -> Result<ModuleOptimizer, Error> {
    let mut params: Vec<&Wanted<'_>> = params.iter().collect();
    params.sort_by_key(|wanted| &wanted.info.path);
    let outline = outline(optimizer, &params)?;
    let record = || OptimizerRecord::from_bytes(outline.clone()).map_err(|why| unreadable(optimizer, why));
    let loads = Loads::of(optimizer, into, record()?, &params)?;
    let (plain, mut into) = (into, into.clone());
    for wanted in &params {
        let ParamInfo { id, path, .. } = wanted.info;
        if let Some(dtype) = wanted.widened(optimizer, &loads)?.filter(|_| !loads.widened.contains(id)) {
            let names = |names: Vec<&String>| names.into_iter().cloned().collect();
            let (moments, scalars) = (wanted.state.moments.keys().collect(), wanted.state.scalars.keys().collect());
            let optim = Widened::new(*id, path, plain, StateNames::new(names(moments), names(scalars)), dtype);
            into = into.with_group(ParamGroup::from_ids(vec![*id]), optim, None);
        }
    }
    let mut states = HashMap::new();
    for wanted in &params {
        let widened = wanted.widened(optimizer, &loads)?.is_some();
        states.insert(wanted.info.id.val().to_string(), wanted.state(optimizer, widened, read)?);
    }
    let states = Mutex::new(states);
    let record = record_of(record()?, move |id, into| {
        // Given away: a state is there once.
        let Some(state) = lock(&states).remove(id) else { return };
        state.scalars.into_iter().for_each(|(name, scalar)| into.push_scalar(id, &name, scalar));
        state.moments.into_iter().for_each(|(name, data)| into.push_tensor(id, &name, data));
    });
    load(optimizer, &into, record)
}

/// A record with a tensor of one element for each moment, of the dtype of its parameter, and the numbers and paths that
/// there are to be; it only asks how they would be loaded.
fn outline(optimizer: &str, params: &[&Wanted<'_>]) -> Result<Bytes, Error> {
    let (mut tensors, mut scalars, mut paths) = (Vec::new(), Vec::new(), Vec::new());
    for Wanted { info, state, .. } in params {
        let id = info.id.val();
        for (name, stored) in &state.moments {
            let one = Elements::zeros(1, info.dtype).into_data(vec![1; stored.dims.len()], info.dtype);
            let (bytes, dims, dtype) = one.into_parts();
            tensors.push(burn_pack::Tensor::new(format!("{id}.{name}"), dtype, dims, Some(id), bytes));
        }
        for (name, scalar) in &state.scalars {
            let name = format!("{id}.{name}");
            let number = scalar.read().ok_or_else(|| {
                checkpoint_error(format!("optimizer `{optimizer}`: `{name}` is {scalar:?}, which is no number"))
            })?;
            scalars.push((name, number));
        }
        scalars.push((format!("{id}.{ASKED}"), Scalar::from(1_usize)));
        paths.push((id.to_string(), info.path.clone()));
    }
    let writer = scalars.iter().fold(Writer::new(tensors), |writer, (name, number)| writer.with_scalar(name, *number));
    let writer = paths.iter().fold(writer, |writer, (id, path)| writer.with_metadata(id, path));
    writer.into_bytes().map_err(|why| unreadable(optimizer, why))
}

/// How an optimizer loads moments that are recorded in the dtype of their parameter.
struct Loads {
    /// The dtypes that they have then, by their names in a record.
    dtypes: BTreeMap<String, DType>,
    /// The parameters that it updates in another dtype than their own, since an earlier restore.
    widened: HashSet<ParamId>,
}

impl Loads {
    /// # Errors
    /// [`Error::Checkpoint`] if the optimizer does not take all that there is: burn silently drops what does not fit.
    fn of(
        optimizer: &str,
        into: &ModuleOptimizer,
        outline: OptimizerRecord,
        params: &[&Wanted<'_>],
    ) -> Result<Self, Error> {
        let tried = load(optimizer, into, outline)?;
        let bytes = tried.to_record().into_bytes().map_err(|why| unreadable(optimizer, why))?;
        let reader = Reader::from_bytes(bytes).map_err(|why| unreadable(optimizer, why))?;
        let scalars: HashSet<String> = reader.scalars().keys().cloned().collect();
        let mut dtypes = BTreeMap::new();
        for tensor in reader.into_tensors().map_err(|why| unreadable(optimizer, why))? {
            let (name, dtype, ..) = tensor.into_parts().map_err(|why| unreadable(optimizer, why))?;
            dtypes.insert(name, dtype);
        }
        let mut widened = HashSet::new();
        for Wanted { info, state, .. } in params {
            let named = |name: &str| format!("{}.{name}", info.id.val());
            if scalars.contains(&named(ASKED)) {
                widened.insert(info.id);
            }
            let mut names = state.moments.keys().chain(state.scalars.keys());
            let lost = names.find(|name| !dtypes.contains_key(&named(name)) && !scalars.contains(&named(name)));
            if let Some(name) = lost {
                return Err(checkpoint_error(format!(
                    "optimizer `{optimizer}` does not take `{name}` of `{}`, which the checkpoint has: it was saved of an optimizer \
                     of another kind. Take that one, or restore without this optimizer, which then begins anew",
                    info.path
                )));
            }
        }
        Ok(Self { dtypes, widened })
    }
}

fn load(optimizer: &str, into: &ModuleOptimizer, record: OptimizerRecord) -> Result<ModuleOptimizer, Error> {
    // burn panics where tensors are not of the rank that it is told.
    let loaded = catch_quietly(|_| true, || into.clone().load_record(record));
    loaded.map_err(|panic| {
        checkpoint_error(format!(
            "optimizer `{optimizer}` does not take what the checkpoint has of it: {}",
            panic_message(&*panic)
        ))
    })
}

impl Wanted<'_> {
    /// The dtype in which the parameter is to be updated, if the optimizer loads its moments in another than its own.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it would lose digits there.
    fn widened(&self, optimizer: &str, loads: &Loads) -> Result<Option<DType>, Error> {
        let ParamInfo { id, path, dtype, .. } = self.info;
        let name = |moment: &String| format!("{}.{moment}", id.val());
        let mut found = self.state.moments.keys().filter_map(|moment| loads.dtypes.get(&name(moment)));
        let Some(found) = found.find(|it| *it != dtype) else { return Ok(None) };
        if !Widened::takes(*dtype, *found) {
            return Err(checkpoint_error(format!(
                "optimizer `{optimizer}` loads moments as {found:?}, and `{path}` is {dtype:?}, which would be updated with fewer \
                 digits, or not at all: make the optimizer with `init_fused`, which loads any, have burn's default device \
                 (with `load_on_host` the host) make {dtype:?} by `Device::configure` as the program begins, or restore \
                 without this optimizer"
            )));
        }
        Ok(Some(*found))
    }

    /// Reads the state of this parameter that this rank takes.
    fn state(&self, optimizer: &str, widened: bool, read: &mut ReadMoment<'_>) -> Result<ParamState, Error> {
        let Self { info, slice, saved_dtype, state } = self;
        let mut moments = BTreeMap::new();
        for (moment, stored) in &state.moments {
            let Some((ranges, dims)) = wanted(&stored.dims, slice) else {
                return Err(checkpoint_error(format!(
                    "optimizer `{optimizer}`: moment `{moment}` of `{}` has dims {:?} in the checkpoint, which do not fit the part \
                     {:?} of {:?} that this rank holds: leave the parameter whole, or restore without this optimizer",
                    info.path, stored.dims, slice.ranges, slice.dims
                )));
            };
            let dtype = stored.burn_dtype()?;
            // Those that were of the dtype of their parameter are so again; what is updated with more digits keeps its
            // own.
            let dtype = if Some(dtype) == *saved_dtype && !widened { info.dtype } else { dtype };
            let data = match ranges.iter().any(Range::is_empty) {
                true => None,
                false => Some(read(&TensorKey::moment(optimizer, &info.path, moment.clone()), stored, &ranges)?),
            };
            moments.insert(moment.clone(), zero_padded(data, &dims, dtype)?);
        }
        let scalars = state.scalars.iter().filter_map(|(name, scalar)| Some((name.clone(), scalar.read()?))).collect();
        Ok(ParamState { moments, scalars })
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
