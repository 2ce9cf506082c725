//! Parameters of which each replica holds some rows, in a captured step: gathered before they are read, their gradients
//! reduced and scattered (ZeRO, [arXiv:1910.02054](https://arxiv.org/abs/1910.02054); PyTorch's FSDP,
//! [arXiv:2304.11277](https://arxiv.org/abs/2304.11277)).
//!
//! The split is not followed through the graph, as [`partition`](super::partition) would: there it is activations that
//! move. Here each group of parameters becomes one gather in front of the first operation that reads one of them, in
//! each pass that does. The gather is started when the group before it is waited for, so that it runs beside what that
//! group is read by; beside the group in use no more than one is on its way. What is gathered is freed after its last
//! reader in the pass, like any tensor.
//!
//! In the backward pass a parameter is gathered again, unless it is to be kept. What the forward pass has made of it by
//! moving its elements or casting them (a transposed weight) would keep it as well: the backward pass makes that anew.
//!
//! A gradient is scattered once all those of its group are made, those of vectors as early as what they are views of.
//! One reduction is under way at a time: the next waits for it.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::ParamId;
use burn::tensor::{Device, Shape};
use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorId, TensorIr};

use super::overlap::token;
use crate::graph::StepGraph;
use crate::graph::liveness::without_dead;
use crate::graph::operation::{only_moves, slices_or_casts};
use crate::graph::step::Rename;
use crate::tensor::PlainTensor;

/// Starts to gather a group of parameters.
pub(crate) const START_GATHER: &str = "replicas.start_gather";
/// Waits for it.
pub(crate) const WAIT_GATHER: &str = "replicas.wait_gather";
/// Starts to reduce and scatter the gradients of a group.
pub(crate) const START_SCATTER: &str = "replicas.start_scatter";
/// Waits for it.
pub(crate) const WAIT_SCATTER: &str = "replicas.wait_scatter";

/// How a parameter lies over the replicas.
#[derive(Debug, Clone)]
pub(crate) struct InRows {
    /// Its number among those that lie so.
    pub(crate) number: usize,
    /// Those of one group are of one dtype and gathered together.
    pub(crate) group: usize,
    /// The dims of this rank's rows.
    pub(crate) dims: Vec<usize>,
}

/// What is done with the parameters of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gathering {
    /// Whether ranks hold rows of the parameters; else all of them, and rows of the gradients alone.
    pub(crate) gathers: bool,
    /// Whether what the forward pass gathers stays for the backward pass.
    pub(crate) keeps: bool,
}

/// The parts of a step that hold operations and results.
pub(crate) struct Parts<'a> {
    /// Passes, one behind the other: the forward pass, then those of the backward pass.
    pub(crate) passes: Vec<&'a mut Vec<OperationIr>>,
    /// The tensors of the parameters as they are whole, by their place.
    pub(crate) params: Vec<(TensorIr, InRows)>,
    /// The gradients, each with the place of its parameter among these.
    pub(crate) gradients: Vec<(usize, &'a mut TensorIr)>,
    /// Other results, which may be parameters.
    pub(crate) results: Vec<&'a mut TensorIr>,
}

/// Has a step run on rows of the parameters for which `rows` says so.
pub(crate) fn shard_parameters(graph: &mut StepGraph, rows: &dyn Fn(ParamId) -> Option<InRows>, gathering: Gathering) {
    let mut passes = live(graph);
    let (mut params, mut gradients) = (Vec::new(), Vec::new());
    for param in &mut graph.params {
        let Some(row) = rows(param.id) else { continue };
        if let Some(gradient) = &mut param.gradient {
            gradients.push((params.len(), gradient));
        }
        params.push((param.tensor.clone(), row.clone()));
        if gathering.gathers {
            param.tensor.shape = Shape::from(row.dims);
        }
    }
    let results = graph.loss.iter_mut().chain(&mut graph.weight).chain(&mut graph.outputs).collect();
    let parts = Parts { passes: passes.iter_mut().collect(), params, gradients, results };
    graph.next_id = rewrite(parts, graph.next_id, gathering);
    let [forward, backward] = passes;
    graph.forward_len = forward.len();
    graph.operations = forward.into_iter().chain(backward).collect();
}

