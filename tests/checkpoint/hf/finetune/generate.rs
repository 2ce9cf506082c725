//! Text from models that are spread over ranks.

use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Engine;

use super::{model, strategy};
use crate::common::finetune::generate::{Continuation, generate, padded};
use crate::common::finetune::model::whole_rows;
use crate::common::models::device;

fn continuation(axes: [usize; 3]) -> Continuation {
    let rows = if axes[1] > 1 { 2 } else { 1 };
    Continuation { length: 30, longest: 64, ends: Vec::new(), temperature: 0.0, seed: 3, rows }
}

fn written(axes: [usize; 3], sharding: Sharding, change: impl Fn(&mut Continuation) + Sync) -> Vec<u32> {
    let model = model();
    let mut texts = launch::threads(axes.iter().product())
        .run(|world| {
            let model = model.clone().fork(&device()).parallelize(&world, &strategy(axes, sharding))?;
            let mut model = model;
            let batch = crate::common::llama::Batch::of_documents(Tensor::ones([2, 9], &device()));
            model.prepare(batch, crate::common::llama::Llama::loss)?;
            let mut config = continuation(axes);
            change(&mut config);
            // Beyond the first length that is captured.
            generate(&model, &world.device(), &[5, 9, 2, 40, 11], &config)
        })
        .unwrap();
    let first = texts.remove(0);
    assert!(texts.iter().all(|text| *text == first), "{axes:?}: {texts:?}");
    first
}

#[test]
fn every_mesh_writes_the_same() {
    let expected = written([1, 1, 1], Sharding::None, |_| ());
    assert_eq!(expected.len(), 30);
    for (axes, sharding) in [
        ([2, 1, 1], Sharding::None),
        ([2, 1, 1], Sharding::Parameters),
        ([1, 2, 1], Sharding::None),
        ([1, 1, 2], Sharding::None),
    ] {
        assert_eq!(written(axes, sharding, |_| ()), expected, "{axes:?}");
    }
    // It ends with a token, and with what the model was made for.
    let end = expected[7];
    let until = expected.iter().position(|token| *token == end).unwrap();
    assert_eq!(written([1, 1, 2], Sharding::None, |config| config.ends = vec![47, end]), expected[..until]);
    assert_eq!(written([1, 1, 1], Sharding::None, |config| config.longest = 12), expected[..7]);
    let drawn = written([1, 1, 1], Sharding::None, |config| config.temperature = 2.0);
    assert_ne!(drawn, expected);
    assert_eq!(written([2, 1, 1], Sharding::None, |config| config.temperature = 2.0), drawn);
}

#[test]
fn a_prompt_has_tokens_and_not_too_many() {
    let error = launch::threads(1).run(|world| {
        let model = model().parallelize(&world, &Strategy::new())?;
        let config = continuation([1, 1, 1]);
        let long = generate(&model, &world.device(), &[1; 65], &config).unwrap_err().to_string();
        assert!(long.contains("has 1 to 64 tokens, as many as the model takes, not 65"), "{long}");
        generate(&model, &world.device(), &[], &config)
    });
    assert!(error.unwrap_err().to_string().contains("not 0"));
}

/// Prompts of unequal lengths have the tokens that they have alone: padding is not seen, whatever the model is spread
/// over.
#[test]
fn prompts_of_any_length_are_padded_to_few() {
    let lengths: std::collections::BTreeSet<usize> = (1..=256).map(padded).collect();
    assert_eq!(Vec::from_iter(lengths), [32, 64, 128, 256]);
    let model = model();
    let text = |length: usize| (0..length).map(|at| (at * 7 % 47) as u32).collect::<Vec<u32>>();
    let alone = |length: usize| {
        let ints = |values: Vec<i64>| {
            let dims = [1, values.len()];
            Tensor::<2, Int>::from_data(burn::tensor::TensorData::new(values, dims), &device())
        };
        let (positions, documents) = whole_rows([1, length], &device());
        let tokens = ints(text(length).into_iter().map(i64::from).collect());
        let logits = model.next(tokens, positions, documents, ints(vec![length as i64 - 1]));
        logits.argmax(1).into_scalar::<i64>() as u32
    };
    let lengths = [1, 5, 31, 32, 33, 63];
    let expected = lengths.map(alone);
    assert!(expected.iter().any(|token| *token != expected[0]), "{expected:?}");
    for (axes, engine) in [([1, 1, 1], Engine::Eager), ([1, 1, 1], Engine::Captured), ([1, 1, 2], Engine::Auto)] {
        let found = launch::threads(axes.iter().product())
            .run(|world| {
                let strategy = strategy(axes, Sharding::None).with_engine(engine);
                let model = model.clone().fork(&device()).parallelize(&world, &strategy)?;
                let config = Continuation { length: 1, ..continuation(axes) };
                let first = |length| Ok(generate(&model, &world.device(), &text(length), &config)?[0]);
                lengths.into_iter().map(first).collect::<Result<Vec<u32>, Error>>()
            })
            .unwrap();
        assert!(found.iter().all(|found| *found == expected), "{axes:?}, {engine:?}: {found:?} {expected:?}");
    }
}
