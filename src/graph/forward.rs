//! Captured forward passes, for evaluation and generation.

use std::collections::HashSet;

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::module::Module;
use burn::tensor::{Device, Shape};
use burn_capture::CaptureDevice;
use burn_ir::OperationIr;

use super::capture::in_scope;
use super::custom::CustomOps;
use super::device::capture_device;
use super::edges::{CaptureInputs, CaptureOutputs};
use super::execute::Executor;
use super::graph_error;
use super::leaves::ToCapture;
use super::module::{Inventory, StepParams};
use super::recording::Recording;
use super::step::StepGraph;
use crate::Error;
use crate::params::one_device;
use crate::tensor::PlainTensor;
use crate::tensor::{TensorMapper, TensorTree};

/// A captured forward pass, and the structure of what it gives.
#[derive(Clone, Debug)]
pub struct ForwardGraph<O> {
    /// The operations. There is no loss and no gradient, and all operations are of the forward pass.
    pub graph: StepGraph,
    /// The outputs with tensors of no elements.
    meta_outputs: O,
}

/// Records a forward pass of `model` in evaluation mode, as after [`Module::valid`]: `forward` on `inputs`.
///
/// Dropout is off, batch norms take their running statistics, nothing is differentiated. What `forward` gives is a
/// tensor or a structure of tensors, anything that implements [`TensorTree`]; what is not a tensor in it is that of the
/// capture at every execution. `model` and `inputs` stay as they are; the inputs give shapes and dtypes only.
///
/// # Errors
/// As [`capture_step`](super::capture_step), but for what concerns the loss.
pub fn capture_forward<M, I, F, O>(model: &M, inputs: I, forward: F) -> Result<ForwardGraph<O>, Error>
where
    M: Module,
    I: TensorTree,
    F: FnOnce(&M, I) -> O,
    O: TensorTree,
{
    let mut meta_outputs = None;
    let home = one_device(model, "a capture")?.unwrap_or_else(Device::flex);
    let graph = in_scope(&home, |device| {
        let (recording, outputs) = record(device, model, inputs, forward)?;
        meta_outputs = Some(outputs);
        Ok(recording)
    })?;
    let meta_outputs = meta_outputs.ok_or_else(|| graph_error("the forward pass was not recorded"))?;
    Ok(ForwardGraph { graph, meta_outputs })
}

impl<O: TensorTree + Clone> ForwardGraph<O> {
    /// The outputs of one execution, in the order of the graph's, as what the closure gave, without autodiff.
    ///
    /// # Errors
    /// [`Error::Graph`] if there are more or fewer.
    pub fn outputs(&self, given: Vec<PlainTensor>) -> Result<O, Error> {
        let mut fill = Fill(given.into_iter());
        let outputs = self.meta_outputs.clone().map_tensors(&mut fill)?;
        match fill.0.next() {
            None => Ok(outputs),
            Some(_) => Err(graph_error("there are more outputs than the captured forward gave")),
        }
    }
}

/// A captured forward that runs with the parameters of now.
#[derive(Debug)]
pub struct Forward<O> {
    executor: Executor,
    captured: ForwardGraph<O>,
}

impl<O: TensorTree + Clone> Forward<O> {
    /// Prepares a captured forward for running with the given custom operations.
    ///
    /// # Errors
    /// Those of [`Executor::new`].
    pub fn new(captured: ForwardGraph<O>, ops: CustomOps) -> Result<Self, Error> {
        Ok(Self { executor: Executor::new(captured.graph.clone(), ops)?, captured })
    }

    /// The operations in the order in which they are run.
    pub(crate) fn operations(&self) -> impl Iterator<Item = &OperationIr> {
        self.executor.operations()
    }

    /// Runs it: what the closure would give.
    ///
    /// # Errors
    /// As [`Executor::step`].
    pub fn run<M: Module, I: TensorTree>(&mut self, model: &M, inputs: I) -> Result<O, Error> {
        self.run_given(model, StepParams::default(), inputs)
    }

    /// As [`run`](Self::run), with what is known of the parameters.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn run_given<M: Module, I: TensorTree>(
        &mut self,
        model: &M,
        params: StepParams<'_>,
        inputs: I,
    ) -> Result<O, Error> {
        let given = self.executor.forward_given(model, params, inputs)?;
        self.captured.outputs(given)
    }
}

fn record<M, I, F, O>(device: CaptureDevice, model: &M, inputs: I, forward: F) -> Result<(Recording, O), Error>
where
    M: Module,
    I: TensorTree,
    F: FnOnce(&M, I) -> O,
    O: TensorTree,
{
    // `valid` also unshares the running statistics, so that mapping them does not reach the original module.
    let valid = model.valid();
    let inventory = Inventory::of(&valid);
    let mut empty = ToCapture::new(device);
    // Parameters are moved by the mapper; `to_device` moves the module's other tensors, which become constants.
    let captured = valid.map(&mut empty).to_device(&capture_device(device));
    let tensors = empty.finish()?;

    let mut edge = CaptureInputs::new(device, None);
    let inputs = inputs.map_tensors(&mut edge)?;
    let mut outputs = CaptureOutputs::new();
    let given = forward(&captured, inputs).map_tensors(&mut outputs)?;
    let given = given.map_tensors(&mut OutOfCapture)?;
    let recording = Recording {
        inventory,
        params: tensors.iter().map(|(id, tensor)| (*id, tensor.id())).collect(),
        running: HashSet::new(),
        gradients: std::collections::HashMap::new(),
        inputs: edge.inputs,
        outputs: outputs.outputs,
        loss: None,
        weight: None,
        marker: None,
    };
    Ok((recording, given))
}

/// Takes the tensors out of a structure that must outlive the capture.
struct OutOfCapture;

impl TensorMapper for OutOfCapture {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let dtype = tensor.dtype();
        let nothing = Shape::from(vec![0; tensor.shape().num_dims()]);
        Ok(PlainTensor::zeros(nothing, dtype, &Device::flex()).into_dispatch())
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}

/// Puts what an execution gave where the tensors were.
struct Fill(std::vec::IntoIter<PlainTensor>);

impl TensorMapper for Fill {
    fn map(&mut self, _: DispatchTensor) -> Result<DispatchTensor, Error> {
        let given = self.0.next();
        given
            .map(PlainTensor::into_dispatch)
            .ok_or_else(|| graph_error("there are fewer outputs than the captured forward gave"))
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}
