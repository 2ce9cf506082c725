//! Outputs without rows, and parameters that several stages hold, of models that are evaluated or loaded.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, Param, ParamId};
use burn::nn::{Embedding, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::prelude::*;

use crate::common::models::{Numbers, Two, device, two};
use crate::common::reference::{filled, values};
use crate::common::store::Store;

fn rows(count: usize) -> Tensor<2> {
    Numbers(11).tensor([count, 6], &device())
}

/// One value for the batch, whatever the micro-batches.
#[test]
fn an_output_without_rows_is_that_of_the_batch() {
    let outputs = |model: &Two, x: Tensor<2>| {
        let y = model.forward(x.clone());
        let right = y.clone().greater_elem(0.0).int();
        (
            (y.clone().powi_scalar(2).mean() * 0.5, y.clone().sum().neg() / 3.0),
            (y.clone().mean_dim(0), right.sum()),
            (y, model.first.bias.as_ref().unwrap().val() * 2.0),
        )
    };
    let of = |x: Tensor<2>| {
        let ((mean, sum), (columns, right), (y, bias)) = outputs(&two().valid(), x.inner());
        let floats = [mean.into_data(), sum.into_data(), columns.into_data(), y.into_data(), bias.into_data()];
        (floats.map(|data| (data.shape().to_vec(), data.try_to_vec::<f32>().unwrap())), right.into_scalar::<i64>())
    };
    // Evenly, not evenly, a row each, and all at once.
    for (count, micro_batches) in [(6, 3), (7, 3), (5, 4), (4, 4), (2, 2), (6, 1)] {
        let expected = of(rows(count));
        launch::threads(2)
            .run(|rank| {
                let mut model = two().pipeline_parallel(&rank, PipelineConfig::new(micro_batches))?;
                model.prepare_forward(rows(count), outputs)?;
                let ((mean, sum), (columns, right), (y, bias)) = model.forward_with(rows(count), outputs)?;
                let found = [mean.into_data(), sum.into_data(), columns.into_data(), y.into_data(), bias.into_data()];
                for (found, (dims, values)) in found.into_iter().zip(&expected.0) {
                    assert_eq!(found.shape().to_vec(), *dims);
                    let found = found.try_to_vec::<f32>().unwrap();
                    let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5 * (1.0 + b.abs());
                    assert!(found.iter().zip(values).all(close), "{found:?} {values:?}");
                }
                assert_eq!(right.into_scalar::<i64>(), expected.1);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{count} rows in {micro_batches}: {error}"));
    }
}

#[test]
fn an_output_that_cannot_be_told_from_micro_batches_is_an_error() {
    let root = |model: &Two, x: Tensor<2>| model.forward(x).powi_scalar(2).mean().sqrt();
    // Divided by a number of rows, which is another one in a micro-batch.
    let over = |model: &Two, x: Tensor<2>| {
        let count = x.dims()[0];
        model.forward(x).sum() / count as f64
    };
    for forward in [root as fn(&Two, Tensor<2>) -> Tensor<1>, over] {
        launch::threads(2)
            .run(|rank| {
                let mut model = two().pipeline_parallel(&rank, PipelineConfig::new(2))?;
                let said = model.prepare_forward(rows(6), forward).unwrap_err().to_string();
                assert!(said.contains("output 0 of the forward pass has dims [1]"), "{said}");
                Ok(())
            })
            .unwrap();
    }
}

#[derive(Module, Debug)]
struct Tied {
    words: Embedding,
    inner: Vec<Linear>,
}

/// A model whose embedding is made only if somebody asks, which is counted.
fn tied(made: &Arc<AtomicUsize>) -> Tied {
    let made = made.clone();
    let init = move |device: &Device, trained: bool| {
        made.fetch_add(1, Ordering::Relaxed);
        let value = Numbers(5).tensor::<2>([11, 6], device);
        if trained { value.require_grad() } else { value }
    };
    let weight = Param::uninitialized(ParamId::new(), init, device(), true, [11, 6].into());
    let linear = |_| LinearConfig::new(6, 6).init(&device());
    Tied { words: Embedding { weight }, inner: (0..2).map(linear).collect() }
}

fn tied_loss(model: &Tied, tokens: Tensor<2, Int>) -> Tensor<1> {
    let [b, s] = tokens.dims();
    let x = model.inner.iter().fold(model.words.forward(tokens.clone()), |x, layer| layer.forward(x).tanh());
    let logits = x.reshape([b * s, 6]).matmul(model.words.weight.val().transpose());
    activation::log_softmax(logits, 1).gather(1, tokens.reshape([b * s, 1])).mean().neg()
}

fn words() -> Tensor<2, Int> {
    Numbers(2).classes([4, 3], 11, &device())
}

#[test]
fn a_tied_lazy_embedding_that_is_loaded_is_never_made() {
    let stored = values(&filled(tied(&Arc::default())));
    launch::threads(2)
        .run(|rank| {
            let made = Arc::new(AtomicUsize::new(0));
            let mut model = tied(&made).pipeline_parallel(&rank, PipelineConfig::new(2))?;
            model.prepare(words(), tied_loss)?;
            assert_eq!(model.report().cut.unwrap().tied.len(), 1);
            let mut store = Store::of(stored.clone());
            let mut model = model.load(&mut store)?;
            assert!(store.read.contains_key("words.weight"), "{:?}", store.read);
            let evaluated = model.forward_with(words(), tied_loss)?.into_scalar::<f32>();
            let step = model.step(words(), tied_loss)?;
            assert_eq!(made.load(Ordering::Relaxed), 0);
            assert!((step.loss.item() as f32 - evaluated).abs() < 1e-5 && step.loss.item().is_finite());
            // Nor sent: the holders sum its gradient, and no more.
            let sent = model.counters().pipeline;
            assert_eq!(sent.of("broadcast").calls, 0, "{sent:?}");
            let sums = sent.of("all_reduce");
            assert_eq!((sums.calls, sums.bytes), (1, 11 * 6 * 4), "{sent:?}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_tied_lazy_embedding_that_is_not_loaded_is_that_of_its_first_stage() {
    let whole = Arc::new(AtomicUsize::new(0));
    let same_inner = |model: Tied| Tied { inner: filled(model.inner), ..model };
    let expected = {
        let model = same_inner(tied(&whole)).valid();
        tied_loss(&model, words().inner()).into_scalar::<f32>()
    };
    launch::threads(3)
        .run(|rank| {
            let made = Arc::new(AtomicUsize::new(0));
            let mut model = same_inner(tied(&made)).pipeline_parallel(&rank, PipelineConfig::new(2))?;
            model.prepare(words(), tied_loss)?;
            assert_eq!(made.load(Ordering::Relaxed), 0);
            // Before a step, too, and whole.
            let evaluated = model.forward_with(words(), tied_loss)?.into_scalar::<f32>();
            assert!((evaluated - expected).abs() < 1e-5, "{evaluated} {expected}");
            let step = model.step(words(), tied_loss)?;
            assert!((step.loss.item() as f32 - expected).abs() < 1e-5, "{} {expected}", step.loss.item());
            assert_eq!(made.load(Ordering::Relaxed), usize::from(rank.rank() == 0));
            let again = model.forward_with(words(), tied_loss)?.into_scalar::<f32>();
            assert!((again - expected).abs() < 1e-5);
            // Once for the forward pass, once for the step. The second stage of three ranks does not hold it.
            let sent = model.counters().pipeline.of("broadcast");
            let times = if rank.rank() == 1 { 0 } else { 2 };
            assert_eq!(sent.calls, times, "{sent:?}");
            Ok(())
        })
        .unwrap();
}
