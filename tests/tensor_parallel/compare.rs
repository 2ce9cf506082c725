//! Models that a plan splits, trained beside one device.

use burn::module::Module;
use burn::prelude::*;
use burn_parallel::graph::TensorTree;
use burn_parallel::partition::ShardReport;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::Sharded;

use crate::common::reference::{Reference, alone, close, difference, optimizer, own, values};

const STEPS: usize = 3;

/// Trains on ranks what `wrap` splits, and on one device. Losses and, put together, all parameters are the same, and
/// have the model's dims.
#[track_caller]
pub fn trains_like_one<M: Module + Sync, I: TensorTree + Clone>(
    model: &M,
    batch: fn(usize) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    wrap: impl Fn(M, &Rank) -> Result<Sharded<M>, Error> + Sync,
    degree: usize,
) -> ShardReport {
    trains_like(&alone(model, STEPS, batch, loss), model, batch, loss, wrap, degree)
}

/// [`trains_like_one`] of a model that a plan splits over each of these numbers of ranks.
#[track_caller]
pub fn splits_like_one<M: Module + Sync, I: TensorTree + Clone>(
    model: &M,
    batch: fn(usize) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    plan: &Plan,
    degrees: &[usize],
) {
    let reference = alone(model, STEPS, batch, loss);
    for degree in degrees {
        trains_like(&reference, model, batch, loss, |model, rank| model.tensor_parallel(rank, plan), *degree);
    }
}

#[track_caller]
fn trains_like<M: Module + Sync, I: TensorTree + Clone>(
    reference: &[Reference],
    model: &M,
    batch: fn(usize) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    wrap: impl Fn(M, &Rank) -> Result<Sharded<M>, Error> + Sync,
    degree: usize,
) -> ShardReport {
    let reports = launch::threads(degree).run(|rank| {
        let (mut model, mut optim) = (wrap(own(model), &rank)?, optimizer());
        for (step, reference) in reference.iter().enumerate() {
            let result = model.step(batch(step), loss)?;
            close(&format!("loss {step} of {degree}"), reference.loss, result.loss.item() as f32);
            model = optim.step(0.05, model, result.grads);
            let worst = difference(&reference.after, &values(&model.assemble()?));
            assert!(worst <= 3e-4, "parameters differ by {worst} after step {step} over {degree} ranks");
        }
        Ok(model.report().shard())
    });
    reports.unwrap().swap_remove(0)
}
