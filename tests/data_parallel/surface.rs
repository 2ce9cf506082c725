//! What a replica takes in and gives: rows, gradients of other backwards, ids, drift, dataloaders, wrapping orders.

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Tensor};
use burn_parallel::comm::part;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::prelude::*;

use crate::common::cases::{self, Case};
use crate::common::fill::filled_from;
use crate::common::reference::{Wholes, all_same, own, values};

/// Losses, and all parameters at the end.
type Trained = (Vec<f64>, Wholes);

fn sgd() -> ModuleOptimizer {
    SgdConfig::new().init()
}

/// Three steps of one device on all rows.
fn alone<M: Module>(case: &Case<M>, rows: usize) -> Trained {
    case.alone(sgd(), 0.1, &[rows; 3])
}

/// Three steps of a model however it is spread, with bare means as losses.
fn spread<P: ParallelModule>(
    mut model: P,
    case: &Case<P::Model>,
    batches: impl Fn(usize) -> Vec<cases::Batch>,
    rows: usize,
) -> Result<Trained, Error> {
    let mut optim = sgd();
    let mut losses = Vec::new();
    for step in 0..3 {
        let done = model.step_micro_batches(batches(step), |model, batch| (case.loss)(model, batch))?;
        assert_eq!(done.weight, rows as f64);
        losses.push(done.loss.item());
        model = model.optimize(&mut optim, 0.1, done)?;
    }
    Ok((losses, values(&model.assemble()?)))
}

#[test]
fn a_bare_mean_counts_for_its_rows_whatever_the_model_is_spread_over() {
    let case = cases::mlp();
    let (losses, expected) = alone(&case, 8);
    // 3 + 3 + 2 rows on three replicas; 2 + 1 and so on as micro-batches.
    let cut = |rows: std::ops::Range<usize>, micro_batches: usize, step: usize| -> Vec<cases::Batch> {
        let parts = (0..micro_batches).map(|index| part(rows.len(), micro_batches, index));
        parts.map(|part| (case.input)(step, rows.start + part.start..rows.start + part.end)).collect()
    };
    for (dp, tp, pp) in [(3, 1, 1), (3, 2, 1), (3, 1, 2), (1, 2, 1), (1, 1, 2), (1, 1, 1)] {
        for engine in ["auto", "captured"] {
            for micro_batches in [1, 2] {
                let found = launch::threads(dp * tp * pp)
                    .run(|world| {
                        let plan = "plan = { parameters = [{ pattern = 'first.weight', shard = 0 }] }";
                        let text = format!(
                            "dp = {dp}\npp = {pp}\ntp = {tp}\nengine = '{engine}'\n[tensor]\n{}\n{}",
                            if tp > 1 { plan } else { "" },
                            if pp > 1 { "[pipeline]\nmicro_batches = 1" } else { "" }
                        );
                        let model = own(&case.model);
                        let model = model.parallelize(&world, &text.parse()?)?;
                        let (replica, replicas) = model.replica();
                        assert_eq!((replica, replicas), (model.mesh().coordinate("dp")?, dp));
                        let report = model.report();
                        assert_eq!((report.captured, report.replicas), (engine == "captured" || tp * pp > 1, dp));
                        spread(model, &case, |step| cut(part(8, dp, replica), micro_batches, step), 8)
                    })
                    .unwrap();
                for (found_losses, found) in found {
                    let what = format!("dp {dp} tp {tp} pp {pp}, {engine}, {micro_batches} micro-batches");
                    for (a, b) in losses.iter().zip(&found_losses) {
                        assert!((a - b).abs() < 1e-5 * a.abs(), "{what}: {losses:?} {found_losses:?}");
                    }
                    all_same(&what, &expected, &found, 2e-5);
                }
            }
        }
    }
}

