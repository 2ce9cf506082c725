//! The layers of `tensor_parallel` against burn's own on one device: outputs, gradients of inputs and of every
//! parameter, and the parameters themselves, over several steps of an optimizer.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::activation::{ActivationConfig, SwiGlu};
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, activation};
use burn_parallel::comm::{Counters, part};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::layers::*;

use crate::common::dense::{Dense, filled, parameters};

const STEPS: u64 = 3;
const DEGREES: [usize; 4] = [1, 2, 3, 4];
/// Batch and sequence of the inputs; the sequence is not divided evenly by 2, 3 or 4.
const BATCH: usize = 2;
const SEQUENCE: usize = 7;

/// With an epsilon above the rounding of gradients that are 0 (a bias of all keys changes no softmax), which AdamW
/// would otherwise blow up.
fn optimizer(name: &str) -> ModuleOptimizer {
    match name {
        "adamw" => AdamWConfig::new().with_epsilon(1e-2).init(),
        _ => SgdConfig::new().init(),
    }
}

fn held(layout: Layout, whole: &Dense, comm: &Communicator) -> Dense {
    match layout {
        Layout::Sharded(dim) => whole.part(dim, comm.size(), comm.rank()),
        _ => whole.clone(),
    }
}

/// What a rank should hold of a parameter, given the dims that it does hold: all, its part, or a head that it shares.
fn slice(whole: &Dense, dims: &[usize], comm: &Communicator) -> Dense {
    let (size, rank) = (comm.size(), comm.rank());
    let Some(dim) = (0..dims.len()).find(|&dim| dims[dim] != whole.dims[dim]) else { return whole.clone() };
    let (local, total) = (dims[dim], whole.dims[dim]);
    if part(total, size, rank).len() == local {
        return whole.part(dim, size, rank);
    }
    let start = rank / (size * local / total) * local;
    whole.rows(dim, start..start + local)
}

/// One run of a layer beside the whole one.
struct Trial<'a> {
    rank: &'a Rank,
    device: Device,
    dtype: DType,
    optim: &'static str,
    /// Layouts and width of the input; `[BATCH, SEQUENCE, width]`.
    input: Layout,
    output: Layout,
    width: usize,
}

impl Trial<'_> {
    fn run<F: Module, L: Module>(
        &self,
        mut full: F,
        mut local: L,
        whole: impl Fn(&F, Tensor<3>) -> Tensor<3>,
        split: impl Fn(&L, Tensor<3>) -> Result<Tensor<3>, Error>,
    ) -> Result<(), Error> {
        let tolerance = if self.dtype == DType::F64 { 1e-9 } else { 2e-4 };
        let comm = self.rank.world();
        let mut optims = [optimizer(self.optim), optimizer(self.optim)];
        for step in 0..STEPS {
            let say = |what: &str| {
                let (rank, size, dtype, optim) = (comm.rank(), comm.size(), self.dtype, self.optim);
                format!("{what}, step {step}, rank {rank} of {size}, {dtype:?}, {optim}")
            };
            let x = Dense::fractions(&[BATCH, SEQUENCE, self.width], 7 + step);
            let leaf = x.tensor::<3>(&self.device, self.dtype).require_grad();
            let y = whole(&full, leaf.clone());
            let expected = Dense::of(&y);
            let w = Dense::fractions(&expected.dims, 70 + step);
            let cost =
                |y: Tensor<3>, w: Dense| (y.clone() * w.tensor(&self.device, self.dtype) + y.clone() * y * 0.1).sum();
            let grads = cost(y, w.clone()).backward();
            let dx = leaf.grad(&grads).map(|dx| Dense::of(&dx));
            let grads = GradientsParams::from_grads(grads, &full);

            let leaf = held(self.input, &x, comm).tensor::<3>(&self.device, self.dtype).require_grad();
            let y = split(&local, leaf.clone())?;
            Dense::of(&y).assert_near(&held(self.output, &expected, comm), tolerance, &say("output"));
            let mut loss = cost(y, held(self.output, &w, comm));
            if self.output != Layout::Replicated {
                loss = layout::reduce_from_group(loss, comm)?;
            }
            let found = layout::backward(&loss, comm)?;
            match (leaf.grad(&found), dx) {
                (Some(found), Some(dx)) => {
                    Dense::of(&found).assert_near(&held(self.input, &dx, comm), tolerance, &say("dx"));
                }
                (found, dx) => assert_eq!(found.is_some(), dx.is_some(), "{}", say("dx")),
            }
            let found = GradientsParams::from_grads(found, &local);
            let compare = |what: &str, found: BTreeMap<String, Dense>, expected: BTreeMap<String, Dense>| {
                assert!(found.keys().eq(expected.keys()), "{}", say(what));
                for (id, found) in found {
                    found.assert_near(&slice(&expected[&id], &found.dims, comm), tolerance, &say(what));
                }
            };
            compare("gradients", parameters(&local, Some(&found)), parameters(&full, Some(&grads)));
            full = optims[0].step(1e-2, full, grads);
            local = optims[1].step(1e-2, local, found);
            compare("parameters", parameters(&local, None), parameters(&full, None));
        }
        Ok(())
    }
}

