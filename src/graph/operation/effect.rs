//! What element-wise operations make of elements of which only something is known: that they are zero, finite, or very
//! low.

use burn_ir::{
    ActivationOperationIr as Activation, BaseOperationIr as Base, FloatOperationIr as Float,
    NumericOperationIr as Numeric, OperationIr, ScalarIr,
};

/// What an element-wise operation does to the size of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Gives ints or bools.
    Discrete,
    /// Of float tensors, as all that follow.
    Sum,
    Difference,
    Product,
    /// Finite of what is finite: a negative, plus or times a number.
    Affine,
    Exponential,
    /// An activation: finite of what is finite.
    Activation,
    /// The gradient of an activation, whose last input is the gradient of its output: zero where that is.
    ActivationGradient,
    /// Anything.
    Other,
}

impl Effect {
    pub(crate) fn of(op: &OperationIr) -> Self {
        match op {
            OperationIr::BaseBool(_) | OperationIr::Bool(_) | OperationIr::BaseInt(_) | OperationIr::Int(_) => {
                Self::Discrete
            }
            OperationIr::NumericFloat(_, numeric) => match numeric {
                Numeric::Add(_) => Self::Sum,
                Numeric::Sub(_) => Self::Difference,
                Numeric::Mul(_) => Self::Product,
                Numeric::Neg(_) | Numeric::AddScalar(_) | Numeric::SubScalar(_) | Numeric::MulScalar(_) => Self::Affine,
                _ => Self::Other,
            },
            OperationIr::Float(_, Float::Exp(_)) => Self::Exponential,
            OperationIr::Activation(
                Activation::ReluBackward(_) | Activation::GeluBackward(_) | Activation::SigmoidBackward(_),
            ) => Self::ActivationGradient,
            OperationIr::Float(_, Float::Tanh(_)) | OperationIr::Activation(_) => Self::Activation,
            _ => Self::Other,
        }
    }
}

/// Whether an element-wise operation makes zeros of zeros.
pub(crate) fn keeps_zero(op: &OperationIr) -> bool {
    match op {
        OperationIr::BaseFloat(Base::MaskFill(op)) => matches!(op.value, ScalarIr::Float(value) if value == 0.0),
        OperationIr::BaseFloat(Base::MaskWhere(_) | Base::Cast(_)) => true,
        OperationIr::NumericFloat(_, numeric) => matches!(
            numeric,
            Numeric::Add(_)
                | Numeric::Sub(_)
                | Numeric::Mul(_)
                | Numeric::MulScalar(_)
                | Numeric::Neg(_)
                | Numeric::Abs(_)
                | Numeric::Sign(_)
        ),
        OperationIr::Float(_, float) => {
            matches!(float, Float::Sqrt(_) | Float::Sin(_) | Float::Tan(_) | Float::Tanh(_) | Float::Erf(_))
        }
        OperationIr::Activation(activation) => {
            matches!(activation, Activation::Relu(_) | Activation::LeakyRelu(_) | Activation::Gelu(_))
        }
        _ => false,
    }
}
