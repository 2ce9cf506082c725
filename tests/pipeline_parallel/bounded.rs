//! However many shapes come, so many graphs are kept.

use burn::module::Module;
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn_parallel::prelude::*;

use crate::common::shapes::{SHAPES, floats, forward, loss, model, rows};

#[test]
fn graphs_of_a_pipeline_are_bounded() {
    let whole = model();
    for ranks in [1, 2] {
        launch::threads(ranks)
            .run(|rank| {
                let cut = if rank.size() == 1 { Cut::default() } else { Cut::before(["1.*"]) };
                let config = || PipelineConfig::new(2).with_cut(cut.clone());
                let own = || whole.clone().fork(&rank.device().autodiff());
                let mut free = own().pipeline_parallel(&rank, config())?;
                let mut bound = own().pipeline_parallel(&rank, config().with_graphs(2))?;
                let mut optims: [ModuleOptimizer; 2] = [SgdConfig::new().init(), SgdConfig::new().init()];
                for count in SHAPES {
                    let (a, b) = (free.step(rows(count), loss)?, bound.step(rows(count), loss)?);
                    assert_eq!(a.loss.item(), b.loss.item(), "{count} rows");
                    let [first, second] = &mut optims;
                    free = first.step(0.1, free, a.grads);
                    bound = second.step(0.1, bound, b.grads);
                    assert!(bound.graphs() <= 2, "{}", bound.graphs());
                }
                for count in [4, 6, 8] {
                    assert_eq!(
                        floats(bound.forward_with(rows(count), forward)?),
                        floats(free.forward_with(rows(count), forward)?)
                    );
                }
                assert_eq!(bound.graphs(), 4);
                Ok(())
            })
            .unwrap();
    }
    // All ranks keep the same.
    let kept = launch::threads(2).run(|rank| {
        let config = PipelineConfig::new(2).with_graphs(1 + rank.rank());
        Ok(whole.clone().pipeline_parallel(&rank, config).map(|_| ()))
    });
    kept.unwrap().into_iter().for_each(|result| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("the pipeline's graphs"), "{message}");
    });
}
