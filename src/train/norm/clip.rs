//! The gradients of a step, measured together with those of the other ranks, and scaled.

use std::collections::HashSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::combine::{NonFiniteGradient, NormReport};
use super::measure::{PartialNorm, sizes};
use super::{Clip, NonFinite};
use crate::Error;
use crate::comm::Communicator;
use crate::graph::{GradientLayout, gradients_params};
use crate::params::is_shard;
use crate::step::NotFinite;
use crate::tensor::PlainTensor;

/// Gradients after [clipping](Clip).
#[derive(Debug)]
pub struct Clipped {
    /// The gradients, scaled if their norm was larger than the largest; none if the step is skipped.
    pub grads: GradientsParams,
    /// The norm before clipping: NaN or infinite if the gradient is not finite.
    pub norm: f64,
    /// What the gradients were multiplied by: at most 1, and 0 if the step is skipped.
    pub factor: f64,
    /// What is not finite, if the step is skipped for that.
    pub skipped: Option<NotFinite>,
}

/// Measures the gradients of `module` over all ranks, and clips them. Collective over the groups of `holding`.
///
/// # Errors
/// [`Error::NonFinite`], the same on all ranks, if the gradient is not finite and that is to stop; [`Error::InvalidArgument`] if
/// the largest norm is not positive, if ranks clip differently, or if there are gradients that `module` has no parameters for;
/// those of [`Communicator`].
pub(crate) fn clip<M: Module>(
    module: &M,
    grads: GradientsParams,
    holding: &GradientLayout,
    clip: Clip,
) -> Result<Clipped, Error> {
    if clip.max.is_nan() || clip.max <= 0.0 {
        let problem = format!("the largest norm is {}; it must be greater than 0", clip.max);
        return Err(Error::invalid("clip_grad_norm", problem));
    }
    let found = take(module, grads, holding.by_hand)?;
    let mine = measure(&found, holding, &clip)?;
    let known = holding.clipping.count(&holding.groups, || mine.over(&holding.groups, &clip))?;
    let mut norm = known.size.norm(clip.norm);
    let Some(non_finite) = known.non_finite else {
        let factor = clip.factor(norm);
        let scaled = found.into_iter().map(|gradient| (gradient.id, gradient.value.scale(factor))).collect();
        return Ok(Clipped { grads: gradients_params(module, scaled), norm, factor, skipped: None });
    };
    if norm.is_finite() {
        // A copy that does not count is not finite: ranks have gone apart.
        norm = f64::NAN;
    }
    let (path, rank) =
        holding.clipping.count(&holding.groups, || culprit(&paths_of(module), non_finite, holding, &clip))?;
    match clip.non_finite {
        NonFinite::Stop => Err(Error::NonFinite { path, rank }),
        NonFinite::Skip => {
            holding.clipping.skip();
            Ok(Clipped { grads: GradientsParams::new(), norm, factor: 0.0, skipped: Some(NotFinite { path, rank }) })
        }
    }
}

/// The path of the first parameter whose gradient is not finite, and the rank that brought it, the same on all ranks: the one
/// that brought it into an average, in which all have it; if nobody did, as where only the sum overflows, the first that has it.
///
/// All ranks come here or none: what is known of the averages is alike on all of them.
fn culprit(
    paths: &[String],
    non_finite: NonFiniteGradient,
    holding: &GradientLayout,
    clip: &Clip,
) -> Result<(String, usize), Error> {
    let over = |non_finite, groups: &[Communicator]| {
        NormReport { size: PartialNorm::nothing(clip.norm), non_finite }.over(groups, clip)
    };
    let mut groups = holding.groups.clone();
    let mut culprit = non_finite;
    if let Some((group, brought)) = &holding.averaged {
        groups.push(group.clone());
        let place = brought.as_ref().and_then(|path| paths.iter().position(|other| **other == **path));
        culprit = match over(place.map(|place| NonFiniteGradient { place, rank: holding.rank }), &groups)?.non_finite {
            Some(brought) => brought,
            None => over(Some(non_finite), std::slice::from_ref(group))?.non_finite.unwrap_or(non_finite),
        };
    }
    // Ranks may hold different modules, as stages that are written by hand are: its own rank knows what it is called.
    let mine = culprit.rank == holding.rank;
    let mut path = paths.get(culprit.place).filter(|_| mine).map(|path| path.clone().into_bytes()).unwrap_or_default();
    for group in groups.iter().filter(|group| group.size() > 1) {
        // Whoever knows it says the same: one of the lines is enough.
        let lens = group.all_gather(vec![path.len() as u64])?;
        let all = group.all_gather(path)?;
        path = all[..lens.into_iter().find(|len| *len > 0).unwrap_or(0) as usize].to_vec();
    }
    Ok((String::from_utf8_lossy(&path).into_owned(), culprit.rank))
}

