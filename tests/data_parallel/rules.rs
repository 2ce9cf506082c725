//! What data parallelism promises beside parity: exact counts, weighted averages, uneven data, partial use, errors.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::{Autodiff, Flex};
use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, FloatDType, Tensor};
use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp, part};
use burn_parallel::data_parallel::{Bucket, CommHook, Eager, Replica};
use burn_parallel::prelude::*;

use crate::common::cases::{self, Batch, Case, wrap};
use crate::common::fill::{cast, filled_from};
use crate::common::models::Mlp;
use crate::common::reference::{Wholes, all_same, gradient_values, train, values};

fn sgd() -> ModuleOptimizer {
    SgdConfig::new().init()
}

/// Steps of one device on all rows of each step, SGD.
fn alone<M: Module>(case: &Case<M>, rows: &[usize]) -> Wholes {
    case.alone(sgd(), 0.1, rows).1
}

#[test]
fn bytes_are_the_lower_bound_and_calls_are_the_buckets() {
    let case = cases::mlp();
    let bytes = 4 * case.model.num_params() as u64;
    for size in [2, 3, 4, 8] {
        let moved = launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_bucket_bytes(2000))?;
                let mut optim = sgd();
                let mut moved = 0;
                for step in 0..3 {
                    let buckets = model.buckets() as u64;
                    assert!(buckets > 2);
                    let done = model.step((case.input)(step, 0..2), |model, batch| (case.loss)(model, batch))?;
                    assert_eq!(done.counters.gradients.total().calls, buckets, "one call a bucket");
                    moved = done.counters.gradients.total().bytes;
                    // Head and tail; after the first step also the order in which gradients were completed.
                    assert_eq!(done.counters.control.total().calls, if step == 0 { 3 } else { 2 });
                    model = optim.step(0.1, model, done.grads);
                }
                Ok(moved)
            })
            .unwrap();
        assert_eq!(moved.iter().sum::<u64>(), 2 * (size as u64 - 1) * bytes, "{size} ranks together");
    }
}

#[test]
fn every_rank_moves_2_n_minus_1_over_n_when_the_size_divides() {
    // 64 x 64 + 64 elements in one bucket: every size divides them.
    for size in [2, 4, 8] {
        launch::threads(size)
            .run(|rank| {
                let device = rank.device().autodiff();
                let config = DataParallelConfig::new();
                let mut model = LinearConfig::new(64, 64).init(&device).data_parallel(&rank, config)?;
                let step = model.step(Tensor::<2>::ones([3, 64], &device), |model, x| model.forward(x).mean())?;
                let moved = step.counters.gradients.total();
                assert_eq!((moved.calls, moved.bytes), (1, 2 * (size as u64 - 1) * (64 * 64 + 64) * 4 / size as u64));
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn micro_batches_are_averaged_by_their_weights_and_reduce_nothing_before_the_last() {
    let case = cases::mlp();
    let expected = alone(&case, &[17, 17, 17]);
    // Rows of each rank's micro-batches: different numbers, different sizes.
    let three = vec![vec![(0, 1), (1, 6), (6, 8)], vec![(8, 13)], vec![(13, 14), (14, 17)]];
    let alone = vec![vec![(0, 4), (4, 5), (5, 17)]];
    for (cuts, summed) in [(&three, false), (&three, true), (&alone, false), (&alone, true)] {
        let found = launch::threads(cuts.len())
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_bucket_bytes(3000))?;
                let mut optim = sgd();
                for step in 0..3 {
                    let batches = cuts[rank.rank()].iter().map(|&(from, to)| ((case.input)(step, from..to), to - from));
                    let grads = if step == 1 {
                        // By hand.
                        let mut losses: Vec<Loss> =
                            batches.map(|(batch, rows)| Loss::mean((case.loss)(&model, batch), rows as f64)).collect();
                        let last = losses.pop().unwrap();
                        let before = model.counters().gradients.total().calls;
                        losses.into_iter().try_for_each(|loss| model.accumulate(loss))?;
                        assert_eq!(model.counters().gradients.total().calls, before);
                        model.backward(last)?
                    } else {
                        model
                            .step_micro_batches(batches, |model, (batch, rows)| {
                                let mean = (case.loss)(model, batch);
                                match summed {
                                    true => Loss::sum(mean * rows as f32, rows as f64),
                                    false => Loss::mean(mean, rows as f64),
                                }
                            })?
                            .grads
                    };
                    model = optim.step(0.1, model, grads);
                }
                Ok(values(&model))
            })
            .unwrap();
        for found in found {
            all_same("accumulated", &expected, &found, 1e-5);
        }
    }
}

#[test]
fn ranks_with_different_numbers_of_batches_finish_together() {
    let case = cases::mlp();
    for size in [2, 3, 4] {
        // Rank r has r + 1 batches of 2 rows; step s is what all ranks that still have one bring.
        let steps = size;
        let found = launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, DataParallelConfig::new())?;
                let mut optim = sgd();
                let mine = (0..rank.rank() + 1).map(|step| (case.input)(step, 2 * rank.rank()..2 * rank.rank() + 2));
                let mut weights = Vec::new();
                for batch in model.join(mine) {
                    let done =
                        model.step_micro_batches(batch?, |model, batch| Loss::mean((case.loss)(model, batch), 2.0))?;
                    weights.push(done.weight);
                    model = optim.step(0.1, model, done.grads);
                }
                assert_eq!(weights, (0..steps).map(|step| 2.0 * (size - step) as f64).collect::<Vec<_>>());
                Ok(values(&model))
            })
            .unwrap();
        let batches = (0..steps).map(|step| (case.input)(step, 2 * step..2 * size));
        let alone = train(&case.model, sgd(), 0.1, batches, case.loss);
        for found in found {
            all_same("joined", &alone[steps - 1].after, &found, 1e-5);
        }
    }
}

