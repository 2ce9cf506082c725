//! Captures a training step of an unmodified module.
//!
//! burn's capture device records tensor code, but has no autodiff of its own: `Device::capture().autodiff()` panics. So
//! the leaves are made here, on `Autodiff<CaptureBackend>`, and the concrete backward of that backend is called.
//! Parameters and inputs enter as tensors *without data*: nothing is copied, and a `forward` that reads them on the
//! host fails instead of freezing what it read.

use burn::backend::{AutodiffBackend, BackendTensor, TensorMetadata};
use burn::module::Module;
use burn::prelude::*;
use burn_capture::{CaptureDevice, CapturedGraph};

use super::device::{AutodiffCapture, as_autodiff, capture_device, capture_device_like, placeholder};
use super::edges::{CaptureInputs, EdgeTensor, computed};
use super::leaves::{Leaf, ToCapture, ToLeaves, running_states};
use super::module::Inventory;
use super::recording::Recording;
use super::step::StepGraph;
use super::{assemble, graph_error};
use crate::comm::panic_message;
use crate::error::{Error, catch_quietly};
use crate::params::one_device;
use crate::step::{Loss, LossParts, Weight};
use crate::tensor::TensorTree;

/// Records one training step of `model`: `loss` on `inputs`, and the backward pass.
///
/// The module is taken in training mode, as after [`Module::train`]: parameters require gradients and flags are on
/// unless they were frozen. `model` and `inputs` stay as they are, on whatever device with or without autodiff. The
/// inputs give shapes and dtypes only. `loss` must be computed from the module and the inputs that the closure is
/// given; it must have one element. A [`Loss`] that says over how many items it is taken is captured as a sum that
/// comes with its number of items. Further outputs are returned beside it: `|model, x| (loss, (logits, accuracy))`.
///
/// If the module's device checkpoints gradients ([`Device::gradient_checkpointing`]), the recomputation is in the
/// graph.
///
/// # Errors
/// [`Error::Graph`] saying what to do, if the step cannot be recorded (see [the module page](super)), if the loss has
/// more than one element, or does not depend on a trainable parameter. burn reports some of these as panics, which are
/// caught, and printed only if no more is known of them than what they say, or `RUST_BACKTRACE` is set.
pub fn capture_step<M, I, F, R>(model: &M, inputs: I, loss: F) -> Result<StepGraph, Error>
where
    M: Module,
    I: TensorTree,
    F: FnOnce(&M, I) -> R,
    R: Into<Loss>,
{
    let home = one_device(model, "a capture")?.unwrap_or_else(Device::flex);
    in_scope(&home, |device| record(device, model, inputs, loss))
}

/// Runs `record` on a capture device like `home`, on which the graph will run, and makes a graph of what it recorded.
pub(crate) fn in_scope(
    home: &Device,
    record: impl FnOnce(CaptureDevice) -> Result<Recording, Error>,
) -> Result<StepGraph, Error> {
    let device = capture_device_like(home)?;
    let mut recording =
        Err(graph_error("a step is captured inside the closure of another capture: capture them one by one"));
    // The closure's state cannot be seen again after a panic: models are only cloned, the rest is moved in.
    let captured = catch_quietly(
        |panic| advice(panic).is_some(),
        || {
            device.capture_scope(|scope| {
                recording = record(device);
                // Inputs and outputs are told apart here, not by burn: they enter as operations without data.
                scope.complete([], [])
            })
        },
    );
    let captured: CapturedGraph = match captured {
        Ok(Ok(captured)) => captured,
        Ok(Err(error)) => {
            return Err(match recording {
                Err(problem) => problem,
                Ok(_) => graph_error(format!(
                    "the step reads a tensor that was made outside it ({error}): pass it as an input, or keep it in the \
                     module"
                )),
            });
        }
        Err(payload) => return Err(explain(&panic_message(&*payload))),
    };
    assemble::assemble(captured, recording?)
}

