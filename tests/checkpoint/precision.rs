//! Saved of a model of one precision and restored into one of another.

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdafactorConfig, AdamWConfig, ModuleOptimizer, MuonConfig, SgdConfig, momentum::MomentumConfig};
use burn::tensor::{FloatDType, Tensor, bf16, f16};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::optim::FusedOptimizer;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use serde_json::Value;

use crate::Dir;
use crate::common::reference::values;
use crate::net::{Axes, Net, train};

/// A maker of optimizers, its name, and the dtype in which it keeps moments of a parameter of `bf16` after a restore.
type Made = (&'static str, fn() -> ModuleOptimizer, &'static str);

/// Its second moments vanish in `f16`: not so the epsilon.
fn adamw() -> AdamWConfig {
    AdamWConfig::new().with_epsilon(1e-3)
}

fn sgd() -> SgdConfig {
    SgdConfig::new().with_momentum(Some(MomentumConfig::new().with_momentum(0.9)))
}

const OPTIMIZERS: [Made; 6] = [
    ("adamw", || adamw().init(), "F32"),
    ("fused adamw", || adamw().init_fused(), "BF16"),
    ("sgd", || sgd().init(), "F32"),
    ("fused sgd", || sgd().init_fused(), "BF16"),
    ("adafactor", || AdafactorConfig::new().init(), "F32"),
    ("muon", muon, "F32"),
];

/// Host memory has a default dtype as well.
fn muon() -> ModuleOptimizer {
    let matrices = burn::module::ParamGroup::from_regex("(up|down).weight$").unwrap();
    adamw().init_fused().with_group(matrices, MuonConfig::new().build().load_on_host(), None)
}

struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value.cast(self.0).detach().require_grad())
    }
}

