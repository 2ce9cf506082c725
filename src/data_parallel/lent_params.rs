//! Parameters that are taken out of a model so that an optimizer updates this rank's rows of them where they lie.
//!
//! What the model held as well could not be updated in place, and would be copied. So the model has stand-ins while the
//! optimizer works: one walk takes the parameters and leaves these, and one puts them back.

use std::collections::HashMap;

use burn::module::{Param, ParamId};
use burn::tensor::Tensor;

use super::reducer::Reducer;
use crate::Error;
use crate::graph::StepEngine;
use crate::params::{MapParams, MappedParam, ModulePath, map_params, stand_in};
use crate::sharding::{Brought, RankedParam, Rows, ShardParam, ShardParams, owners};
use crate::tensor::{Lender, PlainTensor, Returned};

/// A parameter as it is taken out of the model.
pub(super) struct TakenParam {
    /// Without its value.
    shard: ShardParam,
    pub value: PlainTensor,
    /// Whether the value is this rank's rows.
    holds_rows: bool,
}

impl TakenParam {
    pub fn id(&self) -> ParamId {
        self.shard.param.id()
    }

    /// This rank's rows of parameters, in their memory if nobody else holds that, and what is left of each.
    pub fn lend(taken: Vec<Self>, rank: usize) -> Result<(ShardParams, HashMap<ParamId, Option<Whole>>), Error> {
        let (mut own, mut wholes) = (ShardParams::default(), HashMap::new());
        for Self { shard, value, holds_rows } in taken {
            let (value, whole) = match holds_rows {
                true => (value, None),
                false => match shard.rows.lend(value, rank) {
                    (rows, Some(lender)) => (rows, Some(Whole::Lent(lender))),
                    (value, None) => (shard.rows.shard(value.clone(), rank)?, Some(Whole::Kept(value))),
                },
            };
            wholes.insert(shard.param.id(), whole);
            own.0.push(ShardParam { param: shard.param.with_value(value)?, ..shard });
        }
        Ok((own, wholes))
    }
}

/// Takes the parameters that are trained out of an engine, and leaves it stand-ins.
///
/// # Errors
/// [`Error::InvalidArgument`] if one has no rows, or is of a rank that burn's optimizers do not know.
pub(super) fn take_params<E: StepEngine>(
    engine: E,
    reducer: &Reducer,
    ranks: usize,
) -> Result<(E, Vec<TakenParam>), Error> {
    let known = {
        let known = reducer.known();
        let owners = owners(known.params.iter().map(|param| param.shape.as_slice()), ranks);
        let of = |id: ParamId, index: usize| Known {
            path: known.params[index].path.to_string(),
            owner: owners[index],
            held: engine.shard_rows(id),
        };
        known.indices.iter().map(|(id, index)| (*id, of(*id, *index))).collect()
    };
    let mut take = TakeParams { known, ranks, taken: Ok(Vec::new()) };
    let engine = map_params(engine, &mut take);
    Ok((engine, take.taken?))
}

/// What is known of a parameter.
struct Known {
    path: String,
    owner: usize,
    /// How it is divided, if the engine holds this rank's rows of it.
    held: Option<Rows>,
}

/// Takes the parameters that are trained.
struct TakeParams {
    known: HashMap<ParamId, Known>,
    ranks: usize,
    taken: Result<Vec<TakenParam>, Error>,
}

impl TakeParams {
    fn take<const D: usize>(&self, known: &Known, param: &Param<Tensor<D>>) -> Result<TakenParam, Error> {
        let Known { path, owner, held } = known;
        let value = PlainTensor::from(param.base());
        let rows = held.clone().or_else(|| Rows::new(value.shape().as_slice(), self.ranks));
        let nothing = Param::initialized(param.id, stand_in(param)?);
        let (Some(rows), Some(param)) = (rows, RankedParam::new(nothing)) else {
            let problem = format!("parameter `{path}` of rank {D} has no rows to be divided");
            return Err(Error::invalid("optimize", problem));
        };
        let shard = ShardParam { path: path.clone(), rows, owner: *owner, param };
        Ok(TakenParam { shard, value, holds_rows: held.is_some() })
    }
}

impl MapParams for TakeParams {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        let Some(known) = self.known.get(&param.id).filter(|_| param.is_require_grad() && self.taken.is_ok()) else {
            return MappedParam::Same(param);
        };
        let taken = stand_in(&param).and_then(|stand_in| Ok((self.take(known, &param)?, stand_in)));
        match (taken, &mut self.taken) {
            (Ok((one, stand_in)), Ok(taken)) => {
                taken.push(one);
                MappedParam::with_value(param, stand_in)
            }
            (Err(error), taken) => {
                *taken = Err(error);
                MappedParam::Same(param)
            }
            (Ok(_), Err(_)) => MappedParam::Same(param),
        }
    }
}

/// What is left of a parameter whose rows an optimizer has.
pub(super) enum Whole {
    /// All of it but these rows, which lie in its memory.
    Lent(Lender),
    /// All of it as it was: the rows are a copy.
    Kept(PlainTensor),
}

impl Whole {
    /// What this rank has of a parameter whose rows were updated.
    pub fn with_updated(self, rows: PlainTensor) -> Brought {
        match self {
            Self::Lent(lender) => match lender.take_back(rows) {
                Returned::Whole(whole) => Brought::Whole(whole),
                Returned::Part(rows) => Brought::Shard(rows),
            },
            Self::Kept(_) => Brought::Shard(rows),
        }
    }

    /// The parameter whose rows were not updated.
    pub fn unchanged(self, path: &str, rows: PlainTensor) -> Result<PlainTensor, Error> {
        let lender = match self {
            Self::Lent(lender) => lender,
            Self::Kept(whole) => return Ok(whole),
        };
        match lender.take_back(rows) {
            Returned::Whole(whole) => Ok(whole),
            Returned::Part(_) => {
                let problem = format!("rows of `{path}`, which has no gradient, came back as something else");
                Err(Error::invalid("optimize", problem))
            }
        }
    }
}
