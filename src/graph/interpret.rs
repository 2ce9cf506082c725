//! The interpreter: runs operations on the device of the tensors.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::flex::FlexDevice;
use burn::backend::{DispatchKindConversion, DispatchTensor};
use burn::tensor::{Device, TensorData};
use burn_ir::{OperationIr, TensorId, TensorIr};
use burn_router::TensorInterpreter;

use super::backend::{GraphBackend, from_handle, into_handle};
use super::custom::CustomOps;
use super::fused::{WantedProduct, assemble, assembles, fuses_on, multiplies, multiply};
use super::graph_error;
use super::operation::{cat, matmul};
use super::step_memory::StepMemory;
use crate::Error;
use crate::tensor::{PlainTensor, check_device};

/// Runs operations on one device. Tensors are known by their ids.
#[derive(Debug)]
pub(crate) struct Interpreter {
    device: Device,
    /// What products, and tensors beside each other, are written into; none if burn does all.
    memory: Option<Arc<StepMemory>>,
    backend: Box<dyn Interpret>,
}

impl Interpreter {
    /// # Errors
    /// [`Error::Graph`] if no graph can run there.
    pub(crate) fn new(device: &Device, ops: &CustomOps) -> Result<Self, Error> {
        check_device(device).map_err(graph_error)?;
        let backend: Box<dyn Interpret> = match device.as_dispatch() {
            #[cfg(feature = "cubecl")]
            burn::backend::DispatchDevice::Cube(device) => {
                Box::new(TensorInterpreter::with_custom_ops(device.clone(), ops.on_cube()))
            }
            _ => Box::new(TensorInterpreter::with_custom_ops(FlexDevice, ops.on_flex())),
        };
        let memory = (ops.fusion() && fuses_on(device)).then(|| ops.memory().clone());
        Ok(Self { device: device.clone(), memory, backend })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Gives a tensor its value, which is on the device.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is not.
    pub(crate) fn bind(&mut self, id: TensorId, value: PlainTensor) -> Result<(), Error> {
        self.backend.bind(id, value)
    }

    /// Gives a tensor its value from host memory.
    pub(crate) fn bind_data(&mut self, id: TensorId, data: TensorData) {
        self.backend.bind_data(id, data);
    }

    /// Frees a tensor.
    pub(crate) fn free(&mut self, tensor: &TensorIr) {
        self.backend.run(OperationIr::Drop(tensor.clone()));
    }

    /// Runs an operation.
    ///
    /// # Errors
    /// [`Error::Graph`] if a tensor is not on the device.
    pub(crate) fn run(&mut self, op: &OperationIr) -> Result<(), Error> {
        let Some(memory) = &self.memory else {
            self.backend.run(op.clone());
            return Ok(());
        };
        let mut get = |tensor: &TensorIr| self.backend.get(tensor)?.into_flex();
        let (out, made) = if let Some(product) = matmul(op).filter(|product| multiplies(product.out.dtype)) {
            let (out, left, right) = (&product.out, get(&product.lhs)?, get(&product.rhs)?);
            let factors = vec![[&left, &right]];
            let wanted = WantedProduct { factors, dims: &out.shape, room: memory.room(out) };
            (out, multiply(vec![wanted], out.dtype).remove(0))
        } else if let Some(cat) = cat(op).filter(|cat| assembles(cat)) {
            let (out, parts) = (&cat.out, cat.tensors.iter().map(get).collect::<Result<Vec<_>, _>>()?);
            (out, assemble(&parts, cat.dim, &out.shape, out.dtype, memory.room(out)))
        } else {
            self.backend.run(op.clone());
            return Ok(());
        };
        self.backend.bind(out.id, PlainTensor::from_flex(made))
    }

    /// The value of a tensor, taken out if its status says so.
    pub(crate) fn get(&mut self, tensor: &TensorIr) -> Result<PlainTensor, Error> {
        self.backend.get(tensor)
    }
}

trait Interpret: Debug + Send {
    fn bind(&mut self, id: TensorId, value: PlainTensor) -> Result<(), Error>;
    fn bind_data(&mut self, id: TensorId, data: TensorData);
    fn run(&mut self, op: OperationIr);
    fn get(&mut self, tensor: &TensorIr) -> Result<PlainTensor, Error>;
}

impl<B: GraphBackend> Interpret for TensorInterpreter<B>
where
    B::Handle: Send,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn bind(&mut self, id: TensorId, value: PlainTensor) -> Result<(), Error> {
        self.register_tensor_to_device(id, into_handle::<B>(value)?);
        Ok(())
    }

    fn bind_data(&mut self, id: TensorId, data: TensorData) {
        self.register_tensor_data_id(id, data);
    }

    fn run(&mut self, op: OperationIr) {
        self.register_op(op);
    }

    fn get(&mut self, tensor: &TensorIr) -> Result<PlainTensor, Error> {
        from_handle::<B>(self.get_tensor(tensor))
    }
}