/// Two branches; ranks may take either.
#[derive(Module, Debug)]
struct Branches {
    left: Linear,
    right: Linear,
    never: Linear,
}

fn branches() -> Branches {
    let device = Device::flex().autodiff();
    let layer = || LinearConfig::new(3, 2).init(&device);
    filled_from(3, Branches { left: layer(), right: layer(), never: layer() })
}

#[test]
fn parameters_used_on_some_ranks_or_on_none() {
    let model = branches();
    let input = |rank: usize| Tensor::<2>::ones([2, 3], &Device::flex().autodiff()) * (rank as f32 + 1.0);
    let forward = |model: &Branches, rank: usize| {
        // The result of one branch is made and thrown away: its parameters are used, but the loss does not see them.
        let _ = model.never.forward(input(rank));
        let layer = if rank == 0 { &model.left } else { &model.right };
        layer.forward(input(rank)).powf_scalar(2.0).mean()
    };
    for size in [2usize, 3, 4] {
        let found = launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &model, DataParallelConfig::new().with_bucket_bytes(20))?;
                let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                for _ in 0..3 {
                    let loss = forward(&model, rank.rank());
                    let grads = model.backward(loss)?;
                    assert_eq!(grads.len(), 4, "what no rank's loss depends on has no gradient");
                    model = optim.step(0.1, model, grads);
                }
                Ok(values(&model))
            })
            .unwrap();
        let alone = train(&model, AdamWConfig::new().init(), 0.1, 0..3, |model, _| {
            let losses = (0..size).map(|rank| forward(model, rank) / size as f32);
            losses.reduce(|a, b| a + b).unwrap()
        });
        for found in found {
            all_same(&format!("{size} ranks"), &alone[2].after, &found, 1e-5);
        }
    }
}

