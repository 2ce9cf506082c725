//! Batch norm over ranks that split a batch, against one device that has it whole.

use std::sync::{Arc, Condvar, Mutex};

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::Error;
use burn_parallel::data_parallel::{BatchNormSync, register_sync_batch_norm, sync_batch_norm};
use burn_parallel::graph::*;

use crate::common::models::*;
use crate::common::reference::{Wholes, difference, gradient_values, values};

/// A batch norm on a tensor that is neither parameter nor input.
#[derive(Module, Debug)]
struct OnConstant {
    norm: nn::BatchNorm,
    constant: Tensor<4>,
    head: Residual,
}

/// Sums over two threads: the simplest thing that can be an all-reduce.
#[derive(Default)]
struct Pair {
    state: Mutex<(Vec<Option<Vec<f64>>>, usize)>,
    changed: Condvar,
}

impl Pair {
    fn sum_tensor(&self, rank: usize, mine: Tensor<1>) -> Tensor<1> {
        let (device, dtype) = (mine.device(), mine.dtype());
        assert_eq!(dtype, burn::tensor::DType::F64);
        let sum = self.sum(rank, mine.into_data().try_to_vec().unwrap());
        Tensor::from_data(sum.as_slice(), (&device, dtype))
    }

    fn sum(&self, rank: usize, mine: Vec<f64>) -> Vec<f64> {
        let mut state = self.state.lock().unwrap();
        // The previous sum must have been fetched by both.
        state = self.changed.wait_while(state, |s| s.0.get(rank).is_some_and(Option::is_some)).unwrap();
        state.0.resize(2, None);
        state.0[rank] = Some(mine);
        self.changed.notify_all();
        state = self.changed.wait_while(state, |s| s.0.iter().any(Option::is_none)).unwrap();
        let sum = state.0[0].iter().flatten().zip(state.0[1].iter().flatten()).map(|(a, b)| a + b).collect();
        state.1 += 1;
        if state.1 == 2 {
            *state = (vec![None; 2], 0);
            self.changed.notify_all();
        } else {
            drop(self.changed.wait_while(state, |s| s.1 != 0).unwrap());
        }
        sum
    }
}

fn split(rows: std::ops::Range<usize>, seed: u64) -> (Tensor<4>, Tensor<1, Int>) {
    let (images, targets) = images(8, seed, &device());
    (images.slice([rows.clone()]), targets.slice([rows]))
}

