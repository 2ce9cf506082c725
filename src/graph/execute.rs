//! The executor: runs a captured step with the current parameters.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ParamId};
use burn::prelude::*;
use burn_ir::{OperationIr, TensorId, TensorIr};

use super::bind::{computable, fits, is_on, named_tensors};
use super::custom::CustomOps;
use super::fused::fuses_on;
use super::graph_error;
use super::instruction::Instruction;
use super::interpret::Interpreter;
use super::liveness::{Alive, MemoryEstimate, Program, program};
use super::module::{StepParams, found_gradients, read_for_step, write_running_states};
use super::origin::Origins;
use super::results::{ResultRole, Results, StepObserver, StepOutputs, StepResult, StepValues};
use super::step::StepGraph;
use crate::Error;
use crate::comm::panic_message;
use crate::error::catch_quietly;
use crate::params::{FoundParams, sweep_leaves};
use crate::tensor::{PlainTensor, TensorTree};

/// Runs a [`StepGraph`] on the device of the model, any number of times.
///
/// Each step takes parameters and running statistics from the module and the batch from the inputs, sharing their
/// buffers, and frees every intermediate at its last use. Random operations draw new numbers each time. Only the
/// constants of the graph stay between steps.
///
/// On the host, groups of element-wise operations run as one loop each; [`CustomOps::with_fusion`] says how exactly,
/// and turns it off.
///
/// Ranks that are threads need running statistics of their own: `model.clone().fork(&device)` still shares them between
/// clones (so in eager burn too), `.train()` after it gives each its own.
#[derive(Debug)]
pub struct Executor {
    graph: StepGraph,
    program: Vec<Instruction>,
    ops: CustomOps,
    /// There once it is known where to run.
    interpreter: Option<Interpreter>,
    /// The most bytes of a step whose memory is planned, if results stay, and if they leave when they are given.
    planned: Option<[usize; 2]>,
    /// Edge tensors that some operation or result reads; others would only be kept alive.
    needed: HashSet<TensorId>,
    wanted: HashSet<ParamId>,
    roles: HashMap<TensorId, Vec<ResultRole>>,
    /// The action that runs, for messages.
    position: usize,
}

impl Executor {
    /// Prepares `graph` for running with the given custom operations.
    ///
    /// # Errors
    /// [`Error::Graph`] if the graph has a custom operation that `ops` does not know.
    pub fn new(graph: StepGraph, mut ops: CustomOps) -> Result<Self, Error> {
        let Program { instructions: program, fused } = program(&graph, ops.fusion());
        let planned = fused.map(|(kernels, plan)| {
            let needed = [true, false].map(|keeps| plan.needed(keeps));
            ops.plan_memory(plan);
            kernels.register(&mut ops);
            needed
        });
        let needed = ops.read_by(&program)?;
        let mut roles: HashMap<TensorId, Vec<ResultRole>> = HashMap::new();
        let mut plays = |tensor: &TensorIr, what| roles.entry(tensor.id).or_default().push(what);
        graph.loss.iter().for_each(|t| plays(t, ResultRole::Loss));
        graph.weight.iter().for_each(|t| plays(t, ResultRole::Weight));
        for param in &graph.params {
            param.gradient.iter().for_each(|t| plays(t, ResultRole::Gradient(param.id)));
            param.update.iter().for_each(|t| plays(t, ResultRole::Update(param.id)));
        }
        graph.outputs.iter().enumerate().for_each(|(index, t)| plays(t, ResultRole::Output(index)));
        let wanted = graph.params.iter().filter(|p| needed.contains(&p.tensor.id)).map(|p| p.id).collect();
        Ok(Self { graph, program, ops, interpreter: None, planned, needed, wanted, roles, position: 0 })
    }

    /// The graph that runs.
    pub fn graph(&self) -> &StepGraph {
        &self.graph
    }

    /// Whether a step gives running statistics new values.
    pub(crate) fn moves_statistics(&self) -> bool {
        self.graph.params.iter().any(|param| param.update.is_some())
    }

    /// The operations that run, in order.
    pub(crate) fn operations(&self) -> impl Iterator<Item = &OperationIr> {
        self.program.iter().filter_map(|action| match action {
            Instruction::Run(op) => Some(&**op),
            _ => None,
        })
    }

    /// What one step needs of memory beside parameters, inputs and constants: on the host, until a step has run on
    /// another device.
    pub fn memory(&self) -> MemoryEstimate {
        let one_by_one = MemoryEstimate::of_program(&self.program);
        self.planned.map_or(one_by_one, |[peak, _]| MemoryEstimate { peak, ..one_by_one })
    }

    /// The most bytes that are alive at once in a step on a device, which may not have run there yet, if results stay,
    /// or if they leave when they are given.
    pub(crate) fn memory_on(&self, device: &Device, keeps: bool) -> usize {
        let peak = |program: &[Instruction]| match keeps {
            true => MemoryEstimate::of_program(program).peak,
            false => Alive::giving().run(program),
        };
        match self.planned {
            Some(needed) if fuses_on(device) => needed[usize::from(!keeps)],
            Some(_) => peak(&program(&self.graph, false).instructions),
            None => peak(&self.program),
        }
    }

