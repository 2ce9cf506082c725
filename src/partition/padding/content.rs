//! Tracks what the elements are that pad a tensor.

use burn_ir::OperationIr;

use crate::graph::operation::{Effect, is_elementwise, is_zeros, keeps_zero};
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

/// What an element-wise operation makes of it; `None` stands for an operand without padding, which is spread over the
/// dim.
pub(super) fn of_elementwise(op: &OperationIr, inputs: &[Option<Content>]) -> Content {
    let both = |content: Content| inputs.iter().all(|input| *input == Some(content));
    let some = |content: Content| inputs.contains(&Some(content));
    let tame = !some(Wild) && !some(Lowest);
    if keeps_zero(op) && both(Zero) {
        return Zero;
    }
    match Effect::of(op) {
        Effect::Discrete => Finite,
        Effect::Product if some(Zero) && !some(Wild) => Zero,
        Effect::Difference if inputs == [Some(Lowest), None] => Lowest,
        Effect::Sum if some(Lowest) && inputs.contains(&None) => Lowest,
        Effect::Exponential if both(Lowest) => Zero,
        // Of a gradient that is 0.
        Effect::ActivationGradient if tame && inputs.last() == Some(&Some(Zero)) => Zero,
        Effect::Sum
        | Effect::Difference
        | Effect::Product
        | Effect::Affine
        | Effect::Activation
        | Effect::ActivationGradient
            if tame =>
        {
            Finite
        }
        _ => Wild,
    }
}

/// Whether an operation is made of nothing but its scalars, or element-wise.
pub(super) fn can_be_larger(op: &OperationIr) -> bool {
    creates(op) || is_elementwise(op)
}

/// What an operation that makes its output from nothing makes.
pub(super) fn of_creation(op: &OperationIr) -> Content {
    if is_zeros(op) { Zero } else { Finite }
}
