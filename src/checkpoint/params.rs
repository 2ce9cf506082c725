//! The parameters of a model by path, and this rank's slices of them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use burn::module::{Module, ParamId};
use burn::optim::ModuleOptimizer;
use burn::tensor::DType;

use super::checkpoint_error;
use super::contents::{Slice, SliceValue};
use super::plan::TensorKey;
use crate::Error;
use crate::params::{ParamRef, ParamSlice, ShardedIds, average_statistics, is_statistic, visit_params};
use crate::sharding::{Rows, ShardComms};
use crate::tensor::PlainTensor;
use crate::train::{ParallelModule, whole_owners};

/// A parameter, seen without its value. All ranks have the same in the same order.
#[derive(Debug, Clone)]
pub(super) struct ParamInfo {
    pub(super) id: ParamId,
    pub(super) path: String,
    /// Its dtype on this rank.
    pub(super) dtype: DType,
}

/// All parameters of a model, each once, under the first of its paths. Lazy ones are not made.
///
/// # Errors
/// [`Error::Checkpoint`] if two parameters have one path.
pub(super) fn infos<M: Module>(module: &M) -> Result<Vec<ParamInfo>, Error> {
    let mut infos = Vec::new();
    let mut paths = HashSet::new();
    let mut twice = None;
    visit_each(module, &mut |param| {
        let path = param.path();
        if !paths.insert(path.clone()) {
            twice.get_or_insert(path.clone());
        }
        infos.push(ParamInfo { id: param.id(), path, dtype: param.dtype() });
    });
    match twice {
        None => Ok(infos),
        Some(path) => Err(checkpoint_error(format!(
            "two parameters of the model have the path `{path}`: give them paths of their own"
        ))),
    }
}

/// Visits each parameter once; what stands for those of which this rank holds rows is none.
fn visit_each<M: Module>(module: &M, visit: &mut dyn FnMut(ParamRef<'_>)) {
    let mut seen = ShardedIds::of(module).stand_ins;
    visit_params(module, &mut |param| {
        if seen.insert(param.id()) {
            visit(param);
        }
    });
}

/// This rank's slices of the parameters whose values count here. Lazy ones that it holds are made; no value is copied.
///
/// # Errors
/// [`Error::Pipeline`] if it is not known who holds what; [`Error::Graph`] for quantized parameters.
pub(super) fn slices<P: ParallelModule>(model: &P) -> Result<Vec<Slice>, Error> {
    average_statistics(model.local());
    let (mut held, mut outcome) = (model.param_slices()?, Ok(Vec::new()));
    visit_each(model.local(), &mut |param| {
        let Some(ParamSlice { dims, ranges, .. }) = held.remove(&param.id()) else { return };
        let Ok(found) = &mut outcome else { return };
        // Of a parameter without elements it is told all the same that it is there.
        if ranges.iter().any(Range::is_empty) && !dims.contains(&0) {
            return;
        }
        let path = param.path();
        match PlainTensor::of(param.value(), &format!("parameter `{path}`")) {
            Ok(value) => {
                found.push(Slice { key: TensorKey::param(path), dims, ranges, value: SliceValue::There(value) })
            }
            Err(error) => outcome = Err(error),
        }
    });
    outcome
}

/// The running statistics of a model, which loading changes in all clones of it.
pub(super) struct Statistics(HashMap<ParamId, PlainTensor>);

impl Statistics {
    pub(super) fn of<P: ParallelModule>(model: &P) -> Self {
        average_statistics(model.local());
        let mut found = HashMap::new();
        visit_each(model.local(), &mut |param| {
            if is_statistic(&param.path())
                && let Ok(value) = PlainTensor::of(param.value(), "a running statistic")
            {
                found.insert(param.id(), value);
            }
        });
        Self(found)
    }

    /// Gives the model these again.
    pub(super) fn put_back<P: ParallelModule>(self, model: &P) {
        drop(crate::params::replace_values(model.clone(), self.0));
    }
}

/// What of each of these `slices` the moments of an optimizer on this rank are of: the rows that it updates, where
/// replicas divide them; the whole, where the optimizer looks at the whole and this rank updates it, and nothing where
/// another does.
///
/// # Errors
/// [`Error::Optimizer`] if the optimizer does not suit the model.
pub(super) fn moment_slices<P: ParallelModule>(
    model: &P,
    optimizer: &ModuleOptimizer,
    slices: HashMap<ParamId, ParamSlice>,
) -> Result<HashMap<ParamId, ParamSlice>, Error> {
    let shards = model.shards();
    let owners = whole_owners(model, optimizer)?;
    let held = slices.into_iter().filter_map(|(id, param)| {
        let slice = match owners.get(&id) {
            Some(false) => return None,
            Some(true) => ParamSlice::whole(param.dims),
            None => match &shards {
                // Where this rank holds rows alone, its slices are these.
                Some(shards) if !model.holds_rows(id) => rows(param, shards),
                _ => param,
            },
        };
        Some((id, slice))
    });
    Ok(held.collect())
}

/// The rows of what a replica holds of a parameter that this rank updates.
fn rows(param: ParamSlice, shards: &ShardComms) -> ParamSlice {
    let Some(rows) = Rows::new(&param.local_dims, shards.ranks()) else { return param };
    let own = rows.rows(shards.rank());
    let mut ranges = param.ranges;
    // Rows behind the last real one are padding.
    let place = |row: usize| (ranges[0].start + row).min(ranges[0].end);
    ranges[0] = place(own.start)..place(own.end);
    ParamSlice { dims: param.dims, ranges, local_dims: rows.shard_dims() }
}
