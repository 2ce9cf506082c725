//! Models on a GPU, or on what Vulkan offers in its place, train with every strategy as one model on the CPU does.

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::LinearConfig;
use burn::prelude::*;
use burn_parallel::comm::part;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::graph::TensorTree;
use burn_parallel::prelude::*;

use super::trials::{Trials, gpu};
use crate::common::models::{self, Cnn, Lm, Mlp, Numbers, Tied, scalar};
use crate::common::reference::{Reference, alone, difference, optimizer, own_on, values};

pub fn add_to(trials: &mut Trials) {
    trials.add("replicas_with_hooks", replicas_with_hooks);
    trials.add("replicas_with_synchronised_batch_norm", replicas_with_synchronised_batch_norm);
    trials.add("split_layers", split_layers);
    trials.add("split_layers_draw_what_the_cpu_draws", split_layers_draw_what_the_cpu_draws);
    trials.add("lazy_parameters_are_made_in_pieces_on_the_device", lazy_parameters_are_made_in_pieces_on_the_device);
    trials.add("split_batch_norms", split_batch_norms);
    trials.add("stages", stages);
    trials.add("stages_draw_what_the_cpu_draws", stages_draw_what_the_cpu_draws);
    trials.add("stages_with_tied_weights", stages_with_tied_weights);
    trials.add("all_axes_at_once", all_axes_at_once);
    trials.add("gradients_flow_through_moves", gradients_flow_through_moves);
    trials.add("models_on_two_devices_are_refused", models_on_two_devices_are_refused);
}

const STEPS: usize = 3;
const ROWS: usize = 8;

type Batch<I> = fn(usize, &Device) -> I;

/// The steps of one model on the CPU.
fn on_the_cpu<M: Module, I>(model: &M, batch: Batch<I>, loss: fn(&M, I) -> Tensor<1>) -> Vec<Reference> {
    alone(model, STEPS, |step| batch(step, &models::device()), loss)
}

#[track_caller]
fn compare<M: Module>(alone: &[Reference], what: &str, step: usize, loss: f64, model: &M) {
    let expected = f64::from(alone[step].loss);
    assert!((loss - expected).abs() <= 1e-4 * expected.abs().max(1.0), "{what}, loss {step}: {loss} for {expected}");
    let worst = difference(&alone[step].after, &values(model));
    assert!(worst <= 1e-3, "{what}: parameters differ by {worst} after step {step}");
    assert_on(model, &gpu());
}

/// Every parameter is on the device.
#[track_caller]
fn assert_on<M: Module>(model: &M, device: &Device) {
    struct Find<'a>(&'a Device);
    impl ModuleVisitor for Find<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            assert_eq!(param.val().inner().device(), *self.0);
        }
    }
    model.visit(&mut Find(device));
}

pub fn tokens(step: usize, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let mut numbers = Numbers(step as u64 + 60);
    (numbers.classes([ROWS, 5], 11, device), numbers.classes([ROWS, 5], 11, device))
}

fn rows(step: usize, device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let mut numbers = Numbers(step as u64 + 40);
    (numbers.tensor([ROWS, 6], device), numbers.classes([ROWS], 4, device))
}

pub fn images(step: usize, device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    models::images(ROWS, step as u64 + 80, device)
}

pub fn lm_loss(model: &Lm, (tokens, targets): (Tensor<2, Int>, Tensor<2, Int>)) -> Tensor<1> {
    model.loss(tokens, targets)
}

fn mlp_loss(model: &Mlp, (x, targets): (Tensor<2>, Tensor<1, Int>)) -> Tensor<1> {
    model.loss(x, targets)
}

pub fn cnn_loss(model: &Cnn, (images, targets): (Tensor<4>, Tensor<1, Int>)) -> Tensor<1> {
    model.loss(images, targets)
}

pub fn lm() -> Lm {
    Lm::new(11, 8, 1, &models::device())
}

