//! Tracks what the elements are that pad a tensor.

use burn_ir::{
    ActivationOperationIr as Activation, BaseOperationIr as Base, FloatOperationIr as Float,
    NumericOperationIr as Numeric, OperationIr, ScalarIr,
};

use crate::graph::operation::is_elementwise;
use crate::partition::rules::creates;

/// What the elements behind the end of a padded dim are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// 0: nothing to a sum.
    Zero,
    /// So low that its exponential is 0, and nothing to a maximum.
    Lowest,
    /// Numbers.
    Finite,
    /// Anything, NaN too.
    Wild,
}

use Content::{Finite, Lowest, Wild, Zero};

/// What an element-wise operation makes of it; `None` stands for an operand without padding, which is spread over the dim.
pub(super) fn of_elementwise(op: &OperationIr, inputs: &[Option<Content>]) -> Content {
    let both = |content: Content| inputs.iter().all(|input| *input == Some(content));
    let some = |content: Content| inputs.contains(&Some(content));
    let tame = !some(Wild) && !some(Lowest);
    if keeps_zero(op) && both(Zero) {
        return Zero;
    }
    match op {
        OperationIr::BaseBool(_) | OperationIr::Bool(_) | OperationIr::BaseInt(_) | OperationIr::Int(_) => Finite,
        OperationIr::NumericFloat(_, numeric) => match numeric {
            Numeric::Mul(_) if some(Zero) && !some(Wild) => Zero,
            Numeric::Sub(_) if inputs == [Some(Lowest), None] => Lowest,
            Numeric::Add(_) if some(Lowest) && inputs.contains(&None) => Lowest,
            Numeric::Add(_) | Numeric::Sub(_) | Numeric::Mul(_) | Numeric::Neg(_) if tame => Finite,
            Numeric::AddScalar(_) | Numeric::SubScalar(_) | Numeric::MulScalar(_) if tame => Finite,
            _ => Wild,
        },
        OperationIr::Float(_, Float::Exp(_)) if both(Lowest) => Zero,
        OperationIr::Float(_, Float::Tanh(_)) | OperationIr::Activation(_) if tame => match op {
            // The gradient of what is finite, of a gradient that is 0.
            OperationIr::Activation(
                Activation::ReluBackward(_) | Activation::GeluBackward(_) | Activation::SigmoidBackward(_),
            ) if inputs.last() == Some(&Some(Zero)) => Zero,
            _ => Finite,
        },
        _ => Wild,
    }
}

/// Whether zeros give zeros.
fn keeps_zero(op: &OperationIr) -> bool {
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

/// Whether an operation is made of nothing but its scalars, or element-wise.
pub(super) fn can_be_larger(op: &OperationIr) -> bool {
    creates(op) || is_elementwise(op)
}

/// What an operation that makes its output from nothing makes.
pub(super) fn of_creation(op: &OperationIr) -> Content {
    match op {
        OperationIr::BaseFloat(Base::Zeros(_)) | OperationIr::BaseInt(Base::Zeros(_)) => Zero,
        _ => Finite,
    }
}
