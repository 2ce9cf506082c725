//! What the operations of burn that can be fused do, element by element: those on whose numbers a kernel agrees with
//! burn.

use burn::tensor::{BoolStore, DType, IndexingUpdateOp};
use burn_ir::{
    ActivationOperationIr as Activation, BaseOperationIr as Base, BoolOperationIr as Bool, FloatOperationIr as Float,
    NumericOperationIr as Numeric, OperationIr, ScalarIr, ScalarOpIr, TensorIr,
};
use half::{bf16, f16};

use super::loops::{Binary, RowReduction, Unary};

/// What an operation does to what it reads.
pub(super) enum Work<'a> {
    Fill(f64),
    Unary(Unary, &'a TensorIr),
    Binary(Binary, &'a TensorIr, &'a TensorIr),
    /// With a number as the second.
    Scalar(Binary, &'a TensorIr, f64),
    /// Where the first is true the second, else the third.
    Choose(&'a TensorIr, &'a TensorIr, &'a TensorIr),
    /// The same under other dims, of which the last stays.
    Reshape(&'a TensorIr),
    /// Over the last dim.
    Reduce(RowReduction, &'a TensorIr),
    /// Of each row where its maximum is.
    PlaceOfMax(&'a TensorIr),
    /// Of each row the element at an index.
    Pick(&'a TensorIr, &'a TensorIr),
    /// The first, with a number of each row added at an index.
    AddAt(&'a TensorIr, &'a TensorIr, &'a TensorIr),
    /// The sums over all dims but the last.
    AddRows(&'a TensorIr),
}

impl<'a> Work<'a> {
    /// What an operation does and where that goes; none if it cannot be fused.
    pub(super) fn of(op: &'a OperationIr) -> Option<(Self, &'a TensorIr)> {
        let out = op.outputs().next()?;
        let work = match op {
            OperationIr::BaseFloat(op) => base(op, out)?,
            OperationIr::NumericFloat(_, op) => numeric(op, out)?,
            OperationIr::Float(_, op) => float(op)?,
            OperationIr::Activation(op) => activation(op)?,
            OperationIr::Bool(Bool::IntoFloat(op)) => Self::Unary(Unary::Copy, &op.input),
            _ => return None,
        };
        let wide = is_wide(op);
        let index = match work {
            Self::Pick(_, index) | Self::AddAt(_, index, _) => Some(index.id),
            Self::PlaceOfMax(_) => Some(out.id),
            _ => None,
        };
        let fits = |tensor: &TensorIr| {
            let known = match tensor.dtype {
                DType::I64 | DType::I32 => index == Some(tensor.id),
                DType::F64 => true,
                DType::F32 | DType::F16 | DType::BF16 => !wide,
                DType::Bool(BoolStore::Native | BoolStore::U8) => true,
                _ => false,
            };
            known && tensor.shape.num_dims() > 0 && tensor.shape.num_elements() > 0
        };
        // The functions of `f64` are burn's own, but for those that it has from `libm`.
        let erf = matches!(work, Self::Unary(Unary::Erf | Unary::Gelu, _) | Self::Binary(Binary::GeluBackward, ..));
        (op.inputs().chain([out]).all(fits) && !(erf && wide)).then_some((work, out))
    }

    /// What it runs over: the dims of what it reads, if it reduces, else of what it gives.
    pub(super) fn over(&self, out: &'a TensorIr) -> &'a TensorIr {
        match self {
            Self::Reduce(_, x) | Self::AddRows(x) | Self::PlaceOfMax(x) | Self::Pick(x, _) => x,
            _ => out,
        }
    }

    /// Whether it is worth a loop of its own.
    pub(super) fn is_dear(&self) -> bool {
        use Unary::{Erf, Exp, Gelu, Log, Log1p, Sigmoid, Tanh};
        matches!(
            self,
            Self::Unary(Exp | Log | Log1p | Tanh | Erf | Sigmoid | Gelu, _) | Self::Binary(Binary::GeluBackward, ..)
        )
    }
}

/// A number as burn gives it to an operation on elements of a dtype.
fn number(value: &ScalarIr, dtype: DType) -> f64 {
    let value = match *value {
        ScalarIr::Float(value) => value,
        ScalarIr::Int(value) => value as f64,
        ScalarIr::UInt(value) => value as f64,
        ScalarIr::Bool(value) => f64::from(u8::from(value)),
    };
    match dtype {
        DType::F16 | DType::BF16 => rounded(value, dtype),
        _ => value,
    }
}

/// A number as a float dtype holds it.
pub(super) fn rounded(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(value as f32).to_f64(),
        DType::BF16 => bf16::from_f32(value as f32).to_f64(),
        DType::F32 => f64::from(value as f32),
        _ => value,
    }
}

/// Whether an operation is computed in `f64`.
pub(super) fn is_wide(op: &OperationIr) -> bool {
    op.inputs().chain(op.outputs()).any(|tensor| tensor.dtype == DType::F64)
}

fn base<'a>(op: &'a Base, out: &TensorIr) -> Option<Work<'a>> {
    Some(match op {
        Base::Ones(_) => Work::Fill(1.0),
        Base::Zeros(_) => Work::Fill(0.0),
        Base::Cast(op) => Work::Unary(Unary::Copy, &op.input),
        Base::MaskFill(op) => {
            let value = number(&op.value, out.dtype);
            Work::Binary(Binary::MaskFill(value), &op.tensor, &op.mask)
        }
        Base::MaskWhere(op) => Work::Choose(&op.mask, &op.value, &op.tensor),
        Base::Reshape(op) => {
            let same = op.input.shape.last() == out.shape.last() && op.input.shape.num_dims() > 0;
            same.then_some(Work::Reshape(&op.input))?
        }
        Base::Gather(op) => {
            is_one_of_row(&op.tensor, op.dim, &op.indices).then_some(Work::Pick(&op.tensor, &op.indices))?
        }
        Base::Scatter(op) => {
            let adds = matches!(op.update, IndexingUpdateOp::Add) && op.value.shape == op.indices.shape;
            let one = adds && is_one_of_row(&op.tensor, op.dim, &op.indices);
            one.then_some(Work::AddAt(&op.tensor, &op.indices, &op.value))?
        }
        Base::Equal(op) => Work::Binary(Binary::Equal, &op.lhs, &op.rhs),
        Base::NotEqual(op) => Work::Binary(Binary::NotEqual, &op.lhs, &op.rhs),
        Base::EqualElem(op) => compared(Binary::Equal, op)?,
        Base::NotEqualElem(op) => compared(Binary::NotEqual, op)?,
        _ => return None,
    })
}

/// Whether indices are of one element of each row.
fn is_one_of_row(tensor: &TensorIr, dim: usize, indices: &TensorIr) -> bool {
    let Some((columns, rows)) = tensor.shape.split_last() else { return false };
    indices.shape.split_last() == Some((&1, rows)) && dim == rows.len() && are_numbered(*columns)
}

/// Whether the elements of a row are so few that each index is a number of its own in all floats that are computed
/// with; and several, since a loop over longer rows takes one element for a number of the row.
fn are_numbered(columns: usize) -> bool {
    (2..1 << f32::MANTISSA_DIGITS).contains(&columns)
}

fn place_of_max(x: &TensorIr, dim: usize) -> Option<Work<'_>> {
    let (columns, rows) = x.shape.split_last()?;
    (dim == rows.len() && are_numbered(*columns)).then_some(Work::PlaceOfMax(x))
}

/// A comparison with a number, which burn rounds to 16 bits at once.
fn compared(op: Binary, with: &ScalarOpIr) -> Option<Work<'_>> {
    let value = number(&with.rhs, DType::F64);
    let value = match with.lhs.dtype {
        DType::F32 | DType::F64 => value,
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        _ => return None,
    };
    Some(Work::Scalar(op, &with.lhs, value))
}

fn numeric<'a>(op: &'a Numeric, out: &TensorIr) -> Option<Work<'a>> {
    let scalar = |op, lhs: &'a TensorIr, rhs: &ScalarIr| Work::Scalar(op, lhs, number(rhs, lhs.dtype));
    // With 16 bits burn compares with a number that they may not hold.
    let bound = |value: &ScalarIr| matches!(out.dtype, DType::F32 | DType::F64).then(|| number(value, out.dtype));
    Some(match op {
        Numeric::Full(op) => Work::Fill(number(&op.value, out.dtype)),
        Numeric::Add(op) => Work::Binary(Binary::Add, &op.lhs, &op.rhs),
        Numeric::Sub(op) => Work::Binary(Binary::Sub, &op.lhs, &op.rhs),
        Numeric::Mul(op) => Work::Binary(Binary::Mul, &op.lhs, &op.rhs),
        Numeric::Div(op) => Work::Binary(Binary::Div, &op.lhs, &op.rhs),
        Numeric::AddScalar(op) => scalar(Binary::Add, &op.lhs, &op.rhs),
        Numeric::SubScalar(op) => scalar(Binary::Sub, &op.lhs, &op.rhs),
        Numeric::MulScalar(op) => scalar(Binary::Mul, &op.lhs, &op.rhs),
        Numeric::DivScalar(op) => scalar(Binary::Div, &op.lhs, &op.rhs),
        Numeric::Neg(op) => Work::Unary(Unary::Neg, &op.input),
        Numeric::Abs(op) => Work::Unary(Unary::Abs, &op.input),
        Numeric::PowiScalar(op) => power(&op.lhs, &op.rhs)?,
        Numeric::ClampMin(op) => Work::Unary(Unary::ClampMin(bound(&op.rhs)?), &op.lhs),
        Numeric::ClampMax(op) => Work::Unary(Unary::ClampMax(bound(&op.rhs)?), &op.lhs),
        Numeric::Clamp(op) => {
            let (least, most) = (bound(&op.min)?, bound(&op.max)?);
            // What burn makes of other bounds is its own.
            let ordered = least.partial_cmp(&most).is_some_and(|order| order.is_le());
            ordered.then_some(Work::Unary(Unary::Clamp(least, most), &op.tensor))?
        }
        Numeric::Greater(op) => Work::Binary(Binary::Greater, &op.lhs, &op.rhs),
        Numeric::GreaterEqual(op) => Work::Binary(Binary::GreaterEqual, &op.lhs, &op.rhs),
        Numeric::Lower(op) => Work::Binary(Binary::Lower, &op.lhs, &op.rhs),
        Numeric::LowerEqual(op) => Work::Binary(Binary::LowerEqual, &op.lhs, &op.rhs),
        Numeric::GreaterElem(op) => compared(Binary::Greater, op)?,
        Numeric::GreaterEqualElem(op) => compared(Binary::GreaterEqual, op)?,
        Numeric::LowerElem(op) => compared(Binary::Lower, op)?,
        Numeric::LowerEqualElem(op) => compared(Binary::LowerEqual, op)?,
        Numeric::SumDim(op) => reduction(RowReduction::Sum, &op.input, &[op.axis])?,
        Numeric::MeanDim(op) => reduction(RowReduction::Mean, &op.input, &[op.axis])?,
        Numeric::MaxDim(op) => reduction(RowReduction::Max, &op.input, &[op.axis])?,
        Numeric::ArgMax(op) => place_of_max(&op.input, op.axis)?,
        Numeric::SumDims(op) => reduction(RowReduction::Sum, &op.input, &op.axes)?,
        _ => return None,
    })
}

/// Over the last dim, or sums over all others; dims of one element count for nothing.
fn reduction<'a>(op: RowReduction, x: &'a TensorIr, dims: &[usize]) -> Option<Work<'a>> {
    let last = x.shape.num_dims() - 1;
    let reduced = |dim: usize| dims.contains(&dim);
    let long = |dim: &usize| x.shape[*dim] > 1;
    if dims.iter().copied().filter(long).count() == 0 {
        return Some(Work::Unary(Unary::Copy, x));
    }
    if (0..last).filter(long).all(|dim| !reduced(dim)) {
        return Some(Work::Reduce(op, x));
    }
    let all = op == RowReduction::Sum && !(reduced(last) && long(&last)) && (0..last).filter(long).all(reduced);
    // Sums of 16 bits are rounded after each dim.
    (all && long(&last) && matches!(x.dtype, DType::F32 | DType::F64)).then_some(Work::AddRows(x))
}

