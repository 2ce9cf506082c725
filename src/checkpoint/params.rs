//! The parameters of a model by path, and this rank's slices of them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use burn::backend::DispatchTensor;
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Tensor};

use super::checkpoint_error;
use super::contents::Slice;
use super::plan::TensorKey;
use crate::Error;
use crate::params::{ParamSlice, average_statistics, is_statistic};
use crate::sharding::{Rows, Sharding};
use crate::tensor::PlainTensor;
use crate::train::ParallelModule;

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
    average_statistics(model.local());
    let held = SliceWalk { held: model.param_slices()?, found: Vec::new(), outcome: Ok(()) };
    let mut walk = Walk { path: Vec::new(), seen: HashSet::new(), with: held };
    model.local().visit(&mut walk);
    walk.with.outcome.map(|()| walk.with.found)
}

/// The running statistics of a model, which loading changes in all clones of it.
pub(super) struct Statistics(HashMap<ParamId, PlainTensor>);

impl Statistics {
    pub(super) fn of<P: ParallelModule>(model: &P) -> Self {
        average_statistics(model.local());
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

/// What of a parameter the moments of an optimizer on this rank are of.
pub(super) struct MomentSlice {
    /// What the rank holds of the parameter.
    param: ParamSlice,
    /// The rows of that which it updates, where replicas divide them.
    rows: Option<ParamSlice>,
}

impl MomentSlice {
    /// Which of both a moment of these dims is of.
    pub(super) fn of_dims(&self, dims: &[usize]) -> &ParamSlice {
        self.rows.as_ref().filter(|rows| rows.local_dims == dims).unwrap_or(&self.param)
    }

    /// What a moment is to be read for.
    pub(super) fn to_restore(&self) -> &ParamSlice {
        self.rows.as_ref().unwrap_or(&self.param)
    }
}

/// What of each parameter the moments of an optimizer on this rank are of.
///
/// # Errors
/// [`Error::Pipeline`] if it is not known who holds what.
pub(super) fn moment_slices<P: ParallelModule>(model: &P) -> Result<HashMap<ParamId, MomentSlice>, Error> {
    // Where replicas divide the parameters themselves, the slices are rows already.
    let shards = model.shards().filter(|_| model.report().sharding != Sharding::Parameters);
    let rows = |param: &ParamSlice| {
        let shards = shards.as_ref()?;
        let rows = Rows::new(&param.local_dims, shards.ranks())?;
        let own = rows.rows(shards.rank());
        let mut ranges = param.ranges.clone();
        // Rows behind the last real one are padding.
        let place = |row: usize| (param.ranges[0].start + row).min(param.ranges[0].end);
        ranges[0] = place(own.start)..place(own.end);
        Some(ParamSlice { dims: param.dims.clone(), ranges, local_dims: rows.shard_dims() })
    };
    let slices = model.param_slices()?.into_iter();
    Ok(slices.map(|(id, param)| (id, MomentSlice { rows: rows(&param), param })).collect())
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
