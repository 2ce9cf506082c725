//! Tokens beyond a vocabulary that is split.

use burn::prelude::*;
use burn_parallel::prelude::*;

use super::{device, tokens};
use crate::common::llama::{self, LLAMA, Llama, LlamaConfig, QWEN2};

/// Tokens of which one is another.
fn with(token: i64, row: usize, place: usize, words: usize) -> Tensor<2, Int> {
    let all = tokens(7, words, 0);
    let one = Tensor::<2, Int>::from_ints([[token]], &device());
    all.slice_assign([row..row + 1, place..place + 1], one)
}

#[test]
fn a_token_beyond_the_vocabulary_is_an_error_with_the_token() {
    for (words, degree) in [(36, 2), (35, 2), (35, 3), (36, 4)] {
        for config in [LLAMA, QWEN2] {
            let config = LlamaConfig { vocab: words, layers: 1, ..llama::small(config) };
            let model = config.init(&device()).train();
            // As an input and a target, in the padding, far away, and below 0.
            for (token, place) in [(words as i64, 0), (words as i64, 6), (1 << 30, 3), (-1, 3), (-100, 6)] {
                let errors = launch::threads(degree).run(|rank| {
                    let mut model = model.clone().fork(&device()).tensor_parallel(&rank, Plan::hugging_face())?;
                    model.step(tokens(7, words, 0), llama::loss)?;
                    let bad = || with(token, 2, place, words);
                    let error = model.step(bad(), llama::loss).unwrap_err().to_string();
                    // Where the loss is computed from whole logits, burn panics as on one device.
                    let forward = |model: &Llama, tokens: Tensor<2, Int>| llama::loss(model, tokens);
                    let evaluated = model.forward_with(bad(), forward).unwrap_err().to_string();
                    assert!(evaluated.contains(&format!("index {token} ")), "{evaluated}");
                    // All is well again.
                    model.step(tokens(7, words, 1), llama::loss)?;
                    Ok(error)
                });
                for error in errors.unwrap() {
                    let said = [format!("index {token} at [2, "), format!("a dim of size {words}"), "axis `tp`".into()];
                    let flat = error.contains(&format!("index {token} at [17, 0]"));
                    assert!(said[1..].iter().all(|said| error.contains(said)), "{error}");
                    assert!(error.contains(&said[0]) || flat, "{error}");
                }
            }
        }
    }
}

#[test]
fn labels_that_are_masked_before_they_are_looked_up_are_no_error() {
    let config = LlamaConfig { layers: 1, ..llama::small(LLAMA) };
    let model = crate::common::models::seeded(config.init(&device()));
    let loss = |model: &Llama, labels: Tensor<2, Int>| {
        let real = labels.clone().greater_equal_elem(0).float();
        llama::loss(model, labels.clamp_min(0)) * real.mean()
    };
    let labels = || with(-100, 1, 4, 36);
    let expected = crate::common::models::eager(&model, |model| loss(model, labels())).0;
    let found = launch::threads(2).run(|rank| {
        let mut model = model.clone().fork(&device()).tensor_parallel(&rank, Plan::hugging_face())?;
        Ok(model.step(labels(), loss)?.loss.item() as f32)
    });
    assert!(found.unwrap().iter().all(|loss| (loss - expected).abs() < 1e-5 * expected));
}

/// Over replicas in the graph, and through a pipeline.
#[test]
fn beside_other_axes_too() {
    let model = llama::small(QWEN2).init(&device()).train();
    let plan = Plan::hugging_face();
    launch::threads(4)
        .run(|rank| {
            let mesh = Mesh::new(&rank, [("dp", 2), ("tp", 2)])?;
            let plan = plan.clone().on("dp", Plan::new().shard_input("", 0));
            let mut model = model.clone().fork(&device()).tensor_parallel_over(&mesh, &["tp", "dp"], &plan)?;
            let step = model.step(tokens(7, 36, 0), llama::loss)?;
            assert!(step.loss.item().is_finite());
            assert!(model.report().shards.iter().all(|report| report.fallbacks.is_empty()));
            Ok(())
        })
        .unwrap();
    let errors = launch::threads(4).run(|rank| {
        let mesh = Mesh::new(&rank, [("pp", 2), ("tp", 2)])?;
        let model = model.clone().fork(&device()).tensor_parallel(&mesh.axis("tp")?, &plan)?;
        let mut model = model.pipeline_parallel(&mesh.axis("pp")?, PipelineConfig::new(2))?;
        model.step(tokens(7, 36, 0), llama::loss)?;
        Ok(model.step(with(36, 3, 1, 36), llama::loss).unwrap_err().to_string())
    });
    for error in errors.unwrap() {
        assert!(error.contains("index 36 at [1, 1]"), "{error}");
    }
}
