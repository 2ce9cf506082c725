//! Replicas with different numbers of rows and micro-batches, also none.

use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::models::{Lm, Tokens, device, token_rows};
use crate::common::reference::{alone, difference, optimizer, own, values};
use crate::grad_norm::lm as tied;

const STEPS: usize = 3;

/// The summed loss over the targets that are not 0, as where those are padding, and their number.
fn summed(model: &Lm, (tokens, targets): Tokens) -> (Tensor<1>, Tensor<1>) {
    let [rows, length] = targets.dims();
    let counts = targets.clone().not_equal_elem(0).float().reshape([rows * length, 1]);
    ((model.token_losses((tokens, targets)) * counts.clone()).sum(), counts.sum())
}

fn token_loss(model: &Lm, batch: Tokens) -> Loss {
    let (sum, count) = summed(model, batch);
    Loss::sum(sum, count)
}

/// This replica's micro-batches: of different rows, on some replicas more of them, on one none in some steps.
fn share(step: usize, replica: usize, replicas: usize) -> Vec<Tokens> {
    match (replica, replicas) {
        (0, 2) => vec![token_rows(step, 0..2), token_rows(step, 2..3), token_rows(step, 3..4)],
        (1, 2) => vec![token_rows(step, 4..9)],
        (0, _) if step == 1 => vec![],
        (0, _) => vec![token_rows(step, 0..7)],
        (1, _) if step == 1 => vec![token_rows(step, 0..8), token_rows(step, 8..9)],
        (1, _) => vec![token_rows(step, 7..8), token_rows(step, 8..9)],
        // The last replica never has any.
        _ => vec![],
    }
}

#[test]
fn uneven_replicas_train_like_one_device() {
    let model = Lm::new(11, 16, 2, &device());
    let mean = |model: &Lm, batch: Tokens| {
        let (sum, count) = summed(model, batch);
        sum / count.inner().into_scalar::<f32>()
    };
    let reference = alone(&model, STEPS, |step| token_rows(step, 0..9), mean);
    for (dp, keep) in [(2, Keep::Pass), (3, Keep::Pass), (3, Keep::MicroBatch), (3, Keep::Step)] {
        launch::threads(dp)
            .run(|world| {
                let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
                let strategy = Strategy::new().with_data(data).with_engine(Engine::Captured);
                let mut model = own(&model).parallelize(&world, &strategy)?;
                let mut optim = optimizer();
                for (step, alone) in reference.iter().enumerate() {
                    let result = model.step_micro_batches(share(step, world.rank(), dp), token_loss)?;
                    let (loss, expected) = (result.loss.item() as f32, alone.loss);
                    assert!((loss - expected).abs() < 2e-5 * expected, "loss {step}: {loss} {expected}");
                    model = model.optimize(&mut optim, 0.05, result)?;
                    let worst = difference(&alone.after, &values(&model.assemble()?));
                    assert!(worst < 3e-4, "{worst} after step {step} with dp {dp}, {keep:?}");
                }
                // Nobody has anything: the parameters stay.
                let before = values(&model.assemble()?);
                let nothing = model.step_micro_batches(Vec::<Tokens>::new(), token_loss)?;
                assert!(nothing.loss.item().is_nan() && nothing.weight == 0.0);
                model = model.optimize(&mut optim, 0.05, nothing)?;
                assert_eq!(difference(&before, &values(&model.assemble()?)), 0.0);
                Ok(())
            })
            .unwrap();
    }
}

