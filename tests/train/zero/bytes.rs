//! Bytes held and bytes moved, as exact numbers.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::Tensor;
use burn_pack::Reader;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Rows;

use super::{config, wrap};
use crate::common::cases;

/// The bytes of an optimizer's state.
pub fn state_bytes(optim: &ModuleOptimizer) -> usize {
    let reader = Reader::from_bytes(optim.to_record().into_bytes().unwrap()).unwrap();
    let tensors = reader.into_tensors().unwrap();
    tensors.into_iter().map(|tensor| tensor.into_parts().unwrap().2.iter().product::<usize>() * 4).sum()
}

/// The bytes of a rank's rows of all parameters, zeros included.
pub fn row_bytes<M: Module>(model: &M, ranks: usize) -> u64 {
    struct Sum(usize, u64);
    impl ModuleVisitor for Sum {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let shard = Rows::new(&param.lazy_shape(), self.0).unwrap().shard_dims();
            self.1 += 4 * shard.iter().product::<usize>() as u64;
        }
    }
    let mut sum = Sum(ranks, 0);
    model.visit(&mut sum);
    sum.1
}

/// AdamW has two moments of each element. What is moved is what an all-reduce of the padded parameters moves.
#[test]
fn state_is_divided_and_no_more_is_moved_than_by_an_all_reduce() {
    let case = cases::mlp();
    let whole = 4 * case.model.num_params();
    for size in [2, 4, 8] {
        for (level, micro_batches) in [(Sharding::Optimizer, 1), (Sharding::Optimizer, 2), (Sharding::Gradients, 2)] {
            launch::threads(size)
                .run(|rank| {
                    let mut model = wrap(&rank, &case.model, config(level))?;
                    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                    let rows = row_bytes(&case.model, rank.size());
                    for step in 0..2 {
                        let before = model.counters();
                        let batches = vec![(case.input)(step, 0..2); micro_batches];
                        let done = model.step_micro_batches(batches, |model, batch| (case.loss)(model, batch))?;
                        model = model.optimize(&mut optim, 1e-2, done)?;
                        let moved = model.counters() - before;
                        let pass = (rank.size() as u64 - 1) * rows;
                        let reductions = if level == Sharding::Gradients { micro_batches as u64 } else { 1 };
                        assert_eq!(moved.gradients.of("reduce_scatter").bytes, reductions * pass, "{level}");
                        assert_eq!(moved.gradients.total().bytes, reductions * pass, "{level}");
                        // With an optimizer that is new they meet, with a number each.
                        let meeting = if step == 0 { 8 * (rank.size() as u64 - 1) } else { 0 };
                        assert_eq!(moved.parameters.of("all_gather").bytes, pass + meeting, "{level}");
                        assert_eq!(moved.parameters.total().bytes, pass + meeting, "{level}");
                    }
                    assert_eq!(state_bytes(&optim), 2 * rows as usize);
                    // Few rows of a small model: zeros are up to 8 rows of 33 in the widest layer.
                    assert!(rows as usize * rank.size() <= whole + 4 * 8 * (33 + 17 + 4 + 3), "{rows} of {whole}");
                    Ok(())
                })
                .unwrap();
        }
    }
}