/// Runs trials on worlds of some degrees, in both dtypes, with both optimizers, with and without checkpointing.
fn trials(degrees: &[usize], body: impl Fn(Trial<'_>) -> Result<(), Error> + Sync) {
    for &degree in degrees {
        let run = launch::threads(degree).run(|rank| {
            let autodiff = rank.device().autodiff();
            let checkpointed = rank.device().autodiff().gradient_checkpointing();
            for (dtype, optim, device) in
                [(DType::F32, "adamw", &autodiff), (DType::F64, "adamw", &autodiff), (DType::F64, "sgd", &checkpointed)]
            {
                let (input, output) = (Layout::Replicated, Layout::Replicated);
                body(Trial { rank: &rank, device: device.clone(), dtype, optim, input, output, width: 5 })?;
            }
            Ok(())
        });
        run.unwrap();
    }
}

const SEQUENCE_PARTS: Layout = Layout::Sharded(1);
const FEATURE_PARTS: Layout = Layout::Sharded(2);

fn sequence(parallel: bool) -> Layout {
    if parallel { SEQUENCE_PARTS } else { Layout::Replicated }
}

#[test]
fn column() {
    trials(&DEGREES, |mut trial| {
        for (bias, gather, parallel) in
            [(true, false, false), (false, true, false), (true, false, true), (true, true, true)]
        {
            let full =
                filled(LinearConfig::new(5, 9).with_bias(bias).init(&trial.device), 1, &trial.device, trial.dtype);
            let local = ColumnParallelLinearConfig::new(5, 9)
                .with_bias(bias)
                .with_gather_output(gather)
                .with_sequence_parallel(parallel)
                .init_from(&full, trial.rank)?;
            trial.input = sequence(parallel);
            trial.output = if gather { Layout::Replicated } else { FEATURE_PARTS };
            trial.run(full, local, |full, x| full.forward(x), |local, x| local.forward(x))?;
        }
        Ok(())
    });
}

#[test]
fn row() {
    trials(&DEGREES, |mut trial| {
        for (bias, cut, parallel) in
            [(true, true, false), (false, true, false), (true, false, false), (true, true, true)]
        {
            let full =
                filled(LinearConfig::new(5, 9).with_bias(bias).init(&trial.device), 2, &trial.device, trial.dtype);
            let local = RowParallelLinearConfig::new(5, 9)
                .with_bias(bias)
                .with_input_is_parallel(cut)
                .with_sequence_parallel(parallel)
                .init_from(&full, trial.rank)?;
            trial.input = if cut { FEATURE_PARTS } else { Layout::Replicated };
            trial.output = sequence(parallel);
            trial.run(full, local, |full, x| full.forward(x), |local, x| local.forward(x))?;
        }
        Ok(())
    });
}

#[test]
fn feed_forward() {
    trials(&DEGREES, |mut trial| {
        for (activation, ours) in [
            (ActivationConfig::Gelu, FeedForwardActivation::Gelu),
            (ActivationConfig::GeluApproximate, FeedForwardActivation::GeluApproximate),
            (ActivationConfig::Relu, FeedForwardActivation::Relu),
        ] {
            let config = PositionWiseFeedForwardConfig::new(5, 10).with_dropout(0.0).with_activation(activation);
            let full = filled(config.init(&trial.device), 3, &trial.device, trial.dtype);
            let whole = |full: &PositionWiseFeedForward, x| full.forward(x);
            let split = |local: &ParallelFeedForward, x| local.forward(x);
            for parallel in [false, true] {
                let local = ParallelFeedForwardConfig::new(5, 10)
                    .with_activation(ours)
                    .with_sequence_parallel(parallel)
                    .init_from(&full.linear_inner, None, &full.linear_outer, trial.rank)?;
                (trial.input, trial.output) = (sequence(parallel), sequence(parallel));
                trial.run(full.clone().fork(&trial.device), local, whole, split)?;
            }
            (trial.input, trial.output) = (Layout::Replicated, Layout::Replicated);
            let local = ParallelFeedForward::from_full(&full, trial.rank)?;
            trial.run(full, local, whole, split)?;
        }
        Ok(())
    });
}

#[derive(Module, Debug)]
struct Gated {
    inner: SwiGlu,
    outer: Linear,
}

#[test]
fn swiglu() {
    trials(&DEGREES, |mut trial| {
        for (bias, parallel) in [(false, false), (true, false), (true, true)] {
            let linear = |d_input, d_output| LinearConfig::new(d_input, d_output).with_bias(bias).init(&trial.device);
            let full = Gated {
                inner: SwiGlu { linear_inner: linear(5, 10), linear_outer: linear(5, 10) },
                outer: linear(10, 5),
            };
            let full = filled(full, 4, &trial.device, trial.dtype);
            let local = match parallel {
                false => ParallelFeedForward::from_full_swiglu(&full.inner, &full.outer, trial.rank)?,
                true => ParallelFeedForwardConfig::new(5, 10)
                    .with_activation(FeedForwardActivation::SwiGlu)
                    .with_sequence_parallel(true)
                    .init_from(&full.inner.linear_outer, Some(&full.inner.linear_inner), &full.outer, trial.rank)?,
            };
            (trial.input, trial.output) = (sequence(parallel), sequence(parallel));
            let whole = |full: &Gated, x| full.outer.forward(full.inner.forward(x));
            trial.run(full, local, whole, |local, x| local.forward(x))?;
        }
        Ok(())
    });
}

/// Ids below `vocabulary`, every one of them, some more than once; the last one is `-100` if there may be padding.
fn ids(rows: usize, vocabulary: usize, padding: bool, device: &Device) -> Tensor<1, Int> {
    let id = |row: usize| if padding && row % 5 == 4 { -100 } else { (row * 7 % vocabulary) as i64 };
    Tensor::from_data(TensorData::new((0..rows).map(id).collect::<Vec<i64>>(), [rows]), device)
}

const VOCABULARY: usize = 13;

fn padding_mask(device: &Device) -> Tensor<2, Bool> {
    let padded = (0..BATCH * SEQUENCE).map(|place| place / SEQUENCE == 1 && place % SEQUENCE > 4).collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(padded, [BATCH, SEQUENCE]), device)
}

