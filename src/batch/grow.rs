//! Lets the batch grow during training.

use serde::{Deserialize, Serialize};

use super::NoiseScale;
use crate::Error;

/// A batch that doubles as training goes on, when the noise of the gradient says that a larger one pays: early on a
/// small batch makes as much progress for each row as a large one, later it does not (Smith et al. 2018,
/// [arXiv:1711.00489](https://arxiv.org/abs/1711.00489)).
///
/// It grows by accumulation, with [`BatchSplit`](super::BatchSplit) for the new size: the same micro-batches, more of
/// them, so that neither memory nor captured steps change. Going on with more replicas is a
/// [checkpoint](crate::checkpoint) that is restored on a larger mesh. All ranks decide alike, since all have the same
/// noise scale.
///
/// ```
/// use burn_parallel::batch::{GradientNoise, GrowBatch, NoiseScale};
///
/// let mut batch = GrowBatch::new(16, 64)?.with_patience(2);
/// let mut noise = NoiseScale::with_decay(0.5);
/// let mut sizes = Vec::new();
/// for _ in 0..7 {
///     // A step measures a noise scale of 1000 tokens, with rows of 10 tokens.
///     noise.add_estimate(GradientNoise { squared_norm: 1.0, trace: 1000.0, micro_batches: 2, items: 160.0 });
///     sizes.push(batch.after_step(&noise, 10.0));
/// }
/// assert_eq!(sizes, [16, 32, 32, 64, 64, 64, 64]); // not 128: that is beyond the most
/// # Ok::<(), burn_parallel::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowBatch {
    rows: usize,
    most: usize,
    patience: u64,
    since: u64,
    /// How many steps had measured the noise when it has grown last.
    #[serde(default)]
    measured: u64,
}

impl GrowBatch {
    /// Begins with so many rows, and doubles up to `most`. After each change it keeps a size for 100 steps that
    /// [measure the noise](crate::data_parallel::DataParallelConfig::with_noise_scale_every) at least.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no rows, or fewer at most.
    pub fn new(rows: usize, most: usize) -> Result<Self, Error> {
        match rows > 0 && most >= rows {
            true => Ok(Self { rows, most, patience: 100, since: 0, measured: 0 }),
            false => {
                let problem =
                    format!("a batch of {rows} rows cannot grow to {most}: take at least 1 row, and as many at most");
                Err(Error::invalid("GrowBatch", problem))
            }
        }
    }

    /// Sets how many steps that measure the noise a size is kept at least, so that averages of it are those of this
    /// size.
    pub fn with_patience(mut self, steps: u64) -> Self {
        self.patience = steps.max(1);
        self
    }

    /// Sets how far it may grow from here.
    pub fn with_most(mut self, rows: usize) -> Self {
        self.most = rows.max(self.rows);
        self
    }

    /// The rows of the next step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// After a step: the rows of the next one. It doubles if the noise scale is at least twice the batch, so that the
    /// doubled batch still is no larger than it. `items_per_row` is how many items of the loss a row has, 1 for a plain
    /// mean.
    pub fn after_step(&mut self, noise: &NoiseScale, items_per_row: f64) -> usize {
        self.since += 1;
        let doubled = self.rows.saturating_mul(2);
        let pays = noise.items().is_ok_and(|items| items >= doubled as f64 * items_per_row);
        let measured = noise.steps().saturating_sub(self.measured);
        if measured >= self.patience && doubled <= self.most && pays {
            (self.rows, self.since, self.measured) = (doubled, 0, noise.steps());
        }
        self.rows
    }

    /// The steps since the batch has grown last, or since the start: for the [warm-up](super::warm_up) to the new
    /// learning rate.
    pub fn steps_since(&self) -> u64 {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::GradientNoise;

    #[test]
    fn it_grows_no_further_than_noise_and_limit_say() {
        let mut noise = NoiseScale::new();
        let mut batch = GrowBatch::new(8, 100).unwrap().with_patience(0);
        assert_eq!(batch.after_step(&noise, 1.0), 8, "nothing is known yet");
        let estimate = GradientNoise { squared_norm: 1.0, trace: 33.0, micro_batches: 2, items: 8.0 };
        let mut grown = || {
            noise.add_estimate(estimate);
            batch.after_step(&noise, 1.0)
        };
        assert_eq!([grown(), grown(), grown(), grown()], [16, 32, 32, 32]);
        assert_eq!(batch.steps_since(), 2);
        assert_eq!(batch.with_most(16).after_step(&noise, 1.0), 32, "what it has is kept");
        assert!(GrowBatch::new(0, 4).is_err() && GrowBatch::new(8, 4).is_err());
    }

    /// A size is kept for so many measurements, and a row of several items of the loss has as much less of the noise.
    #[test]
    fn it_waits_and_counts_rows() {
        let sizes = |patience: u64, items: f64| {
            let (mut noise, mut batch) = (NoiseScale::new(), GrowBatch::new(2, 1000).unwrap().with_patience(patience));
            let mut size = || {
                noise.add_estimate(GradientNoise { squared_norm: 1.0, trace: 100.0, micro_batches: 2, items: 8.0 });
                batch.after_step(&noise, items)
            };
            (0..7).map(|_| size()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(3, 10.0), [2, 2, 4, 4, 4, 8, 8]);
        assert_eq!(sizes(1, 10.0), [4, 8, 8, 8, 8, 8, 8]);
        assert_eq!(sizes(1, 1.0), [4, 8, 16, 32, 64, 64, 64]);
    }

    /// Steps that measure nothing say nothing of a size.
    #[test]
    fn patience_is_in_measurements() {
        let (mut noise, mut batch) = (NoiseScale::new(), GrowBatch::new(8, 64).unwrap().with_patience(2));
        let mut sizes = Vec::new();
        for step in 0..12 {
            if step % 3 == 2 {
                noise.add_estimate(GradientNoise { squared_norm: 1.0, trace: 1e3, micro_batches: 2, items: 8.0 });
            }
            sizes.push(batch.after_step(&noise, 1.0));
        }
        assert_eq!(sizes, [8, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 32]);
    }
}
