//! Column- and row-parallel products of tensors of any rank.

use burn::tensor::Tensor;

use super::{columns, rows};
use crate::Error;
use crate::collective_matmul::{self, Overlap, ProductCall};
use crate::comm::Communicator;
use crate::layout;

/// Multiplies by this rank's columns of a weight: `y_r = x A_r`.
///
/// The backward all-reduces `dx = sum_i dy_i A_i^T` in chunks, beside `dA_r = x^T dy_r`. It equals a product behind
/// [`copy_to_group`](crate::layout::copy_to_group), Megatron's *f*. A group of one costs nothing more than the product.
///
/// # Shapes
/// - x: `[.., d_input]`, the same on all ranks
/// - weight: `[d_input, part(d_output)]`
/// - output: `[.., part(d_output)]`
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3.
///
/// # Errors
/// [`Error::InvalidArgument`] for dims, dtypes or devices that don't go together; [`Error::UnsupportedDType`] for
/// dtypes other than f32, f64, f16 and bf16. In the backward pass those of [`Communicator`], see
/// [`backward`](crate::layout::backward).
///
/// ```
/// use burn::tensor::Tensor;
/// use burn_parallel::prelude::*;
/// use burn_parallel::tensor_parallel::functional::{Overlap, column_parallel, row_parallel};
///
/// launch::threads(2).run(|rank| {
///     let device = rank.device().autodiff();
///     let x = Tensor::<2>::ones([3, 4], &device).require_grad();
///     let columns = Tensor::<2>::ones([4, 5], &device).require_grad(); // of 10
///     let rows = Tensor::<2>::ones([5, 4], &device).require_grad(); // of 10
///     let hidden = column_parallel(x.clone(), columns, &rank, Overlap::auto())?;
///     let y = row_parallel(hidden, rows, &rank, Overlap::auto())?;
///     let grads = layout::backward(&y.clone().sum(), &rank)?;
///     assert_eq!(y.into_data().iter::<f32>().next(), Some(40.0)); // 10 products of 4
///     assert_eq!(x.grad(&grads).map(|dx| dx.into_data().iter::<f32>().sum()), Some(480.0));
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
pub fn column_parallel<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    group: &Communicator,
    overlap: Overlap,
) -> Result<Tensor<D>, Error> {
    column_parallel_each(x, [weight], group, overlap).map(|[y]| y)
}

/// As [`column_parallel`], by the columns of several weights, up to three: `y_i = x A_i`.
///
/// The gradient of the input is the sum over all ranks *and* weights, reduced once, in chunks, beside the gradients of
/// all weights. So the projections of an attention cost one all-reduce.
///
/// # Shapes
/// - x: `[.., d_input]`, the same on all ranks
/// - weights: `[d_input, part(d_output_i)]`
/// - outputs: `[.., part(d_output_i)]`
///
/// # Errors
/// Those of [`column_parallel`]; [`Error::InvalidArgument`] for no or more than three weights.
pub fn column_parallel_each<const D: usize, const N: usize>(
    x: Tensor<D>,
    weights: [Tensor<2>; N],
    group: &Communicator,
    overlap: Overlap,
) -> Result<[Tensor<D>; N], Error> {
    const NAME: &str = "column_parallel";
    check(NAME, &x, &weights, group)?;
    if group.size() == 1 || !has_kernels(&x) {
        let x = layout::copy_to_group(x, group)?;
        return Ok(weights.map(|weight| plain(x.clone(), weight)));
    }
    let call = ProductCall { name: NAME, dim: 0, even: false, overlap, comm: group.clone() };
    match D {
        1 => {
            let made = columns::multiply(x.unsqueeze::<2>(), weights, false, call)?;
            Ok(made.map(|row| row.squeeze_dim(0)))
        }
        _ => columns::multiply(x, weights, false, call),
    }
}

/// Multiplies by this rank's rows of a weight and sums over the ranks: `y = sum_i x_i A_i`.
///
/// The product is all-reduced in chunks; the backward communicates nothing. It equals a product before
/// [`reduce_from_group`](crate::layout::reduce_from_group), Megatron's *g*.
///
/// # Shapes
/// - x: `[.., part(d_input)]`
/// - weight: `[part(d_input), d_output]`
/// - output: `[.., d_output]`, the same on all ranks
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3.
///
/// # Errors
/// Those of [`column_parallel`], and of [`Communicator`].
pub fn row_parallel<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    group: &Communicator,
    overlap: Overlap,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "row_parallel";
    check(NAME, &x, std::slice::from_ref(&weight), group)?;
    if group.size() == 1 || !has_kernels(&x) {
        return layout::reduce_from_group(plain(x, weight), group);
    }
    let call = ProductCall { name: NAME, dim: 0, even: false, overlap, comm: group.clone() };
    match D {
        1 => Ok(rows::multiply(x.unsqueeze::<2>(), weight, false, call)?.squeeze_dim(0)),
        _ => rows::multiply(x, weight, false, call),
    }
}

