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
