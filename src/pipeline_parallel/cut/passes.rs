//! The forward pass and the two backward passes of a stage over a micro-batch.

use std::collections::{BTreeMap, HashMap};

use burn::module::ParamId;
use burn_ir::{OperationIr, TensorId};

use super::StageRun;
use crate::Error;
use crate::comm::panic_message;
use crate::error::catch_quietly;
use crate::graph::bind::{fits, is_on};
use crate::graph::graph_error;
use crate::graph::instruction::Instruction;
use crate::graph::interpret::Interpreter;
use crate::tensor::PlainTensor;

/// Tensors on the way from one stage to another, in the order of their [`Route`](super::Route).
pub type Tensors = Vec<PlainTensor>;

/// What the forward pass of a stage gives.
#[derive(Debug, Default)]
pub struct StageForward {
    /// What goes to later stages, by stage.
    pub sends: BTreeMap<usize, Tensors>,
    /// The loss, on the stage that computes it.
    pub loss: Option<PlainTensor>,
    /// The number of items of the loss, if it is a sum over items, on the same stage.
    pub weight: Option<PlainTensor>,
    /// The extra outputs that this stage gives, by their place in the graph.
    pub outputs: BTreeMap<usize, PlainTensor>,
    /// The next values of running statistics, which the stage goes on with by itself.
    pub updates: HashMap<ParamId, PlainTensor>,
}

impl StageRun {
    /// The forward pass of a micro-batch with the parameters that are bound. `inputs` are those of the whole graph,
    /// `received` is what came from earlier stages, by stage.
    ///
    /// # Errors
    /// [`Error::Graph`] if something does not fit the graph, or an operation panics; the error of a custom operation.
    pub fn forward(
        &mut self,
        micro_batch: usize,
        inputs: &[PlainTensor],
        received: BTreeMap<usize, Tensors>,
    ) -> Result<StageForward, Error> {
        let Some((device, constants)) = &self.home else {
            return Err(graph_error("no model is bound: bind one before the step"));
        };
        let mut tensors = Interpreter::new(device, &self.ops)?;
        for (id, value) in constants {
            tensors.bind(*id, value.clone())?;
        }
        for (id, path, tensor) in &self.params {
            let unbound = || graph_error(format!("parameter `{path}` is not bound: bind the model before the step"));
            let value = self.values.get(id).ok_or_else(unbound)?;
            tensors.bind(tensor.id, value.clone())?;
        }
        for (place, path, tensor) in &self.inputs {
            let value = inputs.get(*place).ok_or_else(|| graph_error(format!("the step lacks input `{path}`")))?;
            let what = format!("input `{path}`");
            fits(|| what.clone(), value, tensor)?;
            is_on(&what, value, device)?;
            tensors.bind(tensor.id, value.clone())?;
        }
        self.under_way.insert(micro_batch, tensors);
        self.receive(micro_batch, received, |from, here| from < here)?;
        let mut given = self.run(micro_batch, 0)?;
        let updates = self.updates.iter().flat_map(|(tensor, ids)| ids.iter().map(|id| (*id, *tensor)));
        let updates = updates.filter_map(|(id, tensor)| Some((id, given.get(&tensor)?.clone()))).collect();
        self.carry(&updates);
        let outputs = self.part.outputs.iter();
        let outputs = outputs.filter_map(|(place, tensor)| Some((*place, given.get(&tensor.id)?.clone()))).collect();
        let [loss, weight] =
            [&self.part.loss, &self.part.weight].map(|result| given.get(&result.as_ref()?.id).cloned());
        Ok(StageForward { sends: self.sends(&mut given, |to, here| to > here)?, loss, weight, outputs, updates })
    }

    /// The part of the backward pass that earlier stages wait for. `received` is what came from later stages; gradients
    /// of parameters that are ready go to `on_gradient`. Gives what goes to earlier stages.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and those of `on_gradient`.
    pub fn backward_input(
        &mut self,
        micro_batch: usize,
        received: BTreeMap<usize, Tensors>,
        on_gradient: &mut dyn FnMut(ParamId, PlainTensor) -> Result<(), Error>,
    ) -> Result<BTreeMap<usize, Tensors>, Error> {
        self.receive(micro_batch, received, |from, here| from > here)?;
        let mut given = self.run(micro_batch, 1)?;
        let sends = self.sends(&mut given, |to, here| to < here)?;
        self.hand_over(given, on_gradient)?;
        Ok(sends)
    }

    /// The rest of the backward pass: gradients of parameters. Afterwards nothing of the micro-batch is left.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and those of `on_gradient`.
    pub fn backward_weight(
        &mut self,
        micro_batch: usize,
        on_gradient: &mut dyn FnMut(ParamId, PlainTensor) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let given = self.run(micro_batch, 2)?;
        self.under_way.remove(&micro_batch);
        self.hand_over(given, on_gradient)
    }

