//! What a rank holds while it saves and restores a checkpoint, beside its state.

use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::tensor::Tensor;
use burn_parallel::checkpoint::{CheckpointOptions, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::directories::{REST, dir::Dir, most};
use crate::memory::{Mlp, WHOLE, plan};

/// burn gives out the state of an optimizer as a whole, in a record, of which a file in memory is made: two copies of the moments of
/// this rank are allocated for a moment (of which one is there, for the record goes as the file comes), one while they are written. Of
/// parameters nothing is copied, or one tensor.
#[test]
fn a_save_holds_copies_of_the_moments_and_none_of_the_parameters() {
    let _turn = crate::turn();
    let dir = Dir::fresh();
    // Two weights, over both ranks together.
    let (parts, moments) = (2 * WHOLE, 4 * WHOLE);
    launch::threads(2)
        .run(|rank| {
            let device = rank.device().autodiff();
            let mut model = Mlp::new(&device).tensor_parallel(&rank, plan())?;
            let mut optim: ModuleOptimizer = AdamConfig::new().init();
            let x = Tensor::<2>::ones([2, 1024], &device);
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
            assert!(held < 2 * moments + REST, "saving held {held} bytes beside the state, with moments of {moments}");
            // The new parameters beside the old ones, and the moments as they are read and as burn takes them.
            let bound = parts + 2 * moments + REST;
            assert!(restored < bound, "restoring held {restored} bytes, for a state of {}", parts + moments);
            Ok(())
        })
        .unwrap();
}
