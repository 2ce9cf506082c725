//! Dims that are merged for a while: a split of any of them follows.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig, RotaryEncoding, RotaryEncodingConfig};
use burn::prelude::*;
use burn::tensor::activation::softmax;
use burn_parallel::partition::CollectiveKind::{AllGather, AllReduce, AllToAll, ReduceScatter};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use crate::common::models::{Numbers, device};

/// Attention of twelve heads with burn's rotary encoding, on batch and heads in one dim.
#[derive(Module, Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Added to the scores of all heads.
    near: Linear,
    rotary: RotaryEncoding,
    dropout: Dropout,
}

const WIDTH: usize = 24;
const HEADS: usize = 12;

impl Attention {
    fn new(dropout: f64, device: &Device) -> Self {
        let linear = |gives| LinearConfig::new(WIDTH, gives).init(device);
        Self {
            query: linear(WIDTH),
            key: linear(WIDTH),
            value: linear(WIDTH),
            output: linear(WIDTH),
            near: LinearConfig::new(5, 5).init(device),
            rotary: RotaryEncodingConfig::new(8, WIDTH / HEADS).init(device),
            dropout: DropoutConfig::new(dropout).init(),
        }
    }

    /// With batch and heads as two dims but in the rotary encoding.
    fn apart(&self, (x, y): RowBatch) -> Tensor<1> {
        let [b, s, d] = x.dims();
        let heads = |x: Tensor<3>| x.reshape([b, s, HEADS, d / HEADS]).swap_dims(1, 2);
        let query = self.rotary.forward(heads(self.query.forward(x.clone())));
        let key = self.rotary.forward(heads(self.key.forward(x.clone())));
        let seen = softmax(query.matmul(key.transpose()), 3).matmul(heads(self.value.forward(x)));
        let x = self.output.forward(seen.swap_dims(1, 2).reshape([b, s, d]));
        (x - y).powi_scalar(2).mean()
    }

    /// With both in one dim all the way, a mask, dropout, a bias for all heads, and sums over them.
    fn merged(&self, (x, y): RowBatch) -> Tensor<1> {
        let [b, s, d] = x.dims();
        let heads = |x: Tensor<3>| {
            let x = x.reshape([b, s, HEADS, d / HEADS]).swap_dims(1, 2);
            x.reshape([b * HEADS, s, d / HEADS])
        };
        let query = self.rotary.forward(heads(self.query.forward(x.clone())));
        let key = self.rotary.forward(heads(self.key.forward(x.clone())));
        let later = Tensor::<2, Bool>::tril_mask([s, s], 0, &x.device()).unsqueeze::<3>();
        let scores = query.matmul(key.transpose()) + self.near.weight.val().unsqueeze::<3>();
        let scores = scores.mask_fill(later.expand([b * HEADS, s, s]), -1e9);
        let seen = self.dropout.forward(softmax(scores, 2));
        let most = seen.clone().powi_scalar(2).mean_dim(2).sum();
        let seen = seen.matmul(heads(self.value.forward(x))).swap_dims(0, 1).permute([1, 0, 2]);
        let seen = Tensor::cat(vec![seen.clone().slice([0..b * HEADS, 0..2]), seen.slice([0..b * HEADS, 2..s])], 1);
        let x = self.output.forward(seen.reshape([b, HEADS, s, d / HEADS]).swap_dims(1, 2).reshape([b, s, d]));
        (x - y).powi_scalar(2).mean() + most * 0.01
    }
}

type RowBatch = (Tensor<3>, Tensor<3>);

fn rows(seed: u64) -> RowBatch {
    let mut numbers = Numbers(seed + 21);
    (numbers.tensor([4, 5, WIDTH], &device()), numbers.tensor([4, 5, WIDTH], &device()))
}

fn megatron() -> Plan {
    let columns = |plan: Plan, name: &str| plan.shard(format!("{name}.weight"), 1).shard(format!("{name}.bias"), 0);
    ["query", "key", "value"].into_iter().fold(Plan::new(), columns).shard("output.weight", 0)
}

#[test]
fn burns_rotary_encoding_takes_no_collective_of_its_own() {
    let case = Case { make: |d| Attention::new(0.0, d), batch: rows, loss: Attention::apart };
    let references = case.alone(2);
    for degree in [2, 3, 4, 6] {
        let report = &case.compare(&[Axis::new("tp", degree, megatron())], &references).unwrap()[0];
        assert!(report.fallbacks.is_empty(), "{report}");
        let moved = [AllGather, ReduceScatter, AllToAll].map(|kind| report.count(kind));
        assert_eq!(moved, [[0, 0]; 3], "{report}");
        // The output forward; the input has no gradient.
        assert_eq!(report.count(AllReduce), [1, 0], "{report}");
    }
}

