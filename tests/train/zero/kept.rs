//! Eager replicas that gather parameters for a pass are on a device on which burn lets go of them.

use std::time::Duration;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::{config, optimizer};
use crate::common::checkpointing::{beside, checkpointing, on_checkpointing, own_for};
use crate::common::models::{Numbers, device};
use crate::common::reference::{all_same, filled, own, values};

const WIDTH: usize = 131;

fn layers() -> Vec<Linear> {
    filled((0..3).map(|_| LinearConfig::new(WIDTH, WIDTH).init(&device())).collect())
}

fn loss(layers: &[Linear], x: Tensor<2>) -> Tensor<1> {
    layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).powi_scalar(2).mean()
}

fn keeping(keep: Keep) -> DataParallelConfig {
    config(Sharding::Parameters).with_keep(keep)
}

fn input(step: usize, rank: usize, device: &Device) -> Tensor<2> {
    Numbers((step * 31 + rank * 7) as u64).tensor([2, WIDTH], device)
}

#[track_caller]
fn refused<T>(outcome: Result<T, Error>) -> String {
    let error = outcome.map(drop).expect_err("burn would keep views");
    assert!(matches!(error, Error::InvalidArgument { operation: "data_parallel", .. }), "{error}");
    let said = error.to_string();
    for words in ["`device.autodiff().gradient_checkpointing()`", "\"auto\"", "`keep` to \"micro_batch\" or \"step\""] {
        assert!(said.contains(words) && !said.contains('\n'), "`{words}` is missing in: {said}");
    }
    said
}

/// Burn would keep views of weights from forward to backward. The error is that of all ranks, who go on with something
/// else.
#[test]
fn a_device_on_which_burn_keeps_views_is_refused() {
    for (ranks, data) in [
        (2, keeping(Keep::Pass)),
        (3, keeping(Keep::Pass).with_allow_unused_parameters(true)),
        (4, keeping(Keep::Pass).with_sharding_ranks(2)),
    ] {
        launch::threads(ranks)
            .timeout(Duration::from_secs(30))
            .run(|rank| {
                refused(own(&layers()).data_parallel(&rank, data.clone()));
                // One that is frozen is gathered too.
                refused(own(&layers()).no_grad().data_parallel(&rank, data.clone()));
                let strategy = Strategy::new().with_data(data.clone());
                refused(own(&layers()).parallelize(&rank, &strategy.clone().with_engine(Engine::Eager)));
                for keep in [Keep::MicroBatch, Keep::Step] {
                    let mut model = own(&layers()).data_parallel(&rank, data.clone().with_keep(keep))?;
                    model.step(input(0, rank.rank(), &device()), |layers, x| loss(layers, x))?;
                }
                let mut model = own(&layers()).parallelize(&rank, &strategy)?;
                assert!(model.report().captured);
                model.step(input(0, rank.rank(), &device()), |layers, x| loss(layers, x))?;
                on_checkpointing(own(&layers())).data_parallel(&rank, data.clone()).map(drop)
            })
            .unwrap();
    }
    launch::threads(1).run(|rank| own(&layers()).data_parallel(&rank, keeping(Keep::Pass)).map(drop)).unwrap();
}

/// The model of one rank is on another device than those of the others: all are told which.
#[test]
fn the_rank_is_named_whose_device_it_is() {
    launch::threads(3)
        .timeout(Duration::from_secs(30))
        .run(|rank| {
            let model = if rank.rank() == 1 { own(&layers()) } else { on_checkpointing(own(&layers())) };
            let said = refused(model.data_parallel(&rank, keeping(Keep::Pass)));
            assert!(said.contains("rank 1 of group"), "{said}");
            Ok(())
        })
        .unwrap();
}

/// Inputs may be made on a device with or without gradient checkpointing, whichever the model is on.
#[test]
fn inputs_of_another_device_train_alike() {
    let run = |size: usize, data: DataParallelConfig, inputs: &Device| {
        let ran = launch::threads(size).timeout(Duration::from_secs(30)).run(|rank| {
            let mut model = own_for(&layers(), &data).data_parallel(&rank, data.clone())?;
            let mut optim = optimizer("adamw");
            for step in 0..3 {
                let evaluated =
                    model.forward_with(input(step, 9, inputs), |layers: &Vec<Linear>, x| loss(layers, x))?;
                assert!(evaluated.into_scalar::<f32>().is_finite());
                let batches = [input(step, 0, inputs), input(step, 1, inputs)];
                let done = model.step_micro_batches(batches, |layers, x| loss(layers, x))?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(values(&model.assemble()?))
        });
        ran.unwrap().remove(0)
    };
    let expected = run(1, DataParallelConfig::new(), &device());
    for keep in [Keep::Pass, Keep::MicroBatch, Keep::Step] {
        for (what, inputs) in [("plain", device()), ("checkpointing", checkpointing()), ("no autodiff", Device::flex())]
        {
            all_same(&format!("{keep:?}, inputs: {what}"), &expected, &run(2, keeping(keep), &inputs), 3e-5);
        }
    }
}

/// What the closure brings along cannot be put beside the model: an error on all ranks, and no panic.
#[test]
fn tensors_of_two_devices_in_one_operation_are_an_error() {
    for (keep, other) in [(Keep::Pass, device()), (Keep::MicroBatch, checkpointing())] {
        let along = Tensor::<2>::ones([2, WIDTH], &other);
        let error = launch::threads(2)
            .timeout(Duration::from_secs(30))
            .run(|rank| {
                let data = keeping(keep);
                let mut model = own_for(&layers(), &data).data_parallel(&rank, data)?;
                let batch = beside(&model, input(0, rank.rank(), &device()));
                let along = (rank.rank() == 1).then(|| along.clone());
                model.step(batch, |layers, x| loss(layers, along.iter().fold(x, |x, more| x + more.clone()))).map(drop)
            })
            .unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{keep:?}: {error}");
        assert!(error.to_string().contains("with and without gradient checkpointing"), "{keep:?}: {error}");
    }
}

/// Burn forgets gradient checkpointing with autodiff: a model that was made ready to evaluate and then to train again.
#[test]
fn a_model_that_has_lost_gradient_checkpointing_is_refused() {
    let error = launch::threads(2)
        .timeout(Duration::from_secs(30))
        .run(|rank| {
            let data = keeping(Keep::Pass);
            let mut model = own_for(&layers(), &data).data_parallel(&rank, data)?;
            model.step(input(0, rank.rank(), &device()), |layers, x| loss(layers, x))?;
            let mut model = model.valid().train();
            model.step(input(1, rank.rank(), &device()), |layers, x| loss(layers, x)).map(drop)
        })
        .unwrap_err();
    assert!(error.to_string().contains("`0.weight` is now on a device without gradient checkpointing"), "{error}");
}
