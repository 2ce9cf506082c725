//! Runs one stage of a cut step with its parameters.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::{Module, ParamId};
use burn::tensor::{Device, TensorData};
use burn_ir::{TensorId, TensorIr};

use super::program::sections;
use super::split::{StageGraph, inputs_read};
use crate::Error;
use crate::graph::CustomOps;
use crate::graph::bind::{computable, fits};
use crate::graph::fused::fuses_on;
use crate::graph::graph_error;
use crate::graph::instruction::Instruction;
use crate::graph::interpret::Interpreter;
use crate::graph::module::{StepParams, read_for_step, write_running_states};
use crate::graph::origin::Origins;
use crate::graph::step::StepGraph;
use crate::partition::Exchange;
use crate::tensor::PlainTensor;

/// Runs the part of a step that one stage has, on the device of the model.
///
/// Each micro-batch has tensors of its own from its [`forward`](Self::forward) to its
/// [`backward_weight`](Self::backward_weight), and every tensor is freed at its last use. Several micro-batches can be
/// under way, in any order.
#[derive(Debug)]
pub struct StageRun {
    pub(super) part: StageGraph,
    pub(super) sections: [Vec<Instruction>; 3],
    /// The same without fused operations, for devices on which burn fuses.
    unfused: Option<[Vec<Instruction>; 3]>,
    /// The parameters that operations read: id, path, tensor.
    pub(super) params: Vec<(ParamId, String, TensorIr)>,
    /// Gradients and updates by tensor.
    pub(super) gradients: HashMap<TensorId, Vec<ParamId>>,
    pub(super) updates: HashMap<TensorId, Vec<ParamId>>,
    /// The inputs that operations read.
    pub(super) inputs: Vec<(usize, String, TensorIr)>,
    pub(super) constants: Vec<(TensorId, TensorData)>,
    /// Where the stage runs, and the constants there; known once a model was bound.
    pub(super) home: Option<(Device, Vec<(TensorId, PlainTensor)>)>,
    pub(super) ops: CustomOps,
    /// For messages.
    pub(super) origins: Origins,
    /// The parameters of this step.
    pub(super) values: HashMap<ParamId, PlainTensor>,
    pub(super) updated: HashMap<ParamId, PlainTensor>,
    pub(super) under_way: BTreeMap<usize, Interpreter>,
}

impl StageRun {
    /// Prepares a stage of `graph` for running with the given custom operations.
    ///
    /// # Errors
    /// [`Error::Graph`] if the stage has a custom operation that `ops` does not know.
    pub fn new(graph: &StepGraph, part: StageGraph, mut ops: CustomOps) -> Result<Self, Error> {
        let unfused = ops.fusion().then(|| sections(graph, &part, false).0);
        let (sections, kernels) = sections(graph, &part, ops.fusion());
        kernels.register(&mut ops);
        let read = ops.read_by(sections.iter().flatten())?;
        let param = |place: &usize| graph.params.get(*place).filter(|param| read.contains(&param.tensor.id));
        let params = part.params.iter().filter_map(param);
        let params = params.map(|param| (param.id, param.path.clone(), param.tensor.clone())).collect();
        let by_tensor = |results: &[(usize, TensorIr)]| {
            let mut ids: HashMap<TensorId, Vec<ParamId>> = HashMap::new();
            for (param, tensor) in results {
                ids.entry(tensor.id).or_default().push(graph.params[*param].id);
            }
            ids
        };
        let inputs = inputs_read(graph, &part).into_iter().map(|place| {
            let input = &graph.inputs[place];
            (place, input.path.clone(), input.tensor.clone())
        });
        let constants = graph.constants.iter().filter(|(id, _)| read.contains(id));
        let constants = constants.map(|(id, data)| (*id, data.clone()));
        Ok(Self {
            params,
            gradients: by_tensor(&part.gradients),
            updates: by_tensor(&part.updates),
            inputs: inputs.collect(),
            constants: constants.collect(),
            home: None,
            sections,
            unfused,
            ops,
            origins: Origins::of(graph),
            part,
            values: HashMap::new(),
            updated: HashMap::new(),
            under_way: BTreeMap::new(),
        })
    }

