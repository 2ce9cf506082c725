//! The cross-entropy over a split vocabulary in three kernels and two small all-reduces.
//!
//! Of the logits nothing is kept but themselves: softmax minus one-hot is computed in the backward from the largest and
//! the sum of every row.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{Cube, CubeBackend};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::{CubeCount, CubeDim};

use super::epilogue::{empty_like, fused, plain};
use super::{compute, cube, run_on};
use crate::Error;
use crate::comm::device::{from_device, to_device};
use crate::comm::{Communicator, DeviceTensor, ReduceOp};

/// The losses of all rows, or `None` where the kernels don't run. `targets` are columns of this rank, or negative.
pub(crate) fn vocab_parallel_losses(
    logits: &Tensor<2>,
    targets: Tensor<1, Int>,
    group: &Communicator,
) -> Option<Result<Tensor<1>, Error>> {
    if !run_on(&logits.device()) || !compute(logits.dtype()) || logits.shape().num_elements() == 0 {
        return None;
    }
    let targets = targets.cast(DType::I32);
    let made = <Dispatch as Losses>::losses(logits.clone().into_dispatch(), targets.into_dispatch(), group.clone());
    Some(match made.error {
        None => Ok(Tensor::from_dispatch(made.losses)),
        Some(error) => Err(error),
    })
}

#[derive(ExtensionType)]
struct LossResult<B: Backend> {
    losses: FloatTensor<B>,
    error: Option<Error>,
}

#[backend_extension(Cube, Autodiff)]
trait Losses: Backend {
    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>, group: Communicator) -> LossResult<Self>;
}

/// The two halves on backends without a tape.
trait LossKernels: Backend {
    /// Largest, `[rows]`; sum of exponentials and score of the target, `[rows, 2]`; loss, `[rows]`.
    fn forward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        group: &Communicator,
    ) -> Result<[FloatTensor<Self>; 3], Error>;

    /// `(softmax - one-hot) dloss`.
    fn backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        most: FloatTensor<Self>,
        sums: FloatTensor<Self>,
        dloss: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

fn plain_int(tensor: IntTensor<Cube>) -> DeviceTensor {
    let client = tensor.client.clone();
    into_contiguous(client.resolve_tensor_int::<CubeBackend>(tensor))
}

/// A cube for each row. A dim of the grid has an end that a batch may pass.
fn cube_for_each(rows: usize) -> CubeCount {
    let wide = rows.min(1 << 15);
    CubeCount::Static(wide as u32, rows.div_ceil(wide) as u32, 1)
}

impl LossKernels for Cube {
    fn forward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        group: &Communicator,
    ) -> Result<[FloatTensor<Self>; 3], Error> {
        let (z, targets) = (plain(logits), plain_int(targets));
        let (rows, dtype) = (z.shape()[0], dtype_to_storage_type(z.dtype));
        let dim = CubeDim::new_1d(cube::UNITS);
        let most = empty_like(&z, Shape::from([rows]), DType::F32);
        let args = (z.clone().into_tensor_arg(), most.clone().into_tensor_arg());
        cube::row_max::launch(&z.client, cube_for_each(rows), dim, args.0, args.1, dtype);
        let most = match group.size() {
            1 => most,
            _ => to_device(group.all_reduce(from_device::<1, burn::tensor::Float>(most), ReduceOp::Max)?)?,
        };
        let sums = empty_like(&z, Shape::from([rows, 2]), DType::F32);
        cube::row_sums::launch(
            &z.client,
            cube_for_each(rows),
            dim,
            z.clone().into_tensor_arg(),
            most.clone().into_tensor_arg(),
            targets.into_tensor_arg(),
            sums.clone().into_tensor_arg(),
            dtype,
        );
        let mut sums: Tensor<2> = from_device(sums);
        if group.size() > 1 {
            sums = group.all_reduce(sums, ReduceOp::Sum)?;
        }
        let losses = sums.clone().narrow(1, 0, 1).log() - sums.clone().narrow(1, 1, 1);
        Ok([fused(most), fused(to_device(sums)?), fused(to_device(losses.reshape([rows]))?)])
    }

    fn backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        most: FloatTensor<Self>,
        sums: FloatTensor<Self>,
        dloss: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [z, most, sums, dloss] = [logits, most, sums, dloss].map(plain);
        let dz = empty_like(&z, z.shape(), z.dtype);
        let elements = dz.shape().num_elements();
        let dim = CubeDim::new(&dz.client, elements);
        cube::loss_gradient::launch(
            &dz.client,
            calculate_cube_count_elemwise(&dz.client, elements, dim),
            dim,
            z.into_tensor_arg(),
            most.into_tensor_arg(),
            sums.into_tensor_arg(),
            plain_int(targets).into_tensor_arg(),
            dloss.into_tensor_arg(),
            dz.clone().into_tensor_arg(),
            dtype_to_storage_type(dz.dtype),
        );
        fused(dz)
    }
}

impl Losses for Cube {
    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>, group: Communicator) -> LossResult<Self> {
        match <Self as LossKernels>::forward(logits.clone(), targets, &group) {
            Ok([_, _, losses]) => LossResult { losses, error: None },
            Err(error) => LossResult { losses: logits, error: Some(error) },
        }
    }
}

impl<B: Losses + LossKernels, C: CheckpointStrategy> Losses for Autodiff<B, C> {
    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>, group: Communicator) -> LossResult<Self> {
        let (z, guard) = logits.into_parts();
        // Compute-bound: checkpointing must never repeat a collective.
        let kind = LossGradient.prepare::<C>([guard]).compute_bound().stateful();
        let (state, losses, error) = match B::forward(z.clone(), targets.clone(), &group) {
            Ok([most, sums, losses]) => ((z, targets, most, sums), losses, None),
            Err(error) => ((z.clone(), targets, z.clone(), z.clone()), z, Some(error)),
        };
        match kind {
            OpsKind::Tracked(prep) => LossResult { losses: prep.finish(state, losses), error },
            OpsKind::UnTracked(prep) => LossResult { losses: prep.finish(losses), error },
        }
    }
}

/// Softmax minus one-hot.
#[derive(Debug)]
struct LossGradient;

impl<B: Losses + LossKernels> Backward<B, 1> for LossGradient {
    /// Logits, targets, largest, sums.
    type State = (FloatTensor<B>, IntTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (logits, targets, most, sums) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dloss| B::backward(logits, targets, most, sums, dloss));
    }
}
