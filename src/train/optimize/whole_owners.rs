//! Where the moments of an optimizer are, if replicas divide them.

use std::collections::{HashMap, HashSet};

use burn::module::ParamId;
use burn::optim::ModuleOptimizer;

use super::sharded::find_whole;
use crate::Error;
use crate::sharding::ShardParams;
use crate::train::ParallelModule;

/// The parameters that this optimizer updates as a whole on one of the ranks that divide the others by rows, each with that rank: there
/// are its moments. None where nothing is divided. Not collective.
///
/// # Errors
/// As [`ParallelModule::optimize`], if the optimizer does not suit the model.
pub(crate) fn whole_owners<P: ParallelModule>(
    model: &P,
    optim: &ModuleOptimizer,
) -> Result<HashMap<ParamId, usize>, Error> {
    if model.shards().is_none() {
        return Ok(HashMap::new());
    }
    let (checked, split) = (model.checked_optimizers().clone(), model.split_params());
    let mut owners = HashMap::new();
    // Nothing is updated, so nothing travels.
    model.clone().update_shards(&mut |shards, _| {
        let ids: HashSet<ParamId> = shards.0.iter().map(|shard| shard.param.id()).collect();
        let whole = match checked.known_whole(std::ptr::from_ref(optim).addr(), &ids) {
            Some(known) => (*known).clone(),
            None => find_whole(optim, &shards, &split)?,
        };
        let dealt = shards.0.iter().filter(|shard| whole.contains(&shard.param.id()));
        owners = dealt.map(|shard| (shard.param.id(), shard.owner)).collect();
        Ok(ShardParams::default())
    })?;
    Ok(owners)
}
