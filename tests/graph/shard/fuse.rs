//! Products that run together with their collectives: the same numbers, as many as there should be, and no byte more.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::graph::{CustomOps, Executor, StepGraph, TensorTree, capture_forward};
use burn_parallel::partition::ProductKind::{self, AllGather, AllReduce, ReduceScatter};
use burn_parallel::partition::{bucket_reductions, fuse_products, overlap};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case, cut, split};
use super::vocabulary::{POST, TOKENS, megatron_with_vocabulary};
use crate::common::models::{Numbers, device};
use crate::common::reference::filled;

/// How many of a kind there are in the forward and in the backward, and of how many products each.
fn fused(graph: &mut StepGraph, kind: ProductKind) -> [Vec<usize>; 2] {
    let found = fuse_products(graph);
    [true, false]
        .map(|forward| found.iter().filter(|f| f.kind == kind && f.forward == forward).map(|f| f.products).collect())
}

fn none() -> [Vec<usize>; 2] {
    [Vec::new(), Vec::new()]
}

#[test]
fn a_transformer_has_as_many_as_it_has_split_layers() {
    let of = |axis: Axis, kind| fused(&mut TOKENS.split(&[axis], &[0]).0, kind);
    let plain = || Axis::new("tp", 2, Plan::megatron());
    // Of each layer the output of the attention and of the feed-forward block; on the way back what enters them, of
    // which query, key and value are three.
    assert_eq!(of(plain(), AllReduce), [vec![1, 1, 1, 1], vec![1, 3, 1, 3]]);
    assert_eq!(of(plain(), AllGather), none());
    // The output layer is split by columns as well.
    let with_head = || Axis::new("tp", 2, megatron_with_vocabulary());
    assert_eq!(of(with_head(), AllReduce), [vec![1, 1, 1, 1], vec![1, 1, 3, 1, 3]]);
    // Along the sequence everything has its collective on both ways.
    let sequence = || with_head().sequence(1);
    assert_eq!(of(sequence(), ReduceScatter), [vec![1, 1, 1, 1], vec![1, 1, 3, 1, 3]]);
    assert_eq!(of(sequence(), AllGather), [vec![3, 1, 3, 1, 1], vec![1, 1, 1, 1]]);
    assert_eq!(of(sequence(), AllReduce), none());
}

/// Gradients of weights are left to the buckets.
#[test]
fn data_parallelism_has_none() {
    let (mut graph, _) = TOKENS.split(&[Axis::batch(2)], &[0]);
    let before = graph.to_string();
    assert_eq!(fuse_products(&mut graph), []);
    assert_eq!(graph.to_string(), before);
    let (mut alone, _) = TOKENS.split(&[Axis::new("tp", 1, Plan::megatron())], &[0]);
    assert_eq!(fuse_products(&mut alone), []);
}

fn fuse_only(graph: &mut StepGraph) {
    assert!(!fuse_products(graph).is_empty());
}

fn everything(graph: &mut StepGraph) {
    fuse_only(graph);
    bucket_reductions(graph, 4096);
    overlap(graph);
}

#[test]
fn parity() {
    for case in [TOKENS, POST] {
        let references = case.alone(3);
        let plan = megatron_with_vocabulary;
        for rewrite in [fuse_only, everything] {
            for degree in [2, 3, 4] {
                case.compare_rewritten(&[Axis::new("tp", degree, plan())], &references, rewrite).unwrap();
                case.compare_rewritten(&[Axis::new("tp", degree, plan()).sequence(1)], &references, rewrite).unwrap();
            }
            for axes in [
                vec![Axis::new("tp", 3, Plan::megatron()).sequence(0)],
                vec![Axis::new("tp", 2, plan()).sequence(1), Axis::batch(2)],
                vec![Axis::batch(3), Axis::new("tp", 2, plan())],
            ] {
                case.compare_rewritten(&axes, &references, rewrite).unwrap();
            }
        }
    }
}

/// The list is the same on all ranks but for the places of slices.
#[test]
fn every_rank_fuses_the_same() {
    let axes = [Axis::new("tp", 3, megatron_with_vocabulary()).sequence(1)];
    let of = |rank: usize| {
        let (mut graph, _) = TOKENS.split(&axes, &[rank]);
        let found = fuse_products(&mut graph);
        (found, graph.axis_fingerprint("tp"), graph.to_string())
    };
    let first = of(0);
    assert!((1..3).all(|rank| of(rank) == first));
    assert_ne!(first.1, TOKENS.split(&axes, &[0]).0.axis_fingerprint("tp"));
}

