//! The update of sharded replicas: each rank's rows of the parameters go to the optimizer, and come back to all of
//! them.

use std::collections::HashMap;

use burn::module::ParamId;
use burn::tensor::DType;

use super::lent_params::{TakenParam, Whole, take_params};
use super::reducer::Reducer;
use super::{Replica, buckets};
use crate::Error;
use crate::graph::StepEngine;
use crate::params;
use crate::sharding::{Pack, Rows, ShardComms, ShardParam, ShardParams, UpdatedShards};

impl<E: StepEngine> Replica<E> {
    /// Among whom the rows of the parameters are divided, if they are.
    pub(crate) fn shards(&self) -> Option<ShardComms> {
        let shards = match self.row_shards() {
            Some(shards) => Some(shards.comms()),
            None => self.reducer().and_then(|reducer| reducer.shards()),
        };
        shards.map(|shards| shards.clone().after(self.steps))
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
        let Some(comms) = self.shards() else { return Ok(self) };
        if let Some(shards) = self.row_shards().cloned() {
            let mut own = ShardParams::default();
            let without = self.try_change(|engine| {
                let (engine, taken) = shards.take_rows(engine)?;
                own = taken;
                Ok(engine)
            })?;
            let rows = own.0.len();
            let UpdatedShards { updated, unchanged } = update(own, &comms)?;
            let all = updated.0.into_iter().chain(unchanged.0);
            let values: HashMap<_, _> = all.map(|shard| (shard.param.id(), shard.param.value())).collect();
            if values.len() != rows {
                let problem = format!("rows of {rows} parameters were updated, and {} came back", values.len());
                return Err(Error::invalid("optimize", problem));
            }
            return Ok(without.change(|engine| params::replace_values(engine, values)));
        }
        let Some(reducer) = self.reducer().cloned() else { return Ok(self) };
        let mut taken = Vec::new();
        let without = self.try_change(|engine| {
            let (engine, params) = take_params(engine, &reducer, comms.ranks())?;
            taken = params;
            Ok(engine)
        })?;
        // What gathers parameters holds rows as well.
        without.engine.rows_are_out(&taken.iter().map(TakenParam::id).collect::<Vec<_>>());
        let (own, wholes) = TakenParam::lend(taken, comms.rank())?;
        let updated = update(own, &comms)?;
        without.try_change(|engine| put_back(engine, updated, wholes, &reducer, &comms))
    }
}

/// The module with the parameters that were taken out of it, with the updated rows of all ranks; or this rank's, where
/// it holds these only. A bucket at a time, so that of those that are not gathered into their memory no more is held
/// twice.
fn put_back<E: StepEngine>(
    engine: E,
    UpdatedShards { updated, unchanged }: UpdatedShards,
    mut wholes: HashMap<ParamId, Option<Whole>>,
    reducer: &Reducer,
    comms: &ShardComms,
) -> Result<E, Error> {
    let mut values = HashMap::new();
    for ShardParam { path, rows, param, .. } in unchanged.0 {
        let (id, mut value) = (param.id(), param.into_value());
        if let Some(whole) = wholes.remove(&id).flatten() {
            value = rows.without_padding(whole.unchanged(&path, value)?);
        }
        values.insert(id, value);
    }
    let mut gathered = Vec::new();
    for ShardParam { rows, param, .. } in updated.0 {
        let (id, value) = (param.id(), param.into_value());
        match wholes.remove(&id).flatten() {
            Some(whole) => gathered.push((id, rows, whole, value)),
            None => {
                values.insert(id, value);
            }
        }
    }
    if let Some(id) = wholes.keys().next() {
        return Err(Error::invalid("optimize", format!("parameter {id} did not come back")));
    }
    let dtypes: Vec<DType> = gathered.iter().map(|(.., value)| value.dtype()).collect();
    let size =
        |((_, rows, ..), dtype): (&(_, Rows, _, _), &DType)| rows.dims().iter().product::<usize>() * dtype.size();
    let sizes: Vec<usize> = gathered.iter().zip(&dtypes).map(size).collect();
    let order: Vec<usize> = (0..gathered.len()).collect();
    let bytes = reducer.bucket_bytes();
    let mut gathered: Vec<Option<_>> = gathered.into_iter().map(Some).collect();
    for bucket in buckets::divide(&order, &sizes, &dtypes, bytes, bytes) {
        let (mut ids, mut members, mut brought) = (Vec::new(), Vec::new(), Vec::new());
        for (id, rows, whole, value) in bucket.iter().filter_map(|place| gathered[*place].take()) {
            ids.push(id);
            members.push(rows);
            brought.push(whole.with_updated(value));
        }
        values.extend(ids.into_iter().zip(Pack::new(members).gather_into(brought, comms.between(), comms.update())?));
    }
    engine.rows_are_back(&values);
    Ok(params::replace_values(engine, values))
}
