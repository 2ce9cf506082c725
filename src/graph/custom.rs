//! Operations of ours in a graph: collectives above all.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn_ir::{CustomOpIr, HandleKind};
use burn_router::CustomOpRegistry;

use super::graph_error;
use super::inputs::GraphTensor;
use crate::error::Error;

/// What the custom operations of a graph do, by id.
///
/// burn's own registry takes handlers that cannot fail; here a handler returns its error, and the step that runs it
/// returns the same error. Clones share their handlers, and must not run steps at the same time.
#[derive(Clone)]
pub struct CustomOps {
    registry: CustomOpRegistry<Flex>,
    ids: HashSet<String>,
    failed: Arc<Mutex<Option<Error>>>,
}

impl Default for CustomOps {
    fn default() -> Self {
        Self::new()
    }
}

impl core::fmt::Debug for CustomOps {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("CustomOps").field("ids", &self.ids).finish()
    }
}

impl CustomOps {
    /// No operations.
    pub fn new() -> Self {
        Self { registry: CustomOpRegistry::new(), ids: HashSet::new(), failed: Arc::new(Mutex::new(None)) }
    }

    /// Says what the operation `id` does, replacing what it did before.
    ///
    /// `run` gets the operation (its scalars are attributes) and its inputs, and returns as many outputs, of the declared
    /// shapes and dtypes. An input is uniquely owned, so it can be changed in place, unless something else still reads it.
    pub fn register<F>(&mut self, id: &str, run: F)
    where
        F: Fn(&CustomOpIr, Vec<FlexTensor>) -> Result<Vec<FlexTensor>, Error> + Send + Sync + 'static,
    {
        let failed = self.failed.clone();
        self.ids.insert(id.into());
        self.registry.register(id, move |handles, op, _| {
            let inputs = op.inputs.iter().map(|input| {
                // On Flex a tensor of any kind is the same primitive.
                if input.dtype.is_float() {
                    handles.get_float_tensor::<Flex>(input)
                } else if input.dtype.is_bool() {
                    handles.get_bool_tensor::<Flex>(input)
                } else {
                    handles.get_int_tensor::<Flex>(input)
                }
            });
            let inputs = inputs.collect();
            match run(op, inputs).and_then(|outputs| check(op, outputs)) {
                Err(error) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
                Ok(outputs) => {
                    for (out, tensor) in op.outputs.iter().zip(outputs) {
                        let handle: HandleKind<Flex> = if out.dtype.is_float() {
                            GraphTensor::Float(tensor)
                        } else if out.dtype.is_bool() {
                            GraphTensor::Bool(tensor)
                        } else {
                            GraphTensor::Int(tensor)
                        }
                        .into_handle();
                        handles.register_handle(out.id, handle);
                    }
                }
            }
        });
    }

    pub(crate) fn contains(&self, id: &str) -> bool {
        self.ids.contains(id)
    }

    pub(crate) fn registry(&self) -> CustomOpRegistry<Flex> {
        self.registry.clone()
    }

    /// The error of the operation that ran last, if it failed.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn check(op: &CustomOpIr, outputs: Vec<FlexTensor>) -> Result<Vec<FlexTensor>, Error> {
    let right = |(tensor, out): (&FlexTensor, &burn_ir::TensorIr)| {
        *tensor.layout().shape() == out.shape && tensor.dtype() == out.dtype
    };
    if outputs.len() == op.outputs.len() && outputs.iter().zip(&op.outputs).all(right) {
        return Ok(outputs);
    }
    let got: Vec<_> = outputs.iter().map(|t| (t.dtype(), t.layout().shape().clone())).collect();
    let want: Vec<_> = op.outputs.iter().map(|t| (t.dtype, t.shape.clone())).collect();
    Err(graph_error(format!("custom operation `{}` must give {want:?} but gave {got:?}", op.id)))
}