#[test]
fn embedding() {
    trials(&DEGREES, |mut trial| {
        for parallel in [false, true] {
            let full = filled(EmbeddingConfig::new(VOCABULARY, 5).init(&trial.device), 5, &trial.device, trial.dtype);
            let local = VocabParallelEmbeddingConfig::new(VOCABULARY, 5)
                .with_sequence_parallel(parallel)
                .init_from(&full, trial.rank)?;
            let ids = ids(BATCH * SEQUENCE, VOCABULARY, false, &trial.device).reshape([BATCH, SEQUENCE]);
            trial.output = sequence(parallel);
            let whole = |full: &Embedding, _| full.forward(ids.clone());
            trial.run(full, local, whole, |local, _| local.forward(ids.clone()))?;
        }
        Ok(())
    });
}

/// The logits are the input, with a layer before it so that there is something to train.
#[test]
fn cross_entropy() {
    trials(&DEGREES, |mut trial| {
        let rows = BATCH * SEQUENCE;
        for padding in [false, true] {
            let full = filled(LinearConfig::new(5, VOCABULARY).init(&trial.device), 6, &trial.device, trial.dtype);
            let local = ColumnParallelLinear::from_full(&full, trial.rank)?;
            let targets = ids(rows, VOCABULARY, padding, &trial.device);
            let known = targets.clone().mask_fill(targets.clone().equal_scalar(-100), 2);
            trial.output = Layout::Replicated;
            // burn has no target outside of the vocabulary: there the padding is 2, which no other target is.
            let pad = padding.then_some(vec![-100]);
            let whole = |full: &Linear, x: Tensor<3>| {
                let logits = full.forward(x * 20.0).reshape([rows, VOCABULARY]);
                let log = activation::log_softmax(logits, 1).gather(1, known.clone().reshape([rows, 1]));
                let losses = log.neg().reshape([rows]).mask_fill(targets.clone().equal_scalar(-100), 0.0);
                losses.reshape([1, 1, rows])
            };
            let split = |local: &ColumnParallelLinear, x: Tensor<3>| {
                let logits = local.forward(x * 20.0)?;
                let width = logits.dims()[2];
                let (logits, pad) = (logits.reshape([rows, width]), pad.as_deref().unwrap_or_default());
                let losses = vocab_parallel_cross_entropy(logits, targets.clone(), VOCABULARY, pad, trial.rank)?;
                Ok(losses.reshape([1, 1, rows]))
            };
            trial.run(full.clone().fork(&trial.device), local, whole, split)?;

            let local = ColumnParallelLinear::from_full(&full, trial.rank)?;
            let tokens = ids(rows, VOCABULARY, false, &trial.device);
            let pads = padding.then_some(vec![0usize, 7]);
            let burns = CrossEntropyLossConfig::new().with_pad_tokens(pads.clone()).init(&trial.device);
            let ours = VocabParallelCrossEntropyConfig::new(VOCABULARY)
                .with_pad_tokens(pads.map(|pads| pads.into_iter().map(|token| token as i64).collect()))
                .init(trial.rank)?;
            let whole = |full: &Linear, x: Tensor<3>| {
                burns.forward(full.forward(x).reshape([rows, VOCABULARY]), tokens.clone()).reshape([1, 1, 1])
            };
            let split = |local: &ColumnParallelLinear, x: Tensor<3>| {
                let logits = local.forward(x)?;
                let width = logits.dims()[2];
                Ok(ours.forward(logits.reshape([rows, width]), tokens.clone())?.reshape([1, 1, 1]))
            };
            trial.run(full, local, whole, split)?;
        }
        Ok(())
    });
}

#[test]
fn attention_as_burns() {
    trials(&DEGREES, |mut trial| {
        for (causal, padded, parallel) in [(false, false, false), (true, true, false), (true, false, true)] {
            let config = MultiHeadAttentionConfig::new(24, 12).with_dropout(0.0);
            let full = filled(config.init(&trial.device), 8, &trial.device, trial.dtype);
            let mask = padded.then(|| padding_mask(&trial.device));
            let later = Tensor::<3, Bool>::tril_mask([BATCH, SEQUENCE, SEQUENCE], 0, &trial.device);
            let local = match parallel {
                false => ParallelAttention::from_full(&full, causal, trial.rank)?,
                true => ParallelAttentionConfig::new(24, 12)
                    .with_causal(causal)
                    .with_sequence_parallel(true)
                    .init_from(&full.query, &full.key, &full.value, &full.output, trial.rank)?,
            };
            trial.width = 24;
            (trial.input, trial.output) = (sequence(parallel), sequence(parallel));
            let whole = |full: &MultiHeadAttention, x| {
                let input = MhaInput::self_attn(x);
                let input = if causal { input.mask_attn(later.clone()) } else { input };
                full.forward(match &mask {
                    Some(mask) => input.mask_pad(mask.clone()),
                    None => input,
                })
                .context
            };
            trial.run(full, local, whole, |local, x| local.forward(x, mask.clone()))?;
        }
        Ok(())
    });
}

