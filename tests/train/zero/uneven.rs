//! Eager steps in which other ranks have data than in the steps before.

use burn::module::{Module, ParamGroup};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::{config, optimizer};
use crate::common::cases;
use crate::common::checkpointing::own_by;
use crate::common::failing::LONG;

/// How many micro-batches each rank has in a step.
const PLANS: [[[usize; 3]; 6]; 3] = [
    [[1, 0, 1], [1, 1, 1], [1, 0, 2], [2, 0, 1], [1, 1, 1], [2, 1, 2]],
    [[1, 0, 2], [1, 1, 1], [0, 2, 0], [2, 2, 2], [1, 0, 1], [1, 1, 1]],
    [[0, 1, 1], [0, 0, 0], [1, 1, 1], [2, 1, 0], [1, 1, 2], [1, 1, 1]],
];

/// What a rank without data has not learned of the order of gathers, the others do not go by either.
#[test]
fn ranks_take_turns_in_having_no_data() {
    let mut case = cases::mlp();
    case.model = case.model.freeze_group(ParamGroup::from_paths(vec!["between.0.weight", "between.0.bias"]));
    let losses = |plan: &[[usize; 3]; 6], engine, keep| {
        let data = config(Sharding::Parameters).with_keep(keep);
        let strategy = Strategy::new().with_dp(3).with_data(data).with_engine(engine);
        let ran = launch::threads(3).timeout(LONG).run(|rank| {
            let mut model = own_by(&case.model, &strategy).parallelize(&rank, &strategy)?;
            let (mut optim, mut losses) = (optimizer("sgd"), Vec::new());
            for (number, counts) in plan.iter().enumerate() {
                let first = 2 * rank.rank();
                let batches = (0..counts[rank.rank()]).map(|at| (case.input)(number, first + at..first + at + 1));
                let step = model.step_micro_batches(batches.collect::<Vec<_>>(), |m, batch| (case.loss)(m, batch))?;
                losses.push(step.loss.item());
                if counts.iter().any(|count| *count > 0) {
                    model = model.optimize(&mut optim, 1e-2, step)?;
                }
            }
            Ok(losses)
        });
        ran.unwrap().swap_remove(0)
    };
    for plan in &PLANS {
        let expected = losses(plan, Engine::Captured, Keep::Pass);
        for keep in [Keep::Pass, Keep::MicroBatch, Keep::Step] {
            for (step, (found, expected)) in losses(plan, Engine::Eager, keep).into_iter().zip(&expected).enumerate() {
                let same = (found - expected).abs() <= 1e-5 * expected.abs() || found.is_nan() && expected.is_nan();
                assert!(same, "{keep:?}, step {step}: {found} for {expected}");
            }
        }
    }
}
