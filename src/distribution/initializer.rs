//! The initialiser of a lazy parameter as data, so that its value can be made a piece at a time.
//!
//! Run on a capture device, it leaves its operations behind. Where these make each element from nothing but random
//! numbers of its own and constants, as all of burn's initialisers do but the orthogonal one, a piece of the value is
//! what the same operations make of a smaller shape.
//!
//! Pieces follow each other in the order of memory. A generator that goes through a tensor in that order, as that of
//! Flex does, gives them the numbers that it would have given the whole, if the initialiser draws once.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use burn_ir::{IrVisitorMut, TensorId, TensorIr};

use crate::Error;
use crate::graph::CustomOps;
use crate::graph::capture::in_scope;
use crate::graph::device::capture_device;
use crate::graph::edges::computed;
use crate::graph::graph_error;
use crate::graph::instruction::Instruction;
use crate::graph::interpret::Interpreter;
use crate::graph::liveness::program;
use crate::graph::operation::{Class, is_elementwise, swap_dims};
use crate::graph::recording::Recording;
use crate::graph::step::StepGraph;
use crate::tensor::PlainTensor;

/// What makes the value of a parameter.
pub(super) struct Initializer {
    graph: StepGraph,
    /// The dim along which each tensor of the graph is made in pieces.
    cut: HashMap<TensorId, usize>,
}

/// What a lazy parameter turned out to be.
pub(super) enum RecordedParam<const D: usize> {
    Initializer(Initializer),
    /// The parameter is shared and its value is made, or is being made.
    Value(Tensor<D>),
}

impl Initializer {
    /// Takes the initialiser out of a lazy parameter.
    ///
    /// # Errors
    /// [`Error::Graph`] if it reads values on the host.
    pub fn record<const D: usize>(param: Param<Tensor<D>>) -> Result<RecordedParam<D>, Error> {
        let home = param.lazy_device();
        // A parameter that is moved stays lazy if it is not shared.
        let param = param.to_device(&home);
        if param.is_initialized() {
            return Ok(RecordedParam::Value(param.into_value()));
        }
        let (mut source, mut elsewhere) = (Some(param.set_require_grad(false)), None);
        let graph = in_scope(&home.inner(), |device| {
            let param = source.take().ok_or_else(|| graph_error("a parameter was made twice"))?;
            let value = param.to_device(&capture_device(device)).into_value();
            if value.device() != capture_device(device) {
                elsewhere = Some(value);
                return Ok(Recording::default());
            }
            let output = computed("a parameter", String::new(), &value.into_dispatch())?;
            Ok(Recording { outputs: vec![output], ..Recording::default() })
        });
        match (elsewhere, source, graph) {
            (Some(value), _, _) => Ok(RecordedParam::Value(value)),
            // There was no capture: this happens inside another.
            (None, Some(param), _) => Ok(RecordedParam::Value(param.into_value())),
            (None, None, Ok(graph)) => {
                let cut = cut(&graph).unwrap_or_default();
                Ok(RecordedParam::Initializer(Self { graph, cut }))
            }
            (None, None, Err(error)) => Err(graph_error(format!(
                "the initialiser of a parameter cannot be recorded, to make the value in parts; make the parameters \
                 before the model is split: `train` makes them ({error})"
            ))),
        }
    }

    /// The dims of the value.
    pub fn dims(&self) -> Vec<usize> {
        self.graph.outputs.first().map_or_else(Vec::new, |out| out.shape.to_vec())
    }

    /// The dim along which it can be made in pieces, each from its first element on in the order of the dim.
    pub fn along(&self) -> Option<usize> {
        self.cut.get(&self.graph.outputs.first()?.id).copied()
    }

    /// A piece along that dim.
    ///
    /// # Errors
    /// [`Error::Graph`] if `device` cannot compute it.
    pub fn piece(&self, range: Range<usize>, device: &Device) -> Result<PlainTensor, Error> {
        let mut graph = self.graph.clone();
        let mut resize = Resize { cut: &self.cut, size: range.len() };
        graph.operations.iter_mut().for_each(|op| op.visit_mut(&mut resize));
        graph.outputs.iter_mut().for_each(|out| resize.visit_tensor_mut(out));
        run(&graph, device)
    }

    /// The value.
    ///
    /// # Errors
    /// [`Error::Graph`] if `device` cannot compute it.
    pub fn whole(&self, device: &Device) -> Result<PlainTensor, Error> {
        run(&self.graph, device)
    }
}

fn run(graph: &StepGraph, device: &Device) -> Result<PlainTensor, Error> {
    let mut interpreter = Interpreter::new(device, &CustomOps::new())?;
    for (id, data) in &graph.constants {
        interpreter.bind_data(*id, data.clone());
    }
    let mut value = None;
    for action in program(graph, false).instructions {
        match action {
            Instruction::Run(op) => interpreter.run(&op)?,
            Instruction::Free(tensor) => interpreter.free(&tensor),
            Instruction::Output(tensor) => value = Some(interpreter.get(&tensor)?),
        }
    }
    value.ok_or_else(|| graph_error("the initialiser of a parameter makes nothing"))
}

/// The dims along which the tensors of a graph can be made in pieces; none if not all of them can.
fn cut(graph: &StepGraph) -> Option<HashMap<TensorId, usize>> {
    let mut cut: HashMap<TensorId, usize> = HashMap::new();
    for op in &graph.operations {
        let out = op.outputs().next()?;
        let dim = match Class::of(op) {
            Class::Random | Class::Creation if out.dtype.is_float() => out.shape.iter().position(|size| *size > 1)?,
            Class::View => {
                let swap = swap_dims(op)?;
                match *cut.get(&swap.input.id)? {
                    dim if dim == swap.dim1 => swap.dim2,
                    dim if dim == swap.dim2 => swap.dim1,
                    dim => dim,
                }
            }
            _ if is_elementwise(op) => {
                let dim = op.inputs().find_map(|input| cut.get(&input.id)).copied()?;
                let fits = |input: &TensorIr| match cut.get(&input.id) {
                    Some(other) => *other == dim && input.shape == out.shape,
                    None => input.shape.num_dims() == out.shape.num_dims() && input.shape[dim] == 1,
                };
                op.inputs().all(fits).then_some(dim)?
            }
            _ => return None,
        };
        cut.insert(out.id, dim);
    }
    Some(cut)
}

/// Gives tensors another size along the dim that is cut.
struct Resize<'a> {
    cut: &'a HashMap<TensorId, usize>,
    size: usize,
}

impl IrVisitorMut for Resize<'_> {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if let Some(dim) = self.cut.get(&tensor.id) {
            tensor.shape[*dim] = self.size;
        }
    }
}