    /// What the replicas of this stage exchange in a pass.
    pub(crate) fn exchanges(&self, pass: usize) -> Vec<Exchange> {
        let instructions = self.sections.get(pass).into_iter().flatten();
        let operations = instructions.filter_map(|instruction| match instruction {
            Instruction::Run(op) => Exchange::of(op),
            _ => None,
        });
        operations.collect()
    }

    /// What a pass runs on a device, where it may not have run yet.
    pub(crate) fn program(&self, pass: usize, device: &Device) -> &[Instruction] {
        let unfused = self.unfused.as_ref().filter(|_| !fuses_on(device));
        unfused.unwrap_or(&self.sections).get(pass).map_or(&[], Vec::as_slice)
    }

    /// What the stage runs, sends and receives.
    pub fn graph(&self) -> &StageGraph {
        &self.part
    }

    /// Whether the stage gives running statistics new values.
    pub(crate) fn moves_statistics(&self) -> bool {
        !self.updates.is_empty()
    }

    /// Takes the parameters for the micro-batches that follow, sharing their buffers. Of `model` only what the stage
    /// holds is looked at.
    ///
    /// # Errors
    /// [`Error::Graph`] if the model lacks one, or has another shape or dtype than at the capture.
    pub fn bind<M: Module>(&mut self, model: &M) -> Result<(), Error> {
        Self::bind_all(&mut [self], model, StepParams::default())
    }

    /// As [`bind`](Self::bind), for several stages at once, with what is known of the parameters.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub(crate) fn bind_all<M: Module>(runs: &mut [&mut Self], model: &M, params: StepParams<'_>) -> Result<(), Error> {
        let wanted: HashSet<ParamId> = runs.iter().flat_map(|run| run.params.iter().map(|(id, ..)| *id)).collect();
        let moves = runs.iter().any(|run| run.moves_statistics());
        let (values, device) = read_for_step(model, params, moves, &wanted)?;
        let device = device.unwrap_or_else(Device::flex);
        runs.iter_mut().try_for_each(|run| run.take(&values, device.clone()))
    }

    fn take(&mut self, values: &HashMap<ParamId, PlainTensor>, device: Device) -> Result<(), Error> {
        self.values.clear();
        for (id, path, tensor) in &self.params {
            let value = values.get(id).ok_or_else(|| graph_error(format!("the stage lacks parameter `{path}`")))?;
            fits(|| format!("parameter `{path}`"), value, tensor)?;
            self.values.insert(*id, value.clone());
        }
        self.settle(device)
    }

    /// Brings the constants to a device.
    fn settle(&mut self, device: Device) -> Result<(), Error> {
        if self.home.as_ref().is_none_or(|(home, _)| *home != device) {
            if let Some(unfused) = self.unfused.take_if(|_| !fuses_on(&device)) {
                self.sections = unfused;
            }
            let operations = self.sections.iter().flatten().filter_map(|action| match action {
                Instruction::Run(op) => Some(op),
                Instruction::Free(_) | Instruction::Output(_) => None,
            });
            computable(operations.flat_map(|op| op.inputs().chain(op.outputs())), &device)?;
            let constants = self.constants.iter();
            let constants = constants.map(|(id, data)| (*id, PlainTensor::from_data(data.clone(), &device))).collect();
            self.home = Some((device, constants));
        }
        Ok(())
    }

    /// Goes on with these running statistics.
    pub fn carry(&mut self, updates: &HashMap<ParamId, PlainTensor>) {
        for (id, value) in updates {
            if let Some(old) = self.values.get_mut(id) {
                *old = value.clone();
            }
        }
        self.updated.extend(updates.iter().map(|(id, value)| (*id, value.clone())));
    }

    /// Lets go of the parameters, and gives running statistics their new values, seen by all clones of `model`.
    pub fn unbind<M: Module>(&mut self, model: &M) {
        self.values.clear();
        write_running_states(model, std::mem::take(&mut self.updated));
    }

    /// Micro-batches that have had their forward pass and not all of their backward pass.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Forgets all micro-batches, the parameters, and what running statistics would have become.
    pub fn discard(&mut self) {
        self.under_way.clear();
        self.values.clear();
        self.updated.clear();
    }
}
