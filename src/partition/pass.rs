//! The pass over the operations of a step that gives every tensor a layout.

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::logical_tensor::LogicalTensor;
use super::options::PartitionOptions;
use super::report::ShardReport;
use super::rules::{LocalOperation, ShardingOption, looked_up, lower, realise};
use crate::graph::StepGraph;
use crate::graph::liveness::without_dead;
use crate::graph::operation::{only_moves, op_name, replace_tensors};
use crate::graph::origin::Origins;
use crate::layout::Layout::{self, Replicated, Sharded};

/// What is known while the operations are walked. How it is decided what they run on is in [`cost`](super::cost); how
/// tensors change their layout, in [`moves`](super::moves).
pub(super) struct Pass<'a> {
    pub(super) options: &'a PartitionOptions,
    /// The operations of the graph that results depend on; lowered ones are added.
    pub(super) source: Vec<OperationIr>,
    pub(super) readers: HashMap<TensorId, Vec<usize>>,
    made_forward: HashSet<TensorId>,
    /// The layouts in which results are wanted.
    pub(super) wanted: HashMap<TensorId, Vec<Layout>>,
    pub(super) tensors: HashMap<TensorId, LogicalTensor>,
    pub(super) operations: Vec<OperationIr>,
    next_id: u64,
    pub(super) report: ShardReport,
    /// For the report: what is at work.
    pub(super) reader: String,
    /// The layer that it belongs to.
    pub(super) layer: String,
    origins: Origins,
    pub(super) forward: bool,
    /// By indices and dim: the layout of what was read there along a split dim. What is written back there, as a
    /// gradient, belongs beside it.
    pub(super) indexed: HashMap<(TensorId, usize), Layout>,
    /// As in the graph.
    pub(super) unpadded: &'a HashMap<TensorId, (usize, usize)>,
    /// Indices that were looked at, by their tensor and what they must be below.
    pub(super) within: HashMap<(TensorId, usize), TensorIr>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(graph: &'a StepGraph, params: &[Layout], options: &'a PartitionOptions) -> Self {
        let mut wanted: HashMap<TensorId, Vec<Layout>> = HashMap::new();
        for (binding, layout) in graph.params.iter().zip(params) {
            for result in binding.gradient.iter().chain(&binding.update) {
                wanted.entry(result.id).or_default().push(*layout);
            }
        }
        for result in graph.loss.iter().chain(&graph.weight).chain(&graph.outputs) {
            wanted.entry(result.id).or_default().push(Replicated);
        }
        let made_forward = graph.operations[..graph.forward_len].iter().flat_map(|op| op.outputs().map(|t| t.id));
        let mut pass = Self {
            options,
            source: without_dead(&graph.operations, &wanted.keys().copied().collect()),
            readers: HashMap::new(),
            made_forward: made_forward.collect(),
            wanted,
            tensors: HashMap::new(),
            operations: Vec::new(),
            next_id: graph.next_id,
            report: ShardReport { axis: options.axis.clone(), ..ShardReport::default() },
            reader: String::new(),
            layer: String::new(),
            origins: Origins::of(graph),
            forward: true,
            indexed: HashMap::new(),
            unpadded: &graph.unpadded,
            within: HashMap::new(),
        };
        for index in 0..pass.source.len() {
            pass.note_reader(index);
        }
        pass
    }

    pub(super) fn run(mut self, graph: &StepGraph, params: &[Layout], inputs: &[Layout]) -> (StepGraph, ShardReport) {
        for (binding, layout) in graph.params.iter().zip(params) {
            self.tensors.insert(binding.tensor.id, LogicalTensor::parameter(binding.tensor.clone(), *layout));
        }
        self.reader = "input".into();
        for (binding, layout) in graph.inputs.iter().zip(inputs) {
            let id = binding.tensor.id;
            self.tensors.insert(id, LogicalTensor::new(binding.tensor.clone(), Replicated, id));
            if let Sharded(_) = layout {
                let local = self.get(id, *layout).id;
                if let Some(tensor) = self.tensors.get_mut(&id) {
                    tensor.prefer(*layout, local);
                }
            }
        }
        let alive = self.source.clone();
        let forward = alive.iter().filter(|op| op.outputs().any(|out| self.made_forward.contains(&out.id))).count();
        let mut forward_len = 0;
        for (index, op) in alive.into_iter().enumerate() {
            self.forward = index < forward;
            let outputs: Vec<TensorId> = op.outputs().map(|out| out.id).collect();
            self.step(op);
            self.give(&outputs);
            if self.forward {
                forward_len = self.operations.len();
            }
        }

        let degree = self.options.degree;
        let mut local = graph.clone();
        for (binding, layout) in local.params.iter_mut().zip(params) {
            for result in binding.gradient.iter_mut().chain(&mut binding.update) {
                *result = self.result(result, *layout);
            }
            if let Sharded(dim) = layout {
                binding.tensor.shape[*dim] /= degree;
            }
        }
        local.loss = graph.loss.as_ref().map(|loss| self.result(loss, Replicated));
        local.weight = graph.weight.as_ref().map(|weight| self.result(weight, Replicated));
        local.outputs = graph.outputs.iter().map(|output| self.result(output, Replicated)).collect();
        local.operations = self.operations;
        local.forward_len = forward_len;
        local.next_id = self.next_id;
        // Of whole tensors, which there are no more.
        local.unpadded.clear();
        (local, self.report)
    }

    fn note_reader(&mut self, index: usize) {
        for input in self.source[index].inputs() {
            let readers = self.readers.entry(input.id).or_default();
            if readers.last() != Some(&index) {
                readers.push(index);
            }
        }
    }

    pub(super) fn fresh(&mut self) -> TensorId {
        self.next_id += 1;
        TensorId::new(self.next_id - 1)
    }

    fn step(&mut self, op: OperationIr) {
        // What is first seen here is a constant.
        for input in op.inputs() {
            self.tensors.entry(input.id).or_insert_with(|| LogicalTensor::new(input.clone(), Replicated, input.id));
        }
        self.reader = op_name(&op);
        // What an operation is lowered to belongs where it does.
        if let Some(layer) = self.origins.layer_of(&op) {
            self.layer = layer.into();
        }
        if self.postpone(&op) || self.plan(&op) {
            return;
        }
        let layouts: Vec<Layout> = op.inputs().map(|input| self.tensors[&input.id].layout()).collect();
        if let Some(lowered) = lower(&op, &layouts, &mut || self.fresh()) {
            for op in &lowered {
                self.source.push(op.clone());
                self.note_reader(self.source.len() - 1);
            }
            lowered.into_iter().for_each(|op| self.step(op));
            return;
        }
        let option = self.choose(&op, &layouts);
        self.emit(op, &option);
    }

    /// Runs `op` with its inputs in the layouts of a sharding option.
    fn emit(&mut self, op: OperationIr, option: &ShardingOption) {
        let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
        let moves = only_moves(&op);
        let parameter = moves && op.inputs().all(|input| self.tensors[&input.id].parameter);
        for out in &outputs {
            let mut tensor = LogicalTensor::new(out.clone(), option.output, out.id);
            tensor.parameter = parameter;
            tensor.moved = moves.then(|| Box::new(op.clone()));
            self.tensors.insert(out.id, tensor);
        }
        let ids: Vec<TensorId> = outputs.iter().map(|out| out.id).collect();
        self.emit_as(op, option, &ids);
        if moves {
            self.back_to_sequence(&outputs, option.output);
        }
    }

    /// What was split along the batch while batch and sequence were one dim is split along the sequence again when they
    /// are two.
    fn back_to_sequence(&mut self, outputs: &[TensorIr], layout: Layout) {
        for out in outputs {
            if let (Sharded(have), Some(want)) = (layout, self.along_sequence(out))
                && have < 2
                && have != want
            {
                let local = self.get(out.id, Sharded(want)).id;
                if let Some(tensor) = self.tensors.get_mut(&out.id) {
                    tensor.prefer(Sharded(want), local);
                }
            }
        }
    }

    /// Runs `op`, whose outputs get these ids, with its inputs in the layouts of a sharding option.
    pub(super) fn emit_as(&mut self, mut op: OperationIr, option: &ShardingOption, ids: &[TensorId]) {
        let inputs: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
        let mut locals = HashMap::new();
        for (id, want) in inputs.iter().zip(&option.inputs) {
            locals.insert(*id, self.get(*id, *want));
        }
        if let (LocalOperation::Indexed { dim, .. }, [_, .., indices]) = (&option.how, inputs.as_slice())
            && matches!(option.output, Layout::Partial)
        {
            self.indexed.insert((*indices, *dim), Sharded(*dim));
        }
        if self.forward
            && let Some((tensor, indices, dim)) = looked_up(&op)
        {
            let padded = self.unpadded.get(&tensor.id).filter(|(padded, _)| *padded == dim);
            if padded.is_some() || matches!(option.how, LocalOperation::Indexed { .. }) {
                let below = padded.map_or(tensor.shape[dim], |(_, size)| *size);
                let local = locals[&indices.id].clone();
                locals.insert(indices.id, self.within(local, below));
            }
        }
        let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
        let mut reduced = Vec::new();
        for (out, id) in outputs.iter().zip(ids) {
            let whole = self.tensors[&out.id].local(option.output, *id, self.options.degree);
            let local = match option.how {
                LocalOperation::Reduced(_) => TensorIr { id: self.fresh(), ..whole.clone() },
                _ => whole.clone(),
            };
            locals.insert(out.id, local.clone());
            reduced.push((local, whole));
        }
        replace_tensors(&mut op, &locals);
        let (degree, rank) = (self.options.degree, self.options.rank);
        let local = realise(op, option, degree, rank, &mut || self.fresh());
        self.operations.extend(local);
        if let LocalOperation::Reduced(kind) = option.how {
            for (from, to) in reduced {
                let dims = to.shape.to_vec();
                self.collective(kind, dims, from, to, &[]);
            }
        }
    }

    /// Brings results that are complete into the layouts in which they are wanted.
    fn give(&mut self, made: &[TensorId]) {
        for id in made {
            let Some(layouts) = self.wanted.get(id).cloned() else { continue };
            self.reader = "result".into();
            self.layer = self.origins.layer(*id).unwrap_or_default().into();
            for layout in layouts {
                self.get(*id, layout);
            }
        }
    }

    fn result(&mut self, tensor: &TensorIr, layout: Layout) -> TensorIr {
        self.reader = "result".into();
        self.layer = self.origins.layer(tensor.id).unwrap_or_default().into();
        self.forward = self.made_forward.contains(&tensor.id);
        self.tensors.entry(tensor.id).or_insert_with(|| LogicalTensor::new(tensor.clone(), Replicated, tensor.id));
        self.get(tensor.id, layout)
    }
}
