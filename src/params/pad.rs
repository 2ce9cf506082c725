//! Pads parameters with zeros to dims that the ranks divide, and takes the padding off.

use burn::tensor::Tensor;

/// The tensor with zeros behind it along each dim, up to these dims.
pub(crate) fn padded<const D: usize>(mut value: Tensor<D>, dims: &[usize]) -> Tensor<D> {
    for (dim, size) in dims.iter().enumerate().take(D) {
        let mut missing = value.dims();
        if missing[dim] >= *size {
            continue;
        }
        missing[dim] = size - missing[dim];
        let zeros = Tensor::zeros(missing, (&value.device(), value.dtype()));
        value = if value.dims()[dim] == 0 { zeros } else { Tensor::cat(vec![value, zeros], dim) };
    }
    value
}

/// What of the tensor is within these dims.
pub(crate) fn without_padding<const D: usize>(mut value: Tensor<D>, dims: &[usize]) -> Tensor<D> {
    for (dim, size) in dims.iter().enumerate().take(D) {
        if value.dims()[dim] > *size {
            value = value.narrow(dim, 0, *size);
        }
    }
    value
}
