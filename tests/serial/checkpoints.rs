//! What a rank holds while it saves and restores a checkpoint, beside its state.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::directories::{REST, dir::Dir, most};

const LAYERS: usize = 12;
const WIDTH: usize = 512;
/// The bytes of a weight.
const WEIGHT: usize = WIDTH * WIDTH * 4;

#[derive(Module, Debug)]
struct Deep {
    layers: Vec<Linear>,
}

impl Deep {
    fn new(device: &Device) -> Self {
        Self { layers: (0..LAYERS).map(|_| LinearConfig::new(WIDTH, WIDTH).with_bias(false).init(device)).collect() }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).powi_scalar(2).mean()
    }
}

/// burn gives out the state of an optimizer in records, of copies. They are made of 2 MiB of parameters at a time: two
/// copies of these for a moment, one while they are written; two more in the first save, which learns their names. Of
/// parameters nothing is copied. What is restored is there once, beside what was there; and once still when the next
/// step has changed it.
#[test]
fn a_save_holds_copies_of_a_few_moments_and_a_restore_each_once() {
    let _turn = crate::turn();
    let dir = Dir::fresh();
    // Over both ranks together, as all that is counted.
    let (parts, moments) = (LAYERS * WEIGHT, 2 * LAYERS * WEIGHT);
    let portions = 2 * 2 * (2 * (2 << 20));
    launch::threads(2)
        .run(|rank| {
            let device = rank.device().autodiff();
            let wrap = || Deep::new(&device).tensor_parallel(&rank, Plan::new().shard("layers.*.weight", 1));
            let mut model = wrap()?;
            let mut optim: ModuleOptimizer = AdamConfig::new().init();
            let x = Tensor::<2>::ones([2, WIDTH], &device);
            let step = model.step(x.clone(), |model, x| model.loss(x))?;
            model = model.optimize(&mut optim, 1e-3, step)?;
            let mut checkpoints = Checkpointer::new(&rank, dir.path(), CheckpointConfig::new())?;
            let (_, alone) = most(&rank, || checkpoints.save(1, TrainState::new(&mut model)))?;
            let mut save = |step, model: &mut _, optim: &mut _| {
                let state = TrainState::new(model).with_optimizer("adam", optim);
                most(&rank, || checkpoints.save(step, state)).map(|(_, held)| held)
            };
            let (first, second) = (save(2, &mut model, &mut optim)?, save(3, &mut model, &mut optim)?);
            assert!(alone < REST, "saving parameters held {alone} bytes beside {parts}");
            for held in [first, second] {
                assert!(held < portions + REST, "saving held {held} bytes beside the state, with moments of {moments}");
            }
            let step = model.step(x.clone(), |model, x| model.loss(x))?;
            let (model, updating) = most(&rank, || model.optimize(&mut optim, 1e-3, step))?;
            drop((model, optim));

            // A run that begins: its model has no values yet.
            let (mut model, mut fresh) = (wrap()?, AdamConfig::new().init());
            let state = TrainState::new(&mut model).with_optimizer("adam", &mut fresh);
            let (_, restored) = most(&rank, || checkpoints.restore(state))?;
            let bound = parts + moments + WEIGHT + REST;
            assert!(restored < bound, "restoring held {restored} bytes, for a state of {}", parts + moments);
            let step = model.step(x, |model, x| model.loss(x))?;
            let (_, after) = most(&rank, || model.optimize(&mut fresh, 1e-3, step))?;
            // The first step with an optimizer looks at its moments.
            assert!(after < updating + portions + REST, "the next update held {after} bytes, and {updating} otherwise");
            Ok(())
        })
        .unwrap();
}

/// burn keeps each leaf of its autodiff graph until a backward pass: this is the smallest one.
fn sweep(rank: &Rank) -> Result<isize, Error> {
    rank.barrier()?;
    if rank.rank() == 0 {
        drop(Tensor::<1>::ones([1], &rank.device().autodiff()).require_grad().backward());
    }
    rank.barrier()?;
    let held = crate::memory::held();
    rank.barrier()?;
    Ok(held)
}

/// A restore that succeeds keeps nothing but the state, and neither does a save, however often they are repeated.
#[test]
fn what_is_repeated_keeps_no_memory() {
    let _turn = crate::turn();
    // Lists of the last calls are full by then.
    const WARM: usize = 40;
    const ROUNDS: usize = 40;
    let split = Strategy::new().with_tp(2, Plan::new().shard("layers.*.weight", 1));
    for (ranks, strategy) in [(1, Strategy::new()), (2, Strategy::new().with_dp(2)), (2, split)] {
        let dir = Dir::fresh();
        let run = |rank: Rank| {
            let device = rank.device().autodiff();
            let layer = LinearConfig::new(4, 6).with_bias(false).init(&device);
            let pristine = Deep { layers: vec![layer] }.parallelize(&rank, &strategy)?;
            let mut optim: ModuleOptimizer = AdamConfig::new().init();
            let mut model = pristine.clone();
            let step = model.step(Tensor::<2>::ones([2, 4], &device), |model, x| model.loss(x))?;
            model = model.optimize(&mut optim, 1e-3, step)?;
            let mut checkpoints = Checkpointer::new(&rank, dir.path(), CheckpointConfig::new())?;
            checkpoints.save(1, TrainState::new(&mut model).with_optimizer("adam", &mut optim))?;
            let repeated = |what: &str, rounds: usize, run: &mut dyn FnMut() -> Result<(), Error>| {
                (0..WARM).try_for_each(|_| run())?;
                let before = sweep(&rank)?;
                (0..rounds).try_for_each(|_| run())?;
                rank.barrier()?;
                let unswept = crate::memory::held() - before;
                let each = (sweep(&rank)? - before) / rounds as isize;
                assert!(each < 64, "{strategy}: {what} keeps {each} bytes each time");
                Ok::<_, Error>(unswept)
            };
            repeated("a restore into another state", ROUNDS, &mut || {
                let (mut model, mut optim) = (pristine.clone(), AdamConfig::new().init());
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("adam", &mut optim)).map(drop)
            })?;
            repeated("a restore into the same state", ROUNDS, &mut || {
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("adam", &mut optim)).map(drop)
            })?;
            repeated("a save", ROUNDS, &mut || {
                checkpoints.save(1, TrainState::new(&mut model).with_optimizer("adam", &mut optim)).map(drop)
            })?;
            // Where no backward pass runs, loading sweeps: no more stays than the leaves of half a megabyte.
            if ranks == 1 {
                let unswept =
                    repeated("a restore", 3000, &mut || checkpoints.restore(TrainState::new(&mut model)).map(drop))?;
                assert!(unswept < 1 << 20, "3000 restores keep {unswept} bytes until a backward pass");
            }
            Ok(())
        };
        launch::threads(ranks).run(run).unwrap();
    }
}
