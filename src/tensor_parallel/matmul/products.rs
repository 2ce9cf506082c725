//! The four products, for tensors of any rank.

use burn::backend::Dispatch;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Device, Shape, Tensor};

use super::schedule::Overlap;
use super::tape::{Form, Job};
use crate::Error;
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
/// [`Error::InvalidArgument`] for dims, dtypes or devices that don't go together; [`Error::UnsupportedDType`] for dtypes
/// other than f32, f64, f16 and bf16. In the backward pass those of [`Communicator`], see
/// [`backward`](crate::layout::backward).
///
/// ```
/// use burn::tensor::Tensor;
/// use burn_parallel::prelude::*;
/// use burn_parallel::tensor_parallel::matmul::{Overlap, column_parallel, row_parallel};
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
    const NAME: &str = "column_parallel";
    check(NAME, &x, &weight, group)?;
    if !has_kernels(&x) {
        return Ok(plain(layout::copy_to_group(x, group)?, weight));
    }
    by_rows(x, weight, Job { name: NAME, form: Form::Column, unit: 1, overlap, comm: group.clone() })
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
    check(NAME, &x, &weight, group)?;
    if !has_kernels(&x) {
        return layout::reduce_from_group(plain(x, weight), group);
    }
    by_rows(x, weight, Job { name: NAME, form: Form::Row, unit: 1, overlap, comm: group.clone() })
}

/// Gathers an input that is split along the sequence, and multiplies by this rank's columns of a weight:
/// `y_r = [x_0, .., x_(n-1)] A_r`.
///
/// Rows that are there are multiplied while others are on their way. The backward reduce-scatters
/// `dx = sum_i dy_i A_i^T` in chunks, beside `dA_r = x^T dy_r`, for which the gathered input is kept. It equals a product
/// behind [`gather_and_copy_to_group`](crate::layout::gather_and_copy_to_group).
///
/// # Shapes
/// - x: `[.., part(sequence), d_input]`
/// - weight: `[d_input, part(d_output)]`
/// - output: `[.., sequence, part(d_output)]`
///
/// Source: Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2, figure 5.
///
/// # Errors
/// Those of [`column_parallel`], and of [`Communicator`]; [`Error::InvalidArgument`] if what a rank brings is not its part of
/// the sequence, or a tensor of one dim.
pub fn all_gather_matmul<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    group: &Communicator,
    overlap: Overlap,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "all_gather_matmul";
    check(NAME, &x, &weight, group)?;
    let sequence = sequence_dim::<D>(NAME)?;
    if !has_kernels(&x) {
        return Ok(plain(layout::gather_and_copy_to_group(x, sequence, group)?, weight));
    }
    by_positions(x, weight, Job { name: NAME, form: Form::GatherColumn, unit: 1, overlap, comm: group.clone() })
}

/// Multiplies by this rank's rows of a weight, sums over the ranks, and leaves each its part of the sequence:
/// `y_r = part_r(sum_i x_i A_i)`.
///
/// The product is reduce-scattered in chunks. The backward gathers `dy`, multiplying by `A_r^T` what is there, then computes
/// `dA_r = x_r^T dy`. It equals a product before [`reduce_scatter_to_group`](crate::layout::reduce_scatter_to_group).
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
    check(NAME, &x, &weight, group)?;
    let sequence = sequence_dim::<D>(NAME)?;
    if !has_kernels(&x) {
        return layout::reduce_scatter_to_group(plain(x, weight), sequence, group);
    }
    by_positions(x, weight, Job { name: NAME, form: Form::RowScatter, unit: 1, overlap, comm: group.clone() })
}

/// The product by burn's own means.
fn plain<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    burn::tensor::module::linear(x, weight, None)
}

/// Whether there are sharded products on the tensor's device. On others the product is one, and the move another.
fn has_kernels<const D: usize>(x: &Tensor<D>) -> bool {
    let device = x.device().inner();
    #[cfg(feature = "cubecl")]
    if crate::tensor_parallel::kernels::run_on(&device) {
        return true;
    }
    device == Device::flex()
}