/// A model that is loaded, or made, later draws nothing when it is wrapped.
#[test]
fn one_replica_leaves_lazy_parameters_lazy() {
    let run = launch::threads(1).run(|world| {
        let device = world.device().autodiff();
        let linear: Linear = LinearConfig::new(4, 6).init(&device);
        assert!(!linear.weight.is_initialized());
        let mut model = linear.parallelize(&world, &Strategy::new())?;
        assert!(!model.local().weight.is_initialized());
        let step = model.step(Tensor::<2>::ones([3, 4], &device), |model, x| model.forward(x).mean())?;
        assert_eq!(step.weight, 3.0);
        let before = model.local().weight.val().into_data();
        let model = model.optimize(&mut sgd(), 0.1, step)?;
        assert_ne!(model.local().weight.val().into_data(), before);
        Ok(())
    });
    run.unwrap();
}

#[test]
fn the_gradients_of_another_backward_stay_with_it() {
    let case = cases::mlp();
    let (_, expected) = alone(&case, 6);
    for size in [1, 2, 4] {
        let found = launch::threads(size).run(|rank| {
            let mut model = own(&case.model).data_parallel(&rank, DataParallelConfig::new())?;
            let mut optim = sgd();
            for step in 0..3 {
                let rows = part(6, size, rank.rank());
                let input = |rows| (case.input)(step, rows);
                // One that is not the replica's, and is dropped; and one for the parameters alone.
                drop((case.loss)(&model, input(rows.clone())).backward());
                let grads = (case.loss)(&model, input(rows.clone())).backward();
                let mut own = GradientsParams::from_grads(grads, &*model);
                let mut taken = CountGradients { grads: &mut own, found: 0 };
                model.visit(&mut taken);
                assert!(taken.found > 0, "burn's own backward gives its gradients");
                let loss = (case.loss)(&model, input(rows.clone()));
                let grads = model.backward(Loss::mean(loss, rows.len()))?;
                model = optim.step(0.1, model, grads);
            }
            Ok(values(&model))
        });
        for found in found.unwrap() {
            all_same("after other backwards", &expected, &found, 1e-5);
        }
    }
}

struct CountGradients<'a> {
    grads: &'a mut GradientsParams,
    found: usize,
}

impl ModuleVisitor for CountGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found += usize::from(self.grads.remove::<D>(param.id).is_some());
    }
}

#[test]
fn two_replicas_that_share_a_loss_train_as_on_one_device() {
    let rows = |rank: usize, size: usize, device: &Device| {
        let part = part(4, size, rank);
        let all = Tensor::<2>::from_floats([[0.1, -0.4], [0.7, 0.2], [-0.3, 0.9], [0.5, 0.5]], device);
        all.slice([part])
    };
    let layer = |seed, device: &Device| -> Linear {
        filled_from(seed, LinearConfig::new(2, 2).init(&Device::flex().autodiff())).fork(device).train()
    };
    let run = |size: usize| {
        let trained = launch::threads(size).run(|rank| {
            let device = rank.device().autodiff();
            let config = DataParallelConfig::new;
            let mut generator = layer(1, &device).data_parallel(&rank, config())?;
            let mut discriminator = layer(2, &device).data_parallel(&rank, config())?;
            let (mut of_generator, mut of_discriminator) = (sgd(), sgd());
            for _ in 0..3 {
                let x = rows(rank.rank(), size, &device);
                let fake = generator.forward(x.clone());
                let loss = discriminator.forward(fake.clone()).powi_scalar(2).mean();
                let grads = generator.backward(loss)?;
                generator = of_generator.step(0.1, generator, grads);
                let loss = (discriminator.forward(fake.detach()) - discriminator.forward(x)).powi_scalar(2).mean();
                let grads = discriminator.backward(loss)?;
                discriminator = of_discriminator.step(0.1, discriminator, grads);
            }
            Ok([values(&generator), values(&discriminator)])
        });
        trained.unwrap().remove(0)
    };
    let alone = run(1);
    for size in [2, 4] {
        for (expected, found) in alone.iter().zip(run(size)) {
            all_same("a generator and a discriminator", expected, &found, 1e-5);
        }
    }
}

