//! Optimizers that take the place of others.

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn_parallel::prelude::*;

use crate::common::zoo::{self, assert_close, parameters};
use crate::zero::{LEVELS, config, optimizer, wrap};

/// Muon in the variable where AdamW was: its update depends on the whole of a parameter, of which each rank holds rows.
#[test]
fn another_optimizer_in_the_same_place_is_looked_at_anew() {
    let case = zoo::mlp();
    let run = |config: DataParallelConfig, size: usize| {
        let found = launch::threads(size).run(|rank| {
            let mut model = wrap(&rank, &case.model, config.clone())?;
            let mut optim: ModuleOptimizer = optimizer("adamw");
            for step in 0..4 {
                if step == 2 {
                    optim = optimizer("muon");
                }
                let done = model.step((case.input)(step, 0..4), |model, batch| (case.loss)(model, batch))?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(parameters(&model.assemble()?.valid()))
        });
        found.unwrap().remove(0)
    };
    let expected = run(DataParallelConfig::new(), 1);
    for level in LEVELS {
        assert_close(&expected, &run(config(level), 2), 3e-5, &format!("{level}"));
    }
}
