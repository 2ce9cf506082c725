//! This rank's parts of split parameters, taken out of its model.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::joined::PartWithGradient;
use crate::Error;
use crate::graph::SplitParam;
use crate::sharding::{RankedParam, Rows, ShardParam};

/// This rank's parts of the parameters of some ids, each once, with the gradients that there are of them.
///
/// # Errors
/// [`Error::InvalidArgument`] for a parameter of a rank that burn's optimizers do not know.
pub(super) fn own_parts<M: Module>(
    module: &M,
    ids: &HashSet<ParamId>,
    split: &[SplitParam],
    grads: &mut GradientsParams,
) -> Result<Vec<PartWithGradient>, Error> {
    let paths: HashMap<ParamId, &SplitParam> =
        split.iter().filter(|param| ids.contains(&param.id)).map(|param| (param.id, param)).collect();
    let mut found = TakeParts { paths, grads, seen: HashSet::new(), parts: Ok(Vec::new()) };
    module.visit(&mut found);
    found.parts
}

struct TakeParts<'a> {
    paths: HashMap<ParamId, &'a SplitParam>,
    grads: &'a mut GradientsParams,
    seen: HashSet<ParamId>,
    parts: Result<Vec<PartWithGradient>, Error>,
}

impl ModuleVisitor for TakeParts<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(split) = self.paths.get(&param.id) else { return };
        let Ok(parts) = &mut self.parts else { return };
        if !self.seen.insert(param.id) {
            return;
        }
        let (rows, ranked) = (Rows::new(&split.dims, 1), RankedParam::new(param.clone()));
        let (Some(rows), Some(ranked)) = (rows, ranked) else {
            let problem = format!("parameter `{}` is of rank {D}, and optimizers take ranks 1 to 8", split.path);
            self.parts = Err(Error::invalid("optimize", problem));
            return;
        };
        if let Some(gradient) = ranked.take_gradient(self.grads) {
            parts.push((ShardParam { path: split.path.clone(), rows, owner: 0, param: ranked }, gradient));
        }
    }
}
