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

/// burn gives out the state of an optimizer in records, of copies. They are made of 2 MiB of parameters at a time: two copies of these
/// for a moment, one while they are written. Of parameters nothing is copied. Of what is restored burn copies the moments once.
#[test]
fn a_save_holds_copies_of_a_few_moments_and_none_of_the_parameters() {
    let _turn = crate::turn();
    let dir = Dir::fresh();
    // Over both ranks together, as all that is counted.
    let (parts, moments) = (LAYERS * WEIGHT, 2 * LAYERS * WEIGHT);
    let portions = 2 * 2 * (2 * (2 << 20));
    launch::threads(2)
        .run(|rank| {
            let device = rank.device().autodiff();
            let mut model = Deep::new(&device).tensor_parallel(&rank, Plan::new().shard("layers.*.weight", 1))?;
            let mut optim: ModuleOptimizer = AdamConfig::new().init();
            let x = Tensor::<2>::ones([2, WIDTH], &device);
            let step = model.step(x, |model, x| model.loss(x))?;
            model = model.optimize(&mut optim, 1e-3, step)?;
            let mut checkpoints = Checkpointer::new(&rank, dir.path(), CheckpointOptions::new())?;
            let (_, alone) = most(&rank, || checkpoints.save(1, TrainState::new(&mut model)))?;
            let (_, held) =
                most(&rank, || checkpoints.save(2, TrainState::new(&mut model).with_optimizer("adam", &mut optim)))?;
            let (_, restored) = most(&rank, || {
                let mut fresh: ModuleOptimizer = AdamConfig::new().init();
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("adam", &mut fresh))
            })?;
            assert!(alone < REST, "saving parameters held {alone} bytes beside {parts}");
            assert!(held < portions + REST, "saving held {held} bytes beside the state, with moments of {moments}");
            let bound = parts + 2 * moments + 2 * WEIGHT + REST;
            assert!(restored < bound, "restoring held {restored} bytes, for a state of {}", parts + moments);
            Ok(())
        })
        .unwrap();
}
