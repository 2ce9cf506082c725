//! The activations that run in one pass with the bias before them.

/// An activation behind a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x`.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `x / 2 (1 + erf(x / sqrt 2))`, [arXiv:1606.08415](https://arxiv.org/abs/1606.08415).
    Gelu,
    /// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, of the same source.
    GeluApproximate,
}