/// A gradient, and the place of its parameter among all of the model.
struct FoundGradient {
    place: usize,
    id: ParamId,
    value: PlainTensor,
}

/// Takes the gradients of the parameters of `module`, in its order.
fn take<M: Module>(module: &M, grads: GradientsParams, by_hand: bool) -> Result<Vec<FoundGradient>, Error> {
    let mut take = TakeGradients { grads, seen: HashSet::new(), found: Vec::new(), explicit: None };
    module.visit(&mut take);
    if let Some(layer) = take.explicit.filter(|_| !by_hand) {
        let problem = format!(
            "the model has a {layer}, of which each rank holds a part that its wrapper does not know of: say how the model is \
             split with `HandSplit`, and clip with that"
        );
        return Err(Error::invalid("clip_grad_norm", problem));
    }
    match take.grads.len() {
        0 => Ok(take.found),
        left => {
            let problem = format!(
                "{left} of {} gradients belong to no parameter of the model: give it the model that made the step, before \
                 its optimizer has changed it for another",
                left + take.found.len()
            );
            Err(Error::invalid("clip_grad_norm", problem))
        }
    }
}

/// The explicit layers that hold parts; the larger ones are made of them.
const EXPLICIT: [&str; 3] = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"];

struct TakeGradients {
    grads: GradientsParams,
    seen: HashSet<ParamId>,
    found: Vec<FoundGradient>,
    /// An explicit layer that was met.
    explicit: Option<&'static str>,
}

impl ModuleVisitor for TakeGradients {
    fn enter_module(&mut self, _: &str, container: &str) {
        let name = container.rsplit(':').next();
        self.explicit = self.explicit.or(EXPLICIT.into_iter().find(|layer| name == Some(*layer)));
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // A parameter that the module holds in two places is one parameter.
        if self.seen.insert(param.id)
            && let Some(gradient) = self.grads.remove::<D>(param.id)
        {
            self.found.push(FoundGradient { place: self.seen.len() - 1, id: param.id, value: gradient.into() });
        }
    }
}

/// What this rank knows: the size of what it counts, and whether anything that it holds is not finite.
fn measure(found: &[FoundGradient], holding: &GradientLayout, clip: &Clip) -> Result<NormReport, Error> {
    let values: Vec<&PlainTensor> = found.iter().map(|gradient| &gradient.value).collect();
    let mut known = NormReport { size: PartialNorm::nothing(clip.norm), non_finite: None };
    for (gradient, size) in found.iter().zip(sizes(&values, clip.norm)?) {
        if !size.is_finite() && known.non_finite.is_none() {
            known.non_finite = Some(NonFiniteGradient { place: gradient.place, rank: holding.rank });
        }
        if !holding.elsewhere.contains(&gradient.id) {
            known.size = known.size.with(size, clip.norm);
        }
    }
    Ok(known)
}

/// The paths of the parameters, in their order.
fn paths_of<M: Module>(module: &M) -> Vec<String> {
    let mut paths = Paths::default();
    module.visit(&mut paths);
    paths.found
}

#[derive(Default)]
struct Paths {
    path: Vec<String>,
    seen: HashSet<ParamId>,
    found: Vec<String>,
}

impl ModuleVisitor for Paths {
    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.push(name.to_owned());
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.pop();
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.seen.insert(param.id) {
            self.found.push(self.path.join("."));
        }
    }
}
