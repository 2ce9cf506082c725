//! What a step of a split model takes and gives: closures that capture, inputs that differ, micro-batches, optimizers.

use burn::grad_clipping::GradientClippingConfig;
use burn::module::ParamGroup;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, LBFGSConfig, ModuleOptimizer, MuonConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::Sharded;

use crate::common::models::{Numbers, device};
use crate::common::reference::{difference, values};
use crate::common::reference::{filled, own};

fn plan() -> Plan {
    Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0)
}

fn layers() -> Vec<Linear> {
    filled(vec![LinearConfig::new(4, 8).init(&device()), LinearConfig::new(8, 2).init(&device())])
}

/// A layer for each of so many stages, and where they begin.
fn stages(count: usize) -> (Vec<Linear>, PipelineConfig) {
    let inner = (2..count).map(|_| LinearConfig::new(8, 8).init(&device()));
    let [first, last]: [Linear; 2] = layers().try_into().unwrap();
    let model = filled(std::iter::once(first).chain(inner).chain([last]).collect());
    let cut = Cut::before((1..count).map(|stage| format!("{stage}.*")));
    (model, PipelineConfig::new(2).with_cut(cut))
}

fn forward(model: &[Linear], x: Tensor<2>) -> Tensor<2> {
    let (first, others) = model.split_first().unwrap();
    others.iter().fold(first.forward(x), |x, layer| layer.forward(x.tanh()))
}

fn rows(seed: u64, rows: usize) -> Tensor<2> {
    Numbers(seed + 5).tensor([rows, 4], &device())
}

#[expect(clippy::ptr_arg, reason = "the model is a `Vec`")]
fn square(model: &Vec<Linear>, x: Tensor<2>) -> Tensor<1> {
    forward(model, x).powi_scalar(2).mean()
}

#[expect(clippy::ptr_arg, reason = "the model is a `Vec`")]
fn double(model: &Vec<Linear>, x: Tensor<2>) -> Tensor<1> {
    forward(model, x).powi_scalar(2).mean() * 2.0
}

