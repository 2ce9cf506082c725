//! Bias and activation after a product, in one pass.

use burn::tensor::{Tensor, activation};

pub use crate::tensor_parallel::activation::Activation;

/// `y = activation(x + bias)`, the bias along the last dim: of the whole sum, once the last chunk of a product is
/// there.
///
/// On CubeCL's devices one kernel, which computes in `f32`, and one in the backward, which keeps `x` alone and computes
/// the rest again: `dx = dy activation'(x + bias)`, `dbias` the sum of its rows. With `f64`, and elsewhere, by burn's
/// operations.
///
/// # Shapes
/// - x, output: `[.., n]`
/// - bias: `[n]`
///
/// # Panics
/// As burn's addition, if the bias has another length.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_parallel::tensor_parallel::functional::{Activation, bias_activation};
///
/// let x = Tensor::<2>::from_floats([[1.0, -3.0]], &Device::flex());
/// let y = bias_activation(x, Some(Tensor::from_floats([1.0, 2.0], &Device::flex())), Activation::Relu);
/// assert_eq!(y.into_data().iter::<f32>().collect::<Vec<_>>(), [2.0, 0.0]);
/// ```
pub fn bias_activation<const D: usize>(x: Tensor<D>, bias: Option<Tensor<1>>, activation: Activation) -> Tensor<D> {
    #[cfg(feature = "cubecl")]
    if let Some(bias) = &bias
        && let Some(done) = crate::tensor_parallel::kernels::bias_activation(&x, bias, activation)
    {
        return done;
    }
    let sum = match bias {
        Some(bias) => x + bias.unsqueeze(),
        None => x,
    };
    match activation {
        Activation::Identity => sum,
        // burn's relu does not take tensors without elements on all devices.
        _ if sum.shape().num_elements() == 0 => sum,
        Activation::Relu => activation::relu(sum),
        Activation::Gelu => activation::gelu(sum),
        Activation::GeluApproximate => activation::gelu_approximate(sum),
    }
}
