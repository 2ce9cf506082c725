//! What a rank holds while it saves and restores a checkpoint, beside its state.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use burn_parallel::checkpoint::{CheckpointOptions, Checkpointer, TrainState};
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
            let mut checkpoints = Checkpointer::new(&rank, dir.path(), CheckpointOptions::new())?;
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

/// A restore that succeeds keeps nothing but the state, and neither does a save, however often they are repeated.
#[test]
fn what_is_repeated_keeps_no_memory() {
    let _turn = crate::turn();
    const WARM: usize = 20;
    const ROUNDS: usize = 100;
    for (ranks, strategy) in [
        (1, Strategy::new()),
        (2, Strategy::new().with_dp(2)),
        (2, Strategy::new().with_tp(2, Plan::new().shard("layers.*.weight", 1))),
    ] {
        let dir = Dir::fresh();
        launch::threads(ranks)
            .run(|rank| {
                let device = rank.device().autodiff();
                let model = LinearConfig::new(4, 6).with_bias(false).init(&device);
                let model = Deep { layers: vec![model] };
                let pristine = model.parallelize(&rank, &strategy)?;
                let mut optim: ModuleOptimizer = AdamConfig::new().init();
                let mut model = pristine.clone();
                let step = model.step(Tensor::<2>::ones([2, 4], &device), |model, x| model.loss(x))?;
                model = model.optimize(&mut optim, 1e-3, step)?;
                let mut checkpoints = Checkpointer::new(&rank, dir.path(), CheckpointOptions::new())?;
                checkpoints.save(1, TrainState::new(&mut model).with_optimizer("adam", &mut optim))?;
                let kept = |what: &str, run: &mut dyn FnMut() -> Result<(), Error>| {
                    for _ in 0..WARM {
                        run()?;
                    }
                    rank.barrier()?;
                    let before = crate::memory::held();
                    rank.barrier()?;
                    for _ in 0..ROUNDS {
                        run()?;
                    }
                    rank.barrier()?;
                    let each = (crate::memory::held() - before) / ROUNDS as isize;
                    rank.barrier()?;
                    println!("{strategy}: {what}: {each} bytes each");
                    Ok::<_, Error>(())
                };
                kept("fresh", &mut || {
                    let (mut model, mut optim) = (pristine.clone(), AdamConfig::new().init());
                    checkpoints.restore(TrainState::new(&mut model).with_optimizer("adam", &mut optim)).map(drop)
                })?;
                kept("model alone", &mut || {
                    let mut model = pristine.clone();
                    checkpoints.restore(TrainState::new(&mut model)).map(drop)
                })?;
                kept("the same", &mut || {
                    checkpoints.restore(TrainState::new(&mut model).with_optimizer("adam", &mut optim)).map(drop)
                })?;
                kept("save", &mut || {
                    checkpoints.save(1, TrainState::new(&mut model).with_optimizer("adam", &mut optim)).map(drop)
                })?;
                Ok(())
            })
            .unwrap();
    }
}
