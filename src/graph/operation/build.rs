//! Makes the operations that passes put into a graph.

use burn::tensor::{DType, IndexingUpdateOp, Slice};
use burn_ir::{
    BaseOperationIr as Base, BinaryOpIr, BoolOperationIr, CastOpIr, CatOpIr, CreationOpIr, DimOpIr,
    EmbeddingBackwardOpIr, EmbeddingOpIr, FloatOperationIr, GatherOpIr, LinearBiasBackwardOpIr, LinearOpIr,
    LinearWeightBackwardOpIr, MaskFillOpIr, MatmulOpIr, ModuleOperationIr as Module, NumericOperationIr as Numeric,
    OperationIr, PermuteOpIr, ReduceDimOpIr, ScalarIr, ScalarOpIr, ScatterOpIr, SelectAssignOpIr, SelectOpIr,
    ShapeOpIr, SliceOpIr, SwapDimsOpIr, TensorIr, UnaryOpIr,
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

/// `out = lhs - rhs` of float tensors.
pub(crate) fn difference(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::Sub(BinaryOpIr { lhs, rhs, out }))
}

/// `out = lhs * rhs` of float tensors, element by element.
pub(crate) fn product(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::Mul(BinaryOpIr { lhs, rhs, out }))
}

/// `out = lhs / rhs` of float tensors.
pub(crate) fn quotient(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::Div(BinaryOpIr { lhs, rhs, out }))
}

/// A float tensor times -1.
pub(crate) fn negative(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::Neg(UnaryOpIr { input, out }))
}

/// `exp` of a float tensor.
pub(crate) fn exponential(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Float(out.dtype, FloatOperationIr::Exp(UnaryOpIr { input, out }))
}

/// The natural logarithm of a float tensor.
pub(crate) fn logarithm(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Float(out.dtype, FloatOperationIr::Log(UnaryOpIr { input, out }))
}

/// `tanh` of a float tensor.
pub(crate) fn tangent(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Float(out.dtype, FloatOperationIr::Tanh(UnaryOpIr { input, out }))
}

/// The square root of a float tensor.
pub(crate) fn root(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Float(out.dtype, FloatOperationIr::Sqrt(UnaryOpIr { input, out }))
}

/// 1 over a float tensor.
pub(crate) fn reciprocal_of(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::Float(out.dtype, FloatOperationIr::Recip(UnaryOpIr { input, out }))
}

/// A float tensor in the dtype of `out`.
pub(crate) fn cast(input: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::BaseFloat(Base::Cast(CastOpIr { input, out }))
}

/// A float tensor, with `least` where it is less.
pub(crate) fn at_least(lhs: TensorIr, least: f64, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::ClampMin(ScalarOpIr { lhs, rhs: ScalarIr::Float(least), out }))
}

/// A float tensor plus a number.
pub(crate) fn plus_number(lhs: TensorIr, by: f64, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, Numeric::AddScalar(ScalarOpIr { lhs, rhs: ScalarIr::Float(by), out }))
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

/// The mean of a float tensor over one dim.
pub(crate) fn mean_dim(input: TensorIr, axis: usize, out: TensorIr) -> OperationIr {
    numeric(out.dtype, Numeric::MeanDim(ReduceDimOpIr { input, out, axis, accumulator_len: 1 }))
}

/// The maximum of a float tensor over one dim.
pub(crate) fn max_dim(input: TensorIr, axis: usize, out: TensorIr) -> OperationIr {
    numeric(out.dtype, Numeric::MaxDim(ReduceDimOpIr { input, out, axis, accumulator_len: 1 }))
}

/// Where the maximum of a float tensor over one dim is, as ints.
pub(crate) fn place_of_max(input: TensorIr, axis: usize, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(input.dtype, Numeric::ArgMax(ReduceDimOpIr { input, out, axis, accumulator_len: 1 }))
}

/// The sums of ints up to each place along a dim.
pub(crate) fn sums_so_far(input: TensorIr, axis: usize, out: TensorIr) -> OperationIr {
    OperationIr::NumericInt(out.dtype, Numeric::CumSum(DimOpIr { input, out, axis }))
}

/// Whether ints are below others.
pub(crate) fn are_below(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericInt(lhs.dtype, Numeric::Lower(BinaryOpIr { lhs, rhs, out }))
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

/// A matrix of floats with `rows` added to its rows at `indices`.
pub(crate) fn add_rows(tensor: TensorIr, indices: TensorIr, rows: TensorIr, out: TensorIr) -> OperationIr {
    select_assign(SelectAssignOpIr { tensor, dim: 0, indices, value: rows, update: IndexingUpdateOp::Add, out })
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
