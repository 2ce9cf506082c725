//! The parameters of a model by path, and this rank's slices of them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use burn::backend::DispatchTensor;
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::ModuleOptimizer;
use burn::tensor::{Bool, DType, Int, Tensor};

use super::checkpoint_error;
use super::contents::Slice;
use super::plan::TensorKey;
use crate::Error;
use crate::params::ParamSlice;
use crate::sharding::{Rows, ShardComms, Sharding};
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
    let mut walk = Walk { path: Vec::new(), seen: HashSet::new(), with: InfoWalk(Vec::new()) };
    module.visit(&mut walk);
    let mut paths = HashSet::new();
    for info in &walk.with.0 {
        if !paths.insert(&info.path) {
            let problem =
                format!("two parameters of the model have the path `{}`: give them paths of their own", info.path);
            return Err(checkpoint_error(problem));
        }
    }
    Ok(walk.with.0)
}

/// This rank's slices of the parameters whose values count here. Lazy ones that it holds are made; no value is copied.
///
/// # Errors
/// [`Error::Pipeline`] if it is not known who holds what; [`Error::Graph`] for quantized parameters.
pub(super) fn slices<P: ParallelModule>(model: &P) -> Result<Vec<Slice>, Error> {
    average_statistics(model);
    let held = SliceWalk { held: model.param_slices()?, found: Vec::new(), outcome: Ok(()) };
    let mut walk = Walk { path: Vec::new(), seen: HashSet::new(), with: held };
    model.local().visit(&mut walk);
    walk.with.outcome.map(|()| walk.with.found)
}

/// Running statistics are shared by all clones of a module, and what a forward adds to them stays aside until somebody asks for
/// the model in evaluation mode.
fn average_statistics<P: ParallelModule>(model: &P) {
    let mut walk = Walk { path: Vec::new(), seen: HashSet::new(), with: InfoWalk(Vec::new()) };
    model.local().visit(&mut walk);
    if walk.with.0.iter().any(|info| is_statistic(&info.path)) {
        drop(model.local().valid());
    }
}

/// Whether a parameter is a running statistic, in which replicas may differ.
pub(super) fn is_statistic(path: &str) -> bool {
    path.ends_with("running_mean") || path.ends_with("running_var")
}

/// The running statistics of a model, which loading changes in all clones of it.
pub(super) struct Statistics(HashMap<ParamId, PlainTensor>);

impl Statistics {
    pub(super) fn of<P: ParallelModule>(model: &P) -> Self {
        average_statistics(model);
        let mut walk = Walk { path: Vec::new(), seen: HashSet::new(), with: StatisticWalk(HashMap::new()) };
        model.local().visit(&mut walk);
        Self(walk.with.0)
    }

    /// Gives the model these again.
    pub(super) fn put_back<P: ParallelModule>(self, model: &P) {
        drop(crate::params::replace_values(model.clone(), self.0));
    }
}

struct StatisticWalk(HashMap<ParamId, PlainTensor>);

impl Visit for StatisticWalk {
    fn param(&mut self, id: ParamId, path: String, _: DType, value: &dyn Fn() -> DispatchTensor) {
        if is_statistic(&path)
            && let Ok(value) = PlainTensor::of(value(), "a running statistic")
        {
            self.0.insert(id, value);
        }
    }
}

/// What of each parameter the moments of an optimizer on this rank are of: the rows that it updates, where replicas divide them; the
/// whole, where the optimizer looks at the whole and this rank updates it, and nothing where another does.
///
/// # Errors
/// [`Error::Pipeline`] if it is not known who holds what; [`Error::Optimizer`] if the optimizer does not suit the model.
pub(super) fn moment_slices<P: ParallelModule>(
    model: &P,
    optimizer: &ModuleOptimizer,
) -> Result<HashMap<ParamId, ParamSlice>, Error> {
    let slices = model.param_slices()?;
    let Some(shards) = model.shards() else { return Ok(slices) };
    let owners = whole_owners(model, optimizer)?;
    // Where replicas divide the parameters themselves, the slices are rows already.
    let divided = model.report().sharding == Sharding::Parameters;
    let held = slices.into_iter().filter_map(|(id, param)| {
        let slice = match owners.get(&id) {
            Some(owner) if *owner != shards.rank() => return None,
            // Nothing that is split along another axis is updated as a whole.
            Some(_) => ParamSlice {
                ranges: param.dims.iter().map(|size| 0..*size).collect(),
                local_dims: param.dims.clone(),
                dims: param.dims,
            },
            None if divided => param,
            None => rows(param, &shards),
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

/// Visits each parameter once.
struct Walk<W> {
    path: Vec<String>,
    seen: HashSet<ParamId>,
    with: W,
}

trait Visit {
    fn param(&mut self, id: ParamId, path: String, dtype: DType, value: &dyn Fn() -> DispatchTensor);
}

impl<W: Visit> Walk<W> {
    fn visit(&mut self, id: ParamId, dtype: DType, value: &dyn Fn() -> DispatchTensor) {
        if self.seen.insert(id) {
            self.with.param(id, self.path.join("."), dtype, value);
        }
    }
}

impl<W: Visit> ModuleVisitor for Walk<W> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let dtype = match param.is_initialized() {
            true => param.base().dtype(),
            false => crate::params::LazyParam::of(param).placeholder.base().dtype(),
        };
        self.visit(param.id, dtype, &|| param.val().into_dispatch());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.visit(param.id, param.val().dtype(), &|| param.val().into_dispatch());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.visit(param.id, param.val().dtype(), &|| param.val().into_dispatch());
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

struct InfoWalk(Vec<ParamInfo>);

impl Visit for InfoWalk {
    fn param(&mut self, id: ParamId, path: String, dtype: DType, _: &dyn Fn() -> DispatchTensor) {
        self.0.push(ParamInfo { id, path, dtype });
    }
}

struct SliceWalk {
    held: HashMap<ParamId, ParamSlice>,
    found: Vec<Slice>,
    outcome: Result<(), Error>,
}

impl Visit for SliceWalk {
    fn param(&mut self, id: ParamId, path: String, _: DType, value: &dyn Fn() -> DispatchTensor) {
        let Some(ParamSlice { dims, ranges, .. }) = self.held.remove(&id) else { return };
        if self.outcome.is_err() || ranges.iter().any(Range::is_empty) {
            return;
        }
        match PlainTensor::of(value(), &format!("parameter `{path}`")) {
            Ok(value) => self.found.push(Slice { key: TensorKey::param(path), dims, ranges, value }),
            Err(error) => self.outcome = Err(error),
        }
    }
}
