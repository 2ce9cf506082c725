//! Splits placed operations into the graphs of the stages, with what each receives and sends.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::analysis::{Analysis, CutRole, ValueSource};
use super::placement::StageResult;
use super::tied::GradientPart;
use crate::graph::StepGraph;
use crate::graph::step::Rename;

/// The tensors that one stage sends to another for every micro-batch: to a later one in its forward pass, to an earlier
/// one in its backward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The stage that sends.
    pub from: usize,
    /// The stage that receives.
    pub to: usize,
    /// What is sent, in this order.
    pub tensors: Vec<TensorIr>,
}

/// The part of a step that one stage runs.
#[derive(Clone, Debug, PartialEq)]
pub struct StageGraph {
    /// Which stage this is.
    pub stage: usize,
    /// The operations of the forward pass.
    pub forward: Vec<OperationIr>,
    /// The operations of the backward pass that earlier stages wait for.
    pub backward_input: Vec<OperationIr>,
    /// The rest of the backward pass, which can run at any time after that: gradients of parameters.
    pub backward_weight: Vec<OperationIr>,
    /// The parameters and running statistics that the stage holds, by their place in the graph.
    pub params: Vec<usize>,
    /// What it receives, by sending stage: from earlier ones for the forward pass, from later ones for the backward
    /// pass.
    pub receives: Vec<Route>,
    /// What it sends, by receiving stage.
    pub sends: Vec<Route>,
    /// The loss, on the stage that computes it.
    pub loss: Option<TensorIr>,
    /// The number of items of the loss, on the stage that computes the loss.
    pub weight: Option<TensorIr>,
    /// The extra outputs that it gives, by their place in the graph.
    pub outputs: Vec<(usize, TensorIr)>,
    /// The gradients that it gives, by the place of the parameter. Of a parameter that several stages hold, each gives
    /// its part; the sum of the parts is the gradient.
    pub gradients: Vec<(usize, TensorIr)>,
    /// The running statistics that it updates, by the place of the parameter.
    pub updates: Vec<(usize, TensorIr)>,
}

/// Everything that is known about where things run.
pub(super) struct Placement<'a> {
    pub analysis: Analysis<'a>,
    /// The stage of each placed operation.
    pub stage: Vec<usize>,
    pub holders: Vec<Vec<usize>>,
    pub gradients: Vec<GradientPart>,
}

/// What every stage runs.
pub(super) fn split(graph: &StepGraph, placement: &Placement<'_>, stages: usize) -> Vec<StageGraph> {
    let loss = graph.loss.as_ref().and_then(|loss| placement.stage_of(loss)).unwrap_or(stages - 1);
    let output = |tensor: &TensorIr| placement.stage_of(tensor).unwrap_or(loss);
    let mut parts: Vec<StageGraph> = (0..stages)
        .map(|stage| StageGraph {
            stage,
            forward: Vec::new(),
            backward_input: Vec::new(),
            backward_weight: Vec::new(),
            params: (0..graph.params.len()).filter(|param| placement.holders[*param].contains(&stage)).collect(),
            receives: Vec::new(),
            sends: Vec::new(),
            loss: graph.loss.clone().filter(|_| stage == loss),
            weight: graph.weight.clone().filter(|_| stage == loss),
            outputs: graph.outputs.iter().cloned().enumerate().filter(|(_, t)| output(t) == stage).collect(),
            gradients: placement
                .gradients
                .iter()
                .filter(|part| part.wanted.stage == stage)
                .map(|part| (part.param, part.wanted.tensor.clone()))
                .collect(),
            updates: (0..graph.params.len())
                .filter(|param| placement.holders[*param][0] == stage)
                .filter_map(|param| graph.params[param].update.clone().map(|update| (param, update)))
                .collect(),
        })
        .collect();
    let needs: Vec<StageOperations<'_, '_>> = parts.iter().map(|part| placement.everything(part)).collect();
    let mut routes: BTreeMap<(usize, usize), BTreeMap<TensorId, TensorIr>> = BTreeMap::new();
    for (stage, walk) in needs.into_iter().enumerate() {
        for (id, (from, tensor)) in walk.received {
            routes.entry((from, stage)).or_default().insert(id, tensor);
        }
    }
    for ((from, to), tensors) in routes {
        let route = Route { from, to, tensors: tensors.into_values().collect() };
        parts[from].sends.push(route.clone());
        parts[to].receives.push(route);
    }
    parts.iter_mut().for_each(|part| placement.fill(part));
    parts
}

impl<'a> Placement<'a> {
    /// The stage that makes a tensor, if only one does.
    fn stage_of(&self, tensor: &TensorIr) -> Option<usize> {
        match self.analysis.origin(tensor.id) {
            ValueSource::Op(op) => Some(self.stage[op]),
            ValueSource::Param(param) => Some(self.holders[param][0]),
            ValueSource::Anywhere => None,
        }
    }

    fn placed_on(&self, stage: usize, forward: bool) -> Vec<usize> {
        let here = |op: &usize| self.stage[*op] == stage && self.analysis.is_forward(*op) == forward;
        self.analysis.placed().filter(here).collect()
    }

    fn walk(&self, stage: usize) -> StageOperations<'_, 'a> {
        StageOperations { placement: self, stage, operations: BTreeMap::new(), received: BTreeMap::new() }
    }

