//! Models with their batches and losses, for tests that train several kinds in the same way.

use std::ops::Range;

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoderConfig, TransformerEncoderInput};
use burn::optim::ModuleOptimizer;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::Error;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::graph::{TensorMapper, TensorTree};
use burn_parallel::prelude::*;

use super::checkpointing::{is_demanded, on_checkpointing};
use super::fill::{Numbers, filled_from};
use super::models::{Cnn, Lm, Mlp, Rnn, Tied, device};
use super::reference::{Wholes, train};

/// Words that the tokens are drawn from.
const WORDS: usize = 13;

/// Features `[rows, 6, 8]`, tokens `[rows, 6]`, targets `[rows, 4]`.
#[derive(Clone)]
pub struct Batch {
    pub features: Tensor<3>,
    pub tokens: Tensor<2, Int>,
    pub targets: Tensor<2>,
}

impl TensorTree for Batch {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let (features, tokens, targets) = (self.features, self.tokens, self.targets).map_tensors(mapper)?;
        Ok(Self { features, tokens, targets })
    }
}

/// Some rows of the batch of a step: the same numbers whoever asks.
pub fn batch(step: usize, rows: Range<usize>) -> Batch {
    let (mut features, mut tokens, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows.clone() {
        let mut numbers = Numbers(((step * 1000 + row) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        features.extend((0..48).map(|_| numbers.next()));
        tokens.extend((0..6).map(|_| numbers.class(WORDS)));
        targets.extend((0..4).map(|_| numbers.next()));
    }
    let (n, device) = (rows.len(), device());
    Batch {
        features: Tensor::from_data(TensorData::new(features, [n, 6, 8]), &device),
        tokens: Tensor::from_data(TensorData::new(tokens, [n, 6]), &device),
        targets: Tensor::from_data(TensorData::new(targets, [n, 4]), &device),
    }
}

/// A model with its batches and its mean loss.
pub struct Case<M> {
    pub model: M,
    pub loss: fn(&M, Batch) -> Tensor<1>,
    pub input: fn(usize, Range<usize>) -> Batch,
}

impl<M: Module> Case<M> {
    /// Trains on one device, on so many rows in each step: the losses, and all parameters at the end.
    pub fn alone(&self, optim: ModuleOptimizer, lr: f64, rows: &[usize]) -> (Vec<f64>, Wholes) {
        let batches = rows.iter().enumerate().map(|(step, rows)| (self.input)(step, 0..*rows));
        let mut steps = train(&self.model, optim, lr, batches, self.loss);
        let losses = steps.iter().map(|step| f64::from(step.loss)).collect();
        (losses, steps.pop().expect("a step").after)
    }
}

/// A replica of a model, with leaves of its own, on a device on which its settings go.
pub fn wrap<M: Module>(rank: &Rank, model: &M, config: DataParallelConfig) -> Result<Replica<Eager<M>>, Error> {
    let own = model.clone().fork(&rank.device().autodiff()).train();
    let own = if is_demanded(&config) && rank.size() > 1 { on_checkpointing(own) } else { own };
    own.data_parallel(rank, config)
}

fn case<M: Module>(seed: u64, make: impl Fn(&Device) -> M, loss: fn(&M, Batch) -> Tensor<1>) -> Case<M> {
    Case { model: filled_from(seed, make(&device())), loss, input: batch }
}

fn mse(output: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    (output - targets).powf_scalar(2.0).mean()
}

/// Three layers, of odd widths.
pub fn mlp() -> Case<Mlp> {
    let make = |device: &Device| Mlp::of(&[48, 33, 17, 4], device);
    case(1, make, |model, batch| mse(model.forward(batch.features.flatten::<2>(1, 2)), batch.targets))
}

pub fn transformer() -> Case<Lm> {
    let encoder = TransformerEncoderConfig::new(8, 16, 2, 2).with_dropout(0.0).with_norm_first(true);
    case(
        2,
        |device| Lm::of(WORDS, &encoder, 4, device),
        |model, batch| {
            let x = model.embed(batch.tokens) + batch.features;
            let x = model.norm.forward(model.encoder.forward(TransformerEncoderInput::new(x)));
            mse(model.head.forward(x.mean_dim(1).squeeze_dim::<2>(1)), batch.targets)
        },
    )
}

pub fn lstm() -> Case<Rnn> {
    case(3, |device| Rnn::of(WORDS, 4, device), |model, batch| mse(model.last(batch.tokens), batch.targets))
}

fn convolutions(norms: [bool; 3]) -> Case<Cnn> {
    let loss = |model: &Cnn, batch: Batch| mse(model.forward(batch.features.unsqueeze_dim::<4>(1)), batch.targets);
    case(4, |device| Cnn::of([1, 4], norms, device), loss)
}

pub fn cnn() -> Case<Cnn> {
    convolutions([false; 3])
}

/// One batch norm, behind the first convolution.
pub fn cnn_with_batch_norm() -> Case<Cnn> {
    convolutions([false, true, false])
}

pub fn tied() -> Case<Tied> {
    case(
        5,
        |device| Tied::of(WORDS, 8, device),
        |model, batch| model.loss(batch.tokens.clone(), batch.tokens.roll_dim(1, 1)),
    )
}