fn power<'a>(x: &'a TensorIr, exponent: &ScalarIr) -> Option<Work<'a>> {
    Some(match number(exponent, DType::F64) {
        1.0 => Work::Unary(Unary::Copy, x),
        2.0 => Work::Unary(Unary::Square, x),
        -1.0 => Work::Unary(Unary::Recip, x),
        // burn rounds the square of 16 bits too.
        -2.0 if matches!(x.dtype, DType::F32 | DType::F64) => Work::Unary(Unary::RecipSquare, x),
        -2.0 | 0.0 => return None,
        _ => Work::Unary(Unary::Powf(number(exponent, x.dtype)), x),
    })
}

fn float(op: &Float) -> Option<Work<'_>> {
    Some(match op {
        Float::Exp(op) => Work::Unary(Unary::Exp, &op.input),
        Float::Log(op) => Work::Unary(Unary::Log, &op.input),
        Float::Log1p(op) => Work::Unary(Unary::Log1p, &op.input),
        Float::Erf(op) => Work::Unary(Unary::Erf, &op.input),
        Float::Sqrt(op) => Work::Unary(Unary::Sqrt, &op.input),
        Float::Tanh(op) => Work::Unary(Unary::Tanh, &op.input),
        Float::Recip(op) => Work::Unary(Unary::Recip, &op.input),
        Float::PowfScalar(op) => power(&op.lhs, &op.rhs)?,
        _ => return None,
    })
}

fn activation(op: &Activation) -> Option<Work<'_>> {
    Some(match op {
        Activation::Relu(op) => Work::Unary(Unary::Relu, &op.input),
        Activation::Sigmoid(op) => Work::Unary(Unary::Sigmoid, &op.input),
        Activation::Gelu(op) => Work::Unary(Unary::Gelu, &op.input),
        Activation::ReluBackward(op) => Work::Binary(Binary::ReluBackward, &op.lhs, &op.rhs),
        Activation::SigmoidBackward(op) => Work::Binary(Binary::SigmoidBackward, &op.lhs, &op.rhs),
        Activation::GeluBackward(op) => Work::Binary(Binary::GeluBackward, &op.lhs, &op.rhs),
        _ => return None,
    })
}
