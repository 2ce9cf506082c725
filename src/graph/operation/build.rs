//! Makes the operations that passes put into a graph.

use burn::tensor::{DType, Slice};
use burn_ir::{
    BaseOperationIr as Base, BinaryOpIr, BoolOperationIr, CatOpIr, CreationOpIr, EmbeddingBackwardOpIr, EmbeddingOpIr,
    FloatOperationIr, GatherOpIr, LinearBiasBackwardOpIr, LinearOpIr, LinearWeightBackwardOpIr, MaskFillOpIr,
    MatmulOpIr, ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr, PermuteOpIr, ReduceDimOpIr,
    ScalarIr, ScalarOpIr, ScatterOpIr, SelectAssignOpIr, SelectOpIr, ShapeOpIr, SliceOpIr, SwapDimsOpIr, TensorIr,
};

/// The operation on tensors of this dtype.
fn of_kind(dtype: DType, op: Base) -> OperationIr {
    if dtype.is_float() {
        OperationIr::BaseFloat(op)
    } else if dtype.is_bool() {
        OperationIr::BaseBool(op)
    } else {
        OperationIr::BaseInt(op)
    }
}

fn numeric(dtype: DType, op: Numeric) -> OperationIr {
    match dtype.is_float() {
        true => OperationIr::NumericFloat(dtype, op),
        false => OperationIr::NumericInt(dtype, op),
    }
}

/// `out = lhs + rhs` of float tensors.
pub(crate) fn add(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::Add(BinaryOpIr { lhs, rhs, out }))
}

/// The product of two float matrices, or batches of them.
pub(crate) fn matmul(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Float(out.dtype, FloatOperationIr::Matmul(MatmulOpIr { lhs, rhs, out }))
}

/// A tensor times a number.
pub(crate) fn scale(lhs: TensorIr, by: f64, out: TensorIr) -> OperationIr {
    numeric(out.dtype, Numeric::MulScalar(ScalarOpIr { lhs, rhs: ScalarIr::Float(by), out }))
}

/// A tensor divided by a number.
pub(crate) fn divide(lhs: TensorIr, by: f64, out: TensorIr) -> OperationIr {
    numeric(out.dtype, Numeric::DivScalar(ScalarOpIr { lhs, rhs: ScalarIr::Float(by), out }))
}

/// The sum over one dim.
pub(crate) fn sum_dim(input: TensorIr, axis: usize, out: TensorIr) -> OperationIr {
    numeric(out.dtype, Numeric::SumDim(ReduceDimOpIr { input, out, axis, accumulator_len: 1 }))
}

/// Ints less a number.
pub(crate) fn minus(lhs: TensorIr, by: i64, out: TensorIr) -> OperationIr {
    OperationIr::NumericInt(lhs.dtype, Numeric::SubScalar(ScalarOpIr { lhs, rhs: ScalarIr::Int(by), out }))
}

/// Whether ints are below a number.
pub(crate) fn is_below(lhs: TensorIr, bound: i64, out: TensorIr) -> OperationIr {
    OperationIr::NumericInt(lhs.dtype, Numeric::LowerElem(ScalarOpIr { lhs, rhs: ScalarIr::Int(bound), out }))
}

/// Whether ints are not below a number.
pub(crate) fn is_at_least(lhs: TensorIr, bound: i64, out: TensorIr) -> OperationIr {
    OperationIr::NumericInt(lhs.dtype, Numeric::GreaterEqualElem(ScalarOpIr { lhs, rhs: ScalarIr::Int(bound), out }))
}

/// Whether one of two bools is true.
pub(crate) fn either(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Bool(BoolOperationIr::Or(BinaryOpIr { lhs, rhs, out }))
}

/// The tensor, with a number where the mask is true.
pub(crate) fn mask_fill(tensor: TensorIr, mask: TensorIr, value: ScalarIr, out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::MaskFill(MaskFillOpIr { tensor, mask, value, out }))
}

pub(crate) fn zeros(out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::Zeros(CreationOpIr { out }))
}

pub(crate) fn reshape(input: TensorIr, out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::Reshape(ShapeOpIr { input, out }))
}

pub(crate) fn swap_dims(input: TensorIr, dim1: usize, dim2: usize, out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::SwapDims(SwapDimsOpIr { input, out, dim1, dim2 }))
}

pub(crate) fn permute(input: TensorIr, axes: Vec<usize>, out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::Permute(PermuteOpIr { input, out, axes }))
}

pub(crate) fn slice(tensor: TensorIr, ranges: Vec<Slice>, out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::Slice(SliceOpIr { tensor, ranges, out }))
}

pub(crate) fn cat(tensors: Vec<TensorIr>, dim: usize, out: TensorIr) -> OperationIr {
    of_kind(out.dtype, Base::Cat(CatOpIr { tensors, dim, out }))
}

pub(crate) fn gather(op: GatherOpIr) -> OperationIr {
    of_kind(op.out.dtype, Base::Gather(op))
}

pub(crate) fn select(op: SelectOpIr) -> OperationIr {
    of_kind(op.out.dtype, Base::Select(op))
}

pub(crate) fn scatter(op: ScatterOpIr) -> OperationIr {
    of_kind(op.out.dtype, Base::Scatter(op))
}

pub(crate) fn select_assign(op: SelectAssignOpIr) -> OperationIr {
    of_kind(op.out.dtype, Base::SelectAssign(op))
}

pub(crate) fn embedding(op: EmbeddingOpIr) -> OperationIr {
    OperationIr::Module(Module::Embedding(op))
}

pub(crate) fn embedding_backward(op: EmbeddingBackwardOpIr) -> OperationIr {
    OperationIr::Module(Module::EmbeddingBackward(op))
}

/// A linear layer without bias.
pub(crate) fn linear(x: TensorIr, weight: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Module(Module::Linear(LinearOpIr { x, weight, bias: None, out }))
}

pub(crate) fn linear_weight_gradient(x: TensorIr, output_grad: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Module(Module::LinearWeightBackward(LinearWeightBackwardOpIr { x, output_grad, out }))
}

pub(crate) fn linear_bias_gradient(output_grad: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Module(Module::LinearBiasBackward(LinearBiasBackwardOpIr { output_grad, out }))
}