/// Rows of a batch of two tensors.
fn of_rank<const D: usize, const E: usize, K>(
    (x, targets): (Tensor<D, K>, Tensor<E, Int>),
    rows: std::ops::Range<usize>,
) -> (Tensor<D, K>, Tensor<E, Int>)
where
    K: burn::tensor::kind::Basic,
{
    (x.slice([rows.clone()]), targets.slice([rows]))
}

fn replicas_with_hooks() {
    let model = lm();
    let reference = on_the_cpu(&model, tokens, lm_loss);
    for size in [2, 4] {
        launch::threads(size)
            .run(|rank| {
                // Small buckets: several are under way while backward runs.
                let config = DataParallelConfig::new().with_bucket_bytes(2048);
                let (mut model, mut optim) = (own_on(&model, gpu()).data_parallel(&rank, config)?, optimizer());
                for step in 0..STEPS {
                    let mine = part(ROWS, size, rank.rank());
                    let half = mine.start + mine.len() / 2;
                    let batch = |rows| of_rank(tokens(step, &gpu().autodiff()), rows);
                    // Accumulated in two halves, or in one go.
                    let micro_batches = match step {
                        0 => vec![batch(mine)],
                        _ => vec![batch(mine.start..half), batch(half..mine.end)],
                    };
                    let result = model.step_micro_batches(micro_batches, lm_loss)?;
                    stayed_there(&model, &result.counters.gradients);
                    model = optim.step(0.05, model, result.grads);
                    compare(&reference, &format!("{size} replicas"), step, result.loss.item(), &*model);
                }
                Ok(())
            })
            .unwrap();
    }
}

/// No gradient went through the host.
#[track_caller]
fn stayed_there<M: Module>(model: &Replica<Eager<M>>, gradients: &burn_parallel::comm::Counters) {
    let reduced = gradients.of("all_reduce");
    assert!(reduced.calls as usize >= model.buckets().min(2), "{reduced:?}");
    assert_eq!(reduced.on_device, reduced.bytes, "{reduced:?}");
}

fn replicas_with_synchronised_batch_norm() {
    let model = Cnn::new(&models::device());
    let reference = on_the_cpu(&model, images, cnn_loss);
    for size in [2, 4] {
        launch::threads(size)
            .run(|rank| {
                let config = DataParallelConfig::new();
                let (mut model, mut optim) = (own_on(&model, gpu()).data_parallel(&rank, config)?, optimizer());
                for step in 0..STEPS {
                    let mine = part(ROWS, size, rank.rank());
                    let weight = mine.len() as f64;
                    let batch = of_rank(images(step, &gpu()), mine);
                    let result = model.step_sync_batch_norm(vec![(batch, weight)], cnn_loss)?;
                    stayed_there(&model, &result.counters.gradients);
                    let statistics = result.counters.statistics.of("all_reduce");
                    assert!(statistics.calls > 0 && statistics.on_device == statistics.bytes, "{statistics:?}");
                    model = optim.step(0.05, model, result.grads);
                    compare(&reference, &format!("{size} replicas"), step, result.loss.item(), &*model);
                }
                Ok(())
            })
            .unwrap();
    }
}

/// Steps of a split model, against one on the CPU.
fn split_trains_like_one<M: Module + Sync, I: TensorTree + Clone>(
    model: &M,
    plan: &Plan,
    batch: Batch<I>,
    loss: fn(&M, I) -> Tensor<1>,
) {
    let reference = on_the_cpu(model, batch, loss);
    for size in [2, 4] {
        launch::threads(size)
            .run(|rank| {
                let (mut model, mut optim) = (own_on(model, gpu()).tensor_parallel(&rank, plan)?, optimizer());
                let dealt = model.counters().tensor.of("scatter");
                assert!(dealt.calls > 0 && dealt.on_device == dealt.bytes, "{dealt:?}");
                for step in 0..STEPS {
                    let before = model.counters();
                    let result = model.step(batch(step, &gpu()), loss)?;
                    let moved = (model.counters() - before).tensor.of("all_reduce");
                    assert!(moved.calls > 0 && moved.on_device == moved.bytes, "{moved:?}");
                    let loss = result.loss.item();
                    model = optim.step(0.05, model, result.grads);
                    compare(&reference, &format!("{size} parts"), step, loss, &model.assemble()?);
                }
                Ok(())
            })
            .unwrap();
    }
}

