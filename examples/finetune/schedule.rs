//! The learning rate of each step.

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn_parallel::prelude::*;

use crate::args::{Args, Scheduler};

/// Up to `--lr` in `--warmup` steps, then as `--scheduler` says, in so many steps together.
pub fn schedule(args: &Args, steps: usize) -> Result<ModuleLrScheduler, Error> {
    let Args { lr, warmup, .. } = *args;
    let rest = steps.saturating_sub(warmup).max(1);
    let down = match args.scheduler {
        Scheduler::Constant => LinearLrSchedulerConfig::new(lr, lr, rest).into(),
        Scheduler::Linear => LinearLrSchedulerConfig::new(lr, 0.0, rest).into(),
        Scheduler::Cosine => CosineAnnealingLrSchedulerConfig::new(lr, rest).into(),
    };
    let (parts, ends) = match warmup {
        0 => (vec![down], Vec::new()),
        _ => (vec![LinearLrSchedulerConfig::new(lr / warmup as f64, lr, warmup).into(), down], vec![warmup]),
    };
    SequentialLrSchedulerConfig::new(parts, ends).init().map_err(Error::user)
}