#[test]
fn forwards_that_are_not_differentiated_and_backwards_that_share_a_forward() {
    let case = cases::mlp();
    let expected = alone(&case, &[8, 8]);
    let found = launch::threads(2)
        .run(|rank| {
            let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_bucket_bytes(3000))?;
            let mut optim = sgd();
            let rows = 4 * rank.rank()..4 * rank.rank() + 4;
            // An evaluation in between leaves uses behind that never get a gradient.
            let _ = (case.loss)(&model, (case.input)(5, 0..2));
            let loss = (case.loss)(&model, (case.input)(0, rows.clone()));
            let grads = model.backward(loss)?;
            model = optim.step(0.1, model, grads);
            // Both halves go forward before either goes backward: the second backward meets uses already forgotten.
            let halves = [rows.start..rows.start + 2, rows.start + 2..rows.end];
            let [first, second] = halves.map(|rows| (case.loss)(&model, (case.input)(1, rows)));
            model.accumulate(Loss::mean(first, 2.0))?;
            let grads = model.backward(Loss::mean(second, 2.0))?;
            model = optim.step(0.1, model, grads);
            Ok(values(&model))
        })
        .unwrap();
    for found in found {
        all_same("shared forwards", &expected, &found, 1e-5);
    }
}

/// A weight used twice, before and after another backward, which makes the first use forgotten: its gradient arrives
/// when its bucket is gone already.
#[test]
fn late_gradients_are_summed_all_the_same() {
    let device = Device::flex().autodiff();
    let layer = filled_from(1, LinearConfig::new(3, 3).init(&device));
    let input = |seed: f32| Tensor::<2>::ones([2, 3], &Device::flex().autodiff()) * seed;
    let twice = |model: &Linear, seed: f32| model.forward(model.forward(input(seed)).tanh()).powf_scalar(2.0).mean();
    let found = launch::threads(2)
        .run(|rank| {
            let mut model = wrap(&rank, &layer, DataParallelConfig::new().with_bucket_bytes(16))?;
            let seed = rank.rank() as f32 + 1.0;
            let (first, half) = (twice(&model, seed), model.forward(input(2.0 * seed)).tanh());
            model.accumulate(first)?;
            let second = model.forward(half).powf_scalar(2.0).mean();
            let grads = model.backward(second)?;
            // Weight and bias, and what came late of both.
            assert_eq!(model.counters().gradients.total().calls, 3);
            Ok(gradient_values(&*model, &grads))
        })
        .unwrap();
    let model = layer.clone().fork(&device);
    let loss = [(1.0, 2.0), (2.0, 4.0)].map(|(a, b)| (twice(&model, a) + twice(&model, b)) / 4.0);
    let [a, b] = loss;
    let grads = GradientsParams::from_grads((a + b).backward(), &model);
    let expected = gradient_values(&model, &grads);
    for found in &found {
        all_same("late", &expected, found, 1e-5);
    }
}

#[test]
fn gradients_travel_in_16_bits_and_come_back_in_32() {
    let case = cases::transformer();
    let expected = alone(&case, &[8, 8, 8]);
    for (dtype, tolerance) in [(FloatDType::BF16, 2e-2), (FloatDType::F16, 3e-3)] {
        let found = launch::threads(4)
            .run(|rank| {
                let config = DataParallelConfig::new().with_reduce_dtype(dtype);
                let mut model = wrap(&rank, &case.model, config)?;
                let mut optim = sgd();
                for step in 0..3 {
                    let batch = (case.input)(step, 2 * rank.rank()..2 * rank.rank() + 2);
                    let done = model.step(batch, |model, batch| (case.loss)(model, batch))?;
                    // Half the bytes of f32.
                    let elements = case.model.num_params() as u64;
                    assert!(done.counters.gradients.total().bytes <= 2 * 3 * elements * 2 / 4 + 64);
                    model = optim.step(0.1, model, done.grads);
                }
                Ok(values(&model))
            })
            .unwrap();
        for other in &found {
            assert_eq!(other, &found[0]);
            all_same(&format!("{dtype:?}"), &expected, other, tolerance);
        }
    }
}

/// Sends only the sign and the mean magnitude, as a user might.
#[derive(Debug, Default)]
struct SignHook {
    seen: Mutex<Vec<(usize, Vec<String>)>>,
}

