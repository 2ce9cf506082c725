//! Bias and activation as one kernel.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::ModuleOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{Cube, CubeBackend};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::CubeDim;

use super::{compute, cube, run_on};
use crate::comm::DeviceTensor;
use crate::comm::device::from_device;
use crate::tensor_parallel::activation::Activation;

/// The kernel, where it runs.
pub(crate) fn bias_activation<const D: usize>(
    x: &Tensor<D>,
    bias: &Tensor<1>,
    activation: Activation,
) -> Option<Tensor<D>> {
    let runs = run_on(&x.device())
        && compute(x.dtype())
        && bias.dtype() == x.dtype()
        && bias.dims()[0] == x.dims()[D - 1]
        && x.shape().num_elements() > 0;
    runs.then(|| {
        let (x, bias) = (x.clone().into_dispatch(), bias.clone().into_dispatch());
        Tensor::from_dispatch(<Dispatch as Epilogue>::bias_activation(x, bias, activation))
    })
}

#[backend_extension(Cube, Autodiff)]
trait Epilogue: Backend {
    fn bias_activation(x: FloatTensor<Self>, bias: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;
}

/// The gradient, on backends without a tape.
trait EpilogueGradient: Backend {
    fn gradient(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self>;
}

pub(super) fn plain(tensor: FloatTensor<Cube>) -> DeviceTensor {
    let client = tensor.client.clone();
    into_contiguous(client.resolve_tensor_float::<CubeBackend>(tensor))
}

pub(super) fn fused(tensor: DeviceTensor) -> FloatTensor<Cube> {
    let tensor: Tensor<1> = from_device(tensor);
    tensor.try_into_primitive::<Cube>().expect("it was made of this backend's primitive")
}

/// A buffer of a dtype, whose values are not set.
pub(super) fn empty_like(like: &DeviceTensor, shape: Shape, dtype: burn::tensor::DType) -> DeviceTensor {
    let buffer = like.client.empty((shape.num_elements() * dtype.size()).max(1));
    DeviceTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, buffer, dtype)
}

impl Epilogue for Cube {
    fn bias_activation(x: FloatTensor<Self>, bias: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let (x, bias) = (plain(x), plain(bias));
        let y = empty_like(&x, x.shape(), x.dtype);
        let elements = y.shape().num_elements();
        let dim = CubeDim::new(&y.client, elements);
        cube::bias_activation::launch(
            &y.client,
            calculate_cube_count_elemwise(&y.client, elements, dim),
            dim,
            x.into_tensor_arg(),
            bias.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            cube::number(activation),
            dtype_to_storage_type(y.dtype),
        );
        fused(y)
    }
}

impl EpilogueGradient for Cube {
    fn gradient(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        let [x, bias, dy] = [x, bias, dy].map(plain);
        let dx = empty_like(&x, x.shape(), x.dtype);
        let elements = dx.shape().num_elements();
        let dim = CubeDim::new(&dx.client, elements);
        cube::bias_activation_gradient::launch(
            &dx.client,
            calculate_cube_count_elemwise(&dx.client, elements, dim),
            dim,
            x.into_tensor_arg(),
            bias.into_tensor_arg(),
            dy.into_tensor_arg(),
            dx.clone().into_tensor_arg(),
            cube::number(activation),
            dtype_to_storage_type(dx.dtype),
        );
        fused(dx)
    }
}

impl<B: Epilogue + EpilogueGradient, C: CheckpointStrategy> Epilogue for Autodiff<B, C> {
    fn bias_activation(x: FloatTensor<Self>, bias: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let ((x, of_x), (bias, of_bias)) = (x.into_parts(), bias.into_parts());
        match Slope.prepare::<C>([of_x, of_bias]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::bias_activation(x.clone(), bias.clone(), activation);
                prep.finish((x, bias, activation), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::bias_activation(x, bias, activation)),
        }
    }
}

/// The gradients of input and bias.
#[derive(Debug)]
struct Slope;

impl<B: Epilogue + EpilogueGradient> Backward<B, 2> for Slope {
    type State = (FloatTensor<B>, FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, bias, activation) = ops.state;
        let dx = B::gradient(x, bias, grads.consume::<B>(&ops.node), activation);
        let [of_x, of_bias] = ops.parents;
        if let Some(of_bias) = of_bias {
            grads.register::<B>(of_bias.id, <B as ModuleOps<B>>::linear_bias_backward(dx.clone()));
        }
        if let Some(of_x) = of_x {
            grads.register::<B>(of_x.id, dx);
        }
    }
}
