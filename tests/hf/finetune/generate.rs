//! Text from models that are spread over ranks.

use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use super::{model, strategy};
use crate::common::finetune::generate::{Continuation, generate};
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
