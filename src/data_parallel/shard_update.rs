//! The update of sharded replicas: each rank's rows of the parameters go to the optimizer, and come back to all of
//! them.

use std::collections::{HashMap, HashSet};

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Tensor};

use super::reducer::Reducer;
use super::{Replica, buckets};
use crate::Error;
use crate::graph::StepEngine;
use crate::params;
use crate::sharding::{Pack, RankedParam, Rows, ShardComms, ShardParam, ShardParams, UpdatedShards, owners};
use crate::tensor::PlainTensor;

impl<E: StepEngine> Replica<E> {
    /// Among whom the rows of the parameters are divided, if they are.
    pub(crate) fn shards(&self) -> Option<ShardComms> {
        match self.row_shards() {
            Some(shards) => Some(shards.comms().clone()),
            None => self.reducer().and_then(|reducer| reducer.shards().cloned()),
        }
    }

    /// Whether this replica holds its rows of a parameter only: not of an adapter, nor of what was put in later, which
    /// are whole and updated by rows.
    pub(crate) fn holds_rows(&self, id: ParamId) -> bool {
        self.row_shards().is_some_and(|shards| shards.divides(id)) || self.engine.shard_rows(id).is_some()
    }

    /// Hands this rank's rows of the parameters that are trained to `update`, and gives all ranks those that it
    /// returns. Collective.
    ///
    /// # Errors
    /// Those of `update` and of [`Communicator`](crate::comm::Communicator).
    pub(crate) fn update_shards(
        self,
        update: &mut dyn FnMut(ShardParams, &ShardComms) -> Result<UpdatedShards, Error>,
    ) -> Result<Self, Error> {
        if let Some(shards) = self.row_shards().cloned() {
            let own = shards.own_rows(self.engine.local())?;
            // What the model holds as well could not be updated in place.
            let taken: HashMap<_, _> =
                own.0.iter().map(|shard| (shard.param.id(), stand_in(&shard.param.value()))).collect();
            let rows = taken.len();
            let without = self.change(|engine| params::replace_values(engine, taken));
            let UpdatedShards { updated, unchanged } = update(own, shards.comms())?;
            let all = updated.0.into_iter().chain(unchanged.0);
            let values: HashMap<_, _> = all.map(|shard| (shard.param.id(), shard.param.value())).collect();
            if values.len() != rows {
                let problem = format!("rows of {rows} parameters were updated, and {} came back", values.len());
                return Err(Error::invalid("optimize", problem));
            }
            return Ok(without.change(|engine| params::replace_values(engine, values)));
        }
        let Some((reducer, comms)) =
            self.reducer().cloned().and_then(|reducer| Some((reducer.clone(), reducer.shards()?.clone())))
        else {
            return Ok(self);
        };
        let mut own = TakeRows::of(&reducer, &comms, &self.engine);
        self.engine.visit(&mut own);
        let updated = update(own.found?, &comms)?;
        let updated = self.try_change(|engine| gather(engine, updated.updated, &reducer, &comms))?;
        updated.engine.rows_changed();
        Ok(updated)
    }
}

/// A tensor of one element, of the same rank and dtype on the same device.
fn stand_in(tensor: &PlainTensor) -> PlainTensor {
    PlainTensor::zeros(vec![1; tensor.rank()], tensor.dtype(), &tensor.device())
}

/// The module with the rows of all ranks in its parameters, or this rank's, where it holds these only: a bucket at a
/// time, so that no more than that is held twice.
fn gather<E: StepEngine>(
    mut engine: E,
    updated: ShardParams,
    reducer: &Reducer,
    comms: &ShardComms,
) -> Result<E, Error> {
    // What the engine holds rows of is not gathered now.
    let (rows, updated): (Vec<ShardParam>, Vec<ShardParam>) =
        updated.0.into_iter().partition(|shard| engine.shard_rows(shard.param.id()).is_some());
    let rows = rows.into_iter().map(|shard| (shard.param.id(), shard.param.value())).collect();
    engine = params::replace_values(engine, rows);
    let dtypes: Vec<DType> = updated.iter().map(ShardParam::dtype).collect();
    let size = |(shard, dtype): (&ShardParam, &DType)| shard.rows.dims().iter().product::<usize>() * dtype.size();
    let sizes: Vec<usize> = updated.iter().zip(&dtypes).map(size).collect();
    let order: Vec<usize> = (0..updated.len()).collect();
    let bytes = reducer.bucket_bytes();
    let mut updated: Vec<Option<ShardParam>> = updated.into_iter().map(Some).collect();
    for bucket in buckets::divide(&order, &sizes, &dtypes, bytes, bytes) {
        let members: Vec<ShardParam> = bucket.iter().filter_map(|place| updated[*place].take()).collect();
        let pack = Pack::new(members.iter().map(|shard| shard.rows.clone()).collect());
        let ids: Vec<ParamId> = members.iter().map(|shard| shard.param.id()).collect();
        let shards = members.into_iter().map(|shard| shard.param.value()).collect();
        let wholes = pack.gather(shards, comms.parameters())?;
        engine = params::replace_values(engine, ids.into_iter().zip(wholes).collect());
    }
    Ok(engine)
}

/// Takes this rank's rows of the parameters that are trained.
struct TakeRows<'a, E> {
    /// Path and owner of each parameter.
    known: HashMap<ParamId, (String, usize)>,
    comms: &'a ShardComms,
    engine: &'a E,
    seen: HashSet<ParamId>,
    found: Result<ShardParams, Error>,
}

impl<'a, E: StepEngine> TakeRows<'a, E> {
    fn of(reducer: &Reducer, comms: &'a ShardComms, engine: &'a E) -> Self {
        let known = reducer.known();
        let owners = owners(known.params.iter().map(|param| param.shape.as_slice()), comms.ranks());
        let of = |index: usize| (known.params[index].path.to_string(), owners[index]);
        let by_id = known.indices.iter().map(|(id, index)| (*id, of(*index))).collect();
        Self { known: by_id, comms, engine, seen: HashSet::new(), found: Ok(ShardParams::default()) }
    }

    fn own<const D: usize>(&self, path: &str, owner: usize, param: &Param<Tensor<D>>) -> Result<ShardParam, Error> {
        let no_rows =
            || Error::invalid("optimize", format!("parameter `{path}` of rank {D} has no rows to be divided"));
        if let Some(rows) = self.engine.shard_rows(param.id) {
            let param = RankedParam::new(param.clone()).ok_or_else(no_rows)?;
            return Ok(ShardParam { path: path.into(), rows, owner, param });
        }
        let base = param.base();
        let kind = params::LeafKind::of(&base);
        let whole = base.inner();
        let rows = Rows::new(&whole.dims(), self.comms.ranks()).ok_or_else(no_rows)?;
        let shard = params::leaf(rows.shard(whole, self.comms.rank())?, kind);
        let param = RankedParam::new(Param::initialized(param.id, shard)).ok_or_else(no_rows)?;
        Ok(ShardParam { path: path.into(), rows, owner, param })
    }
}

impl<E: StepEngine> ModuleVisitor for TakeRows<'_, E> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some((path, owner)) = self.known.get(&param.id) else { return };
        // A parameter that the module holds in two places is one parameter.
        if !param.is_require_grad() || self.found.is_err() || !self.seen.insert(param.id) {
            return;
        }
        let own = self.own(path, *owner, param);
        match (own, &mut self.found) {
            (Ok(own), Ok(found)) => found.0.push(own),
            (Err(error), found) => *found = Err(error),
            _ => {}
        }
    }
}