#[test]
fn attention_on_batch_times_heads_is_split_by_heads() {
    let case = Case { make: |d| Attention::new(0.2, d), batch: rows, loss: Attention::merged };
    let references = case.alone(2);
    for degree in [2, 3, 4, 6] {
        let report = &case.compare(&[Axis::new("tp", degree, megatron())], &references).unwrap()[0];
        assert!(report.fallbacks.is_empty(), "{report}");
        let moved = [AllGather, ReduceScatter, AllToAll].map(|kind| report.count(kind));
        assert_eq!(moved, [[0, 0]; 3], "{report}");
        // The output, what was added up over the heads, and the gradient of the bias of all of them.
        assert_eq!(report.count(AllReduce), [2, 1], "{report}");
    }
    // Along the batch, the outer of the two, over both, and along the sequence.
    case.compare(&[Axis::batch(4)], &references).unwrap();
    case.compare(&[Axis::batch(2), Axis::new("tp", 3, megatron())], &references).unwrap();
    case.compare(&[Axis::new("tp", 6, megatron()), Axis::batch(2)], &references).unwrap();
    case.compare(&[Axis::new("tp", 2, megatron()).sequence(0)], &references).unwrap();
}

/// Merges that something needs stay.
#[test]
fn what_reads_a_merged_dim_as_one_gets_it() {
    let losses: [fn(&Attention, RowBatch) -> Tensor<1>; 3] = [
        |m, (x, y)| {
            let [b, s, d] = x.dims();
            let h = m.query.forward(x).reshape([b, s, HEADS, 2]).swap_dims(1, 2).reshape([b * HEADS, s, 2]);
            let first = h.clone().select(0, Tensor::from_ints([5, 3, 17], &h.device()));
            let h = h.reshape([b, HEADS, s, 2]).swap_dims(1, 2).reshape([b, s, d]);
            (m.output.forward(h) - y).powi_scalar(2).mean() + first.sum()
        },
        |m, (x, y)| {
            let [b, s, d] = x.dims();
            let h = m.query.forward(x).reshape([b, s, HEADS, 2]).swap_dims(1, 2).reshape([b * HEADS, s, 2]);
            let h = h.clone() / h.clone().sum_dim(0).add_scalar(9.0) + h.max_dim(0);
            let h = h.reshape([b, HEADS, s, 2]).swap_dims(1, 2).reshape([b, s, d]);
            (m.output.forward(h) - y).powi_scalar(2).mean()
        },
        |m, (x, y)| {
            let [b, s, d] = x.dims();
            // Taken apart in another way than it was merged.
            let h = m.query.forward(x).reshape([b, s, HEADS, 2]).swap_dims(1, 2).reshape([b * HEADS, s, 2]).tanh();
            let h = h.reshape([HEADS, b, s, 2]).swap_dims(0, 1).swap_dims(1, 2).reshape([b, s, d]);
            (m.output.forward(h) - y).powi_scalar(2).mean()
        },
    ];
    for loss in losses {
        let case = Case { make: |d| Attention::new(0.0, d), batch: rows, loss };
        let references = case.alone(1);
        for degree in [2, 4] {
            case.compare(&[Axis::new("tp", degree, megatron())], &references).unwrap();
        }
    }
}

#[test]
fn reports_name_the_layer() {
    let case = Case { make: |d| Attention::new(0.0, d), batch: rows, loss: Attention::apart };
    let (_, reports) = case.split(&[Axis::new("tp", 2, megatron())], &[0]);
    let said = reports[0].to_string();
    assert!(said.contains("forward  tp.all_reduce [20, 24] for operation BaseFloat.Reshape at `output`"), "{said}");
    let plan = Plan::new().shard("query.weight", 0).shard("output.weight", 1);
    let (_, reports) = case.split(&[Axis::new("tp", 2, plan)], &[0]);
    let layers: Vec<&str> = reports[0].collectives.iter().map(|collective| collective.layer.as_str()).collect();
    assert!(layers.contains(&"query") && layers.contains(&"output"), "{}", reports[0]);
    assert!(layers.iter().all(|layer| ["query", "output", "key", "value"].contains(layer)), "{}", reports[0]);
}
