//! Data parallelism and tensor parallelism together: the numbers of one device.

use burn::prelude::*;
use burn_parallel::partition::CollectiveKind;
use burn_parallel::prelude::*;

use crate::common::models::{Lm, Mlp, Numbers, Tokens, device, eager, token_rows};
use crate::common::reference::{alone, difference, optimizer, own, values};

const STEPS: usize = 3;

fn summed(model: &Lm, batch: Tokens) -> (Tensor<1>, usize) {
    let losses = model.token_losses(batch);
    let count = losses.dims()[0];
    (losses.sum(), count)
}

fn mean_loss(model: &Lm, batch: Tokens) -> Tensor<1> {
    let (sum, count) = summed(model, batch);
    sum / count as f32
}

fn token_loss(model: &Lm, batch: Tokens) -> Loss {
    let (sum, count) = summed(model, batch);
    Loss::sum(sum, count)
}

fn lm() -> Lm {
    Lm::new(11, 16, 2, &device())
}

/// This replica's micro-batches: rows of different numbers, on some replicas more of them.
fn share(step: usize, replica: usize, replicas: usize) -> Vec<Tokens> {
    match (replica, replicas) {
        (_, 1) => vec![token_rows(step, 0..4), token_rows(step, 4..5), token_rows(step, 5..9)],
        (0, 2) => vec![token_rows(step, 0..2), token_rows(step, 2..3), token_rows(step, 3..4)],
        (1, 2) => vec![token_rows(step, 4..9)],
        (0, _) => vec![token_rows(step, 0..7)],
        (1, _) => vec![token_rows(step, 7..8), token_rows(step, 8..9)],
        _ => vec![],
    }
}