fn split_layers() {
    let plan = Plan::new()
        .shard("encoder.layers.*.mha.*.weight", 1)
        .shard("encoder.layers.*.mha.*.bias", 0)
        .shard("encoder.layers.*.pwff.linear_inner.weight", 1)
        .shard("encoder.layers.*.pwff.linear_inner.bias", 0)
        .shard("encoder.layers.*.pwff.linear_outer.weight", 0);
    split_trains_like_one(&lm(), &plan, tokens, lm_loss);
}

fn split_batch_norms() {
    let plan = Plan::new().shard("first.weight", 0).shard("second.weight", 1);
    let model = Cnn::new(&models::device());
    let reference = on_the_cpu(&model, images, cnn_loss);
    launch::threads(2)
        .run(|rank| {
            let (mut model, mut optim) = (own_on(&model, gpu()).tensor_parallel(&rank, &plan)?, optimizer());
            for step in 0..STEPS {
                let result = model.step(images(step, &gpu()), cnn_loss)?;
                let loss = result.loss.item();
                model = optim.step(0.05, model, result.grads);
                compare(&reference, "2 parts", step, loss, &model.assemble()?);
            }
            Ok(())
        })
        .unwrap();
}

fn mlp_plan() -> Plan {
    Plan::new().shard("first.weight", 1).shard("first.bias", 0).shard("second.weight", 0)
}

/// Losses of a few steps with dropout, in training and then in evaluation.
fn dropout_losses(size: usize, device: fn() -> Device) -> Vec<f32> {
    let model = Mlp::new(0.4, &models::device());
    let all = launch::threads(size).run(|rank| {
        let (mut model, mut optim) = (own_on(&model, device()).tensor_parallel(&rank, mlp_plan())?, optimizer());
        let mut losses = Vec::new();
        for step in 0..STEPS {
            let result = model.step(rows(step, &device()), mlp_loss)?;
            losses.push(result.loss.item() as f32);
            model = optim.step(0.05, model, result.grads);
        }
        losses.push(scalar(model.forward_with(rows(9, &device()), mlp_loss)?));
        Ok(losses)
    });
    all.unwrap().swap_remove(size - 1)
}

fn split_layers_draw_what_the_cpu_draws() {
    let expected = dropout_losses(1, Device::flex);
    for size in [1, 2, 4] {
        let found = dropout_losses(size, gpu);
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * a.abs().max(1.0);
        assert!(expected.iter().zip(&found).all(close), "{size} ranks: {found:?} for {expected:?}");
    }
}

/// Steps of a model in stages, against one on the CPU.
fn stages_train_like_one<M: Module + Sync, I: TensorTree + Clone>(
    model: &M,
    cut: [&Cut; 2],
    batch: Batch<I>,
    loss: fn(&M, I) -> Tensor<1>,
) {
    let reference = on_the_cpu(model, batch, loss);
    for (size, cut) in [2, 4].into_iter().zip(cut) {
        launch::threads(size)
            .run(|rank| {
                let config = PipelineConfig::new(4).with_cut(cut.clone());
                let (mut model, mut optim) = (own_on(model, gpu()).pipeline_parallel(&rank, config)?, optimizer());
                for step in 0..STEPS {
                    let before = model.counters();
                    let result = model.step(batch(step, &gpu()), loss)?;
                    let sent = (model.counters() - before).pipeline.of("send");
                    assert!(sent.calls > 0 && sent.on_device == sent.bytes, "{sent:?}");
                    model = optim.step(0.05, model, result.grads);
                    compare(&reference, &format!("{size} stages"), step, result.loss.item(), &model.assemble()?);
                }
                let evaluated = model.forward_with(batch(0, &gpu()), loss)?;
                assert_eq!(evaluated.device(), gpu());
                Ok(())
            })
            .unwrap();
    }
}

