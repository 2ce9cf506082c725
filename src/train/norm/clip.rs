//! Measures gradients over all ranks, and clips them.

use std::collections::HashSet;

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;

use super::combine::{NonFiniteGradient, NormReport};
use super::{Clip, NonFinite};
use crate::Error;
use crate::comm::{ANOTHER_NORM, Communicator, agreed_number};
use crate::graph::{GradientLayout, gradients_params, same_buffer};
use crate::params::{take_gradients, visit_floats};
use crate::step::{CarriedNorm, NotFinite};
use crate::tensor::{PartialNorm, PlainTensor, sizes};

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
/// [`Error::NonFinite`], the same on all ranks, if the gradient is not finite and that is to stop;
/// [`Error::InvalidArgument`] if the largest norm is not positive, if ranks clip differently, or if there are gradients
/// that `module` has no parameters for; those of [`Communicator`].
pub(crate) fn clip<M: Module>(
    module: &M,
    grads: GradientsParams,
    holding: &GradientLayout,
    clip: Clip,
) -> Result<Clipped, Error> {
    clip_and_sum(module, grads, holding, clip, (0.0, None)).map(|(clipped, _)| clipped)
}

/// As [`clip`], and sums up what each rank has measured of its gradients before. A norm that came with the step needs
/// no collective over the ranks that divide rows among themselves.
pub(crate) fn clip_and_sum<M: Module>(
    module: &M,
    grads: GradientsParams,
    holding: &GradientLayout,
    clip: Clip,
    (squares, carried): (f64, Option<CarriedNorm>),
) -> Result<(Clipped, f64), Error> {
    if clip.max.is_nan() || clip.max <= 0.0 {
        let problem = format!("the largest norm is {}; it must be greater than 0", clip.max);
        return Err(Error::invalid("clip_grad_norm", problem));
    }
    let found = take(module, grads, holding.by_hand)?;
    let mut groups = holding.groups.clone();
    let mine = match carried {
        // Those that hold the other rows have summed up the same squares.
        Some(carried) if is_of(&carried, &found, &clip) => {
            groups.retain(|group| group.group() != carried.comms.between().group());
            NormReport { size: carried.size, squares: squares * carried.comms.ranks() as f64, non_finite: None }
        }
        carried => {
            if let Some(CarriedNorm { comms, .. }) = carried {
                // Ranks that take the norm that came are found out where they go on.
                comms.next().all_gather_agreed(vec![0u8], agreed_number(ANOTHER_NORM))?;
            }
            NormReport { squares, ..measure(&found, holding, &clip)? }
        }
    };
    let known = holding.clipping.count(&groups, || mine.over(&groups, &clip, holding.step))?;
    let mut norm = known.size.norm(clip.norm);
    let Some(non_finite) = known.non_finite else {
        let factor = clip.factor(norm);
        let (ids, values) = found.into_iter().map(|gradient| (gradient.id, gradient.value)).unzip::<_, _, Vec<_>, _>();
        let scaled = ids.into_iter().zip(PlainTensor::scale_all(values, factor)).collect();
        return Ok((Clipped { grads: gradients_params(module, scaled), norm, factor, skipped: None }, known.squares));
    };
    if norm.is_finite() {
        // A copy that does not count is not finite: the ranks have diverged.
        norm = f64::NAN;
    }
    let (path, rank) =
        holding.clipping.count(&holding.groups, || culprit(&paths_of(module), non_finite, holding, &clip))?;
    match clip.non_finite {
        NonFinite::Stop => Err(Error::NonFinite { path, rank }),
        NonFinite::Skip => {
            holding.clipping.skip();
            let skipped = Some(NotFinite { path, rank });
            Ok((Clipped { grads: GradientsParams::new(), norm, factor: 0.0, skipped }, f64::NAN))
        }
    }
}

/// Whether the norm that came with a step is the one that is asked for, and of these gradients: nobody has changed any
/// since.
fn is_of(carried: &CarriedNorm, found: &[FoundGradient], clip: &Clip) -> bool {
    let place = |tensor: &PlainTensor| tensor.clone().into_flex().ok().map(|tensor| tensor.layout().start_offset());
    let is_there = |gradient: &FoundGradient| {
        let measured = carried.gradients.get(&gradient.id);
        measured.is_some_and(|it| same_buffer(it, &gradient.value) && place(it) == place(&gradient.value))
    };
    carried.asked == clip.asked() && carried.gradients.len() == found.len() && found.iter().all(is_there)
}

/// The path of the first parameter whose gradient is not finite, and the rank that brought it, the same on all ranks:
/// the one that brought it into an average, in which all have it; if nobody did, as where only the sum overflows, the
/// first that has it.
///
/// All ranks call this or none: all have the same averages.
fn culprit(
    paths: &[String],
    non_finite: NonFiniteGradient,
    holding: &GradientLayout,
    clip: &Clip,
) -> Result<(String, usize), Error> {
    let over = |non_finite, groups: &[Communicator]| {
        NormReport { size: PartialNorm::nothing(clip.norm), squares: 0.0, non_finite }.over(groups, clip, holding.step)
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
        // All ranks that know the path know the same one.
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
fn take<M: Module>(module: &M, mut grads: GradientsParams, by_hand: bool) -> Result<Vec<FoundGradient>, Error> {
    let (mut found, mut explicit) = (Vec::new(), None);
    take_gradients(module, &mut grads, &mut |taken| {
        let is_explicit =
            |layer: &&str| taken.path.places().iter().any(|(_, holder)| holder.ends_with(&format!(":{layer}")));
        explicit = explicit.or_else(|| EXPLICIT.into_iter().find(is_explicit));
        found.extend(taken.gradient.map(|value| FoundGradient { place: taken.index, id: taken.id, value }));
    });
    if let Some(layer) = explicit.filter(|_| !by_hand) {
        let problem = format!(
            "the model has a {layer}, of which each rank holds a part that its wrapper does not know of: say how the model is \
             split with `HandSplit`, and clip with that"
        );
        return Err(Error::invalid("clip_grad_norm", problem));
    }
    match grads.len() {
        0 => Ok(found),
        left => {
            let problem = format!(
                "{left} of {} gradients belong to no parameter of the model: give it the model that made the step, before \
                 its optimizer has changed it for another",
                left + found.len()
            );
            Err(Error::invalid("clip_grad_norm", problem))
        }
    }
}

/// The explicit layers that hold parts; the larger ones are made of them.
const EXPLICIT: [&str; 3] = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"];

/// What this rank knows: the size of what it counts, and whether anything that it holds is not finite.
fn measure(found: &[FoundGradient], holding: &GradientLayout, clip: &Clip) -> Result<NormReport, Error> {
    let values: Vec<&PlainTensor> = found.iter().map(|gradient| &gradient.value).collect();
    let mut known = NormReport { size: PartialNorm::nothing(clip.norm), squares: 0.0, non_finite: None };
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
    let (mut seen, mut paths) = (HashSet::new(), Vec::new());
    visit_floats(module, &mut |param| {
        if seen.insert(param.id()) {
            paths.push(param.path());
        }
    });
    paths
}
