//! Which slice of a layer a rank holds, and how it is cut from a whole layer.

use std::ops::Range;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;

use crate::Error;
use crate::comm::{Communicator, part};

/// The part of this rank, which must not be empty.
pub(super) fn own_part(
    operation: &'static str,
    what: &str,
    total: usize,
    group: &Communicator,
) -> Result<Range<usize>, Error> {
    let (size, name) = (group.size(), group.group());
    if total < size {
        let problem = format!(
            "{what} {total} is less than the {size} ranks of group `{name}`, each of which needs at least 1: use a smaller \
             tensor-parallel degree"
        );
        return Err(Error::invalid(operation, problem));
    }
    Ok(part(total, size, group.rank()))
}

/// A copy of a block of a parameter, as a leaf of its own with the same id. The whole does not stay behind it.
pub(super) fn cut<const D: usize>(param: &Param<Tensor<D>>, block: [Range<usize>; D]) -> Param<Tensor<D>> {
    let whole = param.val();
    let (device, dtype, trained) = (whole.device(), whole.dtype(), whole.is_require_grad());
    let block = whole.detach().slice(block).into_data();
    Param::initialized(param.id, Tensor::from_data(block, (&device, dtype)).set_require_grad(trained))
}

/// Some columns of the weight, with their biases.
pub(super) fn columns(linear: &Linear, own: Range<usize>) -> Linear {
    let [d_input, _] = linear.weight.dims();
    let bias = linear.bias.as_ref().map(|bias| cut(bias, [own.clone()]));
    Linear { weight: cut(&linear.weight, [0..d_input, own]), bias }
}

/// Some rows of the weight, with all biases.
pub(super) fn rows(linear: &Linear, own: Range<usize>) -> Linear {
    let [_, d_output] = linear.weight.dims();
    let all = 0..d_output;
    let bias = linear.bias.as_ref().map(|bias| cut(bias, [all.clone()]));
    Linear { weight: cut(&linear.weight, [own, all]), bias }
}

/// Refuses a layer of other dims than it was configured for.
pub(super) fn check_linear(
    operation: &'static str,
    what: &str,
    linear: &Linear,
    dims: [usize; 2],
    bias: bool,
) -> Result<(), Error> {
    let (found, biased) = (linear.weight.dims(), linear.bias.is_some());
    if found == dims && biased == bias {
        return Ok(());
    }
    let word = |bias: bool| if bias { "with" } else { "without" };
    let problem = format!(
        "{what} is configured as {dims:?} {} bias, but the given layer is {found:?} {} bias",
        word(bias),
        word(biased)
    );
    Err(Error::invalid(operation, problem))
}

/// Refuses a tensor whose last dim is not what the layer takes.
pub(super) fn check_features<const D: usize>(
    operation: &'static str,
    input: &Tensor<D>,
    features: usize,
    group: &Communicator,
) -> Result<(), Error> {
    let dims = input.dims();
    if dims.last() == Some(&features) {
        return Ok(());
    }
    let (rank, size) = (group.rank(), group.size());
    let problem = format!("rank {rank} of {size} takes [.., {features}], but the input is {dims:?}");
    Err(Error::invalid(operation, problem))
}
