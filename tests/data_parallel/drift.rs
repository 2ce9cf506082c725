//! What ranks do for themselves: replicas that drift apart, and backwards that are not the replica's.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Tensor};
use burn_parallel::comm::part;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::prelude::*;

use crate::common::checkpointing::{beside, own_for};
use crate::common::reference::{difference, own, values};

fn sgd() -> ModuleOptimizer {
    SgdConfig::new().init()
}

fn layer(rank: &Rank) -> Linear {
    LinearConfig::new(3, 2).init(&rank.device().autodiff())
}

/// What the last rank does for itself before the fourth step.
type Change = fn(Replica<Eager<Linear>>, Linear) -> Replica<Eager<Linear>>;

struct Scale;

impl ModuleMapper for Scale {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| Tensor::from_inner(value.inner() * 1.5).require_grad())
    }
}

#[test]
fn a_record_or_a_map_on_one_rank_is_found() {
    let changes: [(&str, Change); 2] =
        [("record", |model, other| model.load_record(other.into_record())), ("map", |model, _| model.map(&mut Scale))];
    for (name, change) in changes {
        for size in [2, 4] {
            let outcome = launch::threads(size).run(|rank| {
                let config = DataParallelConfig::new().with_compare_every(2);
                let (mut model, mut optim) = (layer(&rank).data_parallel(&rank, config)?, sgd());
                for step in 0..6 {
                    if step == 3 && rank.rank() == size - 1 {
                        model = change(model, layer(&rank));
                    }
                    let x = Tensor::<2>::ones([2, 3], &rank.device().autodiff());
                    let done = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
                    model = model.optimize(&mut optim, 0.1, done)?;
                    assert!(step < 4, "{name}: not found in step {step}");
                }
                Ok(())
            });
            let error = outcome.unwrap_err();
            let Error::ModelMismatch { rank, path, problem, .. } = &error else { panic!("{name}: {error}") };
            assert_eq!((*rank, path.as_str()), (size - 1, "weight"), "{name}");
            assert!(problem.contains("drifted apart"), "{problem}");
        }
    }
}

/// A backward that is wanted for the gradient of an input alone (adversarial examples, saliency) adds nothing to the
/// step that follows, however gradients are reduced.
#[test]
fn the_gradient_of_an_input_stays_out_of_the_step() {
    const ROWS: usize = 4;
    let model: Linear = LinearConfig::new(3, 2).init(&Device::flex().autodiff());
    let rows = |step: usize, range: std::ops::Range<usize>| {
        let values = range.flat_map(|row| (0..3).map(move |place| ((row * 3 + place + 7 * step) as f32).sin()));
        Tensor::<1>::from_floats(&*values.collect::<Vec<_>>(), &Device::flex().autodiff()).reshape([-1, 3])
    };
    let loss = |model: &Linear, x: Tensor<2>| model.forward(x).tanh().powi_scalar(2).mean();
    let mut expected = own(&model);
    for step in 0..3 {
        let grads = GradientsParams::from_grads(loss(&expected, rows(step, 0..ROWS)).backward(), &expected);
        expected = sgd().step(0.5, expected, grads);
    }
    for size in [2, 4] {
        for sharding in [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters] {
            let found = launch::threads(size).run(|rank| {
                let config = DataParallelConfig::new().with_sharding(sharding);
                let own = own_for(&model, &config);
                let (mut model, mut optim) = (own.data_parallel(&rank, config)?, sgd());
                for step in 0..3 {
                    let mine = part(ROWS, size, rank.rank());
                    let x = beside(&model, rows(step, mine.clone())).require_grad();
                    let of_input = x.grad(&loss(&model, x.clone()).backward()).expect("it is wanted");
                    assert!(of_input.abs().sum().into_scalar::<f32>() > 0.0);
                    let done = model.step(rows(step, mine), |model, x| loss(model, x))?;
                    model = model.optimize(&mut optim, 0.5, done)?;
                }
                Ok(values(&model.assemble()?))
            });
            for found in found.unwrap() {
                let apart = difference(&values(&expected), &found);
                assert!(apart < 1e-5, "{apart}, {sharding} on {size}");
            }
        }
    }
}
