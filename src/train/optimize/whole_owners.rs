//! Where the moments of an optimizer are, if parameters are divided.

use std::collections::{HashMap, HashSet};

use burn::module::ParamId;
use burn::optim::ModuleOptimizer;

use super::joined::owned;
use super::parts;
use super::sharded::find_whole;
use crate::Error;
use crate::sharding::UpdatedShards;
use crate::train::ParallelModule;

/// The parameters that this optimizer updates as a whole on one of the ranks that hold parts or rows of them, and
/// whether this is that rank: there are its moments. None where nothing is divided. Not collective.
///
/// # Errors
/// As [`ParallelModule::optimize`], if the optimizer does not suit the model.
pub(crate) fn whole_owners<P: ParallelModule>(
    model: &P,
    optim: &ModuleOptimizer,
) -> Result<HashMap<ParamId, bool>, Error> {
    let (checked, split) = (model.checked_optimizers().clone(), model.split_params());
    let owned = owned(&split);
    let split_ids: HashSet<ParamId> = split.iter().map(|param| param.id).collect();
    if model.shards().is_none() {
        let whole = match checked.known_whole(optim, &split_ids) {
            Some(known) => (*known).clone(),
            None => parts::whole(optim, model.local(), &split)?,
        };
        return Ok(whole.into_iter().map(|id| (id, owned.contains(&id))).collect());
    }
    let mut owners = HashMap::new();
    // Nothing is updated, so nothing travels.
    model.clone().update_shards(&mut |shards, comms| {
        let ids: HashSet<ParamId> = shards.0.iter().map(|shard| shard.param.id()).collect();
        let whole = match checked.known_whole(optim, &ids) {
            Some(known) => (*known).clone(),
            None => find_whole(optim, &shards, &split)?,
        };
        for shard in shards.0.iter().filter(|shard| whole.contains(&shard.param.id())) {
            let id = shard.param.id();
            let here = shard.owner == comms.rank() && (!split_ids.contains(&id) || owned.contains(&id));
            owners.insert(id, here);
        }
        Ok(UpdatedShards { unchanged: shards, ..UpdatedShards::default() })
    })?;
    Ok(owners)
}
