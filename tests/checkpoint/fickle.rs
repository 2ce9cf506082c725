//! An optimizer that gives out another state each time: a save says whose it is.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::module::ParamGroup;
use burn::optim::{DynOptimizer, DynState, LearningRate, ModuleOptimizer, SgdConfig, StateSink, StateSource};
use burn::tensor::kind::BridgeTensor;
use burn::tensor::{Device, TensorData};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::net::{Axes, Net, train};

/// Of which each moment is longer than the one before.
struct Fickle(AtomicUsize);

impl DynOptimizer for Fickle {
    fn step_dyn(
        &self,
        rank: usize,
        _: LearningRate,
        tensor: BridgeTensor,
        _: BridgeTensor,
        _: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        (tensor, Some(DynState::create((), rank)))
    }

    fn to_device_dyn(&self, state: DynState, _: &Device) -> DynState {
        state
    }

    fn state_flatten(&self, prefix: &str, _: &DynState, into: &mut StateSink) {
        let len = 1 + self.0.fetch_add(1, Relaxed);
        into.push_tensor(prefix, "moment", TensorData::new(vec![0f32; len], [len]));
    }

    fn state_unflatten(&self, rank: usize, _: &str, _: &mut StateSource, _: &Device) -> Option<DynState> {
        Some(DynState::create((), rank))
    }
}

#[test]
fn a_save_names_the_parameter_whose_moments_change_by_themselves() {
    let (dir, net, axes) = (Dir::fresh(), Net::new(), Axes::new(2, 1, 1));
    let errors = launch::threads(2).run(|world| {
        // By one rank alone.
        let only: ModuleOptimizer = SgdConfig::new().init();
        let head = ParamGroup::from_regex("head.bias$").unwrap();
        let mut optim = match world.rank() {
            0 => only,
            _ => only.with_group(head, Fickle(AtomicUsize::new(0)), None),
        };
        let mut model = train(axes.wrap(&world, &net)?, &mut optim, (0, 1))?.0;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        let failed = checkpoints.save(1, TrainState::new(&mut model).with_optimizer("fickle", &mut optim));
        assert_eq!(checkpoints.latest()?, None);
        Ok(failed.unwrap_err().to_string())
    });
    let errors = errors.unwrap();
    assert_eq!(errors[0], errors[1]);
    let says = "rank 1: optimizer `fickle` does not give out the same moments of `head.bias` twice";
    assert!(errors[0].contains(says), "{}", errors[0]);
}
