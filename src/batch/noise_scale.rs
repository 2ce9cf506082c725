//! The gradient noise scale, averaged over steps.

use serde::{Deserialize, Serialize};

use crate::step::{GradientNoise, NoNoise, Step};

/// The gradient noise scale of a training, `tr(S) / |G|^2`, with `G` the true gradient and `S` the covariance of that
/// of one item: the batch size, in items of the loss (tokens, rows), at which the noise of a step's gradient is as
/// large as what it measures (McCandlish et al. 2018, [arXiv:1812.06162](https://arxiv.org/abs/1812.06162), "simple"
/// noise scale).
///
/// The estimates of single steps are themselves noisy, and the mean of their ratios is biased. So numerator and
/// denominator are averaged apart, over `1 / (1 - decay)` measurements, and divided then. All ranks have the same
/// number, bit for bit.
///
/// ```
/// use burn::{nn::LinearConfig, prelude::*, tensor::Distribution};
/// use burn_parallel::batch::NoiseScale;
/// use burn_parallel::prelude::*;
/// use burn_parallel::train::Clip;
///
/// launch::threads(2).run(|rank| {
///     let device = rank.device().autodiff();
///     let config = DataParallelConfig::new().with_noise_scale_every(4);    // measured in the way of the reduction
///     let mut model = LinearConfig::new(4, 1).init(&device).data_parallel(&rank, config)?;
///     let mut noise = NoiseScale::new();
///     for _ in 0..20 {
///         let x = Tensor::<2>::random([8, 4], Distribution::Default, &device);
///         let step = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
///         let step = step.clip_grad_norm(&model, Clip::never())?;          // completes the measurement with the norm
///         noise.add(&step);
///     }
///     println!("{:?} rows", noise.items());                                // or why there is no number
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
///
/// # What it says
/// With a batch of `b` items and a noise scale of `n`, a step makes `1 / (1 + n / b)` of the progress of one with a
/// gradient without noise ([`progress`](Self::progress)). Far below `n`, twice the batch takes half the steps; far
/// above, it takes as many, and twice the data. It is a guide: it grows during training, it leaves out what the
/// optimizer does with the gradient, and for language models it can be wrong by a large factor
/// ([arXiv:2505.23971](https://arxiv.org/abs/2505.23971)): [measure](super) before a long run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NoiseScale {
    decay: f64,
    squared_norm: f64,
    trace: f64,
    /// The weight of all that was averaged: 1 in the long run.
    weight: f64,
    steps: u64,
    last: Option<NoNoise>,
}

impl NoiseScale {
    /// Averages over about a hundred measurements.
    pub fn new() -> Self {
        Self::with_decay(0.99)
    }

    /// Keeps this share of the average at each measurement, at least 0 and less than 1.
    pub fn with_decay(decay: f64) -> Self {
        let decay = if decay >= 0.0 { decay.min(1.0 - f64::EPSILON) } else { 0.0 };
        Self { decay, squared_norm: 0.0, trace: 0.0, weight: 0.0, steps: 0, last: Some(NoNoise::Off) }
    }

    /// Takes in what a step has measured. Steps that have measured nothing, as those between two that do, change no
    /// average.
    pub fn add(&mut self, step: &Step) {
        match step.noise() {
            Ok(noise) => self.add_estimate(noise),
            Err(why) => self.add_nothing(why),
        }
    }

    /// Notes why a step has measured nothing: that it was not its turn only where no other has said more.
    fn add_nothing(&mut self, why: NoNoise) {
        if why != NoNoise::Interval || self.last == Some(NoNoise::Off) {
            self.last = Some(why);
        }
    }

    /// Takes in an estimate.
    pub fn add_estimate(&mut self, noise: GradientNoise) {
        let average = |before: f64, now: f64| self.decay * before + (1.0 - self.decay) * now;
        (self.squared_norm, self.trace, self.weight) = (
            average(self.squared_norm, noise.squared_norm),
            average(self.trace, noise.trace),
            average(self.weight, 1.0),
        );
        self.steps += 1;
        self.last = None;
    }

    /// The noise scale in items of the loss; or why there is none.
    ///
    /// # Errors
    /// Why the last step that was to has measured nothing, if none has yet; [`NoNoise::Drowned`] if the averages do not
    /// tell the gradient from its noise: it takes more steps, or a larger `decay`.
    pub fn items(&self) -> Result<f64, NoNoise> {
        match (self.steps, self.last) {
            (0, why) => Err(why.unwrap_or(NoNoise::Off)),
            _ if self.squared_norm > 0.0 && self.trace >= 0.0 => Ok(self.trace / self.squared_norm),
            _ => Err(NoNoise::Drowned),
        }
    }

    /// The average of the estimates of `|G|^2`, the squared norm of the true gradient. NaN before there is any.
    pub fn squared_norm(&self) -> f64 {
        self.squared_norm / self.weight
    }

    /// The average of the estimates of `tr(S)`, the variance of the gradient of one item. NaN before there is any.
    pub fn trace(&self) -> f64 {
        self.trace / self.weight
    }

    /// How many steps were averaged: those that have measured something.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The share that a step with so many items makes of the progress of a step without noise: `1 / (1 + n / items)`.
    ///
    /// # Errors
    /// As [`items`](Self::items).
    pub fn progress(&self, items: f64) -> Result<f64, NoNoise> {
        Ok(1.0 / (1.0 + self.items()? / items))
    }
}

impl Default for NoiseScale {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(squared_norm: f64, trace: f64) -> GradientNoise {
        GradientNoise { squared_norm, trace, micro_batches: 2, items: 8.0 }
    }

    #[test]
    fn averages_are_divided_and_not_ratios_averaged() {
        let mut noise = NoiseScale::with_decay(0.5);
        assert_eq!(noise.items(), Err(NoNoise::Off));
        noise.add_estimate(estimate(1.0, 4.0));
        assert_eq!(noise.items(), Ok(4.0));
        noise.add_estimate(estimate(3.0, 4.0));
        // 0.5 x 0.5 of the first, 0.5 of the second.
        assert_eq!((noise.squared_norm(), noise.trace()), (1.75 / 0.75, 4.0));
        assert_eq!(noise.items(), Ok(3.0 / 1.75));
        assert_eq!(noise.progress(3.0 / 1.75), Ok(0.5));
        noise.add_estimate(estimate(-10.0, 4.0));
        assert_eq!(noise.items(), Err(NoNoise::Drowned));
        assert_eq!(noise.steps(), 3);
    }

    /// What the steps say that measure is not forgotten over those in between.
    #[test]
    fn steps_between_two_that_measure_change_nothing() {
        let mut noise = NoiseScale::new();
        noise.add_nothing(NoNoise::Interval);
        assert_eq!(noise.items(), Err(NoNoise::Interval));
        noise.add_nothing(NoNoise::OneMicroBatch);
        noise.add_nothing(NoNoise::Interval);
        assert_eq!(noise.items(), Err(NoNoise::OneMicroBatch));
        noise.add_estimate(estimate(1.0, 4.0));
        let before = noise;
        noise.add_nothing(NoNoise::Interval);
        assert_eq!(noise, before);
    }

    #[test]
    fn it_goes_on_where_it_was_written_down() {
        let mut noise = NoiseScale::with_decay(0.5); // JSON as it is read here keeps short numbers
        noise.add_estimate(estimate(1.0, 4.0));
        let text = serde_json::to_string(&noise).unwrap();
        assert_eq!(serde_json::from_str::<NoiseScale>(&text).unwrap(), noise);
    }
}
