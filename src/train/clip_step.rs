//! Clips the gradients of a step by their norm over all ranks.

use super::norm::clip_and_sum;
use super::{Clip, Norm, ParallelModule};
use crate::Error;
use crate::step::{NoNoise, NoiseState, Step};

impl Step {
    /// Measures the gradient of the whole model, whatever it is spread over, and [clips](Clip) it: a number is the
    /// largest L2 norm. [`grad_norm`](Self::grad_norm) is then the norm before that. Collective over the ranks that
    /// share the model, over which it takes one small collective along each axis; replicas hold the same gradients and
    /// communicate nothing. Of sharded ones (ZeRO) it comes with the step, where those of the two steps before were
    /// asked for in the same way: no rank may change its gradients in between that the others leave as they are. Where
    /// one does, [`ParallelModule::clip_grad_norm`] takes the gradients of all as they are.
    ///
    /// In a step that measures the noise of its gradient
    /// ([`noise_scale_every`](crate::data_parallel::DataParallelConfig::with_noise_scale_every)) the same collectives
    /// complete what [`noise`](Self::noise) tells.
    ///
    /// `model` is the one that made the step. A step that is skipped already stays as it is.
    ///
    /// ```
    /// # use burn::{nn::LinearConfig, optim::{ModuleOptimizer, SgdConfig}, prelude::*};
    /// # use burn_parallel::prelude::*;
    /// # launch::threads(2).run(|rank| {
    /// # let device = rank.device().autodiff();
    /// # let mut optim: ModuleOptimizer = SgdConfig::new().init();
    /// # let model = LinearConfig::new(3, 1).init(&device);
    /// let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
    /// let step = model.step(Tensor::<2>::ones([4, 3], &device), |model, x| model.forward(x).mean())?;
    /// let step = step.clip_grad_norm(&model, 1.0)?;
    /// assert!((step.grad_norm.unwrap() - 2.0).abs() < 1e-6); // of three ones and a bias
    /// model = optim.step(0.1, model, step.grads);
    /// # Ok(()) })?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NonFinite`], the same on all ranks, if the gradient is not finite and [that is to
    /// stop](super::NonFinite::Stop); [`Error::InvalidArgument`] if the largest norm is not positive, if ranks that
    /// meet for it clip differently, if `model` has no parameters for some gradients, or if it has explicit layers
    /// ([`HandSplit`](super::HandSplit) is for these); the error of the world. Where the norm has come with the step,
    /// some ranks that ask for another, or have changed their gradients, are an [`Error::Mismatch`] on all, once the
    /// others go on. Where nothing is communicated for it, the step after the next
    /// [`optimize`](super::ParallelModule::optimize) is an [`Error::Optimizer`] if ranks have clipped differently.
    pub fn clip_grad_norm<P: ParallelModule>(mut self, model: &P, clip: impl Into<Clip>) -> Result<Self, Error> {
        if self.skipped {
            return Ok(self);
        }
        let before = model.counters().norm;
        let clip = clip.into();
        let asked = match model.shards() {
            // The first one may come with the step.
            Some(_) => self.asked.or(Some(clip.asked())),
            // Any of the replicas may measure.
            None => clip.clips().then(|| clip.asked()).or(self.asked),
        };
        let squares = match self.noise {
            // All ranks that divide rows among themselves have the same sum over the replicas.
            NoiseState::Part(part) => part.squares / model.shards().map_or(1.0, |shards| shards.ranks() as f64),
            _ => 0.0,
        };
        let measured = (squares, self.norm.take());
        let (clipped, squares) = clip_and_sum(model, self.grads, &model.gradient_layout(), clip, measured)?;
        if let NoiseState::Part(part) = self.noise {
            self.noise = match clip.measures() {
                Norm::L2 => NoiseState::complete(part.micro_batches, squares, clipped.norm * clipped.norm, self.weight),
                Norm::Infinity => NoiseState::None(NoNoise::OtherNorm),
            };
        }
        self.counters.norm = model.counters().norm - before;
        (self.grads, self.grad_norm, self.asked) = (clipped.grads, Some(clipped.norm), asked);
        self.skipped = clipped.skipped.is_some();
        self.counters.skipped += u64::from(self.skipped);
        self.not_finite = clipped.skipped;
        Ok(self)
    }
}