/// The forward and the backward pass without what no result depends on: nothing is gathered for that.
fn live(graph: &mut StepGraph) -> [Vec<OperationIr>; 2] {
    let backward = graph.operations.split_off(graph.forward_len.min(graph.operations.len()));
    let mut needed: HashSet<TensorId> = graph.results().map(|result| result.id).collect();
    let backward = without_dead(&backward, &needed);
    needed.extend(backward.iter().flat_map(|op| op.inputs().map(|input| input.id)));
    [without_dead(&std::mem::take(&mut graph.operations), &needed), backward]
}

/// Puts gathers and scatters into the passes of a step. New tensors have ids from `next_id` on; returns the next one.
pub(crate) fn rewrite(parts: Parts<'_>, next_id: u64, gathering: Gathering) -> u64 {
    let Parts { passes, params, gradients, results } = parts;
    let mut work = ShardRewriter { params, next_id, tickets: 0 };
    let made: HashSet<TensorId> = gradients.iter().map(|(_, gradient)| gradient.id).collect();
    let mut operations: Vec<Vec<OperationIr>> = passes.iter().map(|pass| made_early((**pass).clone(), &made)).collect();
    work.scatter(&mut operations, gradients);
    if gathering.gathers {
        work.gather(&mut operations, results, gathering.keeps);
    }
    passes.into_iter().zip(operations).for_each(|(pass, operations)| *pass = operations);
    work.next_id
}

/// The operations of a pass, with those that give the gradient of a vector its dims right behind what makes it. burn
/// puts what undoes the reshape of a bias behind all layers: the gradients of its group would wait for that, and so
/// those of all groups be whole at once.
fn made_early(operations: Vec<OperationIr>, gradients: &HashSet<TensorId>) -> Vec<OperationIr> {
    let mut moved = vec![false; operations.len()];
    for (place, op) in operations.iter().enumerate() {
        let of_vector = |out: &TensorIr| gradients.contains(&out.id) && out.shape.num_dims() == 1;
        moved[place] = only_moves(op) && op.outputs().any(of_vector);
    }
    let made: HashSet<TensorId> = operations.iter().flat_map(|op| op.outputs().map(|out| out.id)).collect();
    let mut waiting: HashMap<TensorId, Vec<OperationIr>> = HashMap::new();
    let mut put = Vec::with_capacity(operations.len());
    for (op, moved) in operations.into_iter().zip(moved) {
        let input = op.inputs().next().map(|input| input.id);
        match input {
            Some(input) if moved && made.contains(&input) => waiting.entry(input).or_default().push(op),
            _ => put.push(op),
        }
    }
    let mut early = Vec::with_capacity(put.len());
    for op in put {
        let mut next = vec![op];
        while let Some(op) = next.pop() {
            next.extend(op.outputs().filter_map(|out| waiting.remove(&out.id)).flatten());
            early.push(op);
        }
    }
    early
}

struct ShardRewriter {
    params: Vec<(TensorIr, InRows)>,
    next_id: u64,
    tickets: u64,
}

/// A collective to be put in: where, and what with.
struct AsyncPair {
    start: OperationIr,
    wait: OperationIr,
}

impl ShardRewriter {
    fn fresh(&mut self, shape: Shape, like: &TensorIr) -> TensorIr {
        self.next_id += 1;
        TensorIr::uninit(TensorId::new(self.next_id - 1), shape, like.dtype)
    }

    /// A collective of the members of a group: their numbers, what it reads and what it gives.
    fn async_pair(
        &mut self,
        ids: [&str; 2],
        members: &[usize],
        inputs: Vec<TensorIr>,
        outputs: Vec<TensorIr>,
    ) -> AsyncPair {
        let tokens: Vec<TensorIr> = outputs.iter().map(|out| self.fresh(out.shape.clone(), out)).collect();
        // The scalar that may differ between ranks comes last.
        let numbers = members.iter().map(|member| self.params[*member].1.number as u64);
        let scalars: Vec<ScalarIr> = numbers.chain([self.tickets, 0]).map(ScalarIr::UInt).collect();
        self.tickets += 1;
        let op = |id: &str, inputs, outputs| {
            OperationIr::Custom(CustomOpIr { id: id.into(), inputs, outputs, scalars: scalars.clone() })
        };
        AsyncPair { start: op(ids[0], inputs, tokens.clone()), wait: op(ids[1], tokens, outputs) }
    }

