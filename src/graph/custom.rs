//! The registry of custom operations: collectives above all.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

#[cfg(feature = "cubecl")]
use burn::backend::Cube;
use burn::backend::{DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::Device;
use burn_ir::{CustomOpIr, HandleContainer, HandleKind, OperationIr, TensorId};
use burn_router::CustomOpRegistry;

use super::backend::{GraphBackend, from_handle, into_handle};
use super::graph_error;
use super::instruction::Instruction;
use super::memory_plan::MemoryPlan;
use super::step_memory::StepMemory;
use crate::Error;
use crate::lock::lock;
use crate::tensor::{PlainTensor, Pool};

/// What the custom operations of a graph do, by id.
///
/// burn's own registry takes handlers that cannot fail; here a handler returns its error, and the step that runs it
/// returns the same error. Clones share their handlers, and must not run steps at the same time.
#[derive(Clone)]
pub struct CustomOps {
    flex: CustomOpRegistry<Flex>,
    #[cfg(feature = "cubecl")]
    cube: CustomOpRegistry<Cube>,
    ids: HashSet<String>,
    fusion: bool,
    memory: Arc<StepMemory>,
    failed: Arc<Mutex<Option<Error>>>,
}

type CustomFn = dyn Fn(&CustomOpIr, Vec<PlainTensor>, &Device) -> Result<Vec<PlainTensor>, Error> + Send + Sync;

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
        Self {
            flex: CustomOpRegistry::new(),
            #[cfg(feature = "cubecl")]
            cube: CustomOpRegistry::new(),
            ids: HashSet::new(),
            fusion: true,
            memory: Arc::new(StepMemory::new(Pool::of_thread())),
            failed: Arc::new(Mutex::new(None)),
        }
    }

    /// Whether groups of element-wise operations run as one loop each, in blocks that stay in the caches, as they do by
    /// default: additions and products with what they broadcast, masks, casts and activations, and the sums, means and
    /// maxima along the last dim between them, so that a softmax or a norm is one loop. On the host only; on other
    /// devices burn fuses itself. Tensors from 256 KiB on are made in memory that is kept from step to step, as long as
    /// anything on this thread holds these operations: those that end within the step at places that were planned for
    /// them, in one block as large as the largest of these steps needs; its results there too where there is room, else
    /// in a piece each. One that is dropped anywhere goes back there; whoever keeps one longer keeps the whole block
    /// from going back to the system.
    ///
    /// Attention runs in tiles of some rows, if the step has made both its factors and nothing but itself reads its
    /// scores and weights: product, scaling, masks, softmax and product in one operation, and their backward in another
    /// that makes the scores anew, so that none is in memory as a whole. Columns that a mask leaves to none of a tile's
    /// rows, as a causal one half of them, are left out where their weights are 0; a value that is no number and that
    /// no row sees does not reach the results then, which it does one by one, as a product with 0. burn's own function
    /// `burn::tensor::module::attention` is among them, in steps that train and in forward passes alone. What burn
    /// computes as one operation in these, softmax, layer norm and attention, is taken apart for it.
    ///
    /// Numbers are those of the operations one by one, but for sums, those of products too, which are added in another
    /// order, and for `exp`, `log`, `tanh` and `erf` in `f32`, which are within 1 unit in the last place of the exact
    /// value, as burn's are; GELU's share of a normal distribution is within 0.55 times 2^-23; and a zero may have the
    /// other sign. Turn it off to have burn's very operations, or to see which of them fails.
    pub fn with_fusion(mut self, fusion: bool) -> Self {
        self.fusion = fusion;
        self
    }

    pub(crate) fn fusion(&self) -> bool {
        self.fusion
    }

    /// What fused operations make their results in.
    pub(crate) fn memory(&self) -> &Arc<StepMemory> {
        &self.memory
    }

    /// Has results made where a plan says.
    pub(crate) fn plan_memory(&mut self, plan: MemoryPlan) {
        self.memory = Arc::new(self.memory.with_plan(plan));
    }

    /// Says what the operation `id` does, replacing what it did before.
    ///
    /// `run` gets the operation (its scalars are attributes) and its inputs, on the device on which the graph runs, and
    /// returns as many outputs there, of the declared shapes and dtypes. An input is uniquely owned, so it can be
    /// changed in place, unless something else still reads it.
    pub fn register<F>(&mut self, id: &str, run: F)
    where
        F: Fn(&CustomOpIr, Vec<PlainTensor>) -> Result<Vec<PlainTensor>, Error> + Send + Sync + 'static,
    {
        self.register_maker(id, move |op, inputs, _| run(op, inputs));
    }

    /// As [`register`](Self::register), for an operation that makes tensors out of nothing: it is also told the device.
    pub(crate) fn register_maker<F>(&mut self, id: &str, run: F)
    where
        F: Fn(&CustomOpIr, Vec<PlainTensor>, &Device) -> Result<Vec<PlainTensor>, Error> + Send + Sync + 'static,
    {
        let run: Arc<CustomFn> = Arc::new(run);
        self.ids.insert(id.into());
        #[cfg(feature = "cubecl")]
        self.cube.register(id, handler::<Cube>(run.clone(), self.failed.clone()));
        self.flex.register(id, handler::<Flex>(run, self.failed.clone()));
    }

    /// The tensors that a program reads or gives.
    ///
    /// # Errors
    /// [`Error::Graph`] if it has an operation that is not known here.
    pub(crate) fn read_by<'a>(
        &self,
        program: impl IntoIterator<Item = &'a Instruction>,
    ) -> Result<HashSet<TensorId>, Error> {
        let mut read = HashSet::new();
        for action in program {
            match action {
                Instruction::Run(op) => {
                    if let OperationIr::Custom(op) = &**op
                        && !self.ids.contains(&op.id)
                    {
                        let problem = format!("no custom operation `{}` is registered; there is {self:?}", op.id);
                        return Err(graph_error(problem));
                    }
                    read.extend(op.inputs().map(|input| input.id));
                }
                Instruction::Output(tensor) => drop(read.insert(tensor.id)),
                Instruction::Free(_) => {}
            }
        }
        Ok(read)
    }

    pub(crate) fn on_flex(&self) -> CustomOpRegistry<Flex> {
        self.flex.clone()
    }

    #[cfg(feature = "cubecl")]
    pub(crate) fn on_cube(&self) -> CustomOpRegistry<Cube> {
        self.cube.clone()
    }

    /// The error of the operation that ran last, if it failed.
    pub(crate) fn take_error(&self) -> Option<Error> {
        lock(&self.failed).take()
    }
}