impl CommHook for &'static SignHook {
    fn reduce(&self, bucket: Bucket, group: &Communicator) -> Result<Vec<Tensor<1>>, Error> {
        let paths = bucket.paths.iter().map(|path| path.to_string()).collect();
        self.seen.lock().unwrap().push((bucket.index, paths));
        let factor = bucket.factor;
        bucket
            .gradients
            .into_iter()
            .map(|gradient| {
                let scale = gradient.clone().abs().mean();
                group.all_reduce(gradient.sign() * scale, ReduceOp::PreMulSum(factor))
            })
            .collect()
    }
}

#[test]
fn a_compression_of_the_users_own() {
    static HOOK: SignHook = SignHook { seen: Mutex::new(Vec::new()) };
    let case = cases::mlp();
    launch::threads(2)
        .run(|rank| {
            let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_comm_hook(&HOOK))?;
            let step = model.step((case.input)(0, 0..4), |model, batch| (case.loss)(model, batch))?;
            // Both ranks brought the same rows, so the result is the compressed gradient itself.
            let id = model_weight(&model);
            let gradient = step.grads.get::<2>(id).unwrap().abs();
            let data = gradient.into_data().try_to_vec::<f32>().unwrap();
            let largest = data.iter().copied().fold(0.0, f32::max);
            assert!(data.iter().all(|x| *x == 0.0 || (*x - largest).abs() < 1e-6 * largest));
            Ok(())
        })
        .unwrap();
    let seen = HOOK.seen.lock().unwrap();
    assert!(seen.iter().any(|(_, paths)| paths.contains(&"second.weight".to_owned())));
}

fn model_weight<M: Module>(model: &M) -> burn::module::ParamId {
    struct First(Option<burn::module::ParamId>);
    impl burn::module::ModuleVisitor for First {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.get_or_insert(param.id);
        }
    }
    let mut first = First(None);
    model.visit(&mut first);
    first.0.unwrap()
}

#[derive(Debug)]
struct ShortHook;

impl CommHook for ShortHook {
    fn reduce(&self, mut bucket: Bucket, _: &Communicator) -> Result<Vec<Tensor<1>>, Error> {
        bucket.gradients.pop();
        Ok(bucket.gradients)
    }
}

#[test]
fn a_hook_that_loses_gradients_is_an_error_on_every_rank() {
    let case = cases::mlp();
    let outcome = launch::threads(3).timeout(Duration::from_secs(5)).run(|rank| {
        let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_comm_hook(ShortHook))?;
        model.step((case.input)(0, 0..4), |model, batch| (case.loss)(model, batch)).map(|_| ())
    });
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("CommHook::reduce") && text.contains("lengths"), "{text}");
}

#[test]
fn models_of_different_structure_are_refused_with_the_path() {
    for size in [2, 3, 4] {
        let odd = size - 1;
        let run = |shape: fn(bool) -> [usize; 2]| {
            launch::threads(size).timeout(Duration::from_secs(5)).run(|rank| {
                let [from, to] = shape(rank.rank() == odd);
                let device = rank.device().autodiff();
                let model = vec![LinearConfig::new(2, 3).init(&device), LinearConfig::new(from, to).init(&device)];
                model.data_parallel(&rank, DataParallelConfig::new()).map(|_| ())
            })
        };
        match run(|odd| if odd { [3, 5] } else { [3, 4] }).unwrap_err() {
            Error::ModelMismatch { rank, path, problem, .. } => {
                assert_eq!((rank, path.as_str()), (odd, "1.weight"));
                assert!(problem.contains("[3, 5]") && problem.contains("[3, 4]"), "{problem}");
            }
            other => panic!("{other}"),
        }
        let frozen = launch::threads(size).timeout(Duration::from_secs(5)).run(|rank| {
            let model = LinearConfig::new(2, 3).init(&rank.device().autodiff());
            let model = if rank.rank() == odd { model.no_grad() } else { model };
            model.data_parallel(&rank, DataParallelConfig::new()).map(|_| ())
        });
        assert!(matches!(frozen.unwrap_err(), Error::ModelMismatch { rank, .. } if rank == odd));
        let layers = launch::threads(size).timeout(Duration::from_secs(5)).run(|rank| {
            let device = rank.device().autodiff();
            let layers = 2 + usize::from(rank.rank() == odd);
            let model: Vec<Linear> = (0..layers).map(|_| LinearConfig::new(2, 2).init(&device)).collect();
            model.data_parallel(&rank, DataParallelConfig::new()).map(|_| ())
        });
        assert!(matches!(layers.unwrap_err(), Error::ModelMismatch { path, .. } if path == "2.weight"));
    }
}

