//! Documents packed into rows train as each in a row of its own.

use burn::module::Module;
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use super::{model, strategy};
use crate::common::llama::{Batch, Llama, LlamaConfig};
use crate::common::models::{Numbers, device, eager, seeded};
use crate::common::reference::gradient_values;

const WORDS: usize = 48;

/// Documents of these lengths: tokens, with one more to predict.
fn documents(lengths: &[usize]) -> Vec<Vec<i64>> {
    let mut numbers = Numbers(11);
    let mut word = || (((numbers.next() + 1.0) * 0.5 * WORDS as f32) as i64).min(WORDS as i64 - 1);
    lengths.iter().map(|length| (0..=*length).map(|_| word()).collect()).collect()
}

/// Rows of one or more documents each, filled up to `length`; of every document the first target is not trained on.
fn batch(rows: &[&[Vec<i64>]], length: usize) -> Batch {
    let mut all = [const { Vec::<i64>::new() }; 5];
    for row in rows {
        let [tokens, targets, weights, positions, documents] = &mut all;
        let end = tokens.len() + length;
        for (number, document) in row.iter().enumerate() {
            for (place, pair) in document.windows(2).enumerate() {
                tokens.push(pair[0]);
                targets.push(pair[1]);
                weights.push((place > 0) as i64);
                positions.push(place as i64);
                documents.push(number as i64);
            }
        }
        // The rest is a document of its own, of which nothing is trained on.
        for place in 0..end - tokens.len() {
            tokens.push(7);
            targets.push(3);
            weights.push(0);
            positions.push(place as i64);
            documents.push(row.len() as i64);
        }
    }
    let [tokens, targets, weights, positions, documents] =
        all.map(|values| Tensor::<2, Int>::from_data(TensorData::new(values, [rows.len(), length]), &device()));
    Batch { tokens, targets, weights: weights.float(), positions, documents }
}

#[test]
fn packed_rows_have_the_loss_and_the_gradients_of_single_ones() {
    let documents = documents(&[5, 1, 9, 4, 12, 3]);
    let single: Vec<&[Vec<i64>]> = documents.chunks(1).collect();
    let single = batch(&single, 12);
    let packed = batch(&[&documents[..3], &documents[3..]], 20);
    let count: f32 = packed.weights.clone().sum().into_scalar();
    assert_eq!(count, single.weights.clone().sum().into_scalar::<f32>());

    let model = model();
    let (expected, gradients) = eager(&model, |model| model.losses(single.clone()).sum());
    let expected_gradients = gradient_values(&model, &gradients);
    let (found, gradients) = eager(&model, |model| model.losses(packed.clone()).sum());
    assert!((found - expected).abs() < 1e-6 * expected, "{found}, not {expected}");
    let found_gradients = gradient_values(&model, &gradients);
    for (path, expected) in &expected_gradients {
        let largest = expected.values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        for (found, expected) in found_gradients[path].values.iter().zip(&expected.values) {
            assert!((found - expected).abs() <= 2e-6 * largest, "{path}: {found}, not {expected}");
        }
    }

    let mean = f64::from(expected / count);
    for axes in [[2, 1, 1], [1, 2, 1], [1, 1, 2]] {
        launch::threads(2)
            .run(|world| {
                let model = model.clone().fork(&device()).parallelize(&world, &strategy(axes, Sharding::None))?;
                let mut model = model;
                let replica = model.mesh().coordinate("dp")?;
                let share = |x: Batch| match axes[0] {
                    // Replicas with different numbers of targets.
                    2 => narrowed(x, replica),
                    _ => x,
                };
                let step = model.step(share(packed.clone()), Llama::loss)?;
                assert!((step.loss.item() - mean).abs() < 1e-6 * mean, "{axes:?}: {}, not {mean}", step.loss.item());
                Ok(())
            })
            .unwrap();
    }
}

fn narrowed(batch: Batch, row: usize) -> Batch {
    let Batch { tokens, targets, weights, positions, documents } = batch;
    let of = |x: Tensor<2, Int>| x.narrow(0, row, 1);
    Batch {
        tokens: of(tokens),
        targets: of(targets),
        weights: weights.narrow(0, row, 1),
        positions: of(positions),
        documents: of(documents),
    }
}

/// Which documents there are differs from row to row and from step to step, and masks and positions with it: each stage
/// makes its own, of inputs that it has. What crosses is the residual stream and its gradient, whole for each
/// micro-batch.
#[test]
fn stages_make_masks_and_positions_of_packed_rows_themselves() {
    let steps: Vec<Batch> = [[5, 1, 9, 4, 12, 3], [2, 7, 6, 3, 3, 9], [11, 4, 1, 1, 8, 10]]
        .iter()
        .map(|lengths| {
            let documents = documents(lengths);
            let rows = [&documents[..3], &documents[3..], &documents[1..2], &documents[2..4]];
            batch(&rows, 24)
        })
        .collect();
    let config = LlamaConfig { layers: 3, ..LlamaConfig::read(super::folder()).unwrap() };
    let model = seeded(config.init(&device()).materialize());
    let trained = |stages: usize, micro_batches: usize| {
        let runs = launch::threads(stages).run(|world| {
            let mut strategy = strategy([1, stages, 1], Sharding::None);
            if stages > 1 {
                let cut = Cut::before((1..stages).map(|layer| format!("model.layers.{layer}.*")).collect::<Vec<_>>());
                strategy = strategy.with_pp(stages, PipelineConfig::new(micro_batches).with_cut(cut));
            }
            let mut model = model.clone().fork(&device()).parallelize(&world, &strategy)?;
            let mut optim: ModuleOptimizer = AdamWConfig::new().init();
            let mut found = Vec::new();
            for batch in &steps {
                let step = model.step(batch.clone(), Llama::loss)?.clip_grad_norm(&model, 1e9)?;
                found.push((step.loss.item(), step.grad_norm.unwrap()));
                model = model.optimize(&mut optim, 1e-2, step)?;
            }
            Ok((found, model.report().cut))
        });
        runs.unwrap().remove(0)
    };
    let (expected, _) = trained(1, 1);
    for (stages, micro_batches) in [(2, 2), (2, 4), (3, 4)] {
        let (found, cut) = trained(stages, micro_batches);
        for ((loss, norm), (expected, of)) in found.iter().zip(&expected) {
            assert!((loss - expected).abs() < 1e-5 * expected, "pp {stages}: {loss}, not {expected}");
            assert!((norm - of).abs() < 1e-4 * of, "pp {stages}: {norm}, not {of}");
        }
        let (rows, words) = (4 / micro_batches, config.vocab);
        let stream = vec![rows, 24, config.width];
        let crossings = cut.unwrap().crossings;
        assert!(!crossings.is_empty());
        for crossing in crossings {
            for dims in &crossing.tensors {
                // The head is the embedding: what the stages know of its gradient is added up.
                assert!(*dims == stream || *dims == [words, config.width], "pp {stages}: {dims:?} in {crossing:?}");
            }
        }
    }
}
