//! Layers that are put into replicas which hold rows of their parameters.

use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::prelude::*;

use super::config;
use crate::common::checkpointing::{beside, checkpointing, own_for};
use crate::common::models::{Numbers, device};
use crate::common::reference::{all_same, filled, values};

/// Each layer is a group.
const WIDTH: usize = 131;

fn layers() -> Vec<Linear> {
    filled((0..3).map(|_| LinearConfig::new(WIDTH, WIDTH).init(&device())).collect())
}

fn input(step: usize, rank: usize) -> Tensor<2> {
    Numbers((step * 31 + rank * 7) as u64).tensor([2, WIDTH], &device())
}

fn loss(layers: &[Linear], x: Tensor<2>) -> Tensor<1> {
    layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).powi_scalar(2).mean()
}

type Model = Replica<Eager<Vec<Linear>>>;

/// What goes on after the model was changed.
type Way = fn(Model, Tensor<2>) -> Result<(), Error>;

const WAYS: [(&str, Way); 5] = [
    ("step", |mut model, x| model.step(x, |layers, x| loss(layers, x)).map(drop)),
    ("backward", |mut model, x| {
        let loss = loss(&model, beside(&model, x));
        model.backward(loss).map(drop)
    }),
    ("no data", |mut model, _| {
        model.step_micro_batches(Vec::<Tensor<2>>::new(), |layers, x| loss(layers, x)).map(drop)
    }),
    ("evaluation", |model, x| model.forward_with(x, |layers: &Vec<Linear>, x| loss(layers, x)).map(drop)),
    ("assembling", |model, _| model.assemble().map(drop)),
];

/// The error of ranks of which some change their model after a step. They are given what the model was before it was
/// wrapped, and another replica of it.
fn changed(
    way: Way,
    changes: impl Fn(usize) -> bool + Sync,
    change: impl Fn(Model, &[Linear], &Model) -> Model + Sync,
) -> Error {
    let threads = launch::threads(3).timeout(Duration::from_secs(20));
    let ended = threads.run(|rank| {
        let original = own_for(&layers(), &config(Sharding::Parameters));
        let other =
            own_for(&layers(), &config(Sharding::Parameters)).data_parallel(&rank, config(Sharding::Parameters))?;
        let mut model = original.clone().data_parallel(&rank, config(Sharding::Parameters))?;
        model.step(input(0, rank.rank()), |layers, x| loss(layers, x))?;
        if changes(rank.rank()) {
            model = change(model, &original, &other);
        }
        way(model, input(1, rank.rank()))
    });
    ended.unwrap_err()
}

#[track_caller]
fn says(error: &Error, what: &str, words: &[&str]) {
    assert!(matches!(error, Error::InvalidArgument { .. }), "{what}: {error}");
    words.iter().for_each(|word| assert!(error.to_string().contains(word), "{what}: `{word}` is missing in: {error}"));
}

/// A layer from before the model was wrapped has whole parameters, by whose ids the replica gathers rows.
#[test]
fn a_layer_from_before_wrapping_is_refused_by_name() {
    let put_back = |mut model: Model, original: &[Linear], _: &Model| {
        model[1] = original[1].clone();
        model
    };
    let words = ["`1.weight` is whole", "`assemble`", "`init`"];
    for (name, way) in WAYS {
        says(&changed(way, |_| true, put_back), name, &words);
    }
    // Also on rank 0 alone, whose ids all have.
    says(&changed(WAYS[0].1, |rank| rank == 0, put_back), "rank 0", &words);
}

/// One of another replica would be gathered by that, and leave its gradient there.
#[test]
fn a_layer_of_another_replica_is_refused_by_name() {
    let of_another = |mut model: Model, _: &[Linear], other: &Model| {
        model[2] = other[2].clone();
        model
    };
    for (name, way) in WAYS {
        says(&changed(way, |_| true, of_another), name, &["`2.weight` is divided by another replica", "`assemble`"]);
    }
}

/// Whole values in the place of rows.
#[test]
fn rows_of_other_dims_are_refused_by_name() {
    struct Whole;
    impl ModuleMapper for Whole {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| Tensor::ones([WIDTH; D], &value.device()).require_grad())
        }
    }
    let whole = |model: Model, _: &[Linear], _: &Model| model.map(&mut Whole);
    for (name, way) in WAYS {
        let words = ["`0.weight` has the dims [131, 131]", "rows of it with the dims [44, 131]", "`load`"];
        says(&changed(way, |_| true, whole), name, &words);
    }
}

/// What fits goes on: a layer with parameters of its own, and one of the replica itself.
#[test]
fn a_new_layer_and_one_of_its_own_are_taken() {
    let run = |size: usize, config: DataParallelConfig| {
        let ran = launch::threads(size).timeout(Duration::from_secs(20)).run(|rank| {
            let mut model = own_for(&layers(), &config).data_parallel(&rank, config.clone())?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init();
            for step in 0..4 {
                match step {
                    1 => model[1] = filled(LinearConfig::new(WIDTH, WIDTH).init(&model[0].weight.base().device())),
                    2 => model[2] = model[2].clone(),
                    _ => {}
                }
                // Every rank has the same rows.
                let done = model.step(input(step, 0), |layers, x| loss(layers, x))?;
                model = model.optimize(&mut optim, 0.1, done)?;
            }
            Ok(values(&model.assemble()?))
        });
        ran.unwrap().swap_remove(0)
    };
    let expected = run(1, DataParallelConfig::new());
    for size in [2, 3] {
        all_same(&format!("{size} ranks"), &expected, &run(size, config(Sharding::Parameters)), 1e-5);
    }
}

/// In a loop of one's own nobody looks at the model before its forward: the error has the name of what ranks gather.
#[test]
fn a_layer_that_one_rank_alone_replaces_in_its_own_loop_is_named() {
    for place in 0..3 {
        let ended = launch::threads(2).timeout(Duration::from_secs(3)).run(|rank| {
            let config = config(Sharding::Parameters);
            let mut model = own_for(&layers(), &config).data_parallel(&rank, config)?;
            for step in 0..3 {
                if (step, rank.rank()) == (1, 1) {
                    model[place] = filled(LinearConfig::new(WIDTH, WIDTH).init(&checkpointing()));
                }
                let loss = loss(&model, beside(&model, input(step, rank.rank())));
                model.backward(loss)?;
            }
            Ok(())
        });
        let error = ended.unwrap_err().to_string();
        assert!(error.contains(&format!("`{place}")), "layer {place}: {error}");
    }
}