#[test]
fn losses_that_cannot_be_are_errors_on_every_rank() {
    let case = cases::mlp();
    for bad in 0..4 {
        let outcome = launch::threads(3).timeout(Duration::from_secs(5)).run(|rank| {
            let mut model = wrap(&rank, &case.model, DataParallelConfig::new())?;
            let good = (case.loss)(&model, (case.input)(0, 0..2));
            let loss = match (rank.rank() == 1, bad) {
                (true, 0) => Loss::mean(good, -1.0),
                (true, 1) => Loss::mean(good, f64::NAN),
                (true, 2) => Loss::from(good.detach()),
                (true, _) => Loss::from(good.repeat_dim(0, 2)),
                _ => Loss::from(good),
            };
            model.backward(loss).map(|_| ())
        });
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains("Loss"), "{text}");
    }
}

#[test]
fn a_rank_that_fails_in_its_forward_ends_the_others() {
    let case = cases::mlp();
    let began = Instant::now();
    let outcome = launch::threads(4).run(|rank| {
        let mut model = wrap(&rank, &case.model, DataParallelConfig::new())?;
        for step in 0..3 {
            if rank.rank() == 2 && step == 1 {
                return Err(Error::user("no more data"));
            }
            model.step((case.input)(step, 0..2), |model, batch| (case.loss)(model, batch))?;
        }
        Ok(())
    });
    assert!(matches!(outcome.unwrap_err(), Error::RankFailed { rank: 2, .. }));
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn nobody_brings_data() {
    launch::threads(2)
        .run(|rank| {
            let case = cases::mlp();
            let mut model = wrap(&rank, &case.model, DataParallelConfig::new())?;
            let before = values(&model);
            let grads = model.backward_without_data()?;
            assert!(grads.is_empty());
            let model = sgd().step(0.1, model, grads);
            assert_eq!(values(&model), before);
            Ok(())
        })
        .unwrap();
}

#[test]
fn gradient_checkpointing_devices() {
    let case = cases::transformer();
    let expected = alone(&case, &[8, 8]);
    let found = launch::threads(2)
        .run(|rank| {
            let model = Recheck(&case.model).strategy();
            let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
            let mut optim = sgd();
            for step in 0..2 {
                let mut batch = (case.input)(step, 4 * rank.rank()..4 * rank.rank() + 4);
                let strategy = burn::backend::GradientCheckpointingStrategy::Balanced;
                batch.features = batch.features.with_gradient_checkpointing_strategy(strategy);
                batch.tokens = batch.tokens.with_gradient_checkpointing_strategy(strategy);
                batch.targets = batch.targets.with_gradient_checkpointing_strategy(strategy);
                let done = model.step(batch, |model, batch| (case.loss)(model, batch))?;
                model = optim.step(0.1, model, done.grads);
            }
            Ok(values(&model))
        })
        .unwrap();
    for found in found {
        all_same("checkpointing", &expected, &found, 1e-5);
    }
}

/// The model with leaves of its own whose autodiff recomputes what is cheap.
struct Recheck<'a, M>(&'a M);

