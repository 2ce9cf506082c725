//! The critical batch size by measurement.

use std::fmt;

use crate::Error;

/// A training from one state with another batch: what [`critical_batch_size`] asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Branch {
    /// How many times the batch of the first branch.
    pub factor: usize,
    /// The rows of a step.
    pub rows: usize,
    /// How many steps make up the rows that every branch trains on.
    pub steps: usize,
}

/// What branches from one state have shown.
#[derive(Debug, Clone, PartialEq)]
pub struct CriticalBatch {
    /// The rows of the largest batch whose loss, and that of all smaller ones, is within the tolerance.
    pub rows: usize,
    /// Whether a larger batch was tried, and its loss was not: else the critical size may be larger.
    pub bounded: bool,
    /// Every branch with its loss.
    pub branches: Vec<(Branch, f64)>,
}

/// Measures the critical batch size: trains on from one state with 1, 2, 4 and 8 times the batch, as `factors` say,
/// each on the same number of rows, and gives the largest batch whose loss is within `tolerance` of that of the first
/// branch (Merrill et al. 2025, [arXiv:2505.23971](https://arxiv.org/abs/2505.23971)). Where more data in a step stops
/// helping, fewer steps cost loss.
///
/// `train` brings a copy of model and optimizer to the state (a clone of the model, the optimizer read from its record;
/// or a [checkpoint](crate::checkpoint) restored), trains as the branch says with the [learning
/// rate](super::AdamSettings::for_batch) that fits its batch, and returns a loss: a mean over the last rows, or over
/// held-out data, less noisy than the tolerance. Called on all ranks, with the same loss on each
/// ([`Step::loss`](crate::step::Step) is), it gives the same on all.
///
/// ```
/// use burn_parallel::batch::critical_batch_size;
///
/// // A loss that stays what it is up to 4 times the batch.
/// let found = critical_batch_size(16, 960, &[1, 2, 4, 8], 0.01, |branch| {
///     assert_eq!(branch.rows * branch.steps, 960 / 128 * 128); // what all sizes divide
///     Ok(if branch.factor <= 4 { 2.0 } else { 2.1 })
/// })?;
/// assert_eq!((found.rows, found.bounded), (64, true));
/// # Ok::<(), burn_parallel::Error>(())
/// ```
///
/// From a checkpoint, here of two replicas:
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::{AdamWConfig, ModuleOptimizer};
/// use burn::prelude::*;
/// use burn_parallel::batch::{AdamSettings, critical_batch_size};
/// use burn_parallel::prelude::*;
///
/// # let dir = std::env::temp_dir().join(format!("critical-doc-{}", std::process::id()));
/// const BASE: AdamSettings = AdamSettings { lr: 0.01, beta_1: 0.9, beta_2: 0.99, epsilon: 1e-8 };
///
/// fn optimizer(settings: AdamSettings) -> ModuleOptimizer {
///     let AdamSettings { beta_1, beta_2, epsilon, .. } = settings;
///     AdamWConfig::new().with_beta_1(beta_1 as f32).with_beta_2(beta_2 as f32).with_epsilon(epsilon as f32).init()
/// }
///
/// let found = launch::threads(2).run(|world| {
///     let device = world.device().autodiff();
///     let wrap = || LinearConfig::new(4, 1).init(&device).parallelize(&world, &Strategy::new());
///     let mut checkpoints = Checkpointer::new(&world, &dir, CheckpointConfig::new())?;
///     # let (mut model, mut optim) = (wrap()?, optimizer(BASE));
///     # let step = model.step(Tensor::<2>::ones([2, 4], &device), |model, x| model.forward(x).powi_scalar(2).mean())?;
///     # model = model.optimize(&mut optim, 0.01, step)?;
///     # checkpoints.save(100, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
///     critical_batch_size(4, 64, &[1, 2, 4, 8], 0.05, |branch| {
///         let settings = BASE.for_batch(branch.factor as f64)?;
///         let (mut model, mut optim) = (wrap()?, optimizer(settings));
///         checkpoints.restore_step(100, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
///         let mut sum = 0.0;
///         for _ in 0..branch.steps {
///             let x = Tensor::<2>::ones([branch.rows / 2, 4], &device);      // this replica's share of the next rows
///             let step = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
///             sum += step.loss.item() * branch.rows as f64;
///             model = model.optimize(&mut optim, settings.lr, step)?;
///         }
///         Ok(sum / 64.0)
///     })
/// })?;
/// assert!(found[0].branches.len() == 4 && found[0] == found[1]);
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidArgument`] if the factors do not grow from 1, if `rows_each` does not suffice for one step of the
/// largest batch, or if a loss is not finite in the first branch; those of `train`.
pub fn critical_batch_size(
    rows: usize,
    rows_each: usize,
    factors: &[usize],
    tolerance: f64,
    mut train: impl FnMut(Branch) -> Result<f64, Error>,
) -> Result<CriticalBatch, Error> {
    let wrong = |problem: String| Err(Error::invalid("critical_batch_size", problem));
    if rows == 0 || factors.first() != Some(&1) || !factors.windows(2).all(|pair| pair[0] < pair[1]) {
        return wrong(format!(
            "a batch of {rows} rows times {factors:?}: take at least 1 row, and factors that grow from 1"
        ));
    }
    if tolerance.is_nan() || tolerance < 0.0 {
        return wrong(format!("the tolerance is {tolerance}; it must not be negative"));
    }
    // Rows that are whole steps of every branch.
    let Some(multiple) = factors.iter().try_fold(1usize, |all, factor| all.checked_mul(factor / gcd(all, *factor)))
    else {
        return wrong(format!("no number of rows is whole steps of all of {factors:?} times the batch"));
    };
    let block = multiple.saturating_mul(rows);
    let total = rows_each / block * block;
    if total == 0 {
        return wrong(format!("{rows_each} rows are not one step of every branch: give at least {block}"));
    }
    let mut branches = Vec::new();
    for &factor in factors {
        let branch = Branch { factor, rows: rows * factor, steps: total / (rows * factor) };
        branches.push((branch, train(branch)?));
    }
    let first = branches[0].1;
    if !first.is_finite() {
        return wrong(format!("the loss with {rows} rows is {first}: branch from a state that trains"));
    }
    let within = branches.iter().take_while(|(_, loss)| *loss <= first + tolerance).count();
    Ok(CriticalBatch { rows: branches[within - 1].0.rows, bounded: within < branches.len(), branches })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl fmt::Display for CriticalBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let beyond = if self.bounded { "" } else { "at least " };
        write!(f, "critical batch size {beyond}{} rows (", self.rows)?;
        for (place, (branch, loss)) in self.branches.iter().enumerate() {
            write!(f, "{}{}: {loss:.4}", if place > 0 { ", " } else { "" }, branch.rows)?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_before_the_first_that_loses() {
        let run = |losses: [f64; 4]| {
            let mut losses = losses.into_iter();
            critical_batch_size(4, 100, &[1, 2, 4, 8], 0.05, |branch| {
                assert_eq!(branch.rows * branch.steps, 96);
                Ok(losses.next().unwrap())
            })
            .unwrap()
        };
        let found = run([1.0, 1.01, 1.2, 1.0]);
        assert_eq!((found.rows, found.bounded), (8, true));
        let found = run([1.0, 0.9, 0.9, 1.05]);
        assert_eq!((found.rows, found.bounded), (32, false));
        assert!(found.to_string().starts_with("critical batch size at least 32 rows (4: 1.0000, 8"));
        // A branch that diverges is one that loses.
        assert_eq!(run([1.0, f64::NAN, 1.0, 1.0]).rows, 4);
    }

    #[test]
    fn what_cannot_be_compared_is_told() {
        let ask = |rows, each, factors: &[usize], tolerance| {
            critical_batch_size(rows, each, factors, tolerance, |_| Ok(f64::NAN)).unwrap_err().to_string()
        };
        assert!(ask(4, 31, &[1, 8], 0.1).contains("give at least 32"));
        assert!(ask(4, 64, &[2, 4], 0.1).contains("grow from 1"));
        assert!(ask(4, 64, &[1, 2], -0.1).contains("must not be negative"));
        assert!(ask(4, 64, &[1, 2], 0.1).contains("branch from a state that trains"));
        assert!(ask(usize::MAX, 64, &[1, 2], 0.1).contains("give at least"));
    }
}