fn stages() {
    let model = Lm::new(11, 8, 2, &models::device());
    let in_four = Cut::before(["encoder.layers.0.*", "encoder.layers.1.*", "norm.*"]);
    stages_train_like_one(&model, [&Cut::Balanced, &in_four], tokens, lm_loss);
}

/// Losses of a pipeline with dropout, then in evaluation.
fn dropout_in_stages(device: fn() -> Device) -> Vec<f32> {
    let model = Mlp::new(0.4, &models::device());
    let all = launch::threads(2).run(|rank| {
        let config = PipelineConfig::new(2).with_cut(Cut::before(["second.*"])).with_seed(3);
        let (mut model, mut optim) = (own_on(&model, device()).pipeline_parallel(&rank, config)?, optimizer());
        let mut losses = Vec::new();
        for step in 0..STEPS {
            let result = model.step(rows(step, &device()), mlp_loss)?;
            losses.push(result.loss.item() as f32);
            model = optim.step(0.05, model, result.grads);
        }
        let logits = model.forward_with(rows(9, &device()).0, |model, x| model.forward(x))?;
        losses.extend(logits.into_data().try_to_vec::<f32>().unwrap());
        Ok(losses)
    });
    all.unwrap().swap_remove(1)
}

fn stages_draw_what_the_cpu_draws() {
    let (expected, found) = (dropout_in_stages(Device::flex), dropout_in_stages(gpu));
    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * a.abs().max(1.0);
    assert!(expected.len() > STEPS && expected.len() == found.len());
    assert!(expected.iter().zip(&found).all(close), "{found:?} for {expected:?}");
}

fn stages_with_tied_weights() {
    let loss = |model: &Tied, (x, t): (Tensor<2, Int>, Tensor<2, Int>)| model.loss(x, t);
    let model = Tied::new(&models::device());
    let reference = on_the_cpu(&model, tokens, loss);
    launch::threads(2)
        .run(|rank| {
            let config = PipelineConfig::new(2).with_cut(Cut::before(["inner.*"]));
            let (mut model, mut optim) = (own_on(&model, gpu()).pipeline_parallel(&rank, config)?, optimizer());
            for step in 0..STEPS {
                let result = model.step(tokens(step, &gpu()), loss)?;
                model = optim.step(0.05, model, result.grads);
                compare(&reference, "tied", step, result.loss.item(), &model.assemble()?);
            }
            Ok(())
        })
        .unwrap();
}

/// Two replicas of two stages, the layers of each split in two.
fn all_axes_at_once() {
    let model = Mlp::new(0.0, &models::device());
    let reference = on_the_cpu(&model, rows, mlp_loss);
    launch::threads(8)
        .run(|world| {
            let mesh = Mesh::new(&world, [("dp", 2), ("pp", 2), ("tp", 2)])?;
            let dp = mesh.axis("dp")?;
            let config = PipelineConfig::new(2).with_cut(Cut::before(["second.*"]));
            let mut model = own_on(&model, gpu())
                .tensor_parallel(&mesh.axis("tp")?, mlp_plan())?
                .pipeline_parallel(&mesh.axis("pp")?, config)?
                .data_parallel(&dp, DataParallelConfig::new())?;
            let mut optim = optimizer();
            for step in 0..STEPS {
                let batch = of_rank(rows(step, &gpu()), part(ROWS, 2, dp.rank()));
                let result = model.step(batch, mlp_loss)?;
                let reduced = result.counters.gradients.of("all_reduce");
                assert_eq!(reduced.on_device, reduced.bytes);
                model = optim.step(0.05, model, result.grads);
                compare(&reference, "all axes", step, result.loss.item(), &model.assemble()?);
            }
            Ok(())
        })
        .unwrap();
}