#[derive(Module, Debug)]
struct Grouped {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl Grouped {
    /// Head by head, each with the key/value head that it looks at.
    fn forward(&self, x: Tensor<3>, heads: usize, kv_heads: usize) -> Tensor<3> {
        let [_, sequence, d_model] = x.dims();
        let d_k = d_model / heads;
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|layer| layer.forward(x.clone()));
        let later = Tensor::<2, Bool>::tril_mask([sequence, sequence], 0, &x.device()).unsqueeze::<3>();
        let head = |head: usize| {
            let kv_head = head / (heads / kv_heads);
            let query = query.clone().narrow(2, head * d_k, d_k);
            let key = key.clone().narrow(2, kv_head * d_k, d_k);
            let value = value.clone().narrow(2, kv_head * d_k, d_k);
            let scores = query.matmul(key.transpose()) / (d_k as f32).sqrt();
            activation::softmax(scores.mask_fill(later.clone(), -1e4), 2).matmul(value)
        };
        self.output.forward(Tensor::cat((0..heads).map(head).collect(), 2))
    }
}

#[test]
fn attention_with_few_key_value_heads() {
    for (degree, heads, kv_heads) in
        [(1, 4, 2), (2, 4, 1), (2, 4, 2), (2, 8, 4), (3, 6, 1), (3, 6, 3), (4, 4, 1), (4, 4, 2), (4, 8, 2), (4, 16, 8)]
    {
        trials(&[degree], |mut trial| {
            for (bias, parallel) in [(true, false), (false, false), (true, true)] {
                let linear = |width| LinearConfig::new(48, width).with_bias(bias).init(&trial.device);
                let kv = 48 / heads * kv_heads;
                let full = Grouped { query: linear(48), key: linear(kv), value: linear(kv), output: linear(48) };
                let full = filled(full, 9, &trial.device, trial.dtype);
                let local = ParallelAttentionConfig::new(48, heads)
                    .with_n_kv_heads(Some(kv_heads))
                    .with_bias(bias)
                    .with_output_bias(bias)
                    .with_causal(true)
                    .with_sequence_parallel(parallel)
                    .init_from(&full.query, &full.key, &full.value, &full.output, trial.rank)?;
                assert_eq!(local.key.weight.dims(), [48, 48 / heads * kv_heads.div_ceil(degree)]);
                trial.width = 48;
                (trial.input, trial.output) = (sequence(parallel), sequence(parallel));
                trial.run(
                    full,
                    local,
                    |full, x| full.forward(x, heads, kv_heads),
                    |local, x| local.forward(x, None),
                )?;
            }
            Ok(())
        });
    }
}

/// What a function has communicated, by operation, in the order of their names.
fn spent(comm: &Communicator, work: impl FnOnce() -> Result<(), Error>) -> Result<Vec<(&'static str, u64)>, Error> {
    let before = comm.counters();
    work()?;
    let spent: Counters = comm.counters() - before;
    Ok(spent.iter().map(|(name, tally)| (name, tally.calls)).collect())
}

/// Collectives of forward and backward, as Megatron-LM has them.
#[test]
fn collectives_are_counted() {
    type Calls = &'static [(&'static str, u64)];
    fn check(
        rank: &Rank,
        dims: [usize; 3],
        layer: impl Fn(Tensor<3>) -> Result<Tensor<3>, Error>,
        forward: Calls,
        backward: Calls,
    ) -> Result<(), Error> {
        let x = Tensor::<3>::ones(dims, &rank.device().autodiff()).require_grad();
        let mut y = None;
        assert_eq!(spent(rank, || layer(x).map(|out| y = Some(out)))?, forward);
        let loss = y.expect("set above").sum();
        assert_eq!(spent(rank, || layout::backward(&loss, rank).map(|_| ()))?, backward);
        Ok(())
    }
    const SUM: Calls = &[("all_reduce", 1)];
    const BOTH: Calls = &[("all_gather", 1), ("reduce_scatter", 1)];
    const BOTH_AND_BIAS: Calls = &[("all_gather", 1), ("all_reduce", 1), ("reduce_scatter", 1)];
    for size in 2..=4 {
        let run = launch::threads(size).run(|rank| {
            let device = rank.device().autodiff();
            let (whole, part) = ([2, 7, 12], [2, part(7, size, rank.rank()).len(), 12]);
            let column = ColumnParallelLinearConfig::new(12, 9);
            let row = RowParallelLinearConfig::new(9, 12);
            let (a, b) = (column.init(&rank, &device)?, row.init(&rank, &device)?);
            check(&rank, whole, |x| b.forward(a.forward(x)?), SUM, SUM)?;
            check(&rank, whole, |x| a.forward(x), &[], SUM)?;
            let gathered = column.clone().with_gather_output(true).init(&rank, &device)?;
            check(&rank, whole, |x| gathered.forward(x), &[("all_gather", 1)], SUM)?;

            for activation in [FeedForwardActivation::Gelu, FeedForwardActivation::SwiGlu] {
                let block = ParallelFeedForwardConfig::new(12, 9).with_activation(activation);
                let layer = block.init(&rank, &device)?;
                check(&rank, whole, |x| layer.forward(x), SUM, SUM)?;
                let layer = block.clone().with_sequence_parallel(true).init(&rank, &device)?;
                check(&rank, part, |x| layer.forward(x), BOTH, BOTH_AND_BIAS)?;
                let layer = block.with_bias(false).with_sequence_parallel(true).init(&rank, &device)?;
                check(&rank, part, |x| layer.forward(x), BOTH, BOTH)?;
            }

            let heads = ParallelAttentionConfig::new(12, 12);
            let layer = heads.init(&rank, &device)?;
            check(&rank, whole, |x| layer.forward(x, None), SUM, SUM)?;
            // One key/value head for all ranks: its weights and biases are summed as well, in the group that shares
            // them.
            for (bias, sums) in [(true, 2), (false, 1)] {
                let layer = heads.clone().with_n_kv_heads(Some(1)).with_bias(bias).init(&rank, &device)?;
                check(&rank, whole, |x| layer.forward(x, None), SUM, SUM)?;
                let sharers = layer.sharers().expect("all ranks share one head");
                assert_eq!((sharers.size(), sharers.counters().total().calls), (size, sums));
                assert_eq!(sharers.counters().of("all_reduce").calls, sums);
            }
            let layer = heads.with_output_bias(false).with_sequence_parallel(true).init(&rank, &device)?;
            check(&rank, part, |x| layer.forward(x, None), BOTH, BOTH)?;

            let table = VocabParallelEmbeddingConfig::new(13, 12).init(&rank, &device)?;
            let tokens = ids(14, 13, false, &device);
            check(&rank, whole, |_| table.forward(tokens.clone().reshape([2, 7])), SUM, &[])?;
            let scores = ColumnParallelLinearConfig::new(12, 13).init(&rank, &device)?;
            let cost = |x: Tensor<3>| {
                let logits = scores.forward(x)?;
                let width = logits.dims()[2];
                let losses = vocab_parallel_cross_entropy(logits.reshape([14, width]), tokens.clone(), 13, &[], &rank)?;
                Ok(losses.reshape([1, 1, 14]))
            };
            check(&rank, whole, cost, &[("all_reduce", 2)], SUM)?;
            Ok(())
        });
        run.unwrap();
    }
    // A group of one communicates nothing, not even when it is made.
    let run = launch::threads(1).run(|rank| {
        let device = rank.device().autodiff();
        let layer = ParallelAttentionConfig::new(12, 4).with_sequence_parallel(true).init(&rank, &device)?;
        check(&rank, [2, 7, 12], |x| layer.forward(x, None), &[], &[])?;
        assert_eq!(rank.counters().total().calls, 0);
        Ok(())
    });
    run.unwrap();
}

