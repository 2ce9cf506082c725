//! Losses, norms and parameters on every mesh against one device.

use burn::optim::{AdamWConfig, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::DType;
use burn_parallel::comm::part;
use burn_parallel::launch::Rank;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::reference::{Wholes, all_same, own, values};
use crate::grad_norm::lm::{Batch, Kind, Lm, ROWS, batch, cut, loss};

const STEPS: usize = 4;
const CLIP: f64 = 0.7;

/// What a number of steps give.
#[derive(Debug)]
pub struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    after: Wholes,
}

/// The rows of a step's batch that a replica takes.
pub fn share(step: usize, replica: usize, replicas: usize) -> Batch {
    let (tokens, targets) = batch(step, &Device::flex().autodiff());
    let rows = part(ROWS, replicas, replica);
    (tokens.slice([rows.clone()]), targets.slice([rows]))
}

fn train<P: ParallelModule<Model = Lm>>(
    mut model: P,
    mut optim: ModuleOptimizer,
    rate: f64,
    (replica, replicas): (usize, usize),
) -> Result<Trained, Error> {
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for number in 0..STEPS {
        let step = model.step(share(number, replica, replicas), loss)?.clip_grad_norm(&model, CLIP)?;
        assert_eq!(step.weight, (ROWS * 5) as f64);
        losses.push(step.loss.item());
        norms.push(step.grad_norm.unwrap());
        model = model.optimize(&mut optim, rate, step)?;
    }
    Ok(Trained { losses, norms, after: values(&model.assemble()?) })
}

fn one_device(model: &Lm, optim: fn() -> ModuleOptimizer, rate: f64) -> Trained {
    let train = |rank: Rank| train(own(model).data_parallel(&rank, DataParallelConfig::new())?, optim(), rate, (0, 1));
    launch::threads(1).run(train).unwrap().remove(0)
}

/// The strategy of a mesh of these sizes: replicas, stages, ranks of a split.
pub fn strategy([dp, pp, tp]: [usize; 3], kind: Kind, sharding: Sharding, keep: Keep) -> Strategy {
    let data = DataParallelConfig::new().with_sharding(sharding).with_keep(keep);
    let mut strategy = Strategy::new().with_dp(dp).with_data(data).with_engine(Engine::Captured);
    if pp > 1 {
        strategy = strategy.with_pp(pp, PipelineConfig::new(2).with_cut(cut(pp)));
    }
    if tp > 1 {
        strategy = strategy.with_tp(tp, kind.plan());
    }
    strategy
}

fn compare(what: &str, expected: &Trained, found: &Trained) {
    for (name, expected, found) in [("loss", &expected.losses, &found.losses), ("norm", &expected.norms, &found.norms)]
    {
        for (step, (a, b)) in expected.iter().zip(found).enumerate() {
            assert!((a - b).abs() <= 2e-5 * a.abs(), "{what}: {name} of step {step}: {a} {b}");
        }
    }
    all_same(what, &expected.after, &found.after, 2e-4);
}

fn check(axes: [usize; 3], sharding: Sharding, keep: Keep, kind: Kind) {
    check_as(&strategy(axes, kind, sharding, keep), kind, &["sgd", "adamw"]);
}

fn check_as(strategy: &Strategy, kind: Kind, optimizers: &[&str]) {
    let replicas = strategy.dp.unwrap();
    let model = kind.init(&Device::flex().autodiff());
    for name in optimizers {
        let (optim, rate): (fn() -> ModuleOptimizer, f64) = match *name {
            "sgd" => (|| SgdConfig::new().init(), 0.5),
            "muon" => (|| crate::zero::optimizer("muon"), 0.02),
            _ => (|| AdamWConfig::new().with_weight_decay(0.01).with_epsilon(1e-2).init(), 0.05),
        };
        let expected = one_device(&model, optim, rate);
        let all = launch::threads(replicas * strategy.pp * strategy.tp)
            .run(|world| {
                let model = own(&model).parallelize(&world, strategy)?;
                let replica = model.mesh().coordinate("dp")?;
                train(model, optim(), rate, (replica, replicas))
            })
            .unwrap();
        let (sharding, keep, axes) = (strategy.data.sharding, strategy.data.keep, [replicas, strategy.pp, strategy.tp]);
        for found in all {
            compare(&format!("{name}, {sharding} {keep:?} on {axes:?}"), &expected, &found);
        }
    }
}

const TIED: Kind = Kind { tied: true, frozen: true, dtype: DType::F32 };
const APART: Kind = Kind { tied: false, frozen: false, dtype: DType::F32 };

#[test]
fn parameters_over_replicas_alone() {
    for replicas in [2, 3, 4] {
        check([replicas, 1, 1], Sharding::Parameters, Keep::Pass, TIED);
    }
    check_as(&strategy([8, 1, 1], TIED, Sharding::Parameters, Keep::Pass), TIED, &["adamw"]);
    check([3, 1, 1], Sharding::Parameters, Keep::Pass, APART);
    check([2, 1, 1], Sharding::Parameters, Keep::MicroBatch, TIED);
    check([3, 1, 1], Sharding::Parameters, Keep::Step, TIED);
}

#[test]
fn parameters_over_replicas_of_a_split() {
    check([2, 1, 2], Sharding::Parameters, Keep::Pass, TIED);
    check([3, 1, 2], Sharding::Parameters, Keep::Pass, APART);
    check([2, 1, 2], Sharding::Parameters, Keep::Step, APART);
}

#[test]
fn parameters_over_replicas_of_a_pipeline() {
    check([2, 2, 1], Sharding::Parameters, Keep::Pass, TIED);
    check([3, 2, 1], Sharding::Parameters, Keep::Pass, APART);
    check([2, 3, 1], Sharding::Parameters, Keep::Step, TIED);
}

#[test]
fn parameters_over_replicas_of_a_split_pipeline() {
    check([2, 2, 2], Sharding::Parameters, Keep::Pass, TIED);
    check([2, 2, 2], Sharding::Parameters, Keep::Step, APART);
}

#[test]
fn parameters_of_a_pipeline_that_its_first_step_cuts() {
    let mut strategy = strategy([2, 2, 1], APART, Sharding::Parameters, Keep::Pass);
    strategy.pipeline = Some(PipelineConfig::new(2).with_schedule(Schedule::ZeroBubbleH1));
    check_as(&strategy, APART, &["adamw"]);
}

#[test]
fn updates_of_whole_matrices() {
    for replicas in [2, 3] {
        let strategy = strategy([replicas, 1, 1], APART, Sharding::Parameters, Keep::Pass);
        check_as(&strategy, APART, &["muon"]);
    }
}

#[test]
fn parameters_over_some_of_the_replicas() {
    let mut strategy = strategy([4, 1, 1], TIED, Sharding::Parameters, Keep::Pass);
    strategy.data = strategy.data.with_sharding_ranks(2);
    check_as(&strategy, TIED, &["sgd", "adamw"]);
}

#[test]
fn optimizer_state_and_gradients() {
    for sharding in [Sharding::Optimizer, Sharding::Gradients] {
        for axes in [[3, 1, 1], [2, 1, 2], [2, 2, 1], [2, 2, 2]] {
            check_as(&strategy(axes, TIED, sharding, Keep::Pass), TIED, &["adamw"]);
        }
    }
}
