//! What the norm takes is counted as such, and not as something else.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;

use crate::common::models::{Numbers, device};
use crate::common::reference::filled;

fn layers() -> Vec<Linear> {
    filled(vec![LinearConfig::new(4, 8).init(&device()), LinearConfig::new(8, 2).init(&device())])
}

#[expect(clippy::ptr_arg, reason = "the model is a `Vec`")]
fn loss(model: &Vec<Linear>, x: Tensor<2>) -> Tensor<1> {
    model[1].forward(model[0].forward(x).tanh()).powi_scalar(2).mean()
}

#[test]
fn collectives_of_the_norm_are_counted_as_its_own() {
    let plan = || Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0);
    let pipeline = || PipelineConfig::new(2).with_cut(Cut::before(["1.*"]));
    // dp, pp, tp, and the collectives of a norm: one over what shares the model.
    for (axes, calls) in [([2, 1, 1], 0), ([1, 2, 1], 1), ([1, 1, 2], 1), ([2, 1, 2], 1), ([1, 2, 2], 1)] {
        let [dp, pp, tp] = axes;
        launch::threads(dp * pp * tp)
            .run(|rank| {
                let mut strategy = Strategy::new().with_dp(dp);
                if tp > 1 {
                    strategy = strategy.with_tp(tp, plan());
                }
                if pp > 1 {
                    strategy = strategy.with_pp(pp, pipeline());
                }
                let mut model = layers().parallelize(&rank, &strategy)?;
                let x = Numbers(3).tensor([4, 4], &device());
                // The first step compares graphs as well.
                model.step(x.clone(), loss)?;
                let before = model.counters();
                let step = model.step(x, loss)?;
                let plain = model.counters() - before.clone();
                let step = step.clip_grad_norm(&model, 1.0)?;
                let clipped = model.counters() - before;
                assert_eq!(plain.norm.total().calls, 0, "{axes:?}");
                assert_eq!(clipped.norm.total().calls, calls, "{axes:?}");
                assert_eq!(step.counters.norm.total().calls, calls, "{axes:?}");
                for (name, plain, clipped) in [
                    ("gradients", &plain.gradients, &clipped.gradients),
                    ("control", &plain.control, &clipped.control),
                    ("tensor", &plain.tensor, &clipped.tensor),
                    ("pipeline", &plain.pipeline, &clipped.pipeline),
                ] {
                    let (plain, clipped) = (plain.total(), clipped.total());
                    assert_eq!((plain.calls, plain.bytes), (clipped.calls, clipped.bytes), "{axes:?}, {name}");
                }
                assert_eq!(clipped.total().total().calls, plain.total().total().calls + calls);
                Ok(())
            })
            .unwrap();
    }
}