/// Run by the test below, in processes that TCP joins: there products are cut by what they cost.
#[test]
#[ignore = "a helper of the other tests"]
fn uneven_layers() {
    let run = launch::from_env().unwrap().run(|rank| {
        let device = rank.device().autodiff();
        let x = Tensor::<3>::ones([1, 512, 512], &device).require_grad();
        let block = ParallelFeedForwardConfig::new(512, 763);
        for (activation, chunks) in [(FeedForwardActivation::Gelu, 1), (FeedForwardActivation::SwiGlu, 2)] {
            let layer = block.clone().with_activation(activation).with_seed(Some(1)).init(&rank, &device)?;
            let mut y = None;
            assert_eq!(spent(&rank, || layer.forward(x.clone()).map(|out| y = Some(out)))?, [("all_reduce", 1)]);
            let loss = y.expect("set above").sum();
            assert_eq!(spent(&rank, || layout::backward(&loss, &rank).map(|_| ()))?, [("all_reduce", chunks)]);
        }
        Ok(())
    });
    run.unwrap();
}

/// 382 and 381 features: alone, the ranks would cut into two chunks and into one. They know all sizes, and do not ask.
#[test]
#[cfg(unix)]
fn uneven_layers_are_cut_alike_without_a_question() {
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", "layers::uneven_layers", "--ignored", "--nocapture"];
    launch::processes(2).program(program, arguments).supervise().unwrap();
}

/// The loss moves two numbers per row, not the logits: bytes of its collectives, 2 (n - 1) / n of what is summed.
#[test]
fn cross_entropy_never_gathers_the_logits() {
    const ROWS: usize = 16;
    let run = launch::threads(4).run(|rank| {
        let width = part(4001, 4, rank.rank()).len();
        let logits = Tensor::<2>::ones([ROWS, width], &rank.device().autodiff()).require_grad();
        let targets = ids(ROWS, 4001, false, &rank.device().autodiff());
        let loss = vocab_parallel_cross_entropy(logits.clone(), targets, 4001, &[], &rank)?;
        assert!(Dense::of(&loss).values.iter().all(|loss| (loss - 4001f64.ln()).abs() < 1e-5));
        let grads = layout::backward(&loss.sum(), &rank)?;
        assert_eq!(logits.grad(&grads).map(|dz| dz.dims()), Some([ROWS, width]));
        let total = rank.counters().total();
        assert_eq!((total.calls, total.bytes), (2, (3 * ROWS * 4 * 2 / 4 * 3) as u64));
        Ok(())
    });
    run.unwrap();
}