    /// Scatters each group of gradients behind the last of them, and has the results be rows.
    fn scatter(&mut self, passes: &mut [Vec<OperationIr>], mut gradients: Vec<(usize, &mut TensorIr)>) {
        let mut makers: HashMap<TensorId, (usize, usize)> = HashMap::new();
        for (pass, operations) in passes.iter().enumerate() {
            for (place, op) in operations.iter().enumerate() {
                makers.extend(op.outputs().map(|out| (out.id, (pass, place))));
            }
        }
        let last = (passes.len().saturating_sub(1), usize::MAX);
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, (param, _)) in gradients.iter().enumerate() {
            groups.entry(self.params[*param].1.group).or_default().push(place);
        }
        let made = |places: &Vec<usize>| {
            places.iter().map(|place| makers.get(&gradients[*place].1.id).copied().unwrap_or(last)).max()
        };
        let mut starts: Vec<((usize, usize), Vec<usize>)> =
            groups.into_values().filter_map(|places| Some((made(&places)?, places))).collect();
        starts.sort();
        let mut pairs: BTreeMap<(usize, usize), Vec<AsyncPair>> = BTreeMap::new();
        for (at, places) in starts {
            let members: Vec<usize> = places.iter().map(|place| gradients[*place].0).collect();
            let inputs: Vec<TensorIr> = places.iter().map(|place| gradients[*place].1.clone()).collect();
            let outputs: Vec<TensorIr> = members
                .iter()
                .zip(&inputs)
                .map(|(member, gradient)| self.fresh(Shape::from(self.params[*member].1.dims.clone()), gradient))
                .collect();
            let pair = self.async_pair([START_SCATTER, WAIT_SCATTER], &members, inputs, outputs.clone());
            places.into_iter().zip(outputs).for_each(|(place, out)| *gradients[place].1 = out);
            pairs.entry(at).or_default().push(pair);
        }
        for (pass, operations) in passes.iter_mut().enumerate() {
            let mut put = Vec::with_capacity(operations.len());
            let mut under_way: Option<OperationIr> = None;
            let mut start = |at: (usize, usize), put: &mut Vec<OperationIr>| {
                for pair in pairs.remove(&at).unwrap_or_default() {
                    put.extend(under_way.replace(pair.wait));
                    put.push(pair.start);
                }
            };
            for (place, op) in std::mem::take(operations).into_iter().enumerate() {
                put.push(op);
                start((pass, place), &mut put);
            }
            start((pass, usize::MAX), &mut put);
            put.extend(under_way);
            *operations = put;
        }
    }

    /// Gathers each group in front of its first reader in each pass.
    fn gather(&mut self, passes: &mut [Vec<OperationIr>], mut results: Vec<&mut TensorIr>, keeps: bool) {
        let places: HashMap<TensorId, usize> =
            self.params.iter().enumerate().map(|(place, (tensor, _))| (tensor.id, place)).collect();
        let mut moved: HashMap<TensorId, OperationIr> = HashMap::new();
        let mut whole: HashMap<TensorId, TensorId> = HashMap::new();
        for (pass, operations) in passes.iter_mut().enumerate() {
            let own = std::mem::take(operations);
            let found: Vec<OperationIr> = own.iter().filter(|op| moves(op)).cloned().collect();
            if !keeps {
                whole.clear();
            }
            let own = if keeps { own } else { self.moved_again(own, &moved) };
            for op in found {
                let of_parameter =
                    |id: TensorId, moved: &HashMap<_, _>| places.contains_key(&id) || moved.contains_key(&id);
                if op.inputs().all(|input| of_parameter(input.id, &moved)) {
                    moved.extend(op.outputs().map(|out| (out.id, op.clone())).collect::<Vec<_>>());
                }
            }
            let mut asked: Vec<TensorId> = Vec::new();
            if pass == 0 {
                asked.extend(results.iter().map(|result| result.id).filter(|id| places.contains_key(id)));
            }
            let reads = own.iter().enumerate().flat_map(|(at, op)| op.inputs().map(move |input| (at, input.id)));
            let asks = asked.iter().map(|id| (own.len(), *id));
            // By group: its first reader, and its members that anybody reads.
            let mut groups: BTreeMap<usize, (usize, Vec<usize>)> = BTreeMap::new();
            let mut seen = HashSet::new();
            for (at, id) in reads.chain(asks) {
                if let Some(place) = places.get(&id)
                    && !whole.contains_key(&id)
                    && seen.insert(id)
                {
                    groups.entry(self.params[*place].1.group).or_insert((at, Vec::new())).1.push(*place);
                }
            }
            let mut order: Vec<(usize, Vec<usize>)> = groups.into_values().collect();
            order.iter_mut().for_each(|(_, members)| members.sort_unstable());
            order.sort();
            let mut pairs = Vec::with_capacity(order.len());
            for (at, members) in order {
                let tensors: Vec<TensorIr> = members.iter().map(|member| self.params[*member].0.clone()).collect();
                let dims = members.iter().map(|member| Shape::from(self.params[*member].1.dims.clone()));
                let inputs = tensors.iter().zip(dims).map(|(t, dims)| TensorIr::uninit(t.id, dims, t.dtype)).collect();
                let outputs: Vec<TensorIr> = tensors.iter().map(|t| self.fresh(t.shape.clone(), t)).collect();
                whole.extend(tensors.iter().zip(&outputs).map(|(tensor, out)| (tensor.id, out.id)));
                pairs.push((at, self.async_pair([START_GATHER, WAIT_GATHER], &members, inputs, outputs)));
            }
            *operations = interleave(own, pairs, &whole);
            for result in &mut results {
                if let Some(id) = whole.get(&result.id).filter(|_| pass == 0) {
                    result.id = *id;
                }
            }
        }
    }

    /// The operations of a pass, which make anew what an earlier pass has made of parameters by moving their elements.
    fn moved_again(
        &mut self,
        operations: Vec<OperationIr>,
        moved: &HashMap<TensorId, OperationIr>,
    ) -> Vec<OperationIr> {
        let mut again: HashMap<TensorId, TensorId> = HashMap::new();
        let mut put = Vec::with_capacity(operations.len());
        for mut op in operations {
            let inputs: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
            for id in inputs {
                self.move_again(id, moved, &mut again, &mut put);
            }
            rename(&mut op, &again);
            put.push(op);
        }
        put
    }

    fn move_again(
        &mut self,
        id: TensorId,
        moved: &HashMap<TensorId, OperationIr>,
        again: &mut HashMap<TensorId, TensorId>,
        put: &mut Vec<OperationIr>,
    ) {
        let Some(op) = moved.get(&id).filter(|_| !again.contains_key(&id)) else { return };
        let inputs: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
        for input in inputs {
            self.move_again(input, moved, again, put);
        }
        let mut op = op.clone();
        let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
        for out in outputs {
            let fresh = self.fresh(out.shape.clone(), &out);
            again.insert(out.id, fresh.id);
        }
        rename(&mut op, again);
        put.push(op);
    }
}