/// A replica that has no micro-batch in a step lends the rows of its stages, in the order in which the others' schedule
/// asks.
#[test]
fn a_pipeline_without_data_takes_part() {
    let model = Lm::new(11, 16, 2, &device());
    let mean = |model: &Lm, batch: Tokens| {
        let (sum, count) = summed(model, batch);
        sum / count.inner().into_scalar::<f32>()
    };
    let reference = alone(&model, STEPS, |step| token_rows(step, 0..9), mean);
    let share = |step: usize, replica: usize| match (step, replica) {
        (0, 0) => vec![token_rows(step, 0..4)],
        (0, _) => vec![token_rows(step, 4..9)],
        (1, 0) => vec![token_rows(step, 0..7), token_rows(step, 7..9)],
        (2, 1) => vec![token_rows(step, 0..9)],
        _ => vec![],
    };
    for (schedule, keep) in [
        (Schedule::OneForwardOneBackward, Keep::Pass),
        (Schedule::ZeroBubbleH1, Keep::Pass),
        (Schedule::Interleaved { stages_per_rank: 2 }, Keep::Step),
    ] {
        launch::threads(4)
            .run(|world| {
                let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
                let pipeline = PipelineConfig::new(2).with_schedule(schedule.clone());
                let strategy = Strategy::new().with_data(data).with_pp(2, pipeline);
                let mut model = own(&model).parallelize(&world, &strategy)?;
                let replica = model.mesh().coordinate("dp")?;
                let mut optim = optimizer();
                for (step, alone) in reference.iter().enumerate() {
                    let result = model.step_micro_batches(share(step, replica), token_loss)?;
                    let (loss, expected) = (result.loss.item() as f32, alone.loss);
                    assert!((loss - expected).abs() < 2e-5 * expected, "loss {step}: {loss} {expected}");
                    model = model.optimize(&mut optim, 0.05, result)?;
                    let worst = difference(&alone.after, &values(&model.assemble()?));
                    assert!(worst < 3e-4, "{worst} after step {step} with {schedule:?}, {keep:?}");
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn the_first_step_of_a_pipeline_is_for_all() {
    let model = Lm::new(11, 16, 2, &device());
    let error = launch::threads(4)
        .run(|world| {
            let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
            let strategy = Strategy::new().with_data(data).with_pp(2, PipelineConfig::new(2));
            let mut model = own(&model).parallelize(&world, &strategy)?;
            let batches = if model.mesh().coordinate("dp")? == 0 { vec![token_rows(0, 0..4)] } else { vec![] };
            model.step_micro_batches(batches, token_loss).map(|_| ())
        })
        .unwrap_err();
    assert!(error.to_string().contains("every replica must bring a micro-batch"), "{error}");
}

/// A weight that two stages share has a part of its gradient on each: so it is on the stages of a replica without data,
/// which hold rows of the sum.
#[test]
fn a_tied_weight_of_a_pipeline_without_data_is_summed_up() {
    let kind = tied::Kind { tied: true, frozen: false, dtype: burn::tensor::DType::F32 };
    let model = kind.init(&device());
    let mean = |model: &tied::Lm, batch| {
        let (sum, items) = model.summed(batch);
        sum / items as f32
    };
    let rows = |step: usize, rows: std::ops::Range<usize>| {
        let (tokens, targets) = tied::batch(step, &device());
        (tokens.slice([rows.clone()]), targets.slice([rows]))
    };
    let reference = alone(&model, STEPS, |step| tied::batch(step, &device()), mean);
    for keep in [Keep::Pass, Keep::Step] {
        launch::threads(4)
            .run(|world| {
                let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
                let strategy =
                    Strategy::new().with_data(data).with_pp(2, PipelineConfig::new(2).with_cut(tied::cut(2)));
                let mut model = own(&model).parallelize(&world, &strategy)?;
                let replica = model.mesh().coordinate("dp")?;
                let mut optim = optimizer();
                for (step, alone) in reference.iter().enumerate() {
                    let parts = match (step, replica) {
                        (0, 0) => vec![rows(step, 0..4)],
                        (0, _) => vec![rows(step, 4..9)],
                        (_, 0) => vec![],
                        _ => vec![rows(step, 0..5), rows(step, 5..9)],
                    };
                    let result = model.step_micro_batches(parts, tied::loss)?;
                    model = model.optimize(&mut optim, 0.05, result)?;
                    let worst = difference(&alone.after, &values(&model.assemble()?));
                    assert!(worst < 3e-4, "{worst} after step {step}, {keep:?}");
                }
                Ok(())
            })
            .unwrap();
    }
}