impl<M: Module> Recheck<'_, M> {
    fn strategy(&self) -> M {
        struct Set;
        impl ModuleMapper for Set {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let strategy = burn::backend::GradientCheckpointingStrategy::Balanced;
                let (id, value, mapper) = param.consume();
                let trained = value.is_require_grad();
                let value = value.inner().autodiff().with_gradient_checkpointing_strategy(strategy);
                let value = if trained { value.require_grad() } else { value };
                Param::from_mapped_value(id, value, mapper)
            }
        }
        self.0.clone().map(&mut Set)
    }
}

#[test]
fn other_float_dtypes() {
    for (dtype, tolerance) in [(FloatDType::F64, 1e-6), (FloatDType::BF16, 3e-2), (FloatDType::F16, 5e-3)] {
        let mut case = cases::mlp();
        case.model = cast(case.model, dtype);
        let forward = |model: &Mlp, mut batch: Batch| {
            batch.features = batch.features.cast(dtype);
            batch.targets = batch.targets.cast(dtype);
            (case.loss)(model, batch)
        };
        let alone = train(&case.model, sgd(), 0.1, (0..3).map(|step| (case.input)(step, 0..9)), forward);
        let found = launch::threads(3)
            .run(|rank| {
                let mut replica = wrap(&rank, &case.model, DataParallelConfig::new())?;
                let mut optim = sgd();
                for step in 0..3 {
                    let rows = part(9, 3, rank.rank());
                    let done = replica.step((case.input)(step, rows), forward)?;
                    replica = optim.step(0.1, replica, done.grads);
                }
                Ok(values(&replica))
            })
            .unwrap();
        for found in found {
            all_same(&format!("{dtype:?}"), &alone[2].after, &found, tolerance);
        }
    }
}

/// Opens when the first bucket's turn has come.
#[derive(Debug, Default)]
struct Turn {
    come: Mutex<bool>,
    comes: Condvar,
}

impl Turn {
    /// Whether it has come, or comes within the time.
    fn wait(&self, limit: Duration) -> bool {
        let guard = self.come.lock().unwrap();
        *self.comes.wait_timeout_while(guard, limit, |come| !*come).unwrap().0
    }
}

/// Tells of the first bucket of each rank.
#[derive(Debug, Default)]
struct TellTurn([Arc<Turn>; 2]);

impl CommHook for TellTurn {
    fn reduce(&self, bucket: Bucket, group: &Communicator) -> Result<Vec<Tensor<1>>, Error> {
        if bucket.index == 0 {
            let turn = &self.0[group.rank()];
            *turn.come.lock().unwrap() = true;
            turn.comes.notify_all();
        }
        group.all_reduce_coalesced(bucket.gradients, ReduceOp::PreMulSum(bucket.factor))
    }
}

/// What a [`gate`] waits for in backward, how long at most, and what it saw.
type GateState = (Arc<Turn>, Duration, Arc<Mutex<Option<bool>>>);

#[derive(Debug)]
struct Gate;

impl Backward<Flex, 1> for Gate {
    type State = GateState;

    fn backward(self, ops: Ops<GateState, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (turn, limit, seen) = ops.state;
        *seen.lock().unwrap() = Some(turn.wait(limit));
        unary::<Flex, _>(ops.parents, ops.node, grads, |gradient| gradient);
    }
}

