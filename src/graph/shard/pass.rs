//! The one pass over the operations.

use std::collections::HashMap;

use burn::tensor::{Shape, Slice};
use burn_ir::{
    BaseOperationIr, BinaryOpIr, CustomOpIr, FloatOperationIr, IrVisitorMut, NumericOperationIr, OperationIr, ScalarIr,
    SliceOpIr, TensorId, TensorIr,
};

use super::collectives::{ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER};
use super::held::{Held, WaitingSum};
use super::report::{Collective, CollectiveKind, Fallback, ShardReport};
use super::rules::{Strategy, as_sum, localise, lower, only_moves, strategies};
use crate::error::Error;
use crate::graph::liveness::without_dead;
use crate::graph::step::op_name;
use crate::graph::{StepGraph, graph_error};
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

/// Splits a step over `degree` ranks: the graph that `rank` runs, and what was put in.
///
/// `params` and `inputs` are the layouts in the order of the graph's bindings. The result takes the local part of split
/// parameters, and gives gradients and updates in the layout of their parameter. Inputs are given whole: the graph takes
/// its part itself. Loss and extra outputs come out whole on every rank.
///
/// # Errors
/// [`Error::Graph`] if the number of layouts is wrong, a layout is partial, the degree does not divide a dim that is to be
/// split, or the step draws random numbers (and the degree is more than 1).
pub fn partition(
    graph: &StepGraph,
    params: &[Layout],
    inputs: &[Layout],
    degree: usize,
    rank: usize,
) -> Result<(StepGraph, ShardReport), Error> {
    if degree == 0 || rank >= degree {
        return Err(graph_error(format!("there is no rank {rank} among {degree}")));
    }
    if params.len() != graph.params.len() || inputs.len() != graph.inputs.len() {
        return Err(graph_error(format!(
            "a graph of {} parameters and {} inputs was given {} and {} layouts",
            graph.params.len(),
            graph.inputs.len(),
            params.len(),
            inputs.len()
        )));
    }
    let named_params = graph.params.iter().map(|p| (format!("parameter `{}`", p.path), &p.tensor)).zip(params);
    let named_inputs = graph.inputs.iter().map(|i| (format!("input `{}`", i.path), &i.tensor)).zip(inputs);
    for ((name, tensor), layout) in named_params.chain(named_inputs) {
        check(&name, tensor, *layout, degree)?;
    }
    if degree == 1 {
        return Ok((graph.clone(), ShardReport::default()));
    }
    if let Some(op) = graph.operations.iter().find(|op| is_random(op)) {
        return Err(graph_error(format!(
            "the step draws random numbers ({}), which {degree} ranks cannot split yet: set dropout to 0",
            op_name(op)
        )));
    }

    let mut pass = Pass::new(graph, params, degree, rank);
    for (binding, layout) in graph.params.iter().zip(params) {
        let id = binding.tensor.id;
        pass.held.insert(id, Held::new(binding.tensor.clone(), *layout, id));
    }
    pass.forward = true;
    pass.reader = "input".into();
    for (binding, layout) in graph.inputs.iter().zip(inputs) {
        let id = binding.tensor.id;
        pass.held.insert(id, Held::new(binding.tensor.clone(), Replicated, id));
        if let Sharded(_) = layout {
            let local = pass.get(id, *layout).id;
            if let Some(held) = pass.held.get_mut(&id) {
                held.prefer(*layout, local);
            }
        }
    }
    let alive = pass.source.clone();
    let forward = alive.iter().filter(|op| op.outputs().any(|out| pass.made_forward.contains_key(&out.id))).count();
    let mut forward_len = 0;
    for (index, op) in alive.into_iter().enumerate() {
        pass.forward = index < forward;
        pass.step(op);
        if pass.forward {
            forward_len = pass.operations.len();
        }
    }

    pass.reader = "result".into();
    let mut local = graph.clone();
    for (binding, layout) in local.params.iter_mut().zip(params) {
        for result in binding.gradient.iter_mut().chain(&mut binding.update) {
            *result = pass.result(result, *layout);
        }
        if let Sharded(dim) = layout {
            binding.tensor.shape[*dim] /= degree;
        }
    }
    local.loss = graph.loss.as_ref().map(|loss| pass.result(loss, Replicated));
    local.weight = graph.weight.as_ref().map(|weight| pass.result(weight, Replicated));
    local.outputs = graph.outputs.iter().map(|output| pass.result(output, Replicated)).collect();
    local.operations = pass.operations;
    local.forward_len = forward_len;
    local.next_id = pass.next_id;
    Ok((local, pass.report))
}