    /// Ends a micro-batch that has no backward pass.
    pub fn finish(&mut self, micro_batch: usize) {
        self.under_way.remove(&micro_batch);
    }

    fn hand_over(
        &self,
        given: HashMap<TensorId, PlainTensor>,
        on_gradient: &mut dyn FnMut(ParamId, PlainTensor) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut given: Vec<_> = given.into_iter().collect();
        given.sort_by_key(|(tensor, _)| *tensor);
        for (tensor, value) in given {
            let Some((last, others)) = self.gradients.get(&tensor).and_then(|ids| ids.split_last()) else { continue };
            for id in others {
                on_gradient(*id, value.clone())?;
            }
            on_gradient(*last, value)?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        micro_batch: usize,
        mut received: BTreeMap<usize, Tensors>,
        direction: fn(usize, usize) -> bool,
    ) -> Result<(), Error> {
        let stage = self.part.stage;
        let tensors = self.under_way.get_mut(&micro_batch).ok_or_else(|| {
            graph_error(format!(
                "stage {stage} is to run the backward pass of micro-batch {micro_batch} before its forward"
            ))
        })?;
        for route in self.part.receives.iter().filter(|route| direction(route.from, stage)) {
            let values = received.remove(&route.from).unwrap_or_default();
            let from = route.from;
            if values.len() != route.tensors.len() {
                let (wanted, got) = (route.tensors.len(), values.len());
                let problem = format!("stage {stage} wants {wanted} tensors of stage {from}, and got {got}");
                return Err(graph_error(problem));
            }
            for (tensor, value) in route.tensors.iter().zip(values) {
                fits(|| format!("what stage {stage} got of stage {from}"), &value, tensor)?;
                let value = value.moved_to(tensors.device());
                tensors.bind(tensor.id, value)?;
            }
        }
        Ok(())
    }

    fn sends(
        &self,
        given: &mut HashMap<TensorId, PlainTensor>,
        direction: fn(usize, usize) -> bool,
    ) -> Result<BTreeMap<usize, Tensors>, Error> {
        let mut sends = BTreeMap::new();
        let mut routes: Vec<_> = self.part.sends.iter().filter(|route| direction(route.to, self.part.stage)).collect();
        let mut uses: HashMap<TensorId, usize> =
            self.gradients.iter().map(|(id, params)| (*id, params.len())).collect();
        for tensor in routes.iter().flat_map(|route| &route.tensors) {
            *uses.entry(tensor.id).or_default() += 1;
        }
        for route in routes.drain(..) {
            let mut values = Vec::with_capacity(route.tensors.len());
            for tensor in &route.tensors {
                let uses = uses.entry(tensor.id).or_default();
                *uses -= 1;
                // The last one who wants it gets it as its own.
                let value = if *uses == 0 { given.remove(&tensor.id) } else { given.get(&tensor.id).cloned() };
                values.push(value.ok_or_else(|| graph_error("a stage did not give what it is to send"))?);
            }
            sends.insert(route.to, values);
        }
        Ok(sends)
    }

    fn run(&mut self, micro_batch: usize, section: usize) -> Result<HashMap<TensorId, PlainTensor>, Error> {
        let stage = self.part.stage;
        let tensors = self.under_way.get_mut(&micro_batch).ok_or_else(|| {
            graph_error(format!(
                "stage {stage} is to run the backward pass of micro-batch {micro_batch} before its forward"
            ))
        })?;
        let (program, ops, origins) = (&self.sections[section], &self.ops, &self.origins);
        let mut position = 0;
        let run = || {
            let mut given = HashMap::new();
            for (index, action) in program.iter().enumerate() {
                position = index;
                match action {
                    Instruction::Run(op) => {
                        tensors.run(op)?;
                        if matches!(**op, OperationIr::Custom(_))
                            && let Some(error) = ops.take_error()
                        {
                            return Err(error);
                        }
                    }
                    Instruction::Free(tensor) => tensors.free(tensor),
                    Instruction::Output(tensor) => {
                        given.insert(tensor.id, tensors.get(tensor)?);
                    }
                }
            }
            Ok(given)
        };
        match catch_quietly(|_| true, run) {
            Ok(outcome) => outcome,
            Err(payload) => {
                let at = match program.get(position) {
                    Some(Instruction::Run(op)) => origins.describe(op),
                    _ => "the handling of a result".into(),
                };
                Err(graph_error(format!("{at} panicked on stage {stage}: {}", panic_message(&*payload))))
            }
        }
    }
}
