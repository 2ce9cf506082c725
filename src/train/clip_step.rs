//! Clips the gradients of a step by their norm over all ranks.

use super::norm::clip_and_sum;
use super::{Clip, Norm, ParallelModule};
use crate::Error;
use crate::step::{NoNoise, NoiseState, Step};

impl Step {
    /// Measures the gradient of the whole model, whatever it is spread over, and [clips](Clip) it: a number is the
    /// largest L2 norm. [`grad_norm`](Self::grad_norm) is then the norm before that. Collective over the ranks that
    /// share the model, over which it takes one small collective along each axis; replicas hold the same gradients and
    /// communicate nothing. Of sharded ones (ZeRO) it comes with the step, where that of the step before was asked for
    /// in the same way: no rank may change its gradients in between that the others leave as they are.
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
    /// stop](super::NonFinite::Stop); [`Error::InvalidArgument`] if the largest norm is not positive, if ranks clip
    /// differently, if `model` has no parameters for some gradients, or if it has explicit layers
    /// ([`HandSplit`](super::HandSplit) is for these); the error of the world.
    pub fn clip_grad_norm<P: ParallelModule>(mut self, model: &P, clip: impl Into<Clip>) -> Result<Self, Error> {
        if self.skipped {
            return Ok(self);
        }
        let before = model.counters().norm;
        let clip = clip.into();
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
        (self.grads, self.grad_norm) = (clipped.grads, Some(clipped.norm));
        self.skipped = clipped.skipped.is_some();
        self.counters.skipped += u64::from(self.skipped);
        self.not_finite = clipped.skipped;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::LinearConfig;
    use burn::tensor::{Device, Tensor};

    use crate::data_parallel::DataParallelConfig;
    use crate::launch;
    use crate::sharding::Sharding;
    use crate::step::NoNoise;
    use crate::tensor::looked;
    use crate::train::{Clip, Engine, ParallelModule, Parallelize, Strategy};

    /// Of the layer that is trained.
    const ELEMENTS: usize = 3 * 5 + 5;

    /// What each of eight steps of two micro-batches looks at, and squares, on each rank.
    fn looks(ranks: usize, (sharding, engine): (Sharding, Engine), every: u64) -> Vec<Vec<[usize; 2]>> {
        let data = DataParallelConfig::new().with_sharding(sharding).with_noise_scale_every(every);
        let strategy = Strategy::new().with_engine(engine).with_data(data);
        let run = launch::threads(ranks).run(|world| {
            let device = Device::flex().autodiff();
            let mut model = LinearConfig::new(3, 5).init(&device).parallelize(&world, &strategy)?;
            let mut seen = Vec::new();
            for number in 0..8 {
                let rows = [2, 3].map(|rows| Tensor::<2>::ones([rows, 3], &device));
                looked::take();
                let step = model.step_micro_batches(rows, |model, x| model.forward(x).square().mean())?;
                let step = step.clip_grad_norm(&model, Clip::never())?;
                seen.push(looked::take());
                let due = every > 0 && (number + 1) % every == 0;
                assert!(step.noise().is_ok() == due || step.noise() == Err(NoNoise::NotFinite));
            }
            Ok(seen)
        });
        run.unwrap()
    }

    /// The noise takes the squares of the gradient of each micro-batch, in the steps that measure it; the others look
    /// at no element more than those of a run without.
    #[test]
    fn steps_in_between_look_at_nothing_more() {
        for (ranks, way, more) in [
            (1, (Sharding::None, Engine::Auto), 2 * ELEMENTS),
            (2, (Sharding::None, Engine::Auto), 0),
            (2, (Sharding::None, Engine::Captured), 0),
            (2, (Sharding::Gradients, Engine::Auto), 0),
            (2, (Sharding::Parameters, Engine::Captured), 0),
        ] {
            let (without, with) = (looks(ranks, way, 0), looks(ranks, way, 4));
            for (rank, (without, with)) in without.iter().zip(&with).enumerate() {
                for number in 0..8 {
                    let ([all, squared], [all_with, squared_with]) = (without[number], with[number]);
                    let due = number % 4 == 3;
                    let expected = if due { [all + more, squared + 2 * ELEMENTS] } else { [all, squared] };
                    assert_eq!([all_with, squared_with], expected, "{way:?} x {ranks}, rank {rank}, step {number}");
                }
            }
        }
    }
}
