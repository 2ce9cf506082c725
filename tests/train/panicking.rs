//! An optimizer that panics on one rank.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use burn::module::ParamGroup;
use burn::optim::{DynOptimizer, DynState, LearningRate, ModuleOptimizer, SgdConfig, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;
use crate::common::failing::{LONG, PURPOSE};
use crate::common::models::device;
use crate::grad_norm::lm::{Kind, loss};
use crate::zero_captured::parity::{share, strategy};

/// Leaves all parameters as they are, and panics where it is told to.
struct Breaks(Arc<AtomicBool>);

impl DynOptimizer for Breaks {
    fn step_dyn(
        &self,
        rank: usize,
        _: LearningRate,
        tensor: BridgeTensor,
        _: BridgeTensor,
        _: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        assert!(!self.0.load(SeqCst), "{PURPOSE}");
        (tensor, Some(DynState::create((), rank)))
    }

    fn to_device_dyn(&self, state: DynState, _: &Device) -> DynState {
        state
    }

    fn state_flatten(&self, _: &str, _: &DynState, _: &mut StateSink) {}

    fn state_unflatten(&self, rank: usize, _: &str, _: &mut StateSource, _: &Device) -> Option<DynState> {
        Some(DynState::create((), rank))
    }
}

/// An optimizer of all parameters that panics from when it is told to.
pub fn breaking(now: &Arc<AtomicBool>) -> ModuleOptimizer {
    let all: ModuleOptimizer = SgdConfig::new().init();
    all.with_group(ParamGroup::all(), Breaks(now.clone()), None)
}

const KIND: Kind = Kind { tied: false, frozen: false, dtype: DType::F32 };

fn of(axes: [usize; 3], sharding: Sharding) -> Strategy {
    strategy(axes, KIND, sharding, Keep::Pass)
}

/// The errors of ranks of which the second has an optimizer that panics in its first update, or in the next one.
fn errors(strategy: &Strategy, first: bool) -> Vec<Error> {
    let (told, replicas) = (AtomicUsize::new(0), strategy.dp.unwrap());
    let ranks = replicas * strategy.pp * strategy.tp;
    let errors = launch::threads(ranks).timeout(LONG).run(|world| {
        let now = Arc::new(AtomicBool::new(first && world.rank() == 1));
        let mut optim = breaking(&now);
        let mut model = own_by(&KIND.init(&device()), strategy).parallelize(&world, strategy)?;
        let (replica, _) = model.replica();
        let batch = |number| share(number, replica, replicas);
        if !first {
            let step = model.step(batch(0), loss)?;
            model = model.optimize(&mut optim, 0.1, step)?;
            now.store(world.rank() == 1, SeqCst);
        }
        let step = model.step(batch(1), loss)?;
        let error = match model.optimize(&mut optim, 0.1, step) {
            Ok(mut model) => model.step(batch(2), loss).map(drop).unwrap_err(),
            Err(error) => error,
        };
        // The rank that has it goes on with something else.
        let began = Instant::now();
        match world.rank() {
            1 => {
                while told.load(SeqCst) < ranks - 1 && began.elapsed() < 2 * LONG {
                    thread::sleep(Duration::from_millis(5));
                }
            }
            _ => drop(told.fetch_add(1, SeqCst)),
        }
        Ok(error)
    });
    errors.unwrap()
}

fn all_are_told(strategy: &Strategy, first: bool) {
    for (rank, error) in errors(strategy, first).into_iter().enumerate() {
        let said = error.to_string();
        let is_it = matches!(error, Error::Optimizer { .. }) && said.contains(PURPOSE);
        assert!(is_it && said.contains("rank 1 of the world"), "{strategy}, rank {rank}: {error}");
    }
}

/// The others have updated theirs, and are in the next step, or wait for its rows: they get the error as well, though
/// the rank that has it stays where it is.
#[test]
fn a_panic_on_one_rank_is_an_error_on_all() {
    for strategy in [
        of([2, 1, 1], Sharding::None),
        of([2, 1, 1], Sharding::None).with_engine(Engine::Eager),
        of([2, 1, 1], Sharding::Optimizer),
        of([2, 1, 1], Sharding::Parameters),
        of([1, 2, 1], Sharding::None),
        of([1, 1, 2], Sharding::None),
    ] {
        all_are_told(&strategy, false);
    }
}

/// Ranks that refuse it all, but do not all meet, find it out apart, and have one error.
#[test]
fn an_optimizer_that_all_refuse_is_the_same_error_on_all() {
    let hybrid = of([4, 1, 1], Sharding::Optimizer);
    let data = hybrid.data.clone().with_sharding_ranks(2);
    for strategy in [of([2, 1, 2], Sharding::None), of([1, 2, 2], Sharding::None), hybrid.with_data(data)] {
        let replicas = strategy.dp.unwrap();
        let errors = launch::threads(4).timeout(LONG).run(|world| {
            let mut optim = breaking(&Arc::new(AtomicBool::new(true)));
            let mut model = own_by(&KIND.init(&device()), &strategy).parallelize(&world, &strategy)?;
            let step = model.step(share(0, model.replica().0, replicas), loss)?;
            Ok(model.optimize(&mut optim, 0.1, step).err().unwrap())
        });
        let errors = errors.unwrap();
        assert!(errors.iter().all(|error| *error == errors[0]), "{strategy}: {errors:?}");
        let said = errors[0].to_string();
        assert!(said.contains(PURPOSE) && said.contains("of the world"), "{strategy}: {said}");
    }
}

/// In its first update an optimizer is tried out, and refused, where the others may meet without this rank.
#[test]
fn an_optimizer_that_one_rank_refuses_is_an_error_on_all() {
    for strategy in [
        of([2, 1, 1], Sharding::None),
        of([2, 1, 1], Sharding::Optimizer),
        of([2, 1, 1], Sharding::Gradients),
        of([2, 1, 1], Sharding::Parameters),
        of([2, 1, 1], Sharding::Parameters).with_engine(Engine::Eager),
        of([1, 2, 1], Sharding::None),
        of([1, 1, 2], Sharding::None),
        // Ranks that do not meet the one that refuses it.
        of([2, 1, 2], Sharding::None),
        of([2, 1, 2], Sharding::Optimizer),
        of([2, 2, 1], Sharding::Parameters),
        of([1, 2, 2], Sharding::None),
    ] {
        all_are_told(&strategy, true);
    }
}