    /// Runs one step: loss and gradients of `model` on `inputs`. Running statistics of `model` are updated as by an
    /// eager forward, seen by all its clones. A [`Loss`](crate::step::Loss) over items and its gradients are divided by
    /// their number.
    ///
    /// # Errors
    /// [`Error::Graph`] if the model or the inputs do not fit the graph, or an operation panics; the error of a custom
    /// operation. The executor can be used again after an error.
    pub fn step<M: Module, I: TensorTree>(&mut self, model: &M, inputs: I) -> Result<StepResult, Error> {
        let params = FoundParams::of(model);
        let mut gradients = HashMap::new();
        let mut observer = OnGradient(|id, gradient| {
            gradients.insert(id, gradient);
            Ok(())
        });
        let given = StepParams { found: Some(&params), whole: None };
        let StepOutputs { loss, weight, outputs } = self.step_given(model, given, inputs, &mut observer)?;
        if weight != 1.0 && weight > 0.0 {
            gradients = gradients.into_iter().map(|(id, sum)| (id, sum.scale(1.0 / weight))).collect();
        }
        // Of no items at all the loss is NaN, the gradients are those of nothing.
        let loss = if weight == 1.0 { loss } else { loss.div_scalar(weight) };
        Ok(StepResult { loss, weight, gradients: found_gradients(&params, gradients), outputs })
    }

    /// As [`step_with`](Self::step_with), telling an observer of everything as soon as it is known.
    ///
    /// # Errors
    /// As [`step`](Self::step), and the first error of the observer.
    pub fn step_observed<M, I>(
        &mut self,
        model: &M,
        inputs: I,
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutputs, Error>
    where
        M: Module,
        I: TensorTree,
    {
        self.step_given(model, StepParams::default(), inputs, observer)
    }

    /// As [`step_observed`](Self::step_observed), with what is known of the parameters.
    ///
    /// # Errors
    /// As [`step_observed`](Self::step_observed).
    pub(crate) fn step_given<M, I>(
        &mut self,
        model: &M,
        params: StepParams<'_>,
        inputs: I,
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutputs, Error>
    where
        M: Module,
        I: TensorTree,
    {
        let expected: Vec<ParamId> = self.graph.params.iter().filter(|p| p.gradient.is_some()).map(|p| p.id).collect();
        observer.expect(&expected)?;
        if self.graph.weight.is_none() {
            observer.weight(1.0)?;
        }
        let results = self.execute(model, params, inputs, observer)?;
        let loss =
            results.loss.ok_or_else(|| graph_error("this is the graph of a forward alone, which has no loss"))?;
        let (loss, weight) = (loss.float::<1>()?, results.weight.unwrap_or(1.0));
        Ok(StepOutputs { loss, weight, outputs: results.outputs })
    }

    /// As [`step`](Self::step), but hands each gradient to `on_gradient` as soon as it is computed, while the rest of
    /// the backward pass is still to run: a reduction that starts here overlaps with it.
    ///
    /// Gradients come in the order of the backward pass, the same on every rank, once per parameter, and have the
    /// parameter's shape and dtype (not necessarily contiguous). Turn what becomes of them into burn's
    /// [`GradientsParams`](burn::optim::GradientsParams) with [`gradients_params`](super::gradients_params).
    ///
    /// # Errors
    /// As [`step`](Self::step), and the first error of `on_gradient`.
    pub fn step_with<M, I, F>(&mut self, model: &M, inputs: I, on_gradient: F) -> Result<StepOutputs, Error>
    where
        M: Module,
        I: TensorTree,
        F: FnMut(ParamId, PlainTensor) -> Result<(), Error>,
    {
        self.step_observed(model, inputs, &mut OnGradient(on_gradient))
    }

    /// Runs a forward alone, or the forward of a step with the backward thrown in: the outputs, in order.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward<M: Module, I: TensorTree>(&mut self, model: &M, inputs: I) -> Result<Vec<PlainTensor>, Error> {
        self.forward_given(model, StepParams::default(), inputs)
    }

    /// As [`forward`](Self::forward), with what is known of the parameters.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub(crate) fn forward_given<M: Module, I: TensorTree>(
        &mut self,
        model: &M,
        params: StepParams<'_>,
        inputs: I,
    ) -> Result<Vec<PlainTensor>, Error> {
        self.execute(model, params, inputs, &mut OnGradient(|_, _| Ok(()))).map(|results| results.outputs)
    }

