//! Evaluation and generation by ranks with different numbers of batches and tokens.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::prelude::*;
use burn::tensor::{DType, TensorData};
use burn_parallel::prelude::*;
use burn_parallel::train::{Engine, Parallel};

use crate::common::checkpointing::{beside, own_by, own_for};
use crate::common::models::device;
use crate::grad_norm::lm::{Kind, Lm, batch, loss};

const MODEL: Kind = Kind { tied: true, frozen: false, dtype: DType::F32 };

fn strategy(engine: Engine, keep: Keep) -> Strategy {
    let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
    Strategy::new().with_data(data).with_engine(engine)
}

/// What a rank begins with, and how many tokens it wants behind that: 1 on the first, 3 on the second, 5 on the third.
fn prompt(rank: usize) -> (Vec<i64>, usize) {
    ((0..2 + rank as i64).collect(), 1 + 2 * rank)
}

fn tokens(text: &[i64]) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(text.to_vec(), [1, text.len()]), &device())
}

/// The likeliest token behind a text.
fn likeliest(logits: Tensor<3>) -> i64 {
    let [_, length, _] = logits.dims();
    logits.narrow(1, length - 1, 1).argmax(2).into_scalar::<i64>()
}

fn next(model: &Parallel<Lm>, text: &[i64]) -> Result<i64, Error> {
    model.forward_with(tokens(text), Lm::logits).map(likeliest)
}

fn alone(model: &Lm, rank: usize) -> Vec<i64> {
    let (model, (mut text, wanted)) = (model.valid(), prompt(rank));
    for _ in 0..wanted {
        text.push(likeliest(model.logits(tokens(&text))));
    }
    text
}

/// `join` tells a rank that is done that others are not: it goes on with them.
#[test]
fn texts_of_unequal_lengths_are_generated_together() {
    let model = MODEL.init(&device());
    for engine in [Engine::Eager, Engine::Captured] {
        for (ranks, keep) in [(2, Keep::Pass), (3, Keep::Pass), (3, Keep::MicroBatch), (2, Keep::Step)] {
            launch::threads(ranks)
                .run(|world| {
                    let strategy = strategy(engine, keep);
                    let split = own_by(&model, &strategy).parallelize(&world, &strategy)?;
                    for _ in 0..2 {
                        let (mut text, wanted) = prompt(world.rank());
                        for turn in split.join(0..wanted) {
                            let mine = turn?.is_some();
                            let token = next(&split, &text)?;
                            if mine {
                                text.push(token);
                            }
                        }
                        assert_eq!(text, alone(&model, world.rank()), "{engine:?} {keep:?}");
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
}

/// Without that, whatever a rank does that is done first, all end with an error that says what to do.
#[test]
fn a_rank_that_stops_before_the_others_ends_all() {
    type Then = fn(&Rank, &mut Parallel<Lm>) -> Result<(), Error>;
    let then: [(&str, usize, Then); 4] = [
        ("waits", 3, |world, _| world.barrier()),
        ("trains", 2, |_, model| model.step(batch(0, &device()), loss).map(drop)),
        ("assembles", 2, |_, model| model.assemble().map(drop)),
        ("leaves", 2, |_, _| Ok(())),
    ];
    let model = MODEL.init(&device());
    for engine in [Engine::Eager, Engine::Captured] {
        for (what, ranks, then) in then {
            let began = Instant::now();
            let error = launch::threads(ranks)
                .timeout(Duration::from_secs(3))
                .run(|world| {
                    let strategy = strategy(engine, Keep::Pass);
                    let mut split = own_by(&model, &strategy).parallelize(&world, &strategy)?;
                    let (text, wanted) = prompt(world.rank());
                    for _ in 0..wanted {
                        next(&split, &text)?;
                    }
                    then(&world, &mut split)
                })
                .unwrap_err();
            assert!(began.elapsed() < Duration::from_secs(20), "{engine:?}: a rank that {what}");
            let said = error.to_string();
            assert!(said.contains("`join`"), "{engine:?}: a rank that {what}: {said}");
        }
    }
}

/// A forward of one's own has no way out but a panic: the run ends with the error all the same.
#[test]
fn a_forward_of_ones_own_ends_the_run_with_the_error() {
    let model = MODEL.init(&device());
    let error = launch::threads(2)
        .timeout(Duration::from_secs(3))
        .run(|world| {
            let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
            let replica = own_for(&model, &data).data_parallel(&world, data)?;
            if world.rank() == 1 {
                replica.logits(beside(&replica, tokens(&[1, 2])));
            }
            world.barrier()
        })
        .unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(error.to_string().contains("`join`"), "{error}");
}
