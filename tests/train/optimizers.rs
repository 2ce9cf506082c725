//! Every optimizer of burn makes the update that it makes on one device, whatever parameters are divided over.

use std::process::Command;

use burn::grad_clipping::{GradientClipping, GradientClippingConfig};
use burn::module::{Module, ParamGroup};
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Linear, LinearConfig};
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdaGradConfig, AdafactorConfig, AdamConfig, AdamWConfig, AdanConfig, LambConfig, LionConfig, ModuleOptimizer,
    MuonConfig, RmsPropConfig, SgdConfig,
};
use burn::tensor::{DType, Tensor};
use burn_parallel::prelude::*;

use crate::common::cases::{self, wrap};
use crate::common::checkpointing::own_for;
use crate::common::models::device;
use crate::common::reference::{Wholes, all_same, own, values};
use crate::grad_norm::lm::{Kind, Lm, loss};
use crate::zero::{LEVELS, config, optimizer};
use crate::zero_captured::parity::{share, strategy};

const STEPS: usize = 3;

const APART: Kind = Kind { tied: false, frozen: false, dtype: DType::F32 };
const TIED: Kind = Kind { tied: true, frozen: true, dtype: DType::F32 };

/// Each with its rate. Of these Muon, LAMB, Adafactor and those that clip look at whole parameters.
fn all() -> Vec<(&'static str, f64, ModuleOptimizer)> {
    let momentum = MomentumConfig { momentum: 0.9, dampening: 0.1, nesterov: true };
    let decay = || Some(WeightDecayConfig::new(0.01));
    let matrices = || ParamGroup::from_regex("(up|down|head|tokens).weight$").unwrap();
    let adamw = || AdamWConfig::new().with_weight_decay(0.01).with_epsilon(1e-2);
    let norm = || GradientClippingConfig::Norm(0.05);
    vec![
        ("sgd", 0.3, SgdConfig::new().with_momentum(Some(momentum)).with_weight_decay(decay()).init()),
        ("adam", 0.05, AdamConfig::new().with_epsilon(1e-2).with_weight_decay(decay()).init()),
        ("adamw", 0.05, adamw().init()),
        ("cautious adamw", 0.05, adamw().with_cautious_weight_decay(true).init()),
        ("adagrad", 0.05, AdaGradConfig::new().with_epsilon(1e-2).init()),
        ("rmsprop", 0.01, RmsPropConfig::new().with_epsilon(1e-2).with_centered(true).init()),
        ("lion", 0.01, LionConfig::new().init()),
        ("adan", 0.01, AdanConfig::new().with_epsilon(1e-2).init()),
        ("muon", 0.02, adamw().init().with_group(matrices(), MuonConfig::new().build(), None)),
        ("lamb", 0.02, LambConfig::new().with_epsilon(1e-2).init()),
        ("adafactor", 0.02, AdafactorConfig::new().with_weight_decay(0.01).init()),
        ("clip by norm", 0.05, adamw().with_grad_clipping(Some(norm())).init()),
        ("clip by value", 0.05, adamw().with_grad_clipping(Some(GradientClippingConfig::Value(0.01))).init()),
        ("fused sgd", 0.3, SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init_fused()),
        ("fused adam", 0.05, AdamConfig::new().with_epsilon(1e-2).with_weight_decay(decay()).init_fused()),
        ("fused adamw", 0.05, adamw().with_amsgrad(true).init_fused()),
        ("fused, clip by norm", 0.05, adamw().with_grad_clipping(Some(norm())).init_fused()),
        (
            "a group clips",
            0.3,
            SgdConfig::new().init().with_group(
                matrices(),
                SgdConfig::new().build(),
                Some(GradientClipping::Norm(0.05)),
            ),
        ),
    ]
}

/// What each optimizer makes of a model, which is wrapped once for all.
fn trained<P: ParallelModule<Model = Lm>>(
    model: P,
    place: (usize, usize),
) -> Result<Vec<(&'static str, Wholes)>, Error> {
    let (mut model, mut optimizers, mut after) = (model, all(), Vec::new());
    // The first step of a pipeline shows which stages share parameters: clones are made of a model that knows.
    model.step(share(0, place.0, place.1), loss)?;
    for (name, rate, optim) in &mut optimizers {
        let mut model = model.clone();
        for number in 0..STEPS {
            let step = model.step(share(number, place.0, place.1), loss)?;
            model = model.optimize(optim, *rate, step)?;
        }
        after.push((*name, values(&model.assemble()?)));
    }
    Ok(after)
}

fn one_device(kind: Kind) -> Vec<(&'static str, Wholes)> {
    let model = kind.init(&device());
    let run = |rank: Rank| trained(own(&model).data_parallel(&rank, DataParallelConfig::new())?, (0, 1));
    launch::threads(1).run(run).unwrap().remove(0)
}

fn check(what: &str, expected: &[(&str, Wholes)], found: &[Vec<(&str, Wholes)>]) {
    for found in found {
        for ((name, expected), (_, found)) in expected.iter().zip(found) {
            // Iterations of Newton and Schulz grow what rounding differs by.
            let tolerance = if *name == "muon" { 1e-3 } else { 2e-4 };
            all_same(&format!("{name}, {what}"), expected, found, tolerance);
        }
    }
}

#[test]
fn rows_of_eager_replicas() {
    let expected = one_device(TIED);
    let model = TIED.init(&device());
    for level in LEVELS {
        let run = |rank: Rank| {
            let config = DataParallelConfig::new().with_sharding(level);
            trained(own_for(&model, &config).data_parallel(&rank, config)?, (rank.rank(), rank.size()))
        };
        check(&format!("{level} on 3 replicas"), &expected, &launch::threads(3).run(run).unwrap());
    }
}