    fn execute<M: Module, I: TensorTree>(
        &mut self,
        model: &M,
        params: StepParams<'_>,
        inputs: I,
        observer: &mut dyn StepObserver,
    ) -> Result<StepValues, Error> {
        sweep_leaves();
        let inputs = named_tensors(inputs)?;
        let (values, device) = read_for_step(model, params, self.moves_statistics(), &self.wanted)?;
        let device = match device {
            Some(device) => device,
            None => inputs.first().map_or_else(Device::flex, |(_, input)| input.device()),
        };
        let mut interpreter = match self.interpreter.take().filter(|interpreter| *interpreter.device() == device) {
            Some(interpreter) => interpreter,
            None => {
                if !fuses_on(&device) {
                    self.program = program(&self.graph, false).instructions;
                    self.planned = None;
                }
                self.interpreter(&device)?
            }
        };
        self.bind_params(values, &mut interpreter)?;
        self.bind_inputs(inputs, &mut interpreter)?;
        let ran = catch_quietly(|_| true, || self.run(&mut interpreter, observer));
        // What a step that failed left behind must not be found by the next: its interpreter goes with it.
        let results = ran.unwrap_or_else(|payload| {
            let at = match &self.program[self.position] {
                Instruction::Run(op) => Origins::of(&self.graph).describe(op),
                Instruction::Free(_) | Instruction::Output(_) => "the handling of a result".into(),
            };
            Err(graph_error(format!("{at} panicked: {}", panic_message(&*payload))))
        })?;
        self.interpreter = Some(interpreter);
        let Results { loss, weight, outputs, updates, .. } = results;
        write_running_states(model, updates);
        let outputs: Option<Vec<_>> = outputs.into_iter().collect();
        let outputs = outputs.ok_or_else(|| graph_error("the step did not give all its outputs"))?;
        Ok(StepValues { loss, weight, outputs })
    }

    fn bind_params(
        &self,
        mut values: HashMap<ParamId, PlainTensor>,
        interpreter: &mut Interpreter,
    ) -> Result<(), Error> {
        for param in self.graph.params.iter().filter(|p| self.needed.contains(&p.tensor.id)) {
            let value = values.remove(&param.id).ok_or_else(|| {
                graph_error(format!(
                    "the model has no parameter `{}` with the id it had at the capture: is this another model?",
                    param.path
                ))
            })?;
            fits(|| format!("parameter `{}`", param.path), &value, &param.tensor)?;
            interpreter.bind(param.tensor.id, value)?;
        }
        Ok(())
    }

    fn bind_inputs(&self, values: Vec<(String, PlainTensor)>, interpreter: &mut Interpreter) -> Result<(), Error> {
        let given: Vec<&str> = values.iter().map(|(path, _)| path.as_str()).collect();
        let wanted: Vec<&str> = self.graph.inputs.iter().map(|input| input.path.as_str()).collect();
        if given != wanted {
            return Err(graph_error(format!("the graph was captured with inputs {wanted:?} but is given {given:?}")));
        }
        for (input, (path, value)) in self.graph.inputs.iter().zip(values) {
            let what = format!("input `{path}`");
            fits(|| what.clone(), &value, &input.tensor)?;
            is_on(&what, &value, interpreter.device())?;
            if self.needed.contains(&input.tensor.id) {
                interpreter.bind(input.tensor.id, value)?;
            }
        }
        Ok(())
    }

    fn known_weight(&self) -> Option<f64> {
        let weight = self.graph.weight.as_ref()?;
        self.graph.constants.get(&weight.id)?.iter::<f64>().next()
    }

    /// An interpreter that knows the constants.
    fn interpreter(&self, device: &Device) -> Result<Interpreter, Error> {
        let mut interpreter = Interpreter::new(device, &self.ops)?;
        let tensors = self.graph.operations.iter().flat_map(|op| op.inputs().chain(op.outputs()));
        computable(tensors, device)?;
        for (id, value) in self.graph.constants.iter().filter(|(id, _)| self.needed.contains(id)) {
            interpreter.bind_data(*id, value.clone());
        }
        Ok(interpreter)
    }

    fn run(&mut self, interpreter: &mut Interpreter, observer: &mut dyn StepObserver) -> Result<Results, Error> {
        let mut results = Results {
            loss: None,
            weight: None,
            updates: HashMap::new(),
            outputs: vec![None; self.graph.outputs.len()],
            known_weight: self.known_weight(),
        };
        for (position, action) in self.program.iter().enumerate() {
            self.position = position;
            match action {
                Instruction::Run(op) => {
                    interpreter.run(op)?;
                    if matches!(**op, OperationIr::Custom(_))
                        && let Some(error) = self.ops.take_error()
                    {
                        return Err(error);
                    }
                }
                Instruction::Free(tensor) => interpreter.free(tensor),
                Instruction::Output(tensor) => {
                    let value = interpreter.get(tensor)?;
                    let roles = self.roles.get(&tensor.id).map_or(&[][..], Vec::as_slice);
                    let Some((last, others)) = roles.split_last() else { continue };
                    for role in others {
                        results.take(*role, value.clone(), observer)?;
                    }
                    results.take(*last, value, observer)?;
                }
            }
        }
        Ok(results)
    }
}

/// Observes gradients alone.
struct OnGradient<F: FnMut(ParamId, PlainTensor) -> Result<(), Error>>(F);

impl<F: FnMut(ParamId, PlainTensor) -> Result<(), Error>> StepObserver for OnGradient<F> {
    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error> {
        (self.0)(id, gradient)
    }
}