/// The operations with these collectives in front of the places where they are waited for, in order; what they give is
/// read in the place of the parameters.
fn interleave(
    operations: Vec<OperationIr>,
    pairs: Vec<(usize, AsyncPair)>,
    whole: &HashMap<TensorId, TensorId>,
) -> Vec<OperationIr> {
    let mut put = Vec::with_capacity(operations.len() + 2 * pairs.len());
    let (mut waits, mut starts) = (Vec::new(), Vec::new());
    for (at, AsyncPair { start, wait }) in pairs {
        starts.push(start);
        waits.push((at, wait));
    }
    let (mut starts, mut waits) = (starts.into_iter(), waits.into_iter().peekable());
    put.extend(starts.next());
    let mut wait_until = |place: usize, put: &mut Vec<OperationIr>| {
        while let Some((_, wait)) = waits.next_if(|(at, _)| *at <= place) {
            put.push(wait);
            put.extend(starts.next());
        }
    };
    let len = operations.len();
    for (place, mut op) in operations.into_iter().enumerate() {
        wait_until(place, &mut put);
        rename(&mut op, whole);
        put.push(op);
    }
    wait_until(len, &mut put);
    put
}

fn rename(op: &mut OperationIr, names: &HashMap<TensorId, TensorId>) {
    op.visit_mut(&mut Rename(|id| names.get(&id).copied().unwrap_or(id)));
}

/// Whether all that an operation does with a tensor is to move its elements, take some of them or cast them: it costs
/// little to do that again.
fn moves(op: &OperationIr) -> bool {
    only_moves(op) || slices_or_casts(op)
}

/// What stands for the outputs of one of these operations that starts something.
pub(crate) fn tokens(op: &CustomOpIr, device: &Device) -> Vec<PlainTensor> {
    op.outputs.iter().map(|out| token(out, device)).collect()
}

#[cfg(test)]
mod tests;
