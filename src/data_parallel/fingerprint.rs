//! Compares the parameters of the replicas by hashes.

use std::collections::HashSet;

use burn::module::{Module, ParamId};

use crate::Error;
use crate::comm::Communicator;
use crate::params::{ShardedIds, visit_floats};
use crate::tensor::PlainTensor;

/// Demands that all ranks hold the same values of every float parameter that is trained. Reads them all.
///
/// # Errors
/// [`Error::ModelMismatch`], the same on all ranks, with the first path that differs; those of [`Communicator`].
pub(super) fn compare<M: Module>(module: &M, group: &Communicator) -> Result<(), Error> {
    // Of what is divided among the replicas none has a copy.
    let mut known: HashSet<ParamId> = ShardedIds::of(module).shards;
    let (mut paths, mut digests) = (Vec::new(), Vec::new());
    visit_floats(module, &mut |param| {
        if param.is_trained() && known.insert(param.id()) {
            paths.push(param.path());
            digests.push(PlainTensor::of(param.base(), "a parameter").and_then(|value| value.digest()));
        }
    });
    let digests = digests.into_iter().collect::<Result<Vec<u64>, Error>>()?;
    let all = group.all_gather(digests.clone())?;
    let ranks = || all.chunks(digests.len().max(1)).enumerate();
    for (place, path) in paths.into_iter().enumerate() {
        let Some((rank, _)) = ranks().find(|(_, digests)| digests[place] != all[place]) else { continue };
        let problem = "the replicas have drifted apart: it has other values here than on rank 0; did a rank load a record, \
                       take another learning rate, or change the model for itself?";
        let error = Error::ModelMismatch { group: group.group().clone(), rank, path, problem: problem.into() };
        group.fail(error.clone());
        return Err(error);
    }
    Ok(())
}
