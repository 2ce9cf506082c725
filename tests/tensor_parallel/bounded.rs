//! However many shapes come, so many graphs are kept.

use burn::nn::{Linear, LinearConfig};
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