/// Scores whose exponentials no float holds, the largest on the last rank: what counts is the largest of all.
#[test]
fn cross_entropy_of_large_scores() {
    let run = launch::threads(3).run(|rank| {
        let device = rank.device().autodiff();
        let width = part(7, 3, rank.rank()).len();
        let logits = Tensor::<2>::full([2, width], 1000.0 * rank.rank() as f64, &device).require_grad();
        let loss = vocab_parallel_cross_entropy(logits.clone(), Tensor::from_ints([0, 6], &device), 7, &[], &rank)?;
        // The last rank has two columns, which share the probability.
        let expected = Dense { dims: vec![2], values: vec![2000.0 + 2f64.ln(), 2f64.ln()] };
        Dense::of(&loss).assert_near(&expected, 1e-6, "loss");
        let grads = layout::backward(&loss.sum(), &rank)?;
        let values = match rank.rank() {
            0 => vec![-1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            1 => vec![0.0; 4],
            _ => vec![0.5, 0.5, 0.5, -0.5],
        };
        let found = Dense::of(&logits.grad(&grads).expect("a gradient"));
        found.assert_near(&Dense { dims: vec![2, width], values }, 1e-6, "gradient");
        // 16-bit scores are computed in 32 bits.
        let half = logits.detach().cast(DType::F16);
        let loss = vocab_parallel_cross_entropy(half, Tensor::from_ints([0, 6], &device), 7, &[], &rank)?;
        assert_eq!(loss.dtype(), DType::F32);
        Dense::of(&loss).assert_near(&expected, 1e-6, "loss of 16-bit scores");
        Ok(())
    });
    run.unwrap();
}

/// All parameters of a rank, in their order.
fn values<M: Module>(model: &M) -> Vec<Dense> {
    struct Values(Vec<Dense>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            assert!(param.val().is_require_grad());
            self.0.push(Dense::of(&param.val()));
        }
    }
    let mut visitor = Values(Vec::new());
    model.visit(&mut visitor);
    visitor.0
}

type Layers = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, ParallelFeedForward, ParallelAttention);

fn layers(group: &Communicator, device: &Device, initializer: Initializer) -> Result<Layers, Error> {
    Ok((
        ColumnParallelLinearConfig::new(5, 9)
            .with_seed(Some(1))
            .with_initializer(initializer.clone())
            .init(group, device)?,
        RowParallelLinearConfig::new(9, 5)
            .with_seed(Some(2))
            .with_initializer(initializer.clone())
            .init(group, device)?,
        VocabParallelEmbeddingConfig::new(13, 5).with_seed(Some(3)).init(group, device)?,
        ParallelFeedForwardConfig::new(5, 10)
            .with_seed(Some(4))
            .with_activation(FeedForwardActivation::SwiGlu)
            .with_initializer(initializer.clone())
            .init(group, device)?,
        ParallelAttentionConfig::new(24, 12)
            .with_n_kv_heads(Some(2))
            .with_seed(Some(5))
            .with_initializer(initializer)
            .init(group, device)?,
    ))
}

/// The same first values at every degree, of which each rank holds its slice and no more.
#[test]
fn first_values_and_bytes() {
    let initializers = [
        LinearConfig::new(1, 1).initializer,
        Initializer::Normal { mean: 0.5, std: 2.0 },
        Initializer::XavierUniform { gain: 1.0 },
        Initializer::KaimingNormal { gain: 1.0, fan_out_only: true },
    ];
    for initializer in initializers {
        let alone = |rank: Rank| Ok(values(&layers(&rank, &rank.device().autodiff(), initializer.clone())?));
        let whole = launch::threads(1).run(alone).unwrap().remove(0);
        // column, row, table, up, gate, down, query, key, value, output; weights and biases
        for degree in [1, 2, 4] {
            let run = launch::threads(degree).run(|rank| {
                let (size, number) = (rank.size(), rank.rank());
                let found = values(&layers(&rank, &rank.device().autodiff(), initializer.clone())?);
                assert_eq!(found.len(), whole.len());
                for (found, whole) in found.iter().zip(&whole) {
                    assert_eq!(found, &slice(whole, &found.dims, &rank));
                }
                let elements: usize = found.iter().map(|dense| dense.values.len()).sum();
                let own = |total: usize| part(total, size, number).len();
                let expected = own(9) * 6
                    + (own(9) * 5 + 5)
                    + own(13) * 5
                    + own(10) * (6 + 6 + 5)
                    + 5
                    + own(24) * 25
                    + 2 * 4usize.div_ceil(size).max(2) * 25
                    + (own(24) * 24 + 24);
                assert_eq!(elements, expected, "rank {number} of {size}");
                Ok(())
            });
            run.unwrap();
        }
    }
}

/// The numbers are spread as the initializer says, and other seeds give others.
#[test]
fn first_values_are_random() {
    let run = launch::threads(1).run(|rank| {
        let device = rank.device();
        let drawn = |initializer: Initializer, seed: Option<u64>| {
            let config = ColumnParallelLinearConfig::new(100, 200).with_bias(false).with_seed(seed);
            let layer = config.with_initializer(initializer).init(&rank, &device)?;
            Ok::<_, Error>(Dense::of(&layer.weight.val()).values)
        };
        let moments = |values: &[f64]| {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt())
        };
        let even = drawn(LinearConfig::new(1, 1).initializer, Some(1))?;
        let (mean, std) = moments(&even);
        assert!(mean.abs() < 0.002 && (std - 0.1 / 3f64.sqrt()).abs() < 0.001, "{mean} {std}");
        assert!(even.iter().all(|value| value.abs() <= 0.1));
        let normal = drawn(Initializer::Normal { mean: 1.0, std: 2.0 }, Some(1))?;
        let (mean, std) = moments(&normal);
        assert!((mean - 1.0).abs() < 0.05 && (std - 2.0).abs() < 0.05, "{mean} {std}");
        let tail = normal.iter().filter(|value| (*value - 1.0).abs() > 4.0).count() as f64 / normal.len() as f64;
        assert!((tail - 0.0455).abs() < 0.006, "{tail}");
        assert_ne!(even, drawn(LinearConfig::new(1, 1).initializer, Some(2))?);
        assert_ne!(drawn(Initializer::Ones, None)?, drawn(LinearConfig::new(1, 1).initializer, None)?);
        assert_ne!(
            drawn(LinearConfig::new(1, 1).initializer, None)?,
            drawn(LinearConfig::new(1, 1).initializer, None)?
        );
        Ok(())
    });
    run.unwrap();
    // Without a seed the ranks agree on one: the biases of rows are the same.
    let biases = launch::threads(3)
        .run(|rank| {
            let layer = RowParallelLinearConfig::new(4, 6).init(&rank, &rank.device())?;
            Ok(values(&layer.fork(&rank.device().autodiff()).train()).pop())
        })
        .unwrap();
    assert!(biases[0].is_some() && biases.iter().all(|bias| *bias == biases[0]), "{biases:?}");
}