/// A hand-written MLP in Megatron's way, and an exchange of dims, on the tape of the device.
fn gradients_flow_through_moves() {
    let run = |device: fn() -> Device| {
        let all = launch::threads(3).run(|rank| {
            let device = device().autodiff();
            let mut numbers = Numbers(5);
            let [x, a, b] = [[4, 6], [6, 9], [9, 7]].map(|dims| numbers.tensor::<2>(dims, &device).require_grad());
            let columns = layout::scatter_to_group(a.clone(), 1, &rank)?;
            let part_of_b = layout::scatter_to_group(b.clone(), 0, &rank)?;
            let h = layout::copy_to_group(x.clone(), &rank)?.matmul(columns).tanh();
            let y = layout::reduce_from_group(h.matmul(part_of_b), &rank)?;
            // There and back: dims that the ranks do not divide.
            let parts = layout::scatter_to_group(y, 0, &rank)?;
            let turned = layout::all_to_all(parts, 0, 1, &rank)?;
            let whole = layout::gather_from_group(turned.powi_scalar(2), 1, &rank)?;
            let grads = layout::backward(&whole.sum(), &rank)?;
            let values = [&x, &a, &b].map(|leaf| {
                let gradient = leaf.grad(&grads).unwrap();
                assert_eq!(gradient.device(), device.clone().inner());
                gradient.into_data().try_to_vec::<f32>().unwrap()
            });
            Ok(values.concat())
        });
        all.unwrap()
    };
    let (expected, found) = (run(Device::flex), run(gpu));
    for (expected, found) in expected.iter().zip(&found) {
        assert!(expected.iter().zip(found).all(|(a, b)| (a - b).abs() <= 1e-4 * a.abs().max(1.0)), "{found:?}");
    }
}

fn models_on_two_devices_are_refused() {
    let model = || {
        let mut model = own_on(&Mlp::new(0.0, &models::device()), gpu());
        model.second = model.second.fork(&models::device());
        model
    };
    let says = |error: Error| {
        let text = error.to_string();
        assert!(text.contains("first.weight") && text.contains("second.weight"), "{text}");
    };
    says(launch::threads(2).run(|rank| model().data_parallel(&rank, DataParallelConfig::new()).map(drop)).unwrap_err());
    let tp = launch::threads(2)
        .run(|rank| model().tensor_parallel(&rank, mlp_plan())?.step(rows(0, &gpu()), mlp_loss).map(drop));
    says(tp.unwrap_err());
    // Inputs elsewhere than the model.
    let elsewhere = launch::threads(2).run(|rank| {
        let mut model = own_on(&Mlp::new(0.0, &models::device()), gpu()).tensor_parallel(&rank, mlp_plan())?;
        model.step(rows(0, &Device::flex()), mlp_loss).map(drop)
    });
    let text = elsewhere.unwrap_err().to_string();
    assert!(text.contains("input `0` is on") && text.contains("move it there"), "{text}");
}

fn lazy_parameters_are_made_in_pieces_on_the_device() {
    let values = |parameter: TensorData| parameter.try_into_vec::<f32>().unwrap();
    for (degree, dim) in [(2, 0), (2, 1), (3, 0), (3, 1)] {
        let wholes = launch::threads(degree)
            .run(|rank| {
                let model = LinearConfig::new(24, 12).init(&gpu().autodiff());
                let plan = Plan::new().shard("weight", dim).shard("bias", 0);
                let model = model.tensor_parallel(&rank, &plan)?.train();
                assert_on(&model, &gpu());
                let whole = model.assemble()?;
                Ok([whole.weight.val().into_data(), whole.bias.unwrap().val().into_data()].map(values))
            })
            .unwrap();
        assert!(wholes.iter().all(|whole| *whole == wholes[0]), "{degree} {dim}");
        let [weight, bias] = &wholes[0];
        assert_eq!((weight.len(), bias.len()), (24 * 12, 12));
        // Drawn, everywhere, and nothing twice.
        let bound = 1.0 / 24f32.sqrt();
        let mut all: Vec<u32> = weight.iter().chain(bias).map(|value| value.to_bits()).collect();
        assert!(weight.iter().chain(bias).all(|value| *value != 0.0 && value.abs() <= bound), "{degree} {dim}");
        all.sort_unstable();
        all.dedup();
        assert!(all.len() > 290, "{degree} {dim}: {} different numbers of 300", all.len());
    }
}