#[test]
fn all_ranks_have_the_ids_of_the_first() {
    struct Ids(Vec<u64>);
    impl ModuleVisitor for Ids {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.id.val());
        }
    }
    let ids = launch::threads(8).run(|world| {
        // Every rank makes its own.
        let device = world.device().autodiff();
        let model: Vec<Linear> = (0..4).map(|_| LinearConfig::new(4, 4).init(&device)).collect();
        let plan = Plan::new().shard("*.weight", 1).shard("*.bias", 0);
        let pipeline = PipelineConfig::new(2).with_cut(Cut::before(["2.*"]));
        let strategy = Strategy::new().with_dp(2).with_tp(2, plan).with_pp(2, pipeline);
        let mut model = model.parallelize(&world, &strategy)?;
        let x = Tensor::<2>::ones([4, 4], &device);
        let step = model.step(x, |model, x| model.iter().fold(x, |x, layer| layer.forward(x)).mean())?;
        model = model.optimize(&mut sgd(), 0.1, step)?;
        let mut ids = Ids(Vec::new());
        model.visit(&mut ids);
        Ok(ids.0)
    });
    let ids = ids.unwrap();
    assert_eq!(ids[0].len(), 8);
    assert!(ids.iter().all(|of_rank| *of_rank == ids[0]), "{ids:?}");
}

/// Nobody sees what burn's own step is given.
#[test]
fn a_replica_that_takes_another_learning_rate_is_found() {
    for size in [2, 3, 4] {
        let outcome = launch::threads(size).run(|rank| {
            let device = rank.device().autodiff();
            let config = DataParallelConfig::new().with_compare_every(2);
            let mut model = LinearConfig::new(3, 2).init(&device).data_parallel(&rank, config)?;
            let mut optim = sgd();
            for step in 0..8 {
                let done = model.step(Tensor::<2>::ones([2, 3], &device), |m, x| m.forward(x).powi_scalar(2).mean())?;
                // From the fourth step on the last rank takes another rate.
                let rate = if step >= 3 && rank.rank() == size - 1 { 0.2 } else { 0.1 };
                model = optim.step(rate, model, done.grads);
                assert!(step < 5, "not found in step {step}");
            }
            Ok(())
        });
        let error = outcome.unwrap_err();
        let Error::ModelMismatch { rank, path, problem, .. } = &error else { panic!("{error}") };
        assert_eq!((*rank, path.as_str()), (size - 1, "weight"));
        assert!(problem.contains("drifted apart"), "{problem}");
    }
}

#[derive(Clone)]
struct RowBatcher;

impl Batcher<f32, Vec<f32>> for RowBatcher {
    fn batch(&self, items: Vec<f32>, _: &Device) -> Vec<f32> {
        assert!(!items.contains(&13.0), "an item that no batcher can take");
        items
    }
}

#[test]
fn a_dataloader_whose_worker_panics_is_an_error_on_all_ranks() {
    for (size, poison, fails) in [(2, -1.0, false), (2, 13.0, true), (4, -1.0, false), (4, 13.0, true)] {
        let outcome = launch::threads(size).run(|rank| {
            let device = rank.device().autodiff();
            let model = LinearConfig::new(1, 1).init(&device).data_parallel(&rank, DataParallelConfig::new())?;
            let mut items: Vec<f32> = (20..40 + 10 * rank.rank() as i32).map(|item| item as f32).collect();
            if rank.rank() == 1 {
                items[25] = poison;
            }
            let loader =
                DataLoaderBuilder::new(RowBatcher).batch_size(2).num_workers(2).build(InMemDataset::new(items));
            let mut seen = 0;
            for batch in model.join_loader(&*loader) {
                seen += batch?.map_or(0, |batch| batch.len());
            }
            Ok(seen)
        });
        match outcome {
            Ok(seen) => assert!(!fails && seen == [20, 30, 40, 50][..size], "{seen:?}"),
            Err(error) => assert!(fails && error.to_string().contains("of 30 items"), "{error}"),
        }
    }
}