fn check(name: &str, tensor: &TensorIr, layout: Layout, degree: usize) -> Result<(), Error> {
    let problem = match layout {
        Sharded(dim) if dim >= tensor.shape.num_dims() => "which does not exist",
        Sharded(dim) if !tensor.shape[dim].is_multiple_of(degree) => "which the degree does not divide",
        Partial => "but only results of the step can be partial",
        _ => return Ok(()),
    };
    let dims = tensor.shape.as_slice();
    Err(graph_error(format!("{name} of dims {dims:?} is to be {layout} over {degree} ranks, {problem}")))
}

fn is_random(op: &OperationIr) -> bool {
    matches!(
        op,
        OperationIr::Float(_, FloatOperationIr::Random(_))
            | OperationIr::NumericFloat(_, NumericOperationIr::IntRandom(_))
            | OperationIr::NumericInt(_, NumericOperationIr::IntRandom(_))
    )
}

// What a move costs for each element of the logical tensor, next to the others. To gather is to give up a split, and
// with it to compute and to hold everything on every rank.
const GATHER: u64 = 40;
const REDUCE: u64 = 20;
const SCATTER: u64 = 10;
const STILL_PARTIAL: u64 = 1;

struct Pass {
    degree: usize,
    rank: usize,
    /// The operations of the graph that results depend on; lowered ones are added.
    source: Vec<OperationIr>,
    readers: HashMap<TensorId, Vec<usize>>,
    made_forward: HashMap<TensorId, ()>,
    /// The layouts in which results are wanted.
    wanted: HashMap<TensorId, Vec<Layout>>,
    held: HashMap<TensorId, Held>,
    operations: Vec<OperationIr>,
    next_id: u64,
    report: ShardReport,
    /// For the report: what is at work.
    reader: String,
    forward: bool,
}

/// A term of a sum, if it can be added later.
enum Term {
    Partial(TensorIr),
    Whole(TensorIr),
    Waiting(WaitingSum),
}

impl Pass {
    fn new(graph: &StepGraph, params: &[Layout], degree: usize, rank: usize) -> Self {
        let mut wanted: HashMap<TensorId, Vec<Layout>> = HashMap::new();
        for (binding, layout) in graph.params.iter().zip(params) {
            for result in binding.gradient.iter().chain(&binding.update) {
                wanted.entry(result.id).or_default().push(*layout);
            }
        }
        for result in graph.loss.iter().chain(&graph.weight).chain(&graph.outputs) {
            wanted.entry(result.id).or_default().push(Replicated);
        }
        let made_forward = graph.operations[..graph.forward_len].iter().flat_map(|op| op.outputs().map(|t| (t.id, ())));
        let mut pass = Self {
            degree,
            rank,
            source: without_dead(&graph.operations, &wanted.keys().copied().collect()),
            readers: HashMap::new(),
            made_forward: made_forward.collect(),
            wanted,
            held: HashMap::new(),
            operations: Vec::new(),
            next_id: graph.next_id,
            report: ShardReport::default(),
            reader: String::new(),
            forward: true,
        };
        for index in 0..pass.source.len() {
            pass.note_reader(index);
        }
        pass
    }

    fn note_reader(&mut self, index: usize) {
        for input in self.source[index].inputs() {
            let readers = self.readers.entry(input.id).or_default();
            if readers.last() != Some(&index) {
                readers.push(index);
            }
        }
    }

    fn fresh(&mut self) -> TensorId {
        self.next_id += 1;
        TensorId::new(self.next_id - 1)
    }

