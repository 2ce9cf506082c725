//! Parameters whose update depends on the whole of them, dealt out to the ranks that hold rows of them.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::DType;

use crate::Error;
use crate::sharding::{Pack, ShardComms, ShardParam, ShardParams};
use crate::tensor::PlainTensor;

/// What this rank updates: its rows of some parameters, and the whole of others.
pub(super) struct OwnUpdate {
    pub params: ShardParams,
    pub grads: GradientsParams,
}

/// Which parameters each rank updates as a whole.
pub(super) struct Dealt {
    /// The ids of all parameters, in their order.
    order: Vec<ParamId>,
    packs: Vec<OwnedPack>,
}

/// Parameters of one dtype that one rank updates as a whole.
struct OwnedPack {
    owner: usize,
    pack: Pack,
    /// On every rank its shards.
    shards: Vec<ShardParam>,
}

impl Dealt {
    /// Gathers the parameters of `whole`, and their gradients, each on its owner. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator::gather`](crate::comm::Communicator::gather).
    pub fn deal(
        shards: ShardParams,
        gradients: Vec<PlainTensor>,
        whole: &HashSet<ParamId>,
        comms: &ShardComms,
    ) -> Result<(OwnUpdate, Self), Error> {
        let order = shards.0.iter().map(|shard| shard.param.id()).collect();
        let mut work = OwnUpdate { params: ShardParams::default(), grads: GradientsParams::new() };
        let mut to_deal = Vec::new();
        for (shard, gradient) in shards.0.into_iter().zip(gradients) {
            if whole.contains(&shard.param.id()) {
                to_deal.push((shard, gradient));
                continue;
            }
            shard.param.put_gradient(gradient, &mut work.grads)?;
            work.params.0.push(shard);
        }
        let mut packs = Vec::new();
        for ((owner, _), members) in by_owner(to_deal) {
            let (shards, gradients): (Vec<ShardParam>, Vec<PlainTensor>) = members.into_iter().unzip();
            let pack = Pack::new(shards.iter().map(|shard| shard.rows.clone()).collect());
            let values = shards.iter().map(|shard| shard.param.value()).collect();
            let values = pack.gather_on(owner, values, comms.between(), comms.update())?;
            let gradients = pack.gather_on(owner, gradients, comms.gradients(), comms.update())?;
            for ((shard, value), gradient) in shards.iter().zip(values).zip(gradients) {
                let param = shard.param.clone().with_value(value)?;
                param.put_gradient(gradient, &mut work.grads)?;
                work.params.0.push(ShardParam { param, ..shard.clone() });
            }
            packs.push(OwnedPack { owner, pack, shards });
        }
        Ok((work, Self { order, packs }))
    }

    /// This rank's rows of everything that was updated on any rank, in the order in which the parameters came.
    /// Collective.
    ///
    /// # Errors
    /// Those of [`Communicator::scatter`](crate::comm::Communicator::scatter).
    pub fn collect(self, stepped: ShardParams, comms: &ShardComms) -> Result<ShardParams, Error> {
        let mut updated: HashMap<ParamId, ShardParam> =
            stepped.0.into_iter().map(|shard| (shard.param.id(), shard)).collect();
        for OwnedPack { owner, pack, shards } in self.packs {
            let wholes = match owner == comms.rank() {
                true => shards
                    .iter()
                    .filter_map(|shard| updated.remove(&shard.param.id()))
                    .map(|it| it.param.value())
                    .collect(),
                false => Vec::new(),
            };
            let (dtype, device) = (shards[0].dtype(), shards[0].param.value().device());
            let rows = pack.scatter_from(owner, wholes, (dtype, &device), comms.between())?;
            for (shard, value) in shards.into_iter().zip(rows) {
                let id = shard.param.id();
                updated.insert(id, ShardParam { param: shard.param.with_value(value)?, ..shard });
            }
        }
        Ok(ShardParams(self.order.iter().filter_map(|id| updated.remove(id)).collect()))
    }
}

type WholeParam = (ShardParam, PlainTensor);

/// Who updates which parameters: by rank and place of the dtype, in an order that is the same on all ranks.
fn by_owner(members: Vec<WholeParam>) -> BTreeMap<(usize, usize), Vec<WholeParam>> {
    let mut dtypes: Vec<[DType; 2]> = Vec::new();
    let mut dealt: BTreeMap<(usize, usize), Vec<WholeParam>> = BTreeMap::new();
    for member in members {
        let dtype = [member.0.dtype(), member.1.dtype()];
        let place = dtypes.iter().position(|known| *known == dtype).unwrap_or_else(|| {
            dtypes.push(dtype);
            dtypes.len() - 1
        });
        dealt.entry((member.0.owner, place)).or_default().push(member);
    }
    dealt
}
