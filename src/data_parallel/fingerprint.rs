//! Whether the replicas still are one model.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::Error;
use crate::comm::Communicator;
use crate::params::ShardedIds;
use crate::tensor::PlainTensor;

/// Demands that all ranks hold the same values of every float parameter that is trained. Reads them all.
///
/// # Errors
/// [`Error::ModelMismatch`], the same on all ranks, with the first path that differs; those of [`Communicator`].
pub(super) fn compare<M: Module>(module: &M, group: &Communicator) -> Result<(), Error> {
    // Of what is divided among the replicas none has a copy, and what stands for it is the same.
    let known = ShardedIds::of(module).shards.into_iter().collect();
    let mut mine = Fingerprints { known, ..Fingerprints::default() };
    module.visit(&mut mine);
    if let Some(error) = mine.error {
        return Err(error);
    }
    let all = group.all_gather(mine.digests.clone())?;
    let ranks = || all.chunks(mine.digests.len().max(1)).enumerate();
    for (place, path) in mine.paths.into_iter().enumerate() {
        let Some((rank, _)) = ranks().find(|(_, digests)| digests[place] != all[place]) else { continue };
        let problem = "the replicas have drifted apart: it has other values here than on rank 0; did a rank load a record, \
                       take another learning rate, or change the model for itself?";
        let error = Error::ModelMismatch { group: group.group().clone(), rank, path, problem: problem.into() };
        group.fail(error.clone());
        return Err(error);
    }
    Ok(())
}

#[derive(Default)]
struct Fingerprints {
    path: Vec<String>,
    known: Vec<ParamId>,
    paths: Vec<String>,
    digests: Vec<u64>,
    error: Option<Error>,
}

impl ModuleVisitor for Fingerprints {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let base = param.base();
        if !base.is_require_grad() || self.known.contains(&param.id) {
            return;
        }
        self.known.push(param.id);
        self.paths.push(self.path.join("."));
        match PlainTensor::from(base.inner()).digest() {
            Ok(digest) => self.digests.push(digest),
            Err(error) => self.error = Some(error),
        }
    }
}
