//! An optimizer that panics on one rank.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use burn::module::ParamGroup;
use burn::optim::{DynOptimizer, DynState, LearningRate, ModuleOptimizer, SgdConfig, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::failing::{LONG, PURPOSE};
use crate::common::models::device;
use crate::common::reference::own;
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

/// The others have updated theirs, and are in the next step, or wait for its rows: they get the error as well, though
/// the rank that has it stays where it is.
#[test]
fn a_panic_on_one_rank_is_an_error_on_all() {
    let kind = Kind { tied: false, frozen: false, dtype: DType::F32 };
    let of = |axes, sharding| strategy(axes, kind, sharding, Keep::Pass);
    let strategies = [
        of([2, 1, 1], Sharding::None),
        of([2, 1, 1], Sharding::None).with_engine(Engine::Eager),
        of([2, 1, 1], Sharding::Optimizer),
        of([2, 1, 1], Sharding::Parameters),
        of([1, 2, 1], Sharding::None),
        of([1, 1, 2], Sharding::None),
    ];
    for strategy in strategies {
        let told = AtomicBool::new(false);
        let replicas = strategy.dp.unwrap();
        let errors = launch::threads(2).timeout(LONG).run(|world| {
            let now = Arc::new(AtomicBool::new(false));
            let mut optim = breaking(&now);
            let mut model = own(&kind.init(&device())).parallelize(&world, &strategy)?;
            let batch = |number| share(number, world.rank() % replicas, replicas);
            let step = model.step(batch(0), loss)?;
            model = model.optimize(&mut optim, 0.1, step)?;
            let step = model.step(batch(1), loss)?;
            now.store(world.rank() == 1, SeqCst);
            let error = match model.optimize(&mut optim, 0.1, step) {
                Ok(mut model) => model.step(batch(2), loss).map(drop).unwrap_err(),
                Err(error) => error,
            };
            // The rank that has it goes on with something else.
            let began = Instant::now();
            match world.rank() {
                0 => told.store(true, SeqCst),
                _ => {
                    while !told.load(SeqCst) && began.elapsed() < 2 * LONG {
                        thread::sleep(Duration::from_millis(5));
                    }
                }
            }
            Ok(error)
        });
        for (rank, error) in errors.unwrap().into_iter().enumerate() {
            let is_it = matches!(error, Error::Optimizer { .. }) && error.to_string().contains(PURPOSE);
            assert!(is_it, "{strategy}, rank {rank}: {error}");
        }
    }
}