/// Restores what is there, saves it again as the checkpoint of `step`, and trains on: the parameters that were saved,
/// and the losses of the next steps.
fn go_on(
    dir: &Dir,
    optimizer: fn() -> ModuleOptimizer,
    (dtype, axes, step): (FloatDType, Axes, u64),
) -> (Vec<f32>, Vec<f64>) {
    let net = Net::new();
    let run = launch::threads(axes.ranks()).run(|world| {
        let mut model = axes.wrap(&world, &net.clone().map(&mut Cast(dtype)))?;
        let mut optim = optimizer();
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        let state = TrainState::new(&mut model).with_optimizer("optim", &mut optim);
        if checkpoints.restore(state)?.is_none() {
            model = train(model, &mut optim, (0, 2))?.0;
        }
        checkpoints.save(step, TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
        // Over what was restored as well.
        checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
        let whole = model.assemble()?;
        let (_, losses) = train(model, &mut optim, (2, 5))?;
        let numbers: Vec<f32> = values(&whole).into_values().flat_map(|whole| whole.values).collect();
        Ok((numbers, losses))
    });
    run.unwrap().swap_remove(0)
}

/// The dtypes of the moments in the checkpoint of a step.
fn moment_dtypes(dir: &Dir, step: u64) -> Vec<String> {
    let index = std::fs::read(dir.path().join(format!("step-{step:09}/checkpoint.json"))).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let params = index["optimizers"]["optim"].as_object().unwrap().values();
    let moments = params.flat_map(|param| param["moments"].as_object().unwrap().values());
    moments.map(|moment| moment["dtype"].as_str().unwrap().to_owned()).collect()
}

/// Parameters are rounded to what the model has now, and go on from there in more digits again; moments with them, but
/// for those of optimizers that cannot load such.
#[test]
fn another_precision() {
    use FloatDType::{BF16, F16, F32};
    let rounded = |whole: &[f32], dtype: FloatDType| -> Vec<f32> {
        let round = |value: &f32| match dtype {
            BF16 => bf16::from_f32(*value).to_f32(),
            F16 => f16::from_f32(*value).to_f32(),
            _ => *value,
        };
        whole.iter().map(round).collect()
    };
    for (name, optimizer, kept) in OPTIMIZERS {
        let dir = Dir::fresh();
        let (mut whole, losses) = go_on(&dir, optimizer, (F32, Axes::new(1, 1, 2), 2));
        let legs = [
            (BF16, Axes::new(1, 1, 1)),
            (BF16, Axes::new(2, 1, 2).sharded(Sharding::Gradients)),
            (F32, Axes::new(2, 1, 1)),
            (F16, Axes::new(3, 1, 1).sharded(Sharding::Parameters)),
            (BF16, Axes::new(1, 2, 1)),
            (F16, Axes::new(1, 1, 2)),
            (F32, Axes::new(1, 2, 2)),
            (BF16, Axes::new(2, 2, 1).sharded(Sharding::Optimizer)),
        ];
        for (leg, (dtype, axes)) in legs.into_iter().enumerate() {
            let step = 3 + leg as u64;
            whole = rounded(&whole, dtype);
            let (found, near) = go_on(&dir, optimizer, (dtype, axes, step));
            assert_eq!(found, whole, "{name}: {dtype:?} {axes:?}");
            for (near, loss) in near.iter().zip(&losses) {
                assert!((near - loss).abs() < 0.03 * loss, "{name}: {dtype:?} {axes:?}: {near} {loss}");
            }
            if dtype == BF16 {
                let dtypes = moment_dtypes(&dir, step);
                assert!(dtypes.iter().any(|found| found == kept), "{name}: {dtypes:?}");
                assert!(name == "muon" || dtypes.iter().all(|found| found == kept), "{name}: {dtypes:?}");
            }
        }
    }
}

/// Moments keep the digits that a checkpoint has of them, however often the same optimizer is restored, also between
/// steps and from one that was saved since.
#[test]
fn moments_keep_their_digits_however_often_they_are_restored() {
    let net = Net::new();
    for axes in [Axes::new(1, 1, 1), Axes::new(2, 1, 1).sharded(Sharding::Optimizer), Axes::new(1, 2, 2)] {
        let dir = Dir::fresh();
        let ran = launch::threads(axes.ranks()).run(|world| {
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            let mut optim = adamw().init();
            let mut model = train(axes.wrap(&world, &net)?, &mut optim, (0, 2))?.0;
            checkpoints.save(2, TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
            let mut narrow = axes.wrap(&world, &net.clone().map(&mut Cast(FloatDType::BF16)))?;
            let mut optim = adamw().init();
            let mut runs = Vec::new();
            for (from, to) in [(2, 3), (2, 4), (4, 5), (2, 6)] {
                checkpoints.restore_step(from, TrainState::new(&mut narrow).with_optimizer("optim", &mut optim))?;
                checkpoints.save(to, TrainState::new(&mut narrow).with_optimizer("optim", &mut optim))?;
                let (trained, losses) = train(narrow, &mut optim, (2, 5))?;
                narrow = trained;
                runs.push(losses);
            }
            Ok(runs)
        });
        let runs = ran.unwrap().swap_remove(0);
        assert!(runs.iter().all(|run| *run == runs[0]), "{axes:?}: {runs:?}");
        for step in 3..7 {
            assert!(moment_dtypes(&dir, step).iter().all(|found| found == "F32"), "{axes:?}: step {step}");
        }
    }
}

/// With moments of the parameter's own dtype a run goes on to the bit.
#[test]
fn fused_optimizers_go_on_to_the_bit_in_any_precision() {
    let net = Net::new();
    for dtype in [FloatDType::BF16, FloatDType::F16, FloatDType::F64] {
        for axes in [Axes::new(1, 1, 1), Axes::new(2, 1, 2).sharded(Sharding::Optimizer), Axes::new(1, 2, 2)] {
            let dir = Dir::fresh();
            let ran = launch::threads(axes.ranks()).run(|world| {
                let mut optim = adamw().init_fused();
                let model = axes.wrap(&world, &net.clone().map(&mut Cast(dtype)))?;
                let (mut model, _) = train(model, &mut optim, (0, 2))?;
                let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
                checkpoints.save(2, TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
                let expected = train(model, &mut optim, (2, 4))?.1;
                let mut model = axes.wrap(&world, &net.clone().map(&mut Cast(dtype)))?;
                let mut optim = adamw().init_fused();
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
                Ok((train(model, &mut optim, (2, 4))?.1, expected))
            });
            let (found, expected) = ran.unwrap().swap_remove(0);
            assert_eq!(found, expected, "{dtype:?} {axes:?}");
        }
    }
}

/// What would be updated with fewer digits than it has is refused, by all ranks alike, and says what takes it.
#[test]
fn moments_of_fewer_digits_than_the_parameter_are_refused() {
    for axes in [Axes::new(1, 1, 1), Axes::new(1, 2, 1), Axes::new(1, 2, 2)] {
        refused_in_f64(axes);
    }
}

fn refused_in_f64(axes: Axes) {
    let (dir, net) = (Dir::fresh(), Net::new());
    launch::threads(axes.ranks())
        .run(|world| {
            let model = axes.wrap(&world, &net.clone().map(&mut Cast(FloatDType::F64)))?;
            let mut optim = adamw().init();
            let mut model = train(model, &mut optim, (0, 1))?.0;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            checkpoints.save(1, TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
            let restored = checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim));
            let error = restored.unwrap_err().to_string();
            assert!(error.contains("`init_fused`") && error.contains("F64") && error.contains("F32"), "{error}");
            // The state is as it was.
            model = train(model, &mut optim, (1, 2))?.0;
            // One that was restored for 16 bits is refused as well.
            let mut narrow = axes.wrap(&world, &net.clone().map(&mut Cast(FloatDType::BF16)))?;
            let mut optim = adamw().init();
            checkpoints.restore(TrainState::new(&mut narrow).with_optimizer("optim", &mut optim))?;
            let restored = checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim));
            let error = restored.unwrap_err().to_string();
            assert!(error.contains("`init_fused`"), "{error}");
            let error = train(model, &mut optim, (1, 2)).unwrap_err().to_string();
            assert!(error.contains("F64") && error.contains("a new optimizer"), "{error}");
            Ok(())
        })
        .unwrap();
}
