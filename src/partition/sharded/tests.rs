//! Steps over parameters that are divided by rows: what is put in, and what is alive at once.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig};
use burn::prelude::*;
use burn::tensor::TensorData;
use burn_ir::TensorStatus;

use super::*;
use crate::graph::instruction::Instruction;
use crate::graph::liveness::program;
use crate::graph::{CustomOps, Executor, StepGraph, StepResult, capture_step};
use crate::partition::Exchange;

/// A language model whose head is its embedding.
#[derive(Module, Debug)]
struct Lm {
    embedding: Embedding,
    encoder: TransformerEncoder,
    norm: LayerNorm,
}

const WORDS: usize = 11;
const WIDTH: usize = 8;

impl Lm {
    fn new() -> Self {
        let device = Device::flex().autodiff();
        Self {
            embedding: EmbeddingConfig::new(WORDS, WIDTH).init(&device),
            encoder: TransformerEncoderConfig::new(WIDTH, 16, 2, 3).with_dropout(0.0).init(&device),
            norm: LayerNormConfig::new(WIDTH).init(&device),
        }
    }

    fn loss(&self, tokens: Tensor<2, Int>) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let x = self.encoder.forward(TransformerEncoderInput::new(self.embedding.forward(tokens)));
        let x = self.norm.forward(x).reshape([b * s, WIDTH]);
        x.matmul(self.embedding.weight.val().transpose()).powi_scalar(2).mean()
    }
}

fn tokens() -> Tensor<2, Int> {
    let ids: Vec<i64> = (0..10).map(|place| place * 7 % WORDS as i64).collect();
    Tensor::from_data(TensorData::new(ids, [2, 5]), &Device::flex())
}

fn captured(model: &Lm) -> StepGraph {
    capture_step(model, tokens(), |model, tokens| model.loss(tokens)).unwrap()
}

/// Each layer is a group; the embedding is one, the last norm too.
fn group(path: &str) -> usize {
    match path.strip_prefix("encoder.layers.") {
        Some(rest) => 1 + rest.split('.').next().unwrap().parse::<usize>().unwrap(),
        None if path.starts_with("norm") => 4,
        None => 0,
    }
}

/// The step on rows of one rank, which are all.
fn in_rows(graph: &StepGraph, gathering: Gathering) -> StepGraph {
    let mut graph = graph.clone();
    let params = graph.params.iter().enumerate();
    let rows: HashMap<_, _> = params
        .map(|(number, param)| {
            let dims = param.tensor.shape.to_vec();
            (param.id, InRows { number, group: group(&param.path), dims })
        })
        .collect();
    shard_parameters(&mut graph, &|id| rows.get(&id).cloned(), gathering);
    graph
}

/// Has the collectives of one rank give what they get.
fn alone() -> CustomOps {
    let mut ops = CustomOps::new();
    for id in [START_GATHER, WAIT_GATHER, START_SCATTER, WAIT_SCATTER] {
        ops.register(id, |_, inputs| Ok(inputs));
    }
    ops
}

const ALL: [Gathering; 3] = [
    Gathering { gathers: true, keeps: false },
    Gathering { gathers: true, keeps: true },
    Gathering { gathers: false, keeps: false },
];

/// To the bit by burn's operations one by one; loops and sums of products add up in another order where what they
/// are made of is elsewhere.
#[test]
fn the_step_stays_the_same() {
    let model = Lm::new();
    let graph = captured(&model);
    for (gathering, fusion) in ALL.into_iter().flat_map(|gathering| [(gathering, false), (gathering, true)]) {
        let run = |graph: StepGraph, ops: CustomOps| {
            let mut executor = Executor::new(graph, ops.with_fusion(fusion)).unwrap();
            executor.step(&model, tokens()).unwrap()
        };
        let (expected, found) = (run(graph.clone(), CustomOps::new()), run(in_rows(&graph, gathering), alone()));
        assert_eq!(found.gradients.len(), expected.gradients.len());
        let numbers = |step: &StepResult| {
            let attention = &model.encoder.layers[1].mha.query;
            let weights = [model.embedding.weight.id, attention.weight.id];
            let weights = weights.map(|id| step.gradients.get::<2>(id).unwrap().into_data());
            let bias = step.gradients.get::<1>(attention.bias.as_ref().unwrap().id).unwrap().into_data();
            let loss = step.loss.clone().into_data();
            [&weights[0], &weights[1], &bias, &loss].map(|data| data.try_to_vec::<f32>().unwrap())
        };
        for (found, expected) in numbers(&found).iter().zip(&numbers(&expected)) {
            let largest = expected.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            let bound = if fusion { 1e-6 * largest } else { 0.0 };
            let near = |(x, y): (&f32, &f32)| (x - y).abs() <= bound;
            assert!(found.iter().zip(expected).all(near), "{gathering:?}, fused {fusion}");
        }
    }
}

fn count(graph: &StepGraph, id: &str, range: std::ops::Range<usize>) -> usize {
    let is = |op: &&OperationIr| matches!(op, OperationIr::Custom(op) if op.id == id);
    graph.operations[range].iter().filter(is).count()
}