/// All dims but the last are rows.
fn by_rows<const D: usize>(x: Tensor<D>, weight: Tensor<2>, job: Job) -> Result<Tensor<D>, Error> {
    let mut dims = x.dims();
    let rows = dims[..D - 1].iter().product();
    let rows = reshaped(x, [rows, dims[D - 1]]);
    dims[D - 1] = weight.dims()[1];
    Ok(reshaped(multiply(rows, weight, job)?, dims))
}

/// The sequence comes first, and to each of its positions belong the rows of the other dims.
fn by_positions<const D: usize>(x: Tensor<D>, weight: Tensor<2>, mut job: Job) -> Result<Tensor<D>, Error> {
    let order: [isize; D] = std::array::from_fn(|place| match place {
        0 => D as isize - 2,
        place if place < D - 1 => place as isize - 1,
        place => place as isize,
    });
    let back: [isize; D] = std::array::from_fn(|place| match place {
        place if place < D - 2 => place as isize + 1,
        place if place == D - 2 => 0,
        place => place as isize,
    });
    let x = x.permute(order);
    let mut dims = x.dims();
    job.unit = dims[1..D - 1].iter().product();
    let own = dims[0];
    if job.unit == 0 {
        // Batches of nothing have no rows to tell the positions by.
        return empty(x, weight, job).map(|y| y.permute(back));
    }
    let rows = reshaped(x, [own * job.unit, dims[D - 1]]);
    let unit = job.unit;
    dims[D - 1] = weight.dims()[1];
    let made = multiply(rows, weight, job)?;
    dims[0] = made.dims()[0] / unit;
    Ok(reshaped(made, dims).permute(back))
}

/// The product of an input of no rows: the moves alone.
fn empty<const D: usize>(x: Tensor<D>, weight: Tensor<2>, job: Job) -> Result<Tensor<D>, Error> {
    let multiply = |x: Tensor<D>| {
        let mut dims = x.dims();
        let rows = reshaped(x, [0, dims[D - 1]]);
        dims[D - 1] = weight.dims()[1];
        reshaped(rows.matmul(weight), dims)
    };
    match job.form {
        Form::GatherColumn => Ok(multiply(layout::gather_and_copy_to_group(x, 0, &job.comm)?)),
        _ => layout::reduce_scatter_to_group(multiply(x), 0, &job.comm),
    }
}

/// Other dims for the same elements, of which equal numbers are equal. [`Tensor::reshape`] takes a dim of 0 for one to be
/// kept; here it is one.
fn reshaped<const D: usize, const E: usize>(tensor: Tensor<D>, dims: [usize; E]) -> Tensor<E> {
    if D == E {
        return Tensor::from_dispatch(tensor.into_dispatch());
    }
    Tensor::from_dispatch(Dispatch::float_reshape(tensor.into_dispatch(), Shape::from(dims)))
}

fn multiply(x: Tensor<2>, weight: Tensor<2>, job: Job) -> Result<Tensor<2>, Error> {
    match job.comm.size() {
        1 => Ok(x.matmul(weight)),
        _ => job.run(x, weight),
    }
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
    weight: &Tensor<2>,
    group: &Communicator,
) -> Result<(), Error> {
    let (dtype, dims, of_weight) = (x.dtype(), x.dims(), weight.dims());
    if !matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16) {
        return Err(Error::UnsupportedDType { operation: name, dtype });
    }
    let (device, home) = (x.device().inner(), weight.device().inner());
    if dims.last() == Some(&of_weight[0]) && dtype == weight.dtype() && device == home {
        return Ok(());
    }
    let (rank, size) = (group.rank(), group.size());
    let problem = format!(
        "rank {rank} of {size} of group `{}` brings {dims:?} of {dtype:?} on {device:?} and a weight {of_weight:?} of {:?} on \
         {home:?}; the last dim of the one must be the first of the other, on the same device and of the same dtype",
        group.group(),
        weight.dtype()
    );
    Err(Error::invalid(name, problem))
}
