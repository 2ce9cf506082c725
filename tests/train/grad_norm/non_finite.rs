//! A gradient that is NaN on one rank: all know, and all do the same.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::train::{Clip, NonFinite, Norm};

use super::meshes::{Meshed, on_mesh};
use crate::common::models::Numbers;
use crate::common::reference::{Wholes, all_same, own, values};

const WIDTH: usize = 8;
const ROWS: usize = 8;

/// Where an input is 0, the gradient of a root is NaN, and nothing else is: not the loss, nor other gradients.
#[derive(Module, Debug)]
struct Rooted {
    first: Linear,
    roots: Param<Tensor<1>>,
    last: Linear,
}

impl Rooted {
    fn new() -> Self {
        let device = Device::flex().autodiff();
        let mut numbers = Numbers(5);
        let mut linear = |takes: usize, gives: usize| {
            let mut linear = LinearConfig::new(takes, gives).init(&device);
            linear.weight = Param::from_tensor(numbers.tensor([takes, gives], &device));
            linear.bias = Some(Param::from_tensor(numbers.tensor([gives], &device)));
            linear
        };
        Self {
            first: linear(WIDTH, WIDTH),
            last: linear(WIDTH, 2),
            roots: Param::from_tensor(Tensor::ones([WIDTH], &device)),
        }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        let roots = (self.roots.val().unsqueeze() * x.clone()).sqrt();
        self.last.forward(self.first.forward(x) + roots).powi_scalar(2).mean()
    }
}

fn plan() -> Plan {
    Plan::new().shard("first.weight", 1).shard("first.bias", 0).shard("roots", 0).shard("last.weight", 0)
}

fn cut(stages: usize) -> Cut {
    Cut::before(if stages > 1 { vec!["roots".to_string()] } else { vec![] })
}

/// The rows of a step, all greater than 0 but for one number.
fn rows(step: usize, zero: Option<[usize; 2]>) -> Tensor<2> {
    let device = Device::flex().autodiff();
    let x = Numbers(step as u64 + 1).tensor([ROWS, WIDTH], &device).abs() + 0.1;
    match zero {
        Some([row, column]) => x.slice_assign([row..row + 1, column..column + 1], Tensor::zeros([1, 1], &device)),
        None => x,
    }
}

fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().with_epsilon(1e-2).init()
}

/// The step whose gradient is not finite.
const BAD: usize = 1;
const STEPS: usize = 3;

struct Train {
    clip: Clip,
    zero: [usize; 2],
    /// The world rank that brings it.
    rank: usize,
    what: String,
}

impl Meshed<Rooted> for Train {
    fn run<P: ParallelModule<Model = Rooted>>(self, mut model: P, dp: &Communicator) -> Result<(), Error> {
        let Self { clip, zero, rank, what } = self;
        let mut optim = optimizer();
        let own_rows = part(ROWS, dp.size(), dp.rank());
        for number in 0..STEPS {
            let x = rows(number, (number == BAD).then_some(zero)).slice([own_rows.clone()]);
            let step = model.step(x, |model, x| model.loss(x))?;
            assert!(step.loss.item().is_finite(), "{what}");
            let step = match step.clip_grad_norm(&model, clip) {
                Ok(step) => step,
                Err(error) => {
                    assert_eq!(number, BAD, "{what}: {error}");
                    assert_eq!(error, Error::NonFinite { path: "roots".into(), rank }, "{what}");
                    // Whoever wants to can go on, and save what is there.
                    return dp.barrier();
                }
            };
            assert_eq!(step.skipped, number == BAD, "{what}, step {number}");
            assert_eq!(step.grads.is_empty(), step.skipped);
            assert_eq!(step.grad_norm.is_some_and(f64::is_finite), !step.skipped);
            assert_eq!(model.counters().skipped, u64::from(number >= BAD), "{what}, step {number}");
            assert_eq!(
                step.not_finite.as_ref().is_some_and(|bad| bad.path == "roots" && bad.rank == rank),
                step.skipped
            );
            model = optim.step(0.1, model, step.grads);
        }
        assert_eq!(clip, clip.with_non_finite(NonFinite::Skip), "{what}: nothing has stopped");
        all_same(&what, &without_the_bad_step(), &values(&model.assemble()?), 2e-5);
        Ok(())
    }
}

/// What one device has after the steps but the bad one: neither its parameters nor its moments have seen that.
fn without_the_bad_step() -> Wholes {
    let (mut model, mut optim) = (own(&Rooted::new()), optimizer());
    for number in (0..STEPS).filter(|number| *number != BAD) {
        let grads = GradientsParams::from_grads(model.loss(rows(number, None)).backward(), &model);
        model = optim.step(0.1, model, grads);
    }
    values(&model)
}

fn everywhere(clip: Clip) {
    // Sizes of `dp`, `pp` and `tp`; row and column of the 0; the world rank that has it.
    let cases = [
        ([1, 1, 1], [0, 0], 0),
        ([2, 1, 1], [7, 3], 1),
        ([4, 1, 1], [5, 3], 2),
        ([1, 1, 2], [0, 0], 0),
        ([1, 1, 2], [0, 6], 1),
        ([1, 1, 4], [3, 5], 2),
        ([1, 2, 1], [3, 5], 1),
        ([1, 2, 2], [3, 7], 3),
        ([2, 1, 2], [6, 2], 2),
        ([2, 2, 1], [6, 2], 3),
        ([2, 2, 2], [1, 7], 3),
        ([2, 2, 2], [6, 7], 7),
    ];
    for (axes, zero, rank) in cases {
        let model = Rooted::new();
        launch::threads(axes.iter().product())
            .run(|world| {
                let train = Train { clip, zero, rank, what: format!("{axes:?} by {clip:?}") };
                on_mesh(&world, axes, model.clone(), &plan(), cut, train)
            })
            .unwrap();
    }
}

#[test]
fn all_ranks_stop_and_name_the_parameter_and_the_rank() {
    everywhere(Clip::at(1e3));
    everywhere(Clip::never().with_norm(Norm::Infinity));
}

#[test]
fn a_skipped_step_leaves_parameters_and_moments_and_is_counted() {
    everywhere(Clip::at(1e3).with_non_finite(NonFinite::Skip));
    everywhere(Clip::never().with_norm(Norm::Infinity).with_non_finite(NonFinite::Skip));
}