#[test]
fn each_group_is_gathered_once_a_pass_and_scattered_once() {
    let graph = captured(&Lm::new());
    for gathering in ALL {
        let graph = in_rows(&graph, gathering);
        let (forward, all) = (graph.forward_len, graph.operations.len());
        let gathers = [0..forward, forward..all].map(|range| count(&graph, START_GATHER, range));
        let expected = match (gathering.gathers, gathering.keeps) {
            (false, _) => [0, 0],
            (true, true) => [5, 0],
            (true, false) => [5, 5],
        };
        assert_eq!(gathers, expected, "{gathering:?}");
        assert_eq!([0..forward, forward..all].map(|range| count(&graph, START_SCATTER, range)), [0, 5]);
    }
}

/// The place of the collective of a group in the backward pass.
fn place(graph: &StepGraph, id: &str, of: usize) -> usize {
    let is = |op: &OperationIr| match op {
        OperationIr::Custom(op) if op.id == id => match op.scalars[0] {
            ScalarIr::UInt(number) => group(&graph.params[number as usize].path) == of,
            _ => false,
        },
        _ => false,
    };
    graph.operations[graph.forward_len..].iter().position(is).unwrap()
}

/// burn makes the gradients of biases behind all layers: no group waits for that.
#[test]
fn a_layer_is_scattered_before_the_layer_behind_the_next() {
    let graph = in_rows(&captured(&Lm::new()), Gathering { gathers: true, keeps: false });
    for layer in [3, 2] {
        assert!(place(&graph, START_SCATTER, layer) < place(&graph, START_SCATTER, layer - 1));
    }
    assert!(place(&graph, START_SCATTER, 3) < place(&graph, WAIT_GATHER, 1));
}

/// The bytes of gathered tensors that are alive at once, what is on its way and views of what is there included; and
/// those that are alive between the passes.
fn alive(graph: &StepGraph) -> (usize, usize) {
    let forward: HashSet<TensorId> =
        graph.operations[..graph.forward_len].iter().flat_map(|op| op.outputs().map(|out| out.id)).collect();
    let mut of: HashMap<TensorId, (TensorId, usize)> = HashMap::new();
    let mut alive: HashSet<TensorId> = HashSet::new();
    let (mut most, mut between, mut backward) = (0, 0, false);
    for instruction in program(graph, false).instructions {
        match instruction {
            Instruction::Run(op) => {
                if !backward && op.outputs().all(|out| !forward.contains(&out.id)) {
                    backward = true;
                    between = bytes(&alive, &of);
                }
                let is = |id: &str| matches!(&*op, OperationIr::Custom(op) if op.id == id);
                if is(START_GATHER) || is(WAIT_GATHER) {
                    for (place, out) in op.outputs().enumerate() {
                        let own = (out.id, out.shape.num_elements() * out.dtype.size());
                        // What was on its way is there now.
                        let token =
                            if is(WAIT_GATHER) { of.get(&op.inputs().nth(place).unwrap().id).copied() } else { None };
                        of.insert(out.id, token.unwrap_or(own));
                        alive.insert(out.id);
                    }
                } else if only_moves(&op)
                    && let Some(base) = op.inputs().next().and_then(|input| of.get(&input.id)).copied()
                {
                    for out in op.outputs() {
                        of.insert(out.id, base);
                        alive.insert(out.id);
                    }
                }
                most = most.max(bytes(&alive, &of));
                for input in op.inputs().filter(|input| input.status == TensorStatus::ReadWrite) {
                    alive.remove(&input.id);
                }
            }
            Instruction::Free(tensor) => drop(alive.remove(&tensor.id)),
            Instruction::Output(_) => {}
        }
    }
    (most, between)
}

fn bytes(alive: &HashSet<TensorId>, of: &HashMap<TensorId, (TensorId, usize)>) -> usize {
    let bases: BTreeMap<TensorId, usize> = alive.iter().map(|id| of[id]).collect();
    bases.into_values().sum()
}

#[test]
fn two_groups_are_alive_at_once() {
    let graph = captured(&Lm::new());
    let mut groups = [0; 5];
    for param in &graph.params {
        groups[group(&param.path)] += param.tensor.shape.num_elements() * param.tensor.dtype.size();
    }
    let (most, between) = alive(&in_rows(&graph, ALL[0]));
    // The embedding is the head as well, so that it stays over the whole of a pass.
    assert!(most <= groups[0] + 2 * groups[1], "{most} of {groups:?}");
    assert!(most > groups[1]);
    assert_eq!(between, 0, "nothing stays for the backward pass");
    let all: usize = groups.iter().sum();
    let (most, between) = alive(&in_rows(&graph, ALL[1]));
    assert!(most <= all && between > all / 2, "{between} of {all} stay, {most} at most");
}

#[test]
fn what_is_exchanged_is_found_in_the_operations() {
    let graph = in_rows(&captured(&Lm::new()), ALL[0]);
    let found: Vec<Exchange> = graph.operations.iter().filter_map(Exchange::of).collect();
    assert_eq!(found.iter().filter(|exchange| exchange.gathers).count(), 10);
    let mut scattered: Vec<usize> =
        found.iter().filter(|exchange| !exchange.gathers).flat_map(|exchange| exchange.numbers.clone()).collect();
    scattered.sort_unstable();
    assert_eq!(scattered, (0..graph.params.len()).collect::<Vec<_>>());
}
