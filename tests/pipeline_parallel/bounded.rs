//! However many shapes come, so many graphs are kept.

use burn::nn::{Linear, LinearConfig};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

type Model = (Linear, Linear);

fn model() -> Model {
    let device = Device::flex().autodiff();
    let layer = |inputs, outputs| {
        let layer: Linear = LinearConfig::new(inputs, outputs).init(&device);
        layer
    };
    (layer(4, 6), layer(6, 2))
}

fn loss(model: &Model, rows: Tensor<2>) -> Tensor<1> {
    model.1.forward(model.0.forward(rows).tanh()).powf_scalar(2.0).mean()
}

fn forward(model: &Model, rows: Tensor<2>) -> Tensor<2> {
    model.1.forward(model.0.forward(rows).tanh())
}

fn rows(count: usize) -> Tensor<2> {
    let numbers = Tensor::<1, Int>::arange(0..4 * count as i64, &Device::flex().autodiff());
    numbers.float().mul_scalar(0.01).sin().reshape([count, 4])
}

/// Shapes that come and go: more than are kept, some of them again.
const SHAPES: [usize; 14] = [4, 5, 6, 7, 8, 4, 9, 5, 10, 11, 4, 4, 12, 6];

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