/// Losses, trained values and the report of every rank.
fn train(model: &Cnn, cut: usize, steps: u64) -> Vec<(Vec<f64>, Wholes, BatchNormSync)> {
    let (stats, grads) = (Arc::new(Pair::default()), Arc::new(Pair::default()));
    std::thread::scope(|scope| {
        let ranks = [0..cut, cut..8].into_iter().enumerate().map(|(rank, rows)| {
            let (stats, grads) = (stats.clone(), grads.clone());
            // Fresh leaves and running statistics of its own.
            let mut model = model.clone().fork(&device()).train();
            scope.spawn(move || {
                let mut ops = CustomOps::new();
                let count = rows.len() as f64;
                register_sync_batch_norm(&mut ops, move |x| Ok(stats.sum_tensor(rank, x)), move || count);
                let report = Arc::new(Mutex::new(BatchNormSync::default()));
                let found = report.clone();
                let mut cache = GraphCache::new(ops, move |graph| {
                    *found.lock().unwrap() = sync_batch_norm(graph)?;
                    Ok(())
                });
                let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                let mut losses = Vec::new();
                for seed in 0..steps {
                    let batch = split(rows.clone(), seed);
                    let executor = cache.executor(&model, &batch, |m, (x, t)| m.loss(x, t)).unwrap();
                    let result = executor.step(&model, batch).unwrap();
                    let loss = grads.sum(rank, vec![count * scalar(result.loss) as f64, count]);
                    losses.push(loss[0] / loss[1]);
                    let gradients = average(&model, &result.gradients, |x| grads.sum(rank, x), count);
                    model = optim.step(0.01, model, gradients);
                }
                let report = *report.lock().unwrap();
                (losses, values(&model), report)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Gradients weighted with the number of samples, in the order in which both ranks visit the parameters.
fn average<M: Module>(
    model: &M,
    gradients: &GradientsParams,
    sum: impl Fn(Vec<f64>) -> Vec<f64>,
    count: f64,
) -> GradientsParams {
    struct Average<'a, F>(&'a GradientsParams, GradientsParams, F, f64);
    impl<F: Fn(Vec<f64>) -> Vec<f64>> burn::module::ModuleVisitor for Average<'_, F> {
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
            let Some(gradient) = self.0.get::<D>(param.id) else { return };
            let shape = gradient.dims();
            let local = gradient.into_data().iter::<f64>().map(|x| x * self.3 / 8.0).collect();
            let data = TensorData::new((self.2)(local), shape).convert::<f32>();
            self.1.register(param.id, Tensor::<D>::from_data(data, &Device::flex()));
        }
    }
    let mut average = Average(gradients, GradientsParams::new(), sum, count);
    model.visit(&mut average);
    average.1
}

fn whole(model: &Cnn, steps: u64) -> (Vec<f64>, Wholes) {
    let mut model = model.clone().fork(&device()).train();
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for seed in 0..steps {
        let (x, t) = split(0..8, seed);
        let (loss, gradients) = eager(&model, |m| m.loss(x, t));
        losses.push(loss as f64);
        model = optim.step(0.01, model, gradients);
    }
    (losses, values(&model))
}

#[track_caller]
fn like_one_device(model: &Cnn, cut: usize, report: BatchNormSync) {
    let steps = 3;
    let (losses, values) = whole(model, steps);
    for (rank, (rank_losses, rank_values, found)) in train(model, cut, steps).into_iter().enumerate() {
        assert_eq!(found, report);
        for (a, b) in losses.iter().zip(&rank_losses) {
            assert!((a - b).abs() <= 1e-5 * a, "losses of rank {rank}: {losses:?} {rank_losses:?}");
        }
        let worst = difference(&values, &rank_values);
        assert!(worst <= 2e-4, "rank {rank} differs by {worst}");
    }
}

#[test]
fn equal_halves_train_like_one_device() {
    like_one_device(&Cnn::new(&device()), 4, BatchNormSync { modules: 3, collectives: 12 });
}

#[test]
fn unequal_halves_train_like_one_device() {
    like_one_device(&Cnn::new(&device()), 3, BatchNormSync { modules: 3, collectives: 12 });
}

#[test]
fn a_frozen_batch_norm_is_left_alone() {
    let mut model = Cnn::new(&device());
    model.norm = model.norm.freeze();
    like_one_device(&model, 3, BatchNormSync { modules: 2, collectives: 8 });
}

/// One step of two ranks: the largest differences of gradients and of running statistics from one device.
fn one_step<M: Module + Sync>(
    model: &M,
    cut: usize,
    sync: bool,
    weigh: bool,
    loss: impl Fn(&M, (Tensor<4>, Tensor<1, Int>)) -> Tensor<1> + Sync,
) -> (f32, f32) {
    let reference = model.clone().fork(&device()).train();
    let (_, expected) = eager(&reference, |m| loss(m, split(0..8, 5)));
    let (expected, expected_stats) = (gradient_values(&reference, &expected), values(&reference));
    let (stats, grads) = (Arc::new(Pair::default()), Arc::new(Pair::default()));
    std::thread::scope(|scope| {
        let ranks = [0..cut, cut..8].into_iter().enumerate().map(|(rank, rows)| {
            let (stats, grads, expected, expected_stats) = (stats.clone(), grads.clone(), &expected, &expected_stats);
            let (model, loss) = (model.clone().fork(&device()).train(), &loss);
            scope.spawn(move || {
                let count = rows.len() as f64;
                let mut ops = CustomOps::new();
                let weight = if weigh { count } else { 1.0 };
                register_sync_batch_norm(&mut ops, move |x| Ok(stats.sum_tensor(rank, x)), move || weight);
                let mut graph = capture_step(&model, split(rows.clone(), 0), loss).unwrap();
                if sync {
                    sync_batch_norm(&mut graph).unwrap();
                }
                let result = Executor::new(graph, ops).unwrap().step(&model, split(rows, 5)).unwrap();
                let gradients = average(&model, &result.gradients, |x| grads.sum(rank, x), count);
                let gradients = difference(expected, &gradient_values(&model, &gradients));
                (gradients, difference(expected_stats, &values(&model)))
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let worst = |a: (f32, f32), b: (f32, f32)| (a.0.max(b.0), a.1.max(b.1));
        ranks.into_iter().map(|rank| rank.join().unwrap()).fold((0.0, 0.0), worst)
    })
}

#[test]
fn gradients_and_running_statistics_of_one_step() {
    let model = Cnn::new(&device());
    let loss = |m: &Cnn, (x, t)| m.loss(x, t);
    for cut in [4, 3, 1] {
        let (gradients, statistics) = one_step(&model, cut, true, true, loss);
        assert!(gradients <= 1e-5 && statistics <= 1e-5, "cut {cut}: {gradients} {statistics}");
    }
    // That this says something: local statistics are far off, and so is an unweighted backward of unequal parts.
    let (gradients, statistics) = one_step(&model, 4, false, true, loss);
    assert!(gradients > 1e-2 && statistics > 1e-2, "{gradients} {statistics}");
    let (gradients, statistics) = one_step(&model, 3, true, false, loss);
    assert!(gradients > 1e-4 && statistics <= 1e-5, "{gradients} {statistics}");
}

#[test]
fn two_batch_norms_with_the_same_gradient() {
    let model = Residual::new(&device());
    let loss = |m: &Residual, (x, t)| m.loss(x, t);
    for cut in [4, 3] {
        let (gradients, statistics) = one_step(&model, cut, true, true, loss);
        assert!(gradients <= 1e-5 && statistics <= 1e-5, "cut {cut}: {gradients} {statistics}");
    }
}

#[test]
fn a_thread_can_take_an_executor_along() {
    fn is_send<T: Send>() {}
    is_send::<Executor>();
    is_send::<GraphCache>();
    is_send::<CustomOps>();
}

#[test]
fn a_group_of_one_changes_nothing() {
    let plain = Cnn::new(&device());
    let synced = plain.clone().train();
    let batch = || images(5, 3, &device());
    let graph = capture_step(&plain, batch(), |m, (x, t)| m.loss(x, t)).unwrap();
    let mut rewritten = graph.clone();
    sync_batch_norm(&mut rewritten).unwrap();
    assert!(
        graph.forward_len + 6 == rewritten.forward_len && graph.operations.len() + 12 == rewritten.operations.len()
    );
    // With the very operations of eager burn: what is fused ends at a collective, and sums are added in another order.
    let one_by_one = || CustomOps::new().with_fusion(false);
    let mut ops = one_by_one();
    register_sync_batch_norm(&mut ops, Ok, || 5.0);
    let a = Executor::new(graph, one_by_one()).unwrap().step(&plain, batch()).unwrap();
    let b = Executor::new(rewritten, ops).unwrap().step(&synced, batch()).unwrap();
    assert_eq!(scalar(a.loss), scalar(b.loss));
    assert_eq!(difference(&gradient_values(&plain, &a.gradients), &gradient_values(&plain, &b.gradients)), 0.0);
    assert_eq!(difference(&values(&plain), &values(&synced)), 0.0);
}

#[test]
fn batch_norm_is_found_also_with_gradient_checkpointing() {
    let model = Cnn::new(&device().gradient_checkpointing());
    let batch = || images(5, 3, &Device::flex());
    let mut graph = capture_step(&model, batch(), |m, (x, t)| m.loss(x, t)).unwrap();
    let plain = model.valid().train();
    let without = capture_step(&plain, batch(), |m, (x, t)| m.loss(x, t)).unwrap();
    assert!(graph.operations.len() > without.operations.len(), "something is computed again");
    assert_eq!(sync_batch_norm(&mut graph).unwrap(), BatchNormSync { modules: 3, collectives: 12 });
    let mut ops = CustomOps::new().with_fusion(false);
    register_sync_batch_norm(&mut ops, Ok, || 1.0);
    let a = Executor::new(graph, ops).unwrap().step(&model, batch()).unwrap();
    let (_, b) = eager(&plain, |m| m.loss(images(5, 3, &device()).0, batch().1));
    assert!(difference(&gradient_values(&plain, &a.gradients), &gradient_values(&plain, &b)) <= 1e-6);
}

#[test]
fn errors_of_the_all_reduce_and_wrong_weights_are_the_steps() {
    let model = Cnn::new(&device());
    let batch = || images(4, 1, &device());
    let mut graph = capture_step(&model, batch(), |m, (x, t)| m.loss(x, t)).unwrap();
    sync_batch_norm(&mut graph).unwrap();
    let run = |reduce: fn(Tensor<1>) -> Result<Tensor<1>, Error>, weight: f64| {
        let mut ops = CustomOps::new();
        register_sync_batch_norm(&mut ops, reduce, move || weight);
        let before = values(&model);
        let error = Executor::new(graph.clone(), ops).unwrap().step(&model, batch()).unwrap_err().to_string();
        assert_eq!(difference(&before, &values(&model)), 0.0, "a failed step leaves the running statistics");
        error
    };
    assert_eq!(run(|_| Err(Error::Graph { problem: "rank 1 left".into() }), 1.0), "graph: rank 1 left");
    assert!(run(|sums| Ok(sums.narrow(0, 0, 1)), 1.0).contains("was given 3 elements but returned 1"));
    assert!(run(Ok, 0.0).contains("must be positive, but it is 0"));
}

#[test]
fn means_of_the_model_itself_are_not_touched() {
    let model = Cnn::new(&device());
    let mut graph = capture_step(&model, images(4, 1, &device()), |m, (x, t)| {
        // The shape and dims of a batch statistic, forward and backward.
        let own = x.clone().swap_dims(0, 1).reshape([2, -1]).mean_dim(1).powi_scalar(2).mean();
        m.loss(x, t) + own + m.head.weight.val().mean_dim(1).powi_scalar(2).mean()
    });
    let found = sync_batch_norm(graph.as_mut().unwrap()).unwrap();
    assert_eq!(found, BatchNormSync { modules: 3, collectives: 12 });
}

#[test]
fn fingerprints_do_not_depend_on_the_batch() {
    let model = Cnn::new(&device());
    let record = |rows| {
        let mut graph = capture_step(&model, images(rows, 1, &device()), |m, (x, t)| m.loss(x, t)).unwrap();
        let before = graph.collective_fingerprint();
        sync_batch_norm(&mut graph).unwrap();
        assert_ne!(before, graph.collective_fingerprint());
        graph.collective_fingerprint()
    };
    assert_eq!(record(3), record(5));
}

#[test]
fn what_cannot_be_synchronised_is_an_error() {
    let model = OnConstant {
        norm: nn::BatchNormConfig::new(2).init(&device()),
        constant: Tensor::ones([4, 2, 8, 8], &device()),
        head: Residual::new(&device()),
    };
    let loss = |m: &OnConstant, (x, t)| m.head.loss(x + m.norm.forward(m.constant.clone()), t);
    let mut graph = capture_step(&model, images(4, 1, &device()), loss).unwrap();
    let problem = sync_batch_norm(&mut graph).unwrap_err().to_string();
    assert!(problem.contains("batch norm `norm` is in training mode but was called on"), "{problem}");

    let model = Cnn::new(&device());
    let mut graph = capture_step(&model, images(4, 1, &device()), |m, (x, t)| m.loss(x, t)).unwrap();
    // As if burn computed the statistics in another way.
    graph.operations.retain(|op| !format!("{op:?}").contains("MeanDim"));
    graph.forward_len = graph.operations.len();
    let problem = sync_batch_norm(&mut graph).unwrap_err().to_string();
    assert!(problem.contains("cannot find the mean of batch norm `input_norm`"), "{problem}");
}