    fn step(&mut self, op: OperationIr) {
        // What is first seen here is a constant.
        for input in op.inputs() {
            self.held.entry(input.id).or_insert_with(|| Held::new(input.clone(), Replicated, input.id));
        }
        self.reader = op_name(&op);
        if self.postpone(&op) {
            return;
        }
        let inputs: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
        let layouts: Vec<Layout> = inputs.iter().map(|id| self.layout(*id)).collect();
        let mut next_id = self.next_id;
        let mut fresh = || {
            next_id += 1;
            TensorId::new(next_id - 1)
        };
        if let Some(lowered) = lower(&op, &layouts, &mut fresh) {
            self.next_id = next_id;
            for op in &lowered {
                self.source.push(op.clone());
                self.note_reader(self.source.len() - 1);
            }
            lowered.into_iter().for_each(|op| self.step(op));
            return;
        }
        let strategy = self.choose(&op, &inputs, &layouts);
        self.emit(op, &inputs, &strategy);
    }

    /// The layout of a tensor, which is made now if it was only planned.
    fn layout(&mut self, id: TensorId) -> Layout {
        self.settle(id);
        self.held[&id].layout()
    }

    fn choose(&mut self, op: &OperationIr, inputs: &[TensorId], layouts: &[Layout]) -> Strategy {
        let whole = Strategy::replicated(op);
        if layouts.iter().all(|layout| *layout == Replicated) {
            return whole;
        }
        let outputs: u64 = op.outputs().map(|out| out.shape.num_elements() as u64).sum();
        let mut best: Option<(u64, Strategy)> = None;
        let split = strategies(op, self.degree).into_iter().filter(|strategy| {
            // Only what goes on with a layout that is there: nothing is split for its own sake.
            strategy.inputs.iter().zip(layouts).any(|(want, have)| want == have && *want != Replicated)
        });
        for strategy in split.chain([whole.clone()]) {
            let mut cost = if strategy.output == Partial { STILL_PARTIAL * outputs.max(1) } else { 0 };
            let mut possible = true;
            for (place, (id, want)) in inputs.iter().zip(&strategy.inputs).enumerate() {
                match self.cost(*id, *want) {
                    Some(more) if !inputs[..place].contains(id) => cost += more,
                    Some(_) => {}
                    None => possible = false,
                }
            }
            if possible && best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, strategy));
            }
        }
        let strategy = best.map_or(whole, |(_, strategy)| strategy);
        let gathers = inputs
            .iter()
            .zip(layouts)
            .any(|(id, have)| matches!(have, Sharded(_)) && self.held[id].version(Replicated).is_none());
        if strategy.output == Replicated && gathers {
            let dims = op.outputs().next().map(|out| out.shape.to_vec()).unwrap_or_default();
            let (operation, forward) = (self.reader.clone(), self.forward);
            self.report.fallbacks.push(Fallback { operation, dims, forward });
        }
        strategy
    }

    /// What it costs to have a tensor in a layout; `None` if it should not be.
    fn cost(&self, id: TensorId, want: Layout) -> Option<u64> {
        let held = &self.held[&id];
        let each = match (held.layout(), want) {
            (Partial, Partial) if self.is_reduced_anyway(id) => return None,
            (Partial, Partial) => 0,
            (_, Partial) => return None,
            (_, want) if held.version(want).is_some() => 0,
            (Replicated, _) => 0,
            (Partial, _) if self.is_reduced_anyway(id) => 0,
            (Partial, Replicated) => REDUCE,
            (Partial, Sharded(_)) => SCATTER,
            (Sharded(_), _) => match held.version(Replicated) {
                Some(_) => 0,
                None => GATHER,
            },
        };
        Some(each * held.elements())
    }

    /// Whether some reader, or the result, needs all of a partial tensor, so that the sum is made in any case.
    fn is_reduced_anyway(&self, id: TensorId) -> bool {
        let wanted = self.wanted.get(&id).is_some_and(|layouts| layouts.contains(&Replicated));
        wanted
            || self.readers.get(&id).into_iter().flatten().any(|reader| {
                let op = &self.source[*reader];
                let place = op.inputs().position(|input| input.id == id);
                let takes = |s: &Strategy| place.and_then(|place| s.inputs.get(place)) == Some(&Partial);
                if !strategies(op, self.degree).iter().any(takes) {
                    return true;
                }
                only_moves(op) && op.outputs().any(|out| self.is_reduced_anyway(out.id))
            })
    }

    /// Runs `op` with its inputs in the layouts of a strategy.
    fn emit(&mut self, mut op: OperationIr, inputs: &[TensorId], strategy: &Strategy) {
        localise(&mut op, strategy, self.degree);
        let mut locals = HashMap::new();
        for (id, want) in inputs.iter().zip(&strategy.inputs) {
            locals.insert(*id, self.get(*id, *want));
        }
        let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
        for out in outputs {
            let held = Held::new(out.clone(), strategy.output, out.id);
            locals.insert(out.id, held.local(strategy.output, out.id, self.degree));
            self.held.insert(out.id, held);
        }
        op.visit_mut(&mut Replace(&locals));
        self.operations.push(op);
    }

    fn result(&mut self, tensor: &TensorIr, layout: Layout) -> TensorIr {
        self.forward = self.made_forward.contains_key(&tensor.id);
        self.held.entry(tensor.id).or_insert_with(|| Held::new(tensor.clone(), Replicated, tensor.id));
        self.settle(tensor.id);
        self.get(tensor.id, layout)
    }

    /// The local tensor that holds `id` in the layout `want`, moved there if it is not yet.
    fn get(&mut self, id: TensorId, want: Layout) -> TensorIr {
        let held = &self.held[&id];
        if let Some(local) = held.version(want) {
            return held.local(want, local, self.degree);
        }
        let have = held.layout();
        let through_whole = match (have, want) {
            (Sharded(_), Sharded(_)) => true,
            (Partial, Sharded(_)) => self.is_reduced_anyway(id),
            _ => false,
        };
        if through_whole {
            self.get(id, Replicated);
        }
        let held = &self.held[&id];
        // Whatever it came as, what there is whole is whole.
        let have = if held.version(Replicated).is_some() { Replicated } else { held.layout() };
        let from = held.version(have).map(|local| held.local(have, local, self.degree));
        let dims = held.global.shape.to_vec();
        let local = self.fresh();
        let to = self.held[&id].local(want, local, self.degree);
        let Some(from) = from else { return to };
        match (have, want) {
            (Replicated, Sharded(dim)) => self.operations.push(slice(from, to.clone(), dim, self.rank)),
            (Partial, Sharded(dim)) => {
                self.collective(CollectiveKind::ReduceScatter, dims, from, to.clone(), Some(dim));
            }
            (Sharded(dim), _) => self.collective(CollectiveKind::AllGather, dims, from, to.clone(), Some(dim)),
            _ => self.collective(CollectiveKind::AllReduce, dims, from, to.clone(), None),
        }
        if let Some(held) = self.held.get_mut(&id) {
            held.add(want, local);
        }
        to
    }

    fn collective(&mut self, kind: CollectiveKind, dims: Vec<usize>, from: TensorIr, to: TensorIr, dim: Option<usize>) {
        let id = match kind {
            CollectiveKind::AllReduce => ALL_REDUCE,
            CollectiveKind::AllGather => ALL_GATHER,
            CollectiveKind::ReduceScatter => REDUCE_SCATTER,
        };
        // By convention the last scalar does not count in the fingerprint; the dim shall.
        let scalars = dim.map(|dim| vec![ScalarIr::UInt(dim as u64), ScalarIr::UInt(0)]).unwrap_or_default();
        self.operations.push(OperationIr::Custom(CustomOpIr::with_scalars(id, &[from], &[to], scalars)));
        self.report.collectives.push(Collective { kind, dims, forward: self.forward, reader: self.reader.clone() });
    }

    /// Plans a sum of partial and whole terms instead of making it.
    fn postpone(&mut self, op: &OperationIr) -> bool {
        let Some((lhs, rhs, out)) = as_sum(op) else { return false };
        if lhs.id == rhs.id {
            return false;
        }
        let (Some(a), Some(b)) = (self.term(lhs.id), self.term(rhs.id)) else { return false };
        let sum = match (a, b) {
            (Term::Partial(partial), Term::Whole(whole)) | (Term::Whole(whole), Term::Partial(partial)) => {
                WaitingSum { partial, whole }
            }
            (Term::Waiting(sum), Term::Partial(more)) | (Term::Partial(more), Term::Waiting(sum)) => {
                WaitingSum { partial: self.add(sum.partial, more), ..sum }
            }
            (Term::Waiting(sum), Term::Whole(more)) | (Term::Whole(more), Term::Waiting(sum)) => {
                WaitingSum { whole: self.add(sum.whole, more), ..sum }
            }
            (Term::Waiting(a), Term::Waiting(b)) => {
                WaitingSum { partial: self.add(a.partial, b.partial), whole: self.add(a.whole, b.whole) }
            }
            _ => return false,
        };
        self.held.insert(out.id, Held::waiting(out.clone(), sum));
        true
    }

    /// A tensor as a term that may wait. What is not whole yet may only if nobody else reads it.
    fn term(&self, id: TensorId) -> Option<Term> {
        let held = &self.held[&id];
        let alone = self.readers.get(&id).is_some_and(|r| r.len() == 1) && !self.wanted.contains_key(&id);
        if let Some(sum) = &held.waiting {
            return alone.then(|| Term::Waiting(sum.clone()));
        }
        let local = |layout| held.version(layout).map(|local| held.local(layout, local, self.degree));
        match held.layout() {
            Replicated => local(Replicated).map(Term::Whole),
            Partial if alone => local(Partial).map(Term::Partial),
            _ => None,
        }
    }

    fn add(&mut self, lhs: TensorIr, rhs: TensorIr) -> TensorIr {
        let dims = lhs.shape.as_slice().iter().zip(rhs.shape.as_slice()).map(|(a, b)| *a.max(b));
        let shape = Shape::from(dims.collect::<Vec<_>>());
        let out = TensorIr::uninit(self.fresh(), shape, lhs.dtype);
        self.operations.push(sum(lhs, rhs, out.clone()));
        out
    }

    /// Makes a sum that was waiting.
    fn settle(&mut self, id: TensorId) {
        let Some(WaitingSum { partial, whole }) = self.held.get_mut(&id).and_then(|held| held.waiting.take()) else {
            return;
        };
        let reduced = TensorIr { id: self.fresh(), ..partial.clone() };
        self.collective(CollectiveKind::AllReduce, partial.shape.to_vec(), partial, reduced.clone(), None);
        if let Some(held) = self.held.get_mut(&id) {
            let out = held.local(Replicated, id, self.degree);
            self.operations.push(sum(reduced, whole, out));
            held.add(Replicated, id);
        }
    }
}

fn sum(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, NumericOperationIr::Add(BinaryOpIr { lhs, rhs, out }))
}

/// This rank's part of a whole tensor.
fn slice(tensor: TensorIr, out: TensorIr, dim: usize, rank: usize) -> OperationIr {
    let part = out.shape[dim];
    let range = |(place, size): (usize, &usize)| match place == dim {
        true => Slice::new((rank * part) as isize, Some(((rank + 1) * part) as isize), 1),
        false => Slice::new(0, Some(*size as isize), 1),
    };
    let ranges = tensor.shape.as_slice().iter().enumerate().map(range).collect();
    let dtype = out.dtype;
    let op = BaseOperationIr::Slice(SliceOpIr { tensor, ranges, out });
    if dtype.is_float() {
        OperationIr::BaseFloat(op)
    } else if dtype.is_bool() {
        OperationIr::BaseBool(op)
    } else {
        OperationIr::BaseInt(op)
    }
}

struct Replace<'a>(&'a HashMap<TensorId, TensorIr>);

impl IrVisitorMut for Replace<'_> {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if let Some(local) = self.0.get(&tensor.id) {
            *tensor = local.clone();
        }
    }
}
