//! The two ways to split layers, each the other's oracle: the explicit layers, run eagerly, and the captured step of an
//! unmodified model, split by a plan. Same weights, same parts: the loss, every gradient and every parameter of each
//! rank must be the same over several steps of an optimizer.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use burn_parallel::partition::ProductKind;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::layers::*;

use crate::common::dense::{Dense, filled, parameters};

const WIDTH: usize = 24;
const HEADS: usize = 12;
const WORDS: usize = 36;
const DIMS: [usize; 2] = [3, 5];

type Batch = (Tensor<2, Int>, Tensor<2, Int>);

#[derive(Module, Debug)]
struct Plain {
    tokens: Embedding,
    attention: MultiHeadAttention,
    feed_forward: PositionWiseFeedForward,
    head: Linear,
}

impl Plain {
    fn new(device: &Device) -> Self {
        Self {
            tokens: EmbeddingConfig::new(WORDS, WIDTH).init(device),
            attention: MultiHeadAttentionConfig::new(WIDTH, HEADS).with_dropout(0.0).init(device),
            feed_forward: PositionWiseFeedForwardConfig::new(WIDTH, 48).with_dropout(0.0).init(device),
            head: LinearConfig::new(WIDTH, WORDS).init(device),
        }
    }

    fn loss(&self, (tokens, targets): Batch) -> Tensor<1> {
        let ([batch, sequence], device) = (tokens.dims(), tokens.device());
        let x = self.tokens.forward(tokens);
        let mask = generate_autoregressive_mask(batch, sequence, &device);
        let x = x.clone() + self.attention.forward(MhaInput::self_attn(x).mask_attn(mask)).context;
        let x = x.clone() + self.feed_forward.forward(x);
        let logits = self.head.forward(x).reshape([batch * sequence, WORDS]);
        activation::log_softmax(logits, 1).gather(1, targets.reshape([batch * sequence, 1])).mean().neg()
    }
}

#[derive(Module, Debug)]
struct Explicit {
    tokens: VocabParallelEmbedding,
    attention: ParallelAttention,
    feed_forward: ParallelFeedForward,
    head: ColumnParallelLinear,
}

impl Explicit {
    fn of(whole: &Plain, group: &Communicator) -> Result<Self, Error> {
        Ok(Self {
            tokens: VocabParallelEmbedding::from_full(&whole.tokens, group)?,
            attention: ParallelAttention::from_full(&whole.attention, true, group)?,
            feed_forward: ParallelFeedForward::from_full(&whole.feed_forward, group)?,
            head: ColumnParallelLinear::from_full(&whole.head, group)?,
        })
    }

    fn loss(&self, (tokens, targets): Batch, group: &Communicator) -> Result<Tensor<1>, Error> {
        let rows = tokens.dims().iter().product();
        let x = self.tokens.forward(tokens)?;
        let x = x.clone() + self.attention.forward(x, None)?;
        let x = x.clone() + self.feed_forward.forward(x)?;
        let logits = self.head.forward(x)?;
        let logits = logits.reshape([rows, WORDS / group.size()]);
        Ok(vocab_parallel_cross_entropy(logits, targets.reshape([rows]), WORDS, &[], group)?.mean())
    }
}

fn batch(step: usize, device: &Device) -> Batch {
    let words = |salt: usize| {
        let word = |place: usize| ((place * 7 + step * 5 + salt * 11) % WORDS) as i64;
        Tensor::from_data(TensorData::new((0..15).map(word).collect(), DIMS), device)
    };
    (words(0), words(1))
}

fn assert_same(explicit: &BTreeMap<String, Dense>, captured: &BTreeMap<String, Dense>, what: &str) {
    assert!(explicit.keys().eq(captured.keys()), "{what}");
    for (id, part) in captured {
        explicit[id].assert_near(part, 2e-5, &format!("{what}, parameter {id}"));
    }
}

#[test]
fn explicit_layers_and_a_split_graph_train_alike() {
    let whole = filled(Plain::new(&Device::flex().autodiff()), 0, &Device::flex().autodiff(), DType::F32);
    let plan =
        Plan::vocabulary("tokens", "head").then(Plan::multi_head_attention()).then(Plan::position_wise_feed_forward());
    for degree in [1, 2, 3, 4] {
        let ran = launch::threads(degree).run(|rank| {
            let device = rank.device().autodiff();
            let own = whole.clone().fork(&device);
            let mut explicit = Explicit::of(&own, &rank)?;
            let mut captured = own.tensor_parallel(&rank, &plan)?;
            // An epsilon above the rounding of the gradients of key biases, which are 0.
            let optim = || -> ModuleOptimizer { AdamWConfig::new().with_epsilon(1e-2).init() };
            let (mut of_explicit, mut of_captured) = (optim(), optim());
            for step in 0..4 {
                let what = format!("step {step}, rank {} of {degree}", rank.rank());
                let loss = explicit.loss(batch(step, &device), &rank)?;
                let value = loss.clone().inner().into_scalar::<f64>();
                let gradients = GradientsParams::from_grads(loss.backward(), &explicit);
                let split = captured.step(batch(step, &device), Plain::loss)?;
                let other = split.loss.item();
                assert!((value - other).abs() < 1e-5, "{what}: {value} and {other}");
                assert_same(
                    &parameters(&explicit, Some(&gradients)),
                    &parameters(&captured, Some(&split.grads)),
                    &what,
                );
                explicit = of_explicit.step(1e-2, explicit, gradients);
                captured = of_captured.step(1e-2, captured, split.grads);
                assert_same(&parameters(&explicit, None), &parameters(&captured, None), &what);
            }
            // The captured step runs the products of the explicit layers: two layers by rows, and on the way back the
            // input of the attention, of the feed-forward block and of the output layer.
            let fused = captured.report().shard().fused(ProductKind::AllReduce);
            assert_eq!(fused, if degree == 1 { [0, 0] } else { [2, 3] }, "{}", captured.report().shard());
            // Both hold parts: the loss was no whole model's on every rank.
            let held: usize = parameters(&captured, None).values().map(|part| part.values.len()).sum();
            Ok(held)
        });
        let held = ran.unwrap();
        let all: usize = parameters(&whole, None).values().map(|part| part.values.len()).sum();
        // All but the biases of the layers by rows is split.
        let split = all - 2 * WIDTH;
        assert!(held.iter().all(|held| *held == split / degree + 2 * WIDTH), "{held:?} of {all} on {degree} ranks");
    }
}
