//! Changes operations that are there: their tensors, dims, ranges, bias and output.

use std::collections::HashMap;

use burn::tensor::{Shape, Slice};
use burn_ir::{
    ActivationOperationIr as Activation, BaseOperationIr as Base, IrVisitorMut, ModuleOperationIr as Module,
    NumericOperationIr as Numeric, OperationIr, ReduceDimOpIr, ReduceOpIr, TensorId, TensorIr,
};

/// Puts other tensors in the place of those of these numbers that an operation reads or makes.
pub(crate) fn replace_tensors(op: &mut OperationIr, others: &HashMap<TensorId, TensorIr>) {
    struct Replace<'a>(&'a HashMap<TensorId, TensorIr>);
    impl IrVisitorMut for Replace<'_> {
        fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
            if let Some(other) = self.0.get(&tensor.id) {
                *tensor = other.clone();
            }
        }
    }
    op.visit_mut(&mut Replace(others));
}

/// The ranges that an operation reads or writes, and the shape of the tensor that they are of.
pub(crate) fn ranges_mut(op: &mut OperationIr) -> Option<(&mut Vec<Slice>, &Shape)> {
    match base_mut(op)? {
        Base::Slice(op) => Some((&mut op.ranges, &op.tensor.shape)),
        Base::SliceAssign(op) => Some((&mut op.ranges, &op.tensor.shape)),
        _ => None,
    }
}

/// Numbers the dims anew along which an operation works.
pub(crate) fn renumber_dims(op: &mut OperationIr, number: &dyn Fn(usize) -> usize) {
    match op {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base {
            Base::SwapDims(swap) => (swap.dim1, swap.dim2) = (number(swap.dim1), number(swap.dim2)),
            Base::Cat(cat) => cat.dim = number(cat.dim),
            Base::RepeatDim(repeat) => repeat.dim = number(repeat.dim),
            Base::Flip(flip) => flip.axes.iter_mut().for_each(|axis| *axis = number(*axis)),
            _ => {}
        },
        OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric) => match numeric {
            Numeric::SumDim(reduce)
            | Numeric::MeanDim(reduce)
            | Numeric::MaxDim(reduce)
            | Numeric::MaxAbsDim(reduce)
            | Numeric::MinDim(reduce)
            | Numeric::ProdDim(reduce) => reduce.axis = number(reduce.axis),
            Numeric::SumDims(reduce) => reduce.axes.iter_mut().for_each(|axis| *axis = number(*axis)),
            _ => {}
        },
        OperationIr::Activation(Activation::Softmax(along) | Activation::LogSoftmax(along)) => {
            along.axis = number(along.axis);
        }
        _ => {}
    }
}

/// Takes the bias of a convolution, and gives it the output that `make` makes of its own. The bias, and the output as
/// it was; `None` if it is none, or has no bias.
pub(crate) fn without_bias(
    op: &mut OperationIr,
    make: impl FnOnce(&TensorIr) -> TensorIr,
) -> Option<(TensorIr, TensorIr)> {
    let OperationIr::Module(module) = op else { return None };
    let (bias, place) = match module {
        Module::Conv1d(op) => (&mut op.bias, &mut op.out),
        Module::Conv2d(op) => (&mut op.bias, &mut op.out),
        Module::Conv3d(op) => (&mut op.bias, &mut op.out),
        Module::ConvTranspose1d(op) => (&mut op.bias, &mut op.out),
        Module::ConvTranspose2d(op) => (&mut op.bias, &mut op.out),
        Module::ConvTranspose3d(op) => (&mut op.bias, &mut op.out),
        _ => return None,
    };
    let bias = bias.take()?;
    let out = make(place);
    Some((bias, std::mem::replace(place, out)))
}

/// The output of a mean of float tensors.
pub(crate) fn mean_output_mut(op: &mut OperationIr) -> Option<&mut TensorIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::Mean(op)) => Some(&mut op.out),
        OperationIr::NumericFloat(_, Numeric::MeanDim(op)) => Some(&mut op.out),
        _ => None,
    }
}

/// The sum over what a mean of float tensors is over, with the output that `make` makes of that of the mean.
pub(crate) fn sum_of_mean(op: &OperationIr, make: impl FnOnce(&TensorIr) -> TensorIr) -> Option<OperationIr> {
    match op {
        OperationIr::NumericFloat(dtype, Numeric::Mean(mean)) => {
            let sum = Numeric::Sum(ReduceOpIr { input: mean.input.clone(), out: make(&mean.out) });
            Some(OperationIr::NumericFloat(*dtype, sum))
        }
        OperationIr::NumericFloat(dtype, Numeric::MeanDim(mean)) => {
            let sum = Numeric::SumDim(ReduceDimOpIr { out: make(&mean.out), ..mean.clone() });
            Some(OperationIr::NumericFloat(*dtype, sum))
        }
        _ => None,
    }
}

fn base_mut(op: &mut OperationIr) -> Option<&mut Base> {
    match op {
        OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => Some(op),
        _ => None,
    }
}