    /// All that a stage runs and needs.
    fn everything(&self, part: &StageGraph) -> StageOperations<'_, 'a> {
        let mut walk = self.forward(part);
        self.placed_on(part.stage, false).into_iter().for_each(|op| walk.run(op));
        part.gradients.iter().for_each(|(_, tensor)| walk.ask(tensor));
        walk
    }

    fn forward(&self, part: &StageGraph) -> StageOperations<'_, 'a> {
        let mut walk = self.walk(part.stage);
        self.placed_on(part.stage, true).into_iter().for_each(|op| walk.run(op));
        let named = part.outputs.iter().chain(&part.updates).map(|(_, tensor)| tensor);
        let results = part.loss.iter().chain(&part.weight).chain(named);
        results.for_each(|tensor| walk.ask(tensor));
        walk
    }

    /// Gives a stage its operations, once it is known what it sends.
    fn fill(&self, part: &mut StageGraph) {
        let StageGraph { stage, .. } = *part;
        let forward = self.forward(part).operations;
        let mut input = self.walk(stage);
        for tensor in part.sends.iter().filter(|route| route.to < stage).flat_map(|route| &route.tensors) {
            if let Some(op) = self.analysis.maker(tensor.id).filter(|op| !self.analysis.is_forward(*op)) {
                input.run(op);
            }
        }
        let everything = self.everything(part).operations;
        for (index, op) in everything {
            let list = match () {
                () if forward.contains_key(&index) => &mut part.forward,
                () if input.operations.contains_key(&index) => &mut part.backward_input,
                () => &mut part.backward_weight,
            };
            list.push(op);
        }
        for (_, tensor) in &mut part.gradients {
            tensor.id = self.walk(stage).find(tensor).0;
        }
    }
}

/// Collects the operations that a stage needs for what is asked of it.
struct StageOperations<'p, 'a> {
    placement: &'p Placement<'a>,
    stage: usize,
    operations: BTreeMap<usize, OperationIr>,
    received: BTreeMap<TensorId, (usize, TensorIr)>,
}

impl StageOperations<'_, '_> {
    /// Adds an operation, and what it needs.
    fn run(&mut self, op: usize) {
        let analysis = &self.placement.analysis;
        let mut left = vec![op];
        while let Some(op) = left.pop() {
            if self.operations.contains_key(&op) {
                continue;
            }
            let mut operation = analysis.operations[op].clone();
            let mut renamed: HashMap<TensorId, TensorId> = HashMap::new();
            for input in operation.inputs() {
                let (tensor, maker) = self.find(input);
                renamed.insert(input.id, tensor);
                left.extend(maker);
            }
            operation.visit_mut(&mut Rename(|id| renamed.get(&id).copied().unwrap_or(id)));
            self.operations.insert(op, operation);
        }
    }

    /// Adds what a tensor needs.
    fn ask(&mut self, tensor: &TensorIr) {
        let (_, maker) = self.find(tensor);
        maker.into_iter().for_each(|op| self.run(op));
    }

    /// The name under which the stage has a tensor, and the operation of its own that makes it.
    fn find(&mut self, tensor: &TensorIr) -> (TensorId, Option<usize>) {
        let Placement { analysis, stage, .. } = self.placement;
        let from = |id: TensorId| match analysis.origin(id) {
            ValueSource::Op(maker) if stage[maker] != self.stage => Some(stage[maker]),
            _ => None,
        };
        let maker = analysis.maker(tensor.id);
        if maker.is_some_and(|maker| analysis.roles[maker] == CutRole::Again) {
            let first = analysis.twin(tensor.id).unwrap_or(tensor.id);
            // What another stage has computed comes from there; what this one has, it computes again.
            return match (analysis.origin(first), from(first)) {
                (ValueSource::Op(_), None) => (tensor.id, maker),
                _ => self.find(&TensorIr { id: first, ..tensor.clone() }),
            };
        }
        if let Some(from) = from(tensor.id) {
            self.received.insert(tensor.id, (from, tensor.clone()));
            return (tensor.id, None);
        }
        (tensor.id, maker)
    }
}

/// The stage results that are wanted where they are, whatever the gradients.
pub(super) fn pinned_results(graph: &StepGraph, holders: &[Vec<usize>]) -> Vec<StageResult> {
    let updates =
        graph.params.iter().zip(holders).filter_map(|(param, holders)| {
            param.update.clone().map(|tensor| StageResult { tensor, stage: holders[0] })
        });
    updates.collect()
}

/// The inputs that some operation or result of a stage reads.
pub(super) fn inputs_read(graph: &StepGraph, part: &StageGraph) -> BTreeSet<usize> {
    let operations = part.forward.iter().chain(&part.backward_input).chain(&part.backward_weight);
    let mut read: HashSet<TensorId> = operations.flat_map(|op| op.inputs().map(|input| input.id)).collect();
    read.extend(part.loss.iter().chain(&part.weight).map(|tensor| tensor.id));
    read.extend(part.outputs.iter().chain(&part.gradients).map(|(_, tensor)| tensor.id));
    (0..graph.inputs.len()).filter(|input| read.contains(&graph.inputs[*input].tensor.id)).collect()
}
