//! Clips the gradients of models that are split by hand.

use burn::module::{Module, ParamId};
use burn::optim::GradientsParams;

use super::{Clip, Clipped};
use crate::Error;
use crate::comm::Communicator;
use crate::graph::{ClipRecord, GradientLayout};
use crate::params::visit_floats;
use crate::plan::matches;

/// How the parameters of a model lie over groups of ranks where no wrapper knows it: models made of the explicit
/// [layers](crate::tensor_parallel::layers), and stages that are written by hand.
///
/// ```
/// use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
/// use burn::tensor::Tensor;
/// use burn_parallel::prelude::*;
/// use burn_parallel::tensor_parallel::layers::ParallelFeedForwardConfig;
/// use burn_parallel::train::HandSplit;
///
/// launch::threads(2).run(|rank| {
///     let device = rank.device().autodiff();
///     let mut block = ParallelFeedForwardConfig::new(4, 9).with_seed(Some(2)).init(&rank, &device)?;
///     // All but the bias of the outer layer, of which each rank has a copy.
///     let split = HandSplit::new().over(&rank, ["up.*", "down.weight"]);
///
///     let loss = block.forward(Tensor::<3>::ones([1, 3, 4], &device))?.powi_scalar(2).mean();
///     let grads = GradientsParams::from_grads(layout::backward(&loss, &rank)?, &block);
///     let clipped = split.clip_grad_norm(&block, grads, 1.0)?;
///     let mut optim: ModuleOptimizer = SgdConfig::new().init();
///     block = optim.step(0.1, block, clipped.grads);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct HandSplit {
    over: Vec<(Communicator, Vec<String>)>,
    copies: Vec<(Communicator, Vec<String>)>,
}

impl HandSplit {
    /// Nothing is split.
    pub fn new() -> Self {
        Self::default()
    }

    /// Each rank of `group` has a part of its own of the parameters whose paths match one of the
    /// [patterns](crate::plan::Plan#patterns), and the same copy of all others. For stages of a pipeline that is
    /// `["*"]`.
    pub fn over<P: Into<String>>(mut self, group: &Communicator, split: impl IntoIterator<Item = P>) -> Self {
        self.over.push((group.clone(), split.into_iter().map(Into::into).collect()));
        self
    }

    /// All ranks of `group` have the same copy of the parameters whose paths match one of the patterns, though these
    /// are split [over](Self::over) a larger group: key/value heads that several ranks share
    /// ([`ParallelAttention::sharers`](crate::tensor_parallel::layers::ParallelAttention::sharers)), weights that are
    /// tied between stages.
    pub fn copied<P: Into<String>>(mut self, group: &Communicator, copies: impl IntoIterator<Item = P>) -> Self {
        self.copies.push((group.clone(), copies.into_iter().map(Into::into).collect()));
        self
    }

    /// Measures the gradients over all ranks and clips them, as
    /// [`ParallelModule::clip_grad_norm`](crate::train::ParallelModule::clip_grad_norm) does where a wrapper knows who
    /// holds what. Collective over the groups.
    ///
    /// # Errors
    /// [`Error::NonFinite`], the same on all ranks, if the gradient is not finite and that is to stop;
    /// [`Error::InvalidArgument`] if a pattern matches no parameter, if the largest norm is not positive, if ranks clip
    /// differently, or if there are gradients that `model` has no parameters for; those of [`Communicator`].
    pub fn clip_grad_norm<M: Module>(
        &self,
        model: &M,
        grads: GradientsParams,
        clip: impl Into<Clip>,
    ) -> Result<Clipped, Error> {
        super::clip::clip(model, grads, &self.gradient_layout(model)?, clip.into())
    }

    fn gradient_layout<M: Module>(&self, model: &M) -> Result<GradientLayout, Error> {
        let mut params: Vec<(ParamId, Vec<String>)> = Vec::new();
        visit_floats(model, &mut |param| match params.iter_mut().find(|(id, _)| *id == param.id()) {
            Some((_, paths)) => paths.push(param.path()),
            None => params.push((param.id(), vec![param.path()])),
        });
        for pattern in self.over.iter().chain(&self.copies).flat_map(|(_, patterns)| patterns) {
            let mut paths = params.iter().flat_map(|(_, paths)| paths);
            // A stage need not have any parameter.
            if !params.is_empty() && !paths.any(|path| matches(pattern, path)) {
                let known: Vec<&str> = params.iter().map(|(_, paths)| paths[0].as_str()).collect();
                let problem = format!("pattern `{pattern}` matches none of the parameters {known:?}");
                return Err(Error::invalid("clip_grad_norm", problem));
            }
        }
        let any = |patterns: &[String], paths: &[String]| {
            patterns.iter().any(|pattern| paths.iter().any(|path| matches(pattern, path)))
        };
        let elsewhere = |paths: &[String]| {
            let copied = |(group, split): &(Communicator, Vec<String>)| group.rank() != 0 && !any(split, paths);
            let shared = |(group, copies): &(Communicator, Vec<String>)| group.rank() != 0 && any(copies, paths);
            self.over.iter().any(copied) || self.copies.iter().any(shared)
        };
        let groups: Vec<Communicator> = self.over.iter().map(|(group, _)| group.clone()).collect();
        Ok(GradientLayout {
            rank: groups.first().map_or(0, Communicator::world_rank),
            elsewhere: params.iter().filter(|(_, paths)| elsewhere(paths)).map(|(id, _)| *id).collect(),
            groups,
            step: 0,
            averaged: None,
            by_hand: true,
            clipping: ClipRecord::default(),
        })
    }
}