fn meshes(kind: Kind, meshes: &[([usize; 3], Sharding)]) {
    let expected = one_device(kind);
    let model = kind.init(&device());
    for (axes, sharding) in meshes {
        let run = |world: Rank| {
            let model = own(&model).parallelize(&world, &strategy(*axes, kind, *sharding, Keep::Pass))?;
            let replica = model.mesh().coordinate("dp")?;
            trained(model, (replica, axes[0]))
        };
        let found = launch::threads(axes.iter().product()).run(run).unwrap();
        check(&format!("{sharding} on {axes:?}"), &expected, &found);
    }
}

/// Of three ranks none divides the vocabulary or the inner width.
#[test]
fn parts_of_a_split() {
    meshes(APART, &[([1, 1, 2], Sharding::None), ([1, 1, 3], Sharding::None), ([2, 1, 2], Sharding::None)]);
    meshes(TIED, &[([1, 1, 2], Sharding::None)]);
}

#[test]
fn rows_of_parts_of_a_split() {
    meshes(
        TIED,
        &[([2, 1, 2], Sharding::Optimizer), ([2, 1, 2], Sharding::Gradients), ([2, 1, 2], Sharding::Parameters)],
    );
}

#[test]
fn stages_and_their_parts() {
    meshes(TIED, &[([1, 2, 1], Sharding::None), ([1, 2, 2], Sharding::None), ([2, 2, 1], Sharding::Optimizer)]);
}

#[test]
fn rows_of_parts_of_stages() {
    meshes(APART, &[([2, 2, 2], Sharding::Optimizer), ([2, 2, 2], Sharding::Parameters)]);
}

/// One parameter is joined on one rank: its state is whole there, and nowhere else; those of equal dims are shared out.
#[test]
fn joined_parameters_are_shared_out() {
    let kind = APART;
    let mut bytes = launch::threads(2)
        .run(|world| {
            let matrices = ParamGroup::from_regex("up.weight$").unwrap();
            let mut optim = SgdConfig::new().init().with_group(matrices, MuonConfig::new().build(), None);
            let strategy = strategy([1, 1, 2], kind, Sharding::None, Keep::Pass);
            let mut model = own(&kind.init(&device())).parallelize(&world, &strategy)?;
            for number in 0..2 {
                let before = model.counters().tensor;
                let step = model.step(share(number, 0, 1), loss)?;
                let between = model.counters().tensor;
                model = model.optimize(&mut optim, 0.02, step)?;
                let moved = model.counters().tensor - between.clone();
                // Of each of the two owners: the values, the gradients, and the parts that come back.
                assert_eq!((moved.of("gather").calls, moved.of("scatter").calls), (4, 2));
                assert_eq!((between - before).of("gather").calls, 0);
            }
            Ok(crate::zero::bytes::state_bytes(&optim))
        })
        .unwrap();
    // Three matrices of 8 x 7.
    let one = 8 * 7 * 4;
    bytes.sort();
    assert_eq!(bytes, [one, 2 * one]);
}

/// Muon in the variable where AdamW was: its update depends on the whole of a parameter, of which each rank holds rows.
#[test]
fn another_optimizer_in_the_same_place_is_looked_at_anew() {
    let case = cases::mlp();
    let run = |config: DataParallelConfig, size: usize| {
        let found = launch::threads(size).run(|rank| {
            let mut model = wrap(&rank, &case.model, config.clone())?;
            let mut optim: ModuleOptimizer = optimizer("adamw");
            for step in 0..4 {
                if step == 2 {
                    optim = optimizer("muon");
                }
                let done = model.step((case.input)(step, 0..4), |model, batch| (case.loss)(model, batch))?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(values(&model.assemble()?))
        });
        found.unwrap().remove(0)
    };
    let expected = run(DataParallelConfig::new(), 1);
    for level in LEVELS {
        all_same(&format!("{level}"), &expected, &run(config(level), 2), 3e-5);
    }
}

/// A parameter that an optimizer has no update for is named, whatever is divided.
#[test]
fn the_parameter_on_which_an_optimizer_panics_is_named() {
    #[derive(Module, Debug)]
    struct Mixed {
        first: Linear,
        filter: Conv1d,
        last: Linear,
    }
    let linear = || LinearConfig::new(4, 4).with_bias(false).init(&device());
    let filter = Conv1dConfig::new(1, 4, 4).with_bias(false).init(&device());
    let model = Mixed { first: linear(), filter, last: linear() };
    for sharding in [Sharding::None].into_iter().chain(LEVELS) {
        let ran = launch::threads(2).run(|rank| {
            let mut model = wrap(&rank, &model, config(sharding))?;
            let mut optim: ModuleOptimizer = MuonConfig::new().init();
            let x = Tensor::<2>::ones([2, 4], &device());
            let step = model.step(x, |model, x| {
                let x = model.filter.forward(model.first.forward(x).unsqueeze_dim::<3>(1)).squeeze_dim::<2>(2);
                model.last.forward(x).powi_scalar(2).mean()
            })?;
            model.optimize(&mut optim, 1e-2, step).map(drop)
        });
        let error = ran.unwrap_err().to_string();
        assert!(
            error.contains("`filter.weight`, a parameter of 3 dims") && error.contains("2D"),
            "{sharding}: {error}"
        );
    }
}

/// What it says is in the error, and not printed before.
#[test]
fn a_panic_of_an_optimizer_prints_nothing() {
    let mut itself = Command::new(std::env::current_exe().unwrap());
    itself.args(["--exact", "optimizers::the_parameter_on_which_an_optimizer_panics_is_named", "--nocapture"]);
    let output = itself.env("RUST_BACKTRACE", "0").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("panicked at"), "{said}");
}