/// A small language model of burn's layers, the table tied to the output.
#[derive(Module, Debug)]
struct Whole {
    table: Embedding,
    attention: MultiHeadAttention,
    block: PositionWiseFeedForward,
}

/// The same of ours: an ordinary burn module.
#[derive(Module, Debug)]
struct Split {
    table: VocabParallelEmbedding,
    attention: ParallelAttention,
    block: ParallelFeedForward,
}

#[test]
fn a_language_model() {
    trials(&DEGREES, |mut trial| {
        for parallel in [false, true] {
            let device = &trial.device;
            let full = Whole {
                table: EmbeddingConfig::new(VOCABULARY, 24).init(device),
                attention: MultiHeadAttentionConfig::new(24, 12).with_dropout(0.0).init(device),
                block: PositionWiseFeedForwardConfig::new(24, 10).with_dropout(0.0).init(device),
            };
            let full = filled(full, 11, device, trial.dtype);
            let (heads, block) = (&full.attention, &full.block);
            let local = Split {
                table: VocabParallelEmbeddingConfig::new(VOCABULARY, 24)
                    .with_sequence_parallel(parallel)
                    .init_from(&full.table, trial.rank)?,
                attention: ParallelAttentionConfig::new(24, 12)
                    .with_causal(true)
                    .with_sequence_parallel(parallel)
                    .init_from(&heads.query, &heads.key, &heads.value, &heads.output, trial.rank)?,
                block: ParallelFeedForwardConfig::new(24, 10).with_sequence_parallel(parallel).init_from(
                    &block.linear_inner,
                    None,
                    &block.linear_outer,
                    trial.rank,
                )?,
            };
            let rows = BATCH * SEQUENCE;
            let tokens = ids(rows, VOCABULARY, false, device).reshape([BATCH, SEQUENCE]);
            let targets = ids(rows, 11, false, device);
            let later = Tensor::<3, Bool>::tril_mask([BATCH, SEQUENCE, SEQUENCE], 0, device);
            let burns = CrossEntropyLossConfig::new().with_pad_tokens(Some(vec![3])).init(device);
            let ours =
                VocabParallelCrossEntropyConfig::new(VOCABULARY).with_pad_tokens(Some(vec![3])).init(trial.rank)?;
            trial.width = 24;
            trial.input = sequence(parallel);
            let whole = |full: &Whole, x: Tensor<3>| {
                let h = full.table.forward(tokens.clone()) + x;
                let h = h.clone() + full.attention.forward(MhaInput::self_attn(h).mask_attn(later.clone())).context;
                let h = h.clone() + full.block.forward(h);
                let logits = h.reshape([rows, 24]).matmul(full.table.weight.val().transpose());
                burns.forward(logits, targets.clone()).reshape([1, 1, 1])
            };
            let split = |local: &Split, x: Tensor<3>| {
                let h = local.table.forward(tokens.clone())? + x;
                let h = h.clone() + local.attention.forward(h, None)?;
                let h = h.clone() + local.block.forward(h)?;
                let logits = local.table.logits(h)?;
                let width = logits.dims()[2];
                Ok(ours.forward(logits.reshape([rows, width]), targets.clone())?.reshape([1, 1, 1]))
            };
            trial.run(full.clone().fork(&trial.device), local, whole, split)?;
        }
        Ok(())
    });
}

/// What is cut from a whole layer does not keep it alive, and evaluates without a tape.
#[test]
fn slices_are_copies_and_evaluate() {
    let run = launch::threads(3).run(|rank| {
        let device = rank.device().autodiff();
        let full = PositionWiseFeedForwardConfig::new(5, 10).with_dropout(0.0).init(&device);
        let full = filled(full, 12, &device, DType::F32);
        let local = ParallelFeedForward::from_full(&full, &rank)?.valid();
        for weight in [&local.up.weight, &local.down.weight] {
            let bytes = weight.shape().num_elements() * 4;
            let flex = weight.val().try_into_primitive::<burn::backend::Flex>().expect("a plain flex tensor");
            assert_eq!(flex.storage::<f32>().len() * 4, bytes);
        }
        let x = Dense::fractions(&[3, 5], 1).tensor::<2>(&rank.device(), DType::F32);
        let found = local.forward(x.clone())?;
        assert!(!found.is_tracked());
        Dense::of(&found).assert_near(&Dense::of(&full.valid().forward(x)), 1e-5, "evaluation");
        Ok(())
    });
    run.unwrap();
}