/// The operation as an interpreter calls it: on the thread that runs the graph, also where kernels are queued.
fn handler<B: GraphBackend>(
    run: Arc<CustomFn>,
    failed: Arc<Mutex<Option<Error>>>,
) -> impl Fn(&mut HandleContainer<B::Handle>, &CustomOpIr, &B::Device) + Send + Sync + 'static
where
    DispatchTensor: DispatchKindConversion<B>,
{
    move |handles, op, device| {
        let inputs = op.inputs.iter().map(|input| {
            from_handle::<B>(if input.dtype.is_float() {
                HandleKind::Float(handles.get_float_tensor::<B>(input))
            } else if input.dtype.is_bool() {
                HandleKind::Bool(handles.get_bool_tensor::<B>(input))
            } else {
                HandleKind::Int(handles.get_int_tensor::<B>(input))
            })
        });
        let outputs = inputs
            .collect::<Result<Vec<_>, _>>()
            .and_then(|inputs| run(op, inputs, &B::device(device)))
            .and_then(|outputs| check(op, outputs))
            .and_then(|outputs| outputs.into_iter().map(into_handle::<B>).collect::<Result<Vec<_>, _>>());
        match outputs {
            Err(error) => *lock(&failed) = Some(error),
            Ok(outputs) => {
                for (out, tensor) in op.outputs.iter().zip(outputs) {
                    match tensor {
                        HandleKind::Float(tensor) => handles.register_float_tensor::<B>(&out.id, tensor),
                        HandleKind::Int(tensor) => handles.register_int_tensor::<B>(&out.id, tensor),
                        HandleKind::Bool(tensor) => handles.register_bool_tensor::<B>(&out.id, tensor),
                        HandleKind::Quantized(_) => unreachable!("`into_handle` gives none"),
                    }
                }
            }
        }
    }
}

fn check(op: &CustomOpIr, outputs: Vec<PlainTensor>) -> Result<Vec<PlainTensor>, Error> {
    let right =
        |(tensor, out): (&PlainTensor, &burn_ir::TensorIr)| tensor.shape() == out.shape && tensor.dtype() == out.dtype;
    if outputs.len() == op.outputs.len() && outputs.iter().zip(&op.outputs).all(right) {
        return Ok(outputs);
    }
    let got: Vec<_> = outputs.iter().map(|t| (t.dtype(), t.shape())).collect();
    let want: Vec<_> = op.outputs.iter().map(|t| (t.dtype, t.shape.clone())).collect();
    Err(graph_error(format!("custom operation `{}` must give {want:?} but gave {got:?}", op.id)))
}
