//! A rank reads what it needs, and no more.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::common::models::device;
use crate::common::reference::{filled, own, values};

const MIB: u64 = 1 << 20;

/// A weight of 16 MiB. Of a part of the rows a rank reads these; of a part of the columns, of which each line is short,
/// all blocks of the slices that have some.
#[test]
fn bytes_are_those_of_the_slices() {
    let linear: Linear = filled(LinearConfig::new(2048, 2048).with_bias(false).init(&device()));
    let expected = values(&linear);
    let (by_rows, by_columns) = (Plan::new().shard("weight", 0), Plan::new().shard("weight", 1));
    for (save, load, read) in [
        (None, None, 16 * MIB),
        (None, Some((4, &by_rows)), 4 * MIB),
        (Some((2, &by_rows)), Some((4, &by_rows)), 4 * MIB),
        (Some((4, &by_rows)), Some((2, &by_rows)), 8 * MIB),
        (Some((2, &by_columns)), Some((4, &by_columns)), 8 * MIB),
        (Some((4, &by_columns)), Some((4, &by_columns)), 4 * MIB),
        (Some((4, &by_columns)), Some((4, &by_rows)), 4 * MIB),
    ] {
        let dir = Dir::fresh();
        let strategy = |axes: Option<(usize, &Plan)>| match axes {
            Some((tp, plan)) => (tp, Strategy::new().with_tp(tp, plan.clone())),
            None => (1, Strategy::new()),
        };
        let (ranks, saving) = strategy(save);
        let run = launch::threads(ranks).run(|world| {
            let mut model = own(&linear).parallelize(&world, &saving)?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            checkpoints.save(0, TrainState::new(&mut model))
        });
        run.unwrap();
        let (ranks, loading) = strategy(load);
        let restored = launch::threads(ranks).run(|world| {
            let zeros = own(&linear).map(&mut Zeros);
            let mut model = zeros.parallelize(&world, &loading)?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            let restored = checkpoints.restore(TrainState::new(&mut model))?.unwrap();
            assert_eq!(values(&model.assemble()?), expected);
            Ok(restored.bytes_read)
        });
        assert_eq!(restored.unwrap(), vec![read; ranks], "{save:?} to {load:?}");
    }
}

struct Zeros;

impl burn::module::ModuleMapper for Zeros {
    fn map_float<const D: usize>(
        &mut self,
        param: burn::module::Param<burn::tensor::Tensor<D>>,
    ) -> burn::module::Param<burn::tensor::Tensor<D>> {
        param.map(|value| value.zeros_like().detach().require_grad())
    }
}