/// What cannot be is refused, with its numbers, on every rank alike; the world lives on.
#[test]
fn errors() {
    let run = launch::threads(3).run(|rank| {
        let device = rank.device().autodiff();
        let refused = |what: Result<(), Error>, words: &[&str]| {
            let said = what.expect_err("should be refused").to_string();
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        };
        let heads = ParallelAttentionConfig::new(24, 4).init(&rank, &device);
        refused(heads.map(|_| ()), &["3 ranks", "n_heads 4", "another degree"]);
        let heads = ParallelAttentionConfig::new(24, 5).init(&rank, &device);
        refused(heads.map(|_| ()), &["n_heads 5 does not divide d_model 24"]);
        let heads = ParallelAttentionConfig::new(24, 12).with_n_kv_heads(Some(2)).init(&rank, &device);
        refused(heads.map(|_| ()), &["n_kv_heads 2", "3 ranks", "another degree"]);
        let heads = ParallelAttentionConfig::new(24, 12).with_n_kv_heads(Some(5)).init(&rank, &device);
        refused(heads.map(|_| ()), &["n_kv_heads 5 does not divide n_heads 12"]);
        for zero in [(0, 12, 1), (24, 0, 1), (24, 12, 0)] {
            let heads = ParallelAttentionConfig::new(zero.0, zero.1).with_n_kv_heads(Some(zero.2));
            refused(heads.init(&rank, &device).map(|_| ()), &["does not divide"]);
        }
        let mha = MultiHeadAttentionConfig::new(24, 12).init(&device);
        refused(ParallelAttention::from_full(&mha, true, &rank).map(|_| ()), &["dropout of 0.1"]);
        let heads = ParallelAttentionConfig::new(24, 12).init(&rank, &device)?;
        refused(heads.forward(Tensor::ones([1, 2, 23], &device), None).map(|_| ()), &["[.., 24]", "[1, 2, 23]"]);
        let mask = Tensor::<2, Int>::zeros([1, 3], &device).bool();
        refused(heads.forward(Tensor::ones([1, 2, 24], &device), Some(mask)).map(|_| ()), &["[1, 3]", "[1, 2]"]);

        let narrow = ColumnParallelLinearConfig::new(4, 2).init(&rank, &device);
        refused(narrow.map(|_| ()), &["d_output 2", "3 ranks", "smaller"]);
        let narrow = RowParallelLinearConfig::new(2, 4).init(&rank, &device);
        refused(narrow.map(|_| ()), &["d_input 2", "3 ranks", "smaller"]);
        let orthogonal = ColumnParallelLinearConfig::new(4, 4).with_initializer(Initializer::Orthogonal { gain: 1.0 });
        refused(orthogonal.init(&rank, &device).map(|_| ()), &["orthogonal", "init_from"]);
        let linear = LinearConfig::new(4, 6).init(&device);
        let other = ColumnParallelLinearConfig::new(4, 7).init_from(&linear, &rank);
        refused(other.map(|_| ()), &["[4, 7] with bias", "[4, 6] with bias"]);
        let column = ColumnParallelLinearConfig::new(4, 6).with_sequence_parallel(true).init(&rank, &device)?;
        refused(column.forward(Tensor::<1>::ones([4], &device)).map(|_| ()), &["rank 1"]);
        refused(column.forward(Tensor::<2>::ones([2, 3], &device)).map(|_| ()), &["[.., 4]", "[2, 3]"]);
        let row = RowParallelLinear::from_full(&linear, &rank)?;
        refused(row.forward(Tensor::<2>::ones([2, 4], &device)).map(|_| ()), &["[2, 4]"]);

        let block = PositionWiseFeedForwardConfig::new(4, 6).init(&device);
        refused(ParallelFeedForward::from_full(&block, &rank).map(|_| ()), &["dropout of 0.1"]);
        let block = PositionWiseFeedForwardConfig::new(4, 6).with_dropout(0.0).with_activation(ActivationConfig::Tanh);
        refused(ParallelFeedForward::from_full(&block.init(&device), &rank).map(|_| ()), &["Tanh"]);
        let back = LinearConfig::new(6, 4).init(&device);
        let gate = ParallelFeedForwardConfig::new(4, 6).init_from(&linear, Some(&linear), &back, &rank);
        refused(gate.map(|_| ()), &["Gelu takes a gate: false"]);

        let fans = VocabParallelEmbeddingConfig::new(7, 4).with_initializer(Initializer::XavierUniform { gain: 1.0 });
        refused(fans.init(&rank, &device).map(|_| ()), &["fan-in", "Normal"]);
        let table = VocabParallelEmbeddingConfig::new(7, 4).init(&rank, &device)?;
        for ids in [[[1, 7]], [[-1, 0]]] {
            let found = table.forward(Tensor::from_ints(ids, &device));
            refused(found.map(|_| ()), &["0 to 6"]);
        }
        let cost = |logits: Tensor<2>, targets: [i32; 2], pad: &[i64]| {
            vocab_parallel_cross_entropy(logits, Tensor::from_ints(targets, &device), 7, pad, &rank).map(|_| ())
        };
        let own = part(7, 3, rank.rank()).len();
        refused(cost(Tensor::ones([2, 7], &device), [1, 2], &[]), &["of 7 columns", "[2, 7]"]);
        refused(cost(Tensor::ones([3, own], &device), [1, 2], &[]), &["targets [2]"]);
        refused(cost(Tensor::ones([2, own], &device), [1, 7], &[]), &["0 to 6"]);
        refused(cost(Tensor::ones([2, own], &device), [1, -100], &[]), &["-100", "0 to 6"]);
        cost(Tensor::ones([2, own], &device), [1, -100], &[-100])?;
        refused(VocabParallelCrossEntropyConfig::new(2).init(&rank).map(|_| ()), &["vocabulary 2", "3 ranks"]);
        rank.barrier()
    });
    run.unwrap();
}