/// What travels is what travelled before.
#[test]
fn not_a_byte_more() {
    use burn_parallel::graph::capture_step;
    use burn_parallel::partition::register_collectives;
    for axis in [Axis::new("tp", 2, Plan::megatron()), Axis::new("tp", 3, megatron_with_vocabulary()).sequence(1)] {
        let bytes = |rewrite: fn(&mut StepGraph)| {
            let axes = [axis.clone()];
            launch::threads(axis.degree)
                .run(move |rank| {
                    let model = filled((TOKENS.make)(&device()));
                    let graph = capture_step(&model, (TOKENS.batch)(0), TOKENS.loss)?;
                    let (mut graph, _) = split(graph, &axes, &[rank.rank()]);
                    rewrite(&mut graph);
                    let mut ops = CustomOps::new();
                    register_collectives(&mut ops, "tp", &rank);
                    let mut executor = Executor::new(graph, ops)?;
                    let local = cut(model, &axes, &[rank.rank()]);
                    let before = rank.counters();
                    executor.step(&local, (TOKENS.batch)(0))?;
                    let since = (rank.counters() - before).total();
                    Ok((since.calls, since.bytes))
                })
                .unwrap()
        };
        assert_eq!(bytes(|_| {}), bytes(fuse_only));
    }
}

/// Layers on flattened rows and on batches, with a bias and without, and one that several others read.
#[derive(Module, Debug)]
struct Odd {
    first: Linear,
    second: Linear,
    third: Linear,
    last: Linear,
}

impl Odd {
    fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(5, 12).init(device),
            second: LinearConfig::new(5, 12).with_bias(false).init(device),
            third: LinearConfig::new(12, 7).with_bias(false).init(device),
            last: LinearConfig::new(12, 7).init(device),
        }
    }

    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let hidden = activation::silu(self.first.forward(x.clone())) * self.second.forward(x);
        // A sum of two products by rows is one reduction.
        self.third.forward(hidden.clone()) + self.last.forward(hidden.tanh())
    }

    fn loss<const D: usize>(&self, (x, y): (Tensor<D>, Tensor<D>)) -> Tensor<1> {
        (self.forward(x) - y).powi_scalar(2).mean()
    }
}

fn by_columns_then_rows() -> Plan {
    Plan::new()
        .shard("first.weight", 1)
        .shard("first.bias", 0)
        .shard("second.weight", 1)
        .shard("third.weight", 0)
        .shard("last.weight", 0)
}

fn batch<const D: usize>(seed: u64, mut dims: [usize; D]) -> (Tensor<D>, Tensor<D>) {
    let mut numbers = Numbers(seed);
    let x = numbers.tensor(dims, &device());
    dims[D - 1] = 7;
    (x, numbers.tensor(dims, &device()))
}

fn odd<I: TensorTree + Clone>(case: &Case<Odd, I>, sequence: bool) {
    let references = case.alone(4);
    for degree in [2, 3, 4] {
        let axis = Axis::new("tp", degree, by_columns_then_rows());
        for rewrite in [fuse_only, everything] {
            case.compare_rewritten(std::slice::from_ref(&axis), &references, rewrite).unwrap();
            if sequence {
                case.compare_rewritten(&[axis.clone().sequence(1)], &references, rewrite).unwrap();
            }
        }
    }
}

#[test]
fn odd_shapes() {
    odd(&Case { make: Odd::new, batch: |seed| batch(seed, [11, 5]), loss: Odd::loss::<2> }, false);
    odd(&Case { make: Odd::new, batch: |seed| batch(seed, [1, 12, 5]), loss: Odd::loss::<3> }, true);
    odd(&Case { make: Odd::new, batch: |seed| batch(seed, [3, 12, 5]), loss: Odd::loss::<3> }, true);
    odd(&Case { make: Odd::new, batch: |seed| batch(seed, [2, 3, 5, 5]), loss: Odd::loss::<4> }, false);
    let case: Case<Odd, (Tensor<2>, Tensor<2>)> =
        Case { make: Odd::new, batch: |seed| batch(seed, [11, 5]), loss: Odd::loss::<2> };
    let (mut graph, report) = case.split(&[Axis::new("tp", 2, by_columns_then_rows())], &[0]);
    assert_eq!(fused(&mut graph, AllReduce), [vec![2], Vec::new()], "{}\n{graph}", report[0]);
}

#[test]
fn a_forward_alone() {
    use burn_parallel::partition::register_collectives;
    let model = filled(Odd::new(&device()));
    let (x, _) = batch(3, [2, 12, 5]);
    let due = model.valid().forward(x.clone().inner()).into_data();
    let axes = [Axis::new("tp", 2, by_columns_then_rows()).sequence(1)];
    let found = launch::threads(2)
        .run(|rank| {
            let captured = capture_forward(&model, x.clone(), Odd::forward::<3>)?;
            let (mut graph, _) = split(captured.graph, &axes, &[rank.rank()]);
            assert_eq!(fused(&mut graph, AllReduce), [vec![2], Vec::new()], "{graph}");
            let mut ops = CustomOps::new();
            register_collectives(&mut ops, "tp", &rank);
            let local = cut(model.clone(), &axes, &[rank.rank()]);
            let mut given = Executor::new(graph, ops)?.forward(&local, x.clone())?;
            Ok(given.remove(0).float::<3>()?.into_data())
        })
        .unwrap();
    for found in found {
        found.assert_approx_eq::<f32>(&due, burn::tensor::Tolerance::default());
    }
}