#[test]
fn uneven_replicas_of_split_models_train_like_one_device() {
    let model = lm();
    let reference = alone(&model, STEPS, |step| token_rows(step, 0..9), mean_loss);
    for (dp, tp) in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)] {
        launch::threads(dp * tp)
            .run(|world| {
                let mesh = Mesh::new(&world, [("dp", dp), ("tp", tp)])?;
                let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
                // Small buckets: several collectives in each step.
                let config = DataParallelConfig::new().with_bucket_bytes(4096).with_first_bucket_bytes(512);
                let mut model = own(&model).tensor_parallel(&tp, Plan::megatron())?.data_parallel(&dp, config)?;
                let mut optim = optimizer();
                for (step, alone) in reference.iter().enumerate() {
                    let batches = share(step, dp.rank(), dp.size());
                    let result = model.step_micro_batches(batches, token_loss)?;
                    assert_eq!(result.weight, 45.0);
                    let (loss, expected) = (result.loss.item() as f32, alone.loss);
                    assert!((loss - expected).abs() < 2e-5 * expected, "loss {step}: {loss} {expected}");
                    model = optim.step(0.05, model, result.grads);
                    let worst = difference(&alone.after, &values(&model.assemble()?));
                    assert!(worst < 3e-4, "{worst} after step {step} with dp {} and tp {}", dp.size(), tp.size());
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn both_axes_in_the_graph_train_like_one_device() {
    let model = lm();
    let reference = alone(&model, STEPS, |step| token_rows(step, 0..9), mean_loss);
    let plan = Plan::megatron().on("dp", Plan::new().shard_input("0", 0).shard_input("1", 0));
    for (dp, tp) in [(3, 1), (3, 2)] {
        launch::threads(dp * tp)
            .run(|world| {
                let mesh = Mesh::new(&world, [("dp", dp), ("tp", tp)])?;
                let mut model = own(&model).tensor_parallel_over(&mesh, &["tp", "dp"], &plan)?;
                let mut optim = optimizer();
                for (step, alone) in reference.iter().enumerate() {
                    // A mean over all rows, which the axis of the data shares out.
                    let result = model.step(token_rows(step, 0..9), mean_loss)?;
                    let (loss, expected) = (result.loss.item() as f32, alone.loss);
                    assert!((loss - expected).abs() < 2e-5 * expected, "loss {step}: {loss} {expected}");
                    model = optim.step(0.05, model, result.grads);
                    let worst = difference(&alone.after, &values(&model.assemble()?));
                    assert!(worst < 3e-4, "{worst} after step {step} with dp {dp} and tp {tp}");
                }
                let [over_tp, over_dp] = <[_; 2]>::try_from(model.report().shards).unwrap();
                assert_eq!((over_tp.axis.as_str(), over_dp.axis.as_str()), ("tp", "dp"));
                assert!(
                    over_dp.fallbacks.is_empty() && over_dp.count(CollectiveKind::AllGather) == [0, 0],
                    "{over_dp}"
                );
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn parameters_split_over_both_axes() {
    let model = Mlp::new(0.0, &device());
    let plan = Plan::new().shard("first.weight", 1).shard("second.weight", 0);
    let plan = plan.on("fsdp", Plan::new().shard("first.*", 0).shard("second.weight", 0));
    let batch = || {
        let mut numbers = Numbers(5);
        (numbers.tensor([4, 6], &device()), numbers.classes([4], 4, &device()))
    };
    let loss = |m: &Mlp, (x, t): (Tensor<2>, Tensor<1, Int>)| m.loss(x, t);
    let (expected, gradients) = eager(&model, |m| loss(m, batch()));
    let after = values(&optimizer().step(0.05, own(&model), gradients));
    launch::threads(4)
        .run(|world| {
            let mesh = Mesh::new(&world, [("fsdp", 2), ("tp", 2)])?;
            let mut model = own(&model).tensor_parallel_over(&mesh, &["tp", "fsdp"], &plan)?;
            assert_eq!(model.local().first.weight.dims(), [3, 8]);
            assert_eq!(model.local().first.bias.as_ref().unwrap().dims(), [8]);
            assert_eq!(model.local().second.weight.dims(), [4, 4]);
            let text = model.table().to_string();
            assert!(text.contains("sharded along dim 1") && text.contains("[3, 8]"), "{text}");
            let step = model.step(batch(), loss)?;
            assert!((step.loss.item() as f32 - expected).abs() < 1e-6);
            let model = optimizer().step(0.05, model, step.grads);
            assert!(difference(&after, &values(&model.assemble()?)) < 1e-4);
            Ok(())
        })
        .unwrap();
}

#[test]
fn gradients_are_reduced_in_buckets_over_the_replicas_only() {
    let model = lm();
    let counters = launch::threads(4).run(|world| {
        let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
        let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
        let model = own(&model).tensor_parallel(&tp, Plan::megatron())?;
        let mut model = model.data_parallel(&dp, DataParallelConfig::new())?;
        let bytes = model.table().bytes() as u64;
        model.step(token_rows(0, 0..4), token_loss)?;
        let before = model.counters();
        let step = model.step(token_rows(1, 0..4), token_loss)?;
        let split = model.counters() - before;
        Ok((bytes, step.counters.gradients.total(), split.tensor.total()))
    });
    for (bytes, gradients, split) in counters.unwrap() {
        // Of two ranks each sends as much as it holds, but for an element that the halves differ by.
        assert_eq!(gradients.calls, 1);
        assert!(gradients.bytes.abs_diff(bytes) <= 4, "{} {bytes}", gradients.bytes);
        // Two layers, two all-reduces each way.
        assert_eq!(split.calls, 8);
    }
}

#[test]
fn nobody_brings_anything() {
    let model = Mlp::new(0.0, &device());
    launch::threads(2)
        .run(|rank| {
            let alone = rank.split(rank.rank() as u64, 0)?;
            let model = own(&model).tensor_parallel(&alone, Plan::new())?;
            let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
            let step = model.step_micro_batches(Vec::<Tensor<2>>::new(), |m, x| m.forward(x).mean())?;
            assert!(step.loss.item().is_nan() && step.weight == 0.0);
            let before = values(model.local());
            let model = optimizer().step(0.1, model, step.grads);
            assert_eq!(difference(&before, &values(model.local())), 0.0);
            Ok(())
        })
        .unwrap();
}

#[test]
fn replicas_that_hold_different_parts_are_refused() {
    let model = Mlp::new(0.0, &device());
    let error = launch::threads(2)
        .run(|rank| {
            let alone = rank.split(rank.rank() as u64, 0)?;
            let mut model = own(&model);
            if rank.rank() == 1 {
                model.second = burn::nn::LinearConfig::new(16, 5).init(&device());
            }
            let model = model.tensor_parallel(&alone, Plan::new())?;
            model.data_parallel(&rank, DataParallelConfig::new()).map(drop)
        })
        .unwrap_err();
    assert!(matches!(&error, Error::ModelMismatch { rank: 1, path, .. } if path == "second.weight"), "{error}");
}

#[test]
fn the_ranks_of_a_split_are_no_replicas() {
    let model = Mlp::new(0.0, &device());
    let plan = Plan::new().shard("first.weight", 1);
    for pipeline in [false, true] {
        let error = launch::threads(2)
            .run(|world| {
                let split = own(&model).tensor_parallel(&world, &plan)?;
                match pipeline {
                    true => split.pipeline_parallel(&world, PipelineConfig::new(2)).map(drop),
                    false => split.data_parallel(&world, DataParallelConfig::new()).map(drop),
                }
            })
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("first.weight") && text.contains("another axis of the mesh"), "{text}");
    }
}
