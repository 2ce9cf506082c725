//! However many shapes come, so many graphs are kept.

use burn::module::Module;
use burn_parallel::prelude::*;

use crate::common::shapes::{SHAPES, floats, forward, loss, model, rows};

#[test]
fn graphs_of_a_split_model_are_bounded() {
    let plan = Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0);
    let whole = model();
    for ranks in [1, 2, 3] {
        launch::threads(ranks)
            .run(|rank| {
                let own = || whole.clone().fork(&rank.device().autodiff());
                let mut free = own().tensor_parallel(&rank, &plan)?;
                let mut bound = own().tensor_parallel(&rank, &plan)?.with_graphs(3).with_seed(0);
                for (step, count) in SHAPES.into_iter().enumerate() {
                    let losses =
                        [&mut free, &mut bound].map(|model| model.step(rows(count), loss).map(|step| step.loss.item()));
                    let [free_loss, bound_loss] = losses;
                    assert_eq!(free_loss?, bound_loss?, "step {step}");
                    if step % 2 == 0 {
                        assert_eq!(
                            floats(bound.forward_with(rows(count), forward)?),
                            floats(free.forward_with(rows(count), forward)?)
                        );
                    }
                    assert!(bound.graphs() <= 6, "{}", bound.graphs());
                }
                let (mut steps, mut forwards) =
                    (SHAPES.to_vec(), SHAPES.iter().step_by(2).copied().collect::<Vec<_>>());
                [&mut steps, &mut forwards].into_iter().for_each(|shapes| {
                    shapes.sort_unstable();
                    shapes.dedup();
                });
                assert_eq!((free.graphs(), bound.graphs()), (steps.len() + forwards.len(), 6));
                Ok(())
            })
            .unwrap();
    }
}