#[test]
fn what_a_closure_captures_is_followed() {
    let of = |model: &Vec<Linear>| square(model, rows(0, 4)).into_scalar::<f64>();
    let close =
        |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6 * (1.0 + expected), "{found} {expected}");
    let whole = of(&layers());
    for ranks in [1, 2, 4] {
        let staged = of(&stages(ranks.max(2)).0);
        launch::threads(ranks)
            .run(|rank| {
                let mut split = layers().tensor_parallel(&rank, plan())?;
                let mut cut = match ranks {
                    1 => None,
                    _ => {
                        let (model, config) = stages(ranks);
                        Some(model.pipeline_parallel(&rank, config)?)
                    }
                };
                for scale in [1.0, 0.5, 0.25, 0.5] {
                    let loss = move |model: &Vec<Linear>, x| square(model, x) * scale;
                    close(split.step(rows(0, 4), loss)?.loss.item(), whole * scale);
                    if let Some(cut) = &mut cut {
                        close(cut.step(rows(0, 4), loss)?.loss.item(), staged * scale);
                    }
                    let scaled = split.forward_with(rows(0, 4), move |model, x| forward(model, x) * scale)?;
                    let plain = split.forward_with(rows(0, 4), |model, x| forward(model, x))?;
                    let far = (scaled - plain * scale).abs().max().into_scalar::<f32>();
                    assert!(far < 1e-6, "{far}");
                    // The same as a plain value among the inputs.
                    let given = split.step((rows(0, 4), scale), |model, (x, scale)| square(model, x) * scale)?;
                    close(given.loss.item(), whole * scale);
                }
                let functions: [fn(&Vec<Linear>, Tensor<2>) -> Tensor<1>; 2] = [square, double];
                for _ in 0..2 {
                    for (times, loss) in [1.0, 2.0].into_iter().zip(functions) {
                        close(split.step(rows(0, 4), loss)?.loss.item(), whole * times);
                        if let Some(cut) = &mut cut {
                            close(cut.step(rows(0, 4), loss)?.loss.item(), staged * times);
                        }
                    }
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn ranks_that_share_a_model_must_pass_the_same_inputs() {
    let ways = [(false, false), (true, false), (false, true), (true, true)];
    for (ranks, (pipeline, forward)) in [2, 4].into_iter().flat_map(|ranks| ways.map(|way| (ranks, way))) {
        let outcome = launch::threads(ranks).run(|rank| {
            let (model, strategy) = match pipeline {
                true => {
                    let (model, config) = stages(ranks);
                    (model, Strategy::new().with_pp(ranks, config))
                }
                false => (layers(), Strategy::new().with_tp(ranks, plan())),
            };
            let mut model = model.parallelize(&rank, &strategy)?;
            for step in 0..3 {
                let other = step == 2 && rank.rank() == ranks - 1;
                let x = rows(if other { 9 } else { step }, 4);
                let sum = |model: &Vec<Linear>, (a, b)| square(model, a + b);
                match forward && step > 0 {
                    true => drop(model.forward_with((rows(1, 4), x), sum)?),
                    false => drop(model.step((rows(1, 4), x), sum)?),
                }
                assert!(step < 2, "the last rank's input was another");
            }
            Ok(())
        });
        let error = outcome.unwrap_err().to_string();
        let by = if forward { "forward_with: " } else { "step: " };
        let words = [format!("rank {} of group", ranks - 1), "another input `1` than rank 0".into(), by.into()];
        assert!(words.iter().all(|words| error.contains(words)), "{error}");
    }
    // Not if nobody is to look.
    let mixed = launch::threads(2).run(|rank| {
        let config = TensorParallelConfig::new(plan()).with_check_inputs_every(0);
        let mut model = layers().tensor_parallel(&rank, config)?;
        Ok(model.step(rows(rank.rank() as u64, 4), square)?.loss.item())
    });
    assert!(mixed.is_ok());
}

#[test]
fn operations_fused_and_one_by_one_train_alike() {
    let losses = |fusion| {
        let trained = launch::threads(2).run(|rank| {
            let config = TensorParallelConfig::new(plan()).with_fusion(fusion);
            let mut model = layers().tensor_parallel(&rank, config)?;
            let mut optim: ModuleOptimizer = AdamWConfig::new().init();
            let mut losses = Vec::new();
            for step in 0..3 {
                let done = model.step(rows(step, 4), square)?;
                losses.push(done.loss.item());
                model = optim.step(0.1, model, done.grads);
            }
            Ok(losses)
        });
        trained.unwrap()
    };
    let (fused, apart) = (losses(true), losses(false));
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 * b.abs();
    assert!(fused.iter().flatten().zip(apart.iter().flatten()).all(near), "{fused:?} {apart:?}");
}

#[test]
fn micro_batches_add_up_without_replicas() {
    let model = layers();
    let expected = {
        let (mut model, mut optim) = (own(&model), AdamWConfig::new().init());
        for step in 0..3 {
            let loss = square(&model, rows(step, 7));
            let grads = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
            model = optim.step(0.05, model, grads);
        }
        values(&model)
    };
    launch::threads(2)
        .run(|rank| {
            let cut = PipelineConfig::new(1).with_cut(Cut::before(["1.*"]));
            let whole = train(own(&model).tensor_parallel(&rank, plan())?)?;
            assert!(difference(&expected, &values(&whole)) < 1e-4);
            let whole = train(own(&model).pipeline_parallel(&rank, cut)?)?;
            assert!(difference(&expected, &values(&whole)) < 1e-4);
            Ok(())
        })
        .unwrap();
}

fn train<P: ParallelModule<Model = Vec<Linear>>>(mut model: P) -> Result<Vec<Linear>, Error> {
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    for step in 0..3 {
        let x = rows(step, 7);
        let parts = vec![x.clone().narrow(0, 0, 4), x.clone().narrow(0, 4, 1), x.narrow(0, 5, 2)];
        let mut steps = 0;
        for batch in model.join([parts]) {
            let done = model.step_micro_batches(batch?.into_iter().flatten(), square)?;
            assert_eq!((done.weight, done.outputs.len()), (7.0, if model.report().cut.is_some() { 0 } else { 3 }));
            model = model.optimize(&mut optim, 0.05, done)?;
            steps += 1;
        }
        assert_eq!(steps, 1);
        model = model.sync_buffers()?;
    }
    model.assemble()
}

fn step(model: &mut Sharded<Vec<Linear>>) -> Result<Step, Error> {
    model.step(rows(0, 4), square)
}

/// LBFGS looks at all parameters at once, of which each rank would see its own.
#[test]
fn an_optimizer_that_looks_at_all_parameters_at_once_is_refused() {
    let error = launch::threads(2).run(|rank| {
        let model = layers().tensor_parallel(&rank, plan())?;
        LBFGSConfig::new().init().step(0.1, model, |mut model| {
            let done = step(&mut model).unwrap();
            (done.loss.item(), done.grads)
        });
        Ok(())
    });
    let error = error.unwrap_err();
    assert!(matches!(&error, Error::RankFailed { cause, .. } if matches!(**cause, Error::Optimizer { .. })), "{error}");
    let said = error.to_string();
    assert!(said.contains("LBFGS") && said.contains("Sharded"), "{said}");
}

#[test]
fn state_that_does_not_fit_is_an_error_that_names_it() {
    // A record of the whole model, on one device.
    let (mut whole, mut optim) = (layers(), AdamWConfig::new().init());
    let loss = square(&whole, rows(0, 4));
    let grads = burn::optim::GradientsParams::from_grads(loss.backward(), &whole);
    whole = optim.step(0.01, whole, grads);
    let record = optim.into_bytes().unwrap();
    for ranks in [2, 4] {
        let error = launch::threads(ranks).run(|rank| {
            let mut model = whole.clone().fork(&device()).tensor_parallel(&rank, plan())?;
            let mut optim: ModuleOptimizer =
                AdamWConfig::new().init().from_bytes(record.clone()).map_err(Error::user)?;
            let done = step(&mut model)?;
            model.optimize(&mut optim, 0.01, done).map(|_| ())
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("of `0.") && error.contains("dims [") && error.contains("this rank holds ["), "{error}");

        // One of other parameters.
        let error = launch::threads(ranks).run(|rank| {
            let mut model = layers().tensor_parallel(&rank, plan())?;
            let mut optim: ModuleOptimizer =
                AdamWConfig::new().init().from_bytes(record.clone()).map_err(Error::user)?;
            let done = step(&mut model)?;
            model.optimize(&mut optim, 0.01, done).map(|_| ())
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("by an id that no parameter here has"), "{error}");

        // The one that was saved with the model goes on, and a skipped step leaves everything as it is.
        launch::threads(ranks)
            .run(|rank| {
                let (mut model, mut optim) = (layers().tensor_parallel(&rank, plan())?, AdamWConfig::new().init());
                for _ in 0..2 {
                    let done = step(&mut model)?;
                    model = model.optimize(&mut optim, 0.01, done)?;
                }
                let mut again =
                    AdamWConfig::new().init().from_bytes(optim.into_bytes().unwrap()).map_err(Error::user)?;
                let mut other = model.clone();
                for skipped in [true, false] {
                    let before = values(model.local());
                    let mut done = step(&mut model)?;
                    done.skipped = skipped;
                    model = model.optimize(&mut optim, 0.01, done)?;
                    assert_eq!(difference(&before, &values(model.local())) == 0.0, skipped);
                }
                let done = step(&mut other)?;
                other = other.optimize(&mut again, 0.01, done)?;
                assert_eq!(difference(&values(other.local()), &values(model.local())), 0.0);
                Ok(())
            })
            .unwrap();
    }
}

/// Another optimizer may come to be where one was, or another state in the same one.
#[test]
fn an_optimizer_is_not_known_by_its_place_alone() {
    type Change<'a> = &'a (dyn Fn(ModuleOptimizer) -> ModuleOptimizer + Sync);
    let run = |ranks, change: Change<'_>| {
        launch::threads(ranks).run(|rank| {
            let (mut model, mut optim): (_, ModuleOptimizer) =
                (layers().tensor_parallel(&rank, plan())?, AdamWConfig::new().init());
            for number in 0..6 {
                if number == 3 {
                    optim = change(optim);
                }
                let done = step(&mut model)?;
                model = model.optimize(&mut optim, 0.01, done)?;
            }
            Ok(values(&model.assemble()?))
        })
    };
    // One that looks at whole parameters, of which each rank holds a part.
    let with_muon = |ranks| run(ranks, &|_| muon()).unwrap().remove(0);
    assert!(difference(&with_muon(1), &with_muon(2)) < 1e-4);
    // The same one with another for the matrices.
    let with_group = |ranks| {
        let matrices = || ParamGroup::from_predicate("weight");
        run(ranks, &|optim| optim.with_group(matrices(), MuonConfig::new().build(), None)).unwrap().remove(0)
    };
    assert!(difference(&with_group(1), &with_group(2)) < 1e-4);
    let refused = |change: Change<'_>, words: &str| {
        let error = run(2, change).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    };
    // The same state in one that clips each gradient by the norm of the whole: it was that of parts.
    let clips = |optim: ModuleOptimizer| {
        let clipping = Some(GradientClippingConfig::Norm(0.01));
        AdamWConfig::new().with_grad_clipping(clipping).init().load_record(optim.to_record())
    };
    refused(&clips, "clips by their norm");
    // With a state of the same names and dims, whose ids are those of another model.
    let (whole, mut other): (_, ModuleOptimizer) = (layers(), AdamWConfig::new().init());
    let grads = burn::optim::GradientsParams::from_grads(square(&whole, rows(0, 4)).backward(), &whole);
    drop(other.step(0.01, whole, grads));
    let record = other.into_bytes().unwrap();
    refused(&|optim| optim.from_bytes(record.clone()).unwrap(), "by an id that no parameter here has");
    // Its own state, written and read, is known.
    let (alone, again) = (
        run(2, &|optim| optim),
        run(2, &|optim| {
            let bytes = optim.into_bytes().unwrap();
            optim.from_bytes(bytes).unwrap()
        }),
    );
    assert_eq!(difference(&alone.unwrap()[0], &again.unwrap()[0]), 0.0);
}

fn muon() -> ModuleOptimizer {
    let matrices = ParamGroup::from_predicate("weight");
    AdamWConfig::new().init().with_group(matrices, MuonConfig::new().build(), None)
}
