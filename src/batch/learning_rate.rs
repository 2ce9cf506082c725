//! How the settings of an optimizer follow the size of the batch.

use crate::Error;

/// The learning rate of SGD for a batch that is `factor` times as large: `factor` times as high (the linear scaling
/// rule, Goyal et al. 2017, [arXiv:1706.02677](https://arxiv.org/abs/1706.02677)). It holds while a step is small, that
/// is far below the critical batch size, with a [warm-up](warm_up).
///
/// ```
/// assert_eq!(burn_parallel::batch::sgd_learning_rate(0.1, 4.0)?, 0.4);
/// # Ok::<(), burn_parallel::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidArgument`] if a number is not positive and finite.
pub fn sgd_learning_rate(lr: f64, factor: f64) -> Result<f64, Error> {
    positive("sgd_learning_rate", "the learning rate", lr)?;
    positive("sgd_learning_rate", "the factor of the batch", factor)?;
    Ok(lr * factor)
}

/// The settings of Adam and AdamW that follow the size of the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamSettings {
    /// The learning rate.
    pub lr: f64,
    /// The decay of the average of gradients.
    pub beta_1: f64,
    /// The decay of the average of their squares.
    pub beta_2: f64,
    /// What is added to the root of the latter.
    pub epsilon: f64,
}

impl AdamSettings {
    /// Those for a batch that is `factor` times as large, by the square-root scaling rule (Malladi et al. 2022,
    /// [arXiv:2205.10287](https://arxiv.org/abs/2205.10287)): the learning rate times the root of the factor, `1 -
    /// beta` times the factor, epsilon divided by the root. The rule approximates the same path through fewer, larger
    /// steps, where noise dominates the gradient.
    ///
    /// ```
    /// use burn_parallel::batch::AdamSettings;
    ///
    /// let small = AdamSettings { lr: 1e-3, beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8 };
    /// let large = small.for_batch(4.0)?;
    /// assert_eq!((large.lr, large.epsilon), (2e-3, 5e-9));
    /// assert!((large.beta_1 - 0.6).abs() < 1e-12 && (large.beta_2 - 0.996).abs() < 1e-12);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the factor is so large that a beta would be below 0 (`1 / (1 - beta)` is the
    /// most), or if a number makes no sense.
    pub fn for_batch(self, factor: f64) -> Result<Self, Error> {
        const OPERATION: &str = "AdamSettings::for_batch";
        positive(OPERATION, "the learning rate", self.lr)?;
        positive(OPERATION, "the factor of the batch", factor)?;
        let beta = |name: &str, beta: f64| {
            let scaled = 1.0 - factor * (1.0 - beta);
            if (0.0..1.0).contains(&beta) && scaled >= -1e-12 {
                return Ok(scaled.max(0.0));
            }
            let problem = format!(
                "{name} is {beta}, which a batch {factor} times as large turns into {scaled}: take a factor of at most {:.3}, or \
                 another {name}",
                1.0 / (1.0 - beta)
            );
            Err(Error::invalid(OPERATION, problem))
        };
        Ok(Self {
            lr: self.lr * factor.sqrt(),
            beta_1: beta("beta_1", self.beta_1)?,
            beta_2: beta("beta_2", self.beta_2)?,
            epsilon: self.epsilon / factor.sqrt(),
        })
    }
}

/// The factor of the learning rate in step `step`, counted from 0, of a linear warm-up over so many steps, from `from`
/// to 1: after the start of a training (`from` 0), or when the batch and with it the learning rate have
/// [grown](super::GrowBatch).
///
/// ```
/// use burn_parallel::batch::warm_up;
/// assert_eq!((warm_up(0, 4, 0.0), warm_up(1, 4, 0.0), warm_up(3, 4, 0.0), warm_up(9, 4, 0.0)), (0.25, 0.5, 1.0, 1.0));
/// assert_eq!(warm_up(0, 2, 0.5), 0.75);
/// ```
pub fn warm_up(step: usize, steps: usize, from: f64) -> f64 {
    match step + 1 < steps {
        true => from + (1.0 - from) * (step + 1) as f64 / steps as f64,
        false => 1.0,
    }
}

fn positive(operation: &'static str, what: &str, number: f64) -> Result<(), Error> {
    match number > 0.0 && number.is_finite() {
        true => Ok(()),
        false => Err(Error::invalid(operation, format!("{what} is {number}; it must be positive and finite"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_beyond_the_betas_is_told() {
        let settings = AdamSettings { lr: 1e-3, beta_1: 0.9, beta_2: 0.99, epsilon: 1e-8 };
        let edge = settings.for_batch(10.0).unwrap();
        assert!((0.0..1e-12).contains(&edge.beta_1));
        let problem = settings.for_batch(16.0).unwrap_err().to_string();
        assert!(problem.contains("beta_1 is 0.9") && problem.contains("at most 10.000"), "{problem}");
        assert!(settings.for_batch(0.0).is_err() && settings.for_batch(f64::NAN).is_err());
        assert!(sgd_learning_rate(0.1, -1.0).is_err());
        // There and back again.
        let back = settings.for_batch(4.0).unwrap().for_batch(0.25).unwrap();
        assert!((back.lr - 1e-3).abs() < 1e-15 && (back.beta_2 - 0.99).abs() < 1e-12);
    }
}
