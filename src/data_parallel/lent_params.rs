//! Parameters that are taken out of a model so that an optimizer updates this rank's rows of them where they lie.
//!
//! What the model held as well could not be updated in place, and would be copied. So the model has stand-ins while the
//! optimizer works.

use std::collections::{HashMap, HashSet};

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use super::reducer::Reducer;
use crate::Error;
use crate::graph::StepEngine;
use crate::params;
use crate::sharding::{Brought, RankedParam, Rows, ShardParam, ShardParams, owners};
use crate::tensor::{Lender, PlainTensor, Returned};

/// A tensor of one element, of the same rank and dtype on the same device.
pub(super) fn stand_in(tensor: &PlainTensor) -> PlainTensor {
    PlainTensor::zeros(vec![1; tensor.rank()], tensor.dtype(), &tensor.device())
}

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

/// The parameters that are trained, of which the engine holds the values as well.
///
/// # Errors
/// [`Error::InvalidArgument`] if one has no rows, or is of a rank that burn's optimizers do not know.
pub(super) fn take_params<E: StepEngine>(
    reducer: &Reducer,
    ranks: usize,
    engine: &E,
) -> Result<Vec<TakenParam>, Error> {
    let known = {
        let known = reducer.known();
        let owners = owners(known.params.iter().map(|param| param.shape.as_slice()), ranks);
        let of = |index: usize| (known.params[index].path.to_string(), owners[index]);
        known.indices.iter().map(|(id, index)| (*id, of(*index))).collect()
    };
    let mut taken = TakeParams { known, ranks, engine, seen: HashSet::new(), found: Ok(Vec::new()) };
    engine.visit(&mut taken);
    taken.found
}

/// Takes the parameters that are trained.
struct TakeParams<'a, E> {
    /// Path and owner of each parameter.
    known: HashMap<ParamId, (String, usize)>,
    ranks: usize,
    engine: &'a E,
    seen: HashSet<ParamId>,
    found: Result<Vec<TakenParam>, Error>,
}

impl<E: StepEngine> TakeParams<'_, E> {
    fn take<const D: usize>(&self, path: &str, owner: usize, param: &Param<Tensor<D>>) -> Result<TakenParam, Error> {
        let (value, held) = (param.base(), self.engine.shard_rows(param.id));
        let (kind, holds_rows) = (params::LeafKind::of(&value), held.is_some());
        let rows = held.or_else(|| Rows::new(&value.dims(), self.ranks));
        let value = PlainTensor::from(value);
        let nothing = Param::initialized(param.id, params::leaf(stand_in(&value).float::<D>()?, kind));
        let (Some(rows), Some(param)) = (rows, RankedParam::new(nothing)) else {
            let problem = format!("parameter `{path}` of rank {D} has no rows to be divided");
            return Err(Error::invalid("optimize", problem));
        };
        Ok(TakenParam { shard: ShardParam { path: path.into(), rows, owner, param }, value, holds_rows })
    }
}

impl<E: StepEngine> ModuleVisitor for TakeParams<'_, E> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some((path, owner)) = self.known.get(&param.id) else { return };
        // A parameter that the module holds in two places is one parameter.
        if !param.is_require_grad() || self.found.is_err() || !self.seen.insert(param.id) {
            return;
        }
        let taken = self.take(path, *owner, param);
        match (taken, &mut self.found) {
            (Ok(taken), Ok(found)) => found.push(taken),
            (Err(error), found) => *found = Err(error),
            _ => {}
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