fn record<M, I, F, R>(device: CaptureDevice, model: &M, inputs: I, loss: F) -> Result<Recording, Error>
where
    M: Module,
    I: TensorTree,
    F: FnOnce(&M, I) -> R,
    R: Into<Loss>,
{
    let train = model.clone().train();
    let inventory = Inventory::of(&train);
    let strategy = inventory.strategy.unwrap_or_default();

    // `valid` also unshares the running statistics, so that mapping them does not reach the original module.
    let valid = train.valid();
    let before = valid.clone();
    let mut empty = ToCapture::new(device);
    let captured = valid.map(&mut empty);
    let tensors = empty.finish()?;
    let running = running_states(&before, &capture_device(device));

    let flags = inventory.flags.iter().map(|(_, id, on)| (*id, *on)).collect();
    let trainable = inventory.trainable();
    let mut leaves = ToLeaves::new(strategy, trainable, flags, running);
    // Parameters are there already; this moves the module's other tensors, which become constants.
    let captured = captured.to_device(&capture_device(device)).map(&mut leaves);
    leaves.check()?;

    let mut edge = CaptureInputs::new(device, Some(strategy));
    let inputs = inputs.map_tensors(&mut edge)?;

    let LossParts { value, weight, outputs } = loss(&captured, inputs).into().into_parts()?;
    let output = |(path, tensor): (String, _)| computed(&format!("output `{path}`"), path, &tensor);
    let outputs = outputs.into_iter().map(output).collect::<Result<Vec<_>, _>>()?;
    let (value, weight) = as_sum(value, weight);
    let (loss, tracked) = check_loss(value)?;
    let weight = weight.map(edge_of_weight).transpose()?;
    let marker = placeholder(device, [1].into(), loss.dtype, "the loss")?.id();

    let mut found = AutodiffCapture::backward(tracked);
    let gradients = leaves.leaves.iter().filter_map(|(id, leaf)| {
        let gradient =
            if leaves.trainable.contains(id) { AutodiffCapture::grad_remove(leaf, &mut found) } else { None };
        gradient.map(|gradient| (*id, gradient.id()))
    });
    let gradients = gradients.collect();
    Ok(Recording {
        inventory,
        params: tensors.iter().map(|(id, tensor)| (*id, tensor.id())).collect(),
        running: leaves.running,
        gradients,
        inputs: edge.inputs,
        outputs,
        loss: Some(loss),
        weight,
        marker: Some(marker),
    })
}

/// A loss as what is differentiated, and the number of items that this is the sum over; none for a plain mean.
fn as_sum(value: Tensor<1>, weight: Weight) -> (Tensor<1>, Option<Tensor<1>>) {
    let device = value.device();
    match weight {
        Weight::Plain => (value, None),
        // A tensor of other dims is told of as the closure gave it.
        Weight::Mean(items) if value.dims() != [1] => (value, Some(Weight::tensor(items, &device))),
        Weight::Mean(items) => (value * items, Some(Weight::tensor(items, &device))),
        Weight::Sum(items) => (value, Some(Weight::tensor(items, &device))),
        Weight::Counted(items) => (value, Some(items)),
    }
}

fn edge_of_weight(weight: Tensor<1>) -> Result<EdgeTensor, Error> {
    let [elements] = weight.dims();
    if elements != 1 {
        return Err(graph_error(format!(
            "the number of items of a loss must have one element, but it has {elements}: reduce it with `.sum()`"
        )));
    }
    computed("the number of items of the loss", "weight".into(), &weight.into_dispatch())
}

fn check_loss(loss: Tensor<1>) -> Result<(EdgeTensor, Leaf), Error> {
    let [elements] = loss.dims();
    if elements != 1 {
        return Err(graph_error(format!(
            "the loss must have one element, but it has {elements}: reduce it with `.mean()` or `.sum()`"
        )));
    }
    let loss = loss.into_dispatch();
    let (shape, dtype) = (loss.shape(), loss.dtype());
    let unconnected = "the loss does not depend on any trainable parameter: compute it from the module and the inputs that \
                       the closure is given, and check that the module is not frozen";
    let Some(BackendTensor::Float(tracked)) = as_autodiff(loss) else {
        return Err(graph_error(unconnected));
    };
    if !tracked.is_tracked() {
        return Err(graph_error(unconnected));
    }
    Ok((EdgeTensor { path: "loss".into(), id: tracked.primitive().id(), shape, dtype }, tracked))
}

/// The error of a panic during a capture.
fn explain(panic: &str) -> Error {
    graph_error(match advice(panic) {
        // Which is not printed then.
        Some(advice) => format!("{advice} (burn said: {panic}; RUST_BACKTRACE=1 shows where)"),
        None => format!("the step panicked while it was recorded; does it run eagerly? (burn said: {panic})"),
    })
}

/// What to do about a panic of burn during a capture, if that is known.
fn advice(panic: &str) -> Option<&'static str> {
    let says = |words: &[&str]| words.iter().any(|words| panic.contains(words));
    let advice = if says(&["Cannot move"]) {
        "`to_device` inside the step cannot be recorded: move tensors before the step. A `BatchNorm` that is called twice \
         in one forward does the same; give each call its own `BatchNorm`"
    } else if says(&["no concrete value", "no initialized value"]) {
        "the step reads a tensor on the host (`into_scalar`, `into_data`, `to_data`), which has no value while the graph is \
         recorded: keep such decisions outside the step, or express them with tensor operations (`mask_where`)"
    } else if says(&["seeding"]) {
        "the step seeds a device: seed before the step"
    } else if says(&["not on the same device", "not on the same backend", "wrong backend"]) {
        "the step uses a tensor that is neither an input nor part of the module: pass it as an input"
    } else {
        return None;
    };
    Some(advice)
}