/// What one rank of each world brings is no batch.
#[test]
fn a_batch_without_rows_is_an_error_that_names_the_way_out() {
    let case = cases::mlp();
    let plan = "[tensor]\nplan = { parameters = [{ pattern = 'first.weight', shard = 0 }] }";
    let data = |sharding| format!("[data]\nsharding = '{sharding}'");
    for (tp, engine, rest) in [
        (1, "eager", String::new()),
        (1, "captured", String::new()),
        (1, "eager", data("gradients")),
        (1, "captured", data("parameters")),
        (2, "auto", plan.to_owned()),
    ] {
        let ran = launch::threads(2 * tp).run(|rank| {
            let strategy = format!("dp = 2\ntp = {tp}\nengine = '{engine}'\n{rest}").parse()?;
            let mut model = own(&case.model).parallelize(&rank, &strategy)?;
            let rows = if model.replica().0 == 0 { 0..4 } else { 4..4 };
            model.step((case.input)(0, rows), |model, batch| (case.loss)(model, batch)).map(drop)
        });
        let said = ran.unwrap_err().to_string();
        assert!(said.contains("no rows") && said.contains("`step_micro_batches(None, ..)`"), "{engine} {rest}: {said}");
    }
}

/// Loops that leave `join`'s `None` out, and that do not ask `join` at all.
#[test]
fn ranks_with_fewer_batches_are_told_of_join() {
    for joins in [true, false] {
        let ran = launch::threads(2).run(|rank| {
            let device = rank.device().autodiff();
            let model: Linear = LinearConfig::new(2, 1).init(&device);
            let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
            let mine = vec![Tensor::<2>::ones([3, 2], &device); 2 + rank.rank()];
            let items: Box<dyn Iterator<Item = Result<Option<_>, Error>>> = match joins {
                true => Box::new(model.join(mine)),
                false => Box::new(mine.into_iter().map(|batch| Ok(Some(batch)))),
            };
            for batch in items {
                if let Some(batch) = batch? {
                    model.step(batch, |model, x| model.forward(x).mean())?;
                }
            }
            Ok(())
        });
        let said = ran.unwrap_err().to_string();
        let words = if joins { "take a step for each item, also for a `None`" } else { "there is `join`" };
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_model_that_is_wrapped_is_not_wrapped_again_in_generic_code() {
    fn wrap<M: Module>(model: M, rank: &Rank) -> Result<Replica<Eager<M>>, Error> {
        DataParallel::data_parallel(model, rank, DataParallelConfig::new())
    }
    let refused = |error: Option<Error>, outer, inner| match error {
        Some(Error::Nesting { operation, wrapper }) => assert_eq!((operation, wrapper), (outer, inner)),
        other => panic!("{other:?}"),
    };
    for size in [2, 4] {
        launch::threads(size)
            .run(|rank| {
                let device = rank.device().autodiff();
                let make = || -> Linear { LinearConfig::new(4, 4).init(&device) };
                let plan = Plan::new().shard("weight", 1);
                let sharded = make().tensor_parallel(&rank, &plan)?;
                refused(wrap(vec![sharded.clone()], &rank).err(), "data_parallel", "Sharded");
                refused(wrap(sharded, &rank).err(), "data_parallel", "Sharded");
                let replica = wrap(make(), &rank)?;
                refused(
                    TensorParallel::tensor_parallel(replica.clone(), &rank, &plan).err(),
                    "tensor_parallel",
                    "Replica",
                );
                let config = PipelineConfig::new(1);
                let cut = PipelineParallel::pipeline_parallel(replica.clone(), &rank, config).err();
                refused(cut, "pipeline_parallel", "Replica");
                refused(Parallelize::parallelize(replica, &rank, &Strategy::new()).err(), "parallelize", "Replica");
                Ok(())
            })
            .unwrap();
    }
}