/// Gathers an input that is split along the sequence, and multiplies by this rank's columns of a weight:
/// `y_r = [x_0, .., x_(n-1)] A_r`.
///
/// Rows that are there are multiplied while others are on their way. The backward reduce-scatters `dx = sum_i dy_i
/// A_i^T` in chunks, beside `dA_r = x^T dy_r`, for which the gathered input is kept. It equals a product behind
/// [`gather_and_copy_to_group`](crate::layout::gather_and_copy_to_group).
///
/// # Shapes
/// - x: `[.., part(sequence), d_input]`
/// - weight: `[d_input, part(d_output)]`
/// - output: `[.., sequence, part(d_output)]`
///
/// Source: Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2, figure 5.
///
/// # Errors
/// Those of [`column_parallel`], and of [`Communicator`]; [`Error::InvalidArgument`] if what a rank brings is not its
/// part of the sequence, or a tensor of one dim.
pub fn all_gather_matmul<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    group: &Communicator,
    overlap: Overlap,
) -> Result<Tensor<D>, Error> {
    all_gather_matmul_each(x, [weight], group, overlap).map(|[y]| y)
}

/// As [`all_gather_matmul`], by the columns of several weights, up to three: `y_i = [x_0, .., x_(n-1)] A_i`.
///
/// The input is gathered once, and its gradient, the sum over all ranks *and* weights, is reduce-scattered once.
///
/// # Shapes
/// - x: `[.., part(sequence), d_input]`
/// - weights: `[d_input, part(d_output_i)]`
/// - outputs: `[.., sequence, part(d_output_i)]`
///
/// # Errors
/// Those of [`all_gather_matmul`]; [`Error::InvalidArgument`] for no or more than three weights.
pub fn all_gather_matmul_each<const D: usize, const N: usize>(
    x: Tensor<D>,
    weights: [Tensor<2>; N],
    group: &Communicator,
    overlap: Overlap,
) -> Result<[Tensor<D>; N], Error> {
    const NAME: &str = "all_gather_matmul";
    check(NAME, &x, &weights, group)?;
    let sequence = sequence_dim::<D>(NAME)?;
    if group.size() == 1 || !has_kernels(&x) {
        let x = layout::gather_and_copy_to_group(x, sequence, group)?;
        return Ok(weights.map(|weight| plain(x.clone(), weight)));
    }
    columns::multiply(
        x,
        weights,
        true,
        ProductCall { name: NAME, dim: sequence, even: false, overlap, comm: group.clone() },
    )
}

/// Multiplies by this rank's rows of a weight, sums over the ranks, and leaves each its part of the sequence:
/// `y_r = part_r(sum_i x_i A_i)`.
///
/// The product is reduce-scattered in chunks. The backward gathers `dy`, multiplying by `A_r^T` what is there, then
/// computes `dA_r = x_r^T dy`. It equals a product before
/// [`reduce_scatter_to_group`](crate::layout::reduce_scatter_to_group).
///
/// # Shapes
/// - x: `[.., sequence, part(d_input)]`
/// - weight: `[part(d_input), d_output]`
/// - output: `[.., part(sequence), d_output]`
///
/// Source: Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2, figure 5.
///
/// # Errors
/// Those of [`row_parallel`]; [`Error::InvalidArgument`] for a tensor of one dim.
pub fn matmul_reduce_scatter<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    group: &Communicator,
    overlap: Overlap,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "matmul_reduce_scatter";
    check(NAME, &x, std::slice::from_ref(&weight), group)?;
    let sequence = sequence_dim::<D>(NAME)?;
    if group.size() == 1 || !has_kernels(&x) {
        return layout::reduce_scatter_to_group(plain(x, weight), sequence, group);
    }
    rows::multiply(
        x,
        weight,
        true,
        ProductCall { name: NAME, dim: sequence, even: false, overlap, comm: group.clone() },
    )
}

/// The product by burn's own means.
fn plain<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    burn::tensor::module::linear(x, weight, None)
}

fn has_kernels<const D: usize>(x: &Tensor<D>) -> bool {
    collective_matmul::run_on(&x.device().inner())
}

fn sequence_dim<const D: usize>(name: &'static str) -> Result<usize, Error> {
    D.checked_sub(2).ok_or_else(|| {
        let problem = format!("sequence parallelism needs tensors [.., sequence, features], this one has rank {D}");
        Error::invalid(name, problem)
    })
}

fn check<const D: usize>(
    name: &'static str,
    x: &Tensor<D>,
    weights: &[Tensor<2>],
    group: &Communicator,
) -> Result<(), Error> {
    let (dtype, dims, device) = (x.dtype(), x.dims(), x.device().inner());
    if !collective_matmul::multiply(dtype) {
        return Err(Error::UnsupportedDType { operation: name, dtype });
    }
    for weight in weights {
        let (of_weight, home) = (weight.dims(), weight.device().inner());
        if dims.last() == Some(&of_weight[0]) && dtype == weight.dtype() && device == home {
            continue;
        }
        let (rank, size) = (group.rank(), group.size());
        let problem = format!(
            "rank {rank} of {size} of group `{}` brings {dims:?} of {dtype:?} on {device:?} and a weight {of_weight:?} of {:?} \
             on {home:?}; the last dim of the one must be the first of the other, on the same device and of the same dtype",
            group.group(),
            weight.dtype()
        );
        return Err(Error::invalid(name, problem));
    }
    Ok(())
}