/// The identity, whose backward waits for the first bucket's turn.
fn gate(x: Tensor<2>, state: GateState) -> Tensor<2> {
    let (value, node) = x.try_into_primitive::<Autodiff<Flex>>().unwrap().into_parts();
    let output = match Gate.prepare::<NoCheckpointing>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(state, value),
        OpsKind::UnTracked(prepared) => prepared.finish(value),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

/// Backward stops behind the first layer until the bucket of the last layers is being reduced: with overlap it is,
/// without it never would be.
#[test]
fn buckets_are_reduced_while_backward_runs() {
    for (overlap, limit) in [(true, Duration::from_secs(30)), (false, Duration::from_millis(200))] {
        let turns: [Arc<Turn>; 2] = Default::default();
        let seen = launch::threads(2)
            .run(|rank| {
                let device = rank.device().autodiff();
                let layers: Vec<Linear> = (0..4).map(|_| LinearConfig::new(8, 8).init(&device)).collect();
                let hook = TellTurn(turns.clone());
                let config = DataParallelConfig::new().with_bucket_bytes(300).with_overlap(overlap);
                let mut model = layers.data_parallel(&rank, config.with_comm_hook(hook))?;
                let seen = Arc::new(Mutex::new(None));
                let mut x = Tensor::<2>::ones([2, 8], &device);
                for (number, layer) in model.iter().enumerate() {
                    x = layer.forward(x).tanh();
                    if number == 0 {
                        x = gate(x, (turns[rank.rank()].clone(), limit, seen.clone()));
                    }
                }
                model.backward(x.mean())?;
                Ok(seen.lock().unwrap().take())
            })
            .unwrap();
        assert_eq!(seen, [Some(overlap); 2], "with overlap {overlap}");
    }
}

#[test]
fn a_replica_is_saved_and_evaluated_like_its_model() {
    launch::threads(2)
        .run(|rank| {
            let case = cases::transformer();
            let mut replica = wrap(&rank, &case.model, DataParallelConfig::new())?;
            let done = replica.step((case.input)(0, 0..3), |model, batch| (case.loss)(model, batch))?;
            let replica = sgd().step(0.1, replica, done.grads);
            let plain = cases::transformer().model.load_record(replica.clone().into_record());
            assert_eq!(values(&plain), values(&replica));
            assert_eq!(replica.num_params(), case.model.num_params());
            assert!(!format!("{replica:?}").is_empty());
            let valid = replica.valid();
            let mut batch = (case.input)(0, 0..3);
            batch.features = batch.features.inner();
            batch.tokens = batch.tokens.inner();
            batch.targets = batch.targets.inner();
            assert!(!(case.loss)(&valid, batch).is_autodiff());
            drop(valid);
            let model = replica.into_inner();
            let loss = (case.loss)(&model, (case.input)(0, 0..3));
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            assert!(!grads.is_empty(), "without its replica the model trains in burn's own way");
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_replica_trains_on_with_the_parameters_and_the_optimizer_of_another_run() {
    let steps = |rank: &Rank,
                 mut replica: Replica<Eager<Vec<Linear>>>,
                 mut optim: ModuleOptimizer,
                 range: std::ops::Range<usize>| {
        for step in range {
            let rows = Tensor::<2>::ones([2, 3], &rank.device().autodiff()) * (step + rank.rank() + 1) as f32;
            let loss = |model: &Vec<Linear>, x| model.iter().fold(x, |x, layer| layer.forward(x)).powi_scalar(2).mean();
            let grads = replica.step(rows, loss)?.grads;
            replica = optim.step(0.01, replica, grads);
        }
        Ok::<_, Error>((replica, optim))
    };
    let adam = || -> ModuleOptimizer { AdamWConfig::new().init() };
    let layers = |rank: &Rank| -> Vec<Linear> {
        (0..3).map(|_| LinearConfig::new(3, 3).init(&rank.device().autodiff())).collect()
    };
    for size in [1, 2] {
        launch::threads(size)
            .run(|rank| {
                let replica = layers(&rank).data_parallel(&rank, DataParallelConfig::new())?;
                let (replica, optim) = steps(&rank, replica, adam(), 0..3)?;
                let (model, state) = (replica.clone().into_record(), optim.to_record());
                let (whole, _) = steps(&rank, replica, optim, 3..6)?;
                // The parameters of a new model have other ids until the record gives them those of the first run.
                let fresh = layers(&rank).data_parallel(&rank, DataParallelConfig::new())?.load_record(model);
                let (resumed, _) = steps(&rank, fresh, adam().load_record(state), 3..6)?;
                assert_eq!(values(&*whole), values(&*resumed), "on {size} ranks");
                Ok(())
            })
            .unwrap();
    }
}
