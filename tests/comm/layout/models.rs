//! An MLP cut as in Megatron-LM, with and without sequence parallelism, trained like on one device.

use burn::tensor::{DType, Device, Gradients, Tensor, activation::gelu};
use burn_parallel::Error;
use burn_parallel::comm::Communicator;
use burn_parallel::layout::{self, Layout};
use burn_parallel::prelude::{Mesh, launch};

use crate::common::dense::Dense;

const STEPS: u64 = 3;
const RATE: f64 = 0.1;
const SEQUENCE: usize = 7;
const WIDTH: usize = 6;
const HIDDEN: usize = 10;

/// `x + b2 + gelu(norm(x) * gain @ w1 + b1) @ w2`, and how its parameters lie along the tensor axis.
struct Mlp {
    gain: Tensor<2>,
    w1: Tensor<2>,
    b1: Tensor<2>,
    w2: Tensor<2>,
    b2: Tensor<2>,
}

const LAYOUTS: [Layout; 5] =
    [Layout::Replicated, Layout::Sharded(1), Layout::Sharded(1), Layout::Sharded(0), Layout::Replicated];

fn initial() -> [Dense; 5] {
    let dims = [[1, WIDTH], [WIDTH, HIDDEN], [1, HIDDEN], [HIDDEN, WIDTH], [1, WIDTH]];
    std::array::from_fn(|index| Dense::fractions(&dims[index], 100 + index as u64))
}

fn held(layout: Layout, whole: &Dense, comm: Option<&Communicator>) -> Dense {
    match (layout, comm) {
        (Layout::Sharded(dim), Some(comm)) => whole.part(dim, comm.size(), comm.rank()),
        _ => whole.clone(),
    }
}

impl Mlp {
    fn new(device: &Device, dtype: DType, comm: Option<&Communicator>) -> Self {
        let whole = initial();
        let [gain, w1, b1, w2, b2] =
            std::array::from_fn(|index| held(LAYOUTS[index], &whole[index], comm).tensor(device, dtype).require_grad());
        Self { gain, w1, b1, w2, b2 }
    }

    fn parameters(&mut self) -> [&mut Tensor<2>; 5] {
        [&mut self.gain, &mut self.w1, &mut self.b1, &mut self.w2, &mut self.b2]
    }

    fn descend(&mut self, grads: &Gradients) {
        for parameter in self.parameters() {
            let gradient = parameter.grad(grads).expect("every parameter is used");
            let strategy = parameter.gradient_checkpointing_strategy().expect("parameters are on an autodiff device");
            let next = (parameter.clone().inner() - gradient * RATE).autodiff();
            *parameter = next.with_gradient_checkpointing_strategy(strategy).require_grad();
        }
    }

    fn single(&self, x: Tensor<2>) -> Tensor<2> {
        let hidden = gelu((norm(x.clone()) * self.gain.clone()).matmul(self.w1.clone()) + self.b1.clone());
        x + hidden.matmul(self.w2.clone()) + self.b2.clone()
    }

    /// Replicated activations outside, columns then rows inside.
    fn tensor_parallel(&self, x: Tensor<2>, tp: &Communicator) -> Result<Tensor<2>, Error> {
        let normed = layout::copy_to_group(norm(x.clone()) * self.gain.clone(), tp)?;
        let hidden = gelu(normed.matmul(self.w1.clone()) + self.b1.clone());
        Ok(x + layout::reduce_from_group(hidden.matmul(self.w2.clone()), tp)? + self.b2.clone())
    }

    /// Activations outside are sharded along the sequence; replicated parameters that meet them are copied to the
    /// group.
    fn sequence_parallel(&self, x: Tensor<2>, tp: &Communicator) -> Result<Tensor<2>, Error> {
        let normed = norm(x.clone()) * layout::copy_to_group(self.gain.clone(), tp)?;
        let normed = layout::gather_and_copy_to_group(normed, 0, tp)?;
        let hidden = gelu(normed.matmul(self.w1.clone()) + self.b1.clone());
        let rows = layout::reduce_scatter_to_group(hidden.matmul(self.w2.clone()), 0, tp)?;
        Ok(x + rows + layout::copy_to_group(self.b2.clone(), tp)?)
    }
}

fn norm(x: Tensor<2>) -> Tensor<2> {
    let mean_square = (x.clone() * x.clone()).mean_dim(1);
    x / (mean_square + 1e-3).sqrt()
}

fn batch(step: u64) -> [Dense; 2] {
    [0, 1].map(|which| Dense::fractions(&[SEQUENCE, WIDTH], 2 * step + which))
}

fn squares(y: Tensor<2>, target: Tensor<2>) -> Tensor<1> {
    let error = y - target;
    (error.clone() * error).sum() / (SEQUENCE * WIDTH) as f64
}

/// Loss, gradient of the input, and parameters after every step.
type History = Vec<(Dense, Dense, [Dense; 5])>;

fn train(
    mut model: Mlp,
    device: &Device,
    dtype: DType,
    lies: impl Fn(&Dense) -> Dense,
    loss: impl Fn(&Mlp, Tensor<2>, Tensor<2>) -> Result<Tensor<1>, Error>,
    backward: impl Fn(&Tensor<1>) -> Result<Gradients, Error>,
) -> Result<History, Error> {
    let mut history = Vec::new();
    for step in 0..STEPS {
        let [x, target] = batch(step).map(|whole| lies(&whole).tensor::<2>(device, dtype));
        let x = x.require_grad();
        let loss = loss(&model, x.clone(), target)?;
        let grads = backward(&loss)?;
        let dx = Dense::of(&x.grad(&grads).expect("a gradient"));
        model.descend(&grads);
        history.push((Dense::of(&loss), dx, model.parameters().map(|parameter| Dense::of(parameter))));
    }
    Ok(history)
}

fn single_device(dtype: DType) -> History {
    let device = Device::flex().autodiff();
    let model = Mlp::new(&device, dtype, None);
    let loss = |model: &Mlp, x, target| Ok(squares(model.single(x), target));
    train(model, &device, dtype, Dense::clone, loss, |loss| Ok(loss.backward())).unwrap()
}

fn compare(found: &History, expected: &History, comm: &Communicator, tolerance: f64, sequence: bool) {
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        found.0.assert_near(&expected.0, tolerance, &format!("loss of step {step}"));
        let dx = if sequence { expected.1.part(0, comm.size(), comm.rank()) } else { expected.1.clone() };
        found.1.assert_near(&dx, tolerance, &format!("gradient of the input in step {step}"));
        for (index, layout) in LAYOUTS.into_iter().enumerate() {
            let due = held(layout, &expected.2[index], Some(comm));
            found.2[index].assert_near(&due, tolerance, &format!("parameter {index} after step {step}"));
        }
    }
}

/// Dtypes with their tolerances.
const PRECISIONS: [(DType, f64); 2] = [(DType::F64, 1e-12), (DType::F32, 2e-5)];

#[test]
fn megatron() {
    for (dtype, tolerance) in PRECISIONS {
        let expected = single_device(dtype);
        for size in 1..=4 {
            let run = launch::threads(size).run(|world| {
                for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
                    let model = Mlp::new(&device, dtype, Some(&world));
                    let loss = |model: &Mlp, x, target| Ok(squares(model.tensor_parallel(x, &world)?, target));
                    let back = |loss: &Tensor<1>| layout::backward(loss, &world);
                    let found = train(model, &device, dtype, Dense::clone, loss, back)?;
                    compare(&found, &expected, &world, tolerance, false);
                }
                Ok(())
            });
            run.unwrap();
        }
    }
}

#[test]
fn megatron_with_sequence_parallelism() {
    for (dtype, tolerance) in PRECISIONS {
        let expected = single_device(dtype);
        for size in 1..=4 {
            let run = launch::threads(size).run(|world| {
                for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
                    let model = Mlp::new(&device, dtype, Some(&world));
                    let loss = |model: &Mlp, x, target| {
                        layout::reduce_from_group(squares(model.sequence_parallel(x, &world)?, target), &world)
                    };
                    let back = |loss: &Tensor<1>| layout::backward(loss, &world);
                    let lies = |whole: &Dense| whole.part(0, world.size(), world.rank());
                    let found = train(model, &device, dtype, lies, loss, back)?;
                    compare(&found, &expected, &world, tolerance, true);
                }
                Ok(())
            });
            run.unwrap();
        }
    }
}

/// Rows of the batch along one axis, the tensor-parallel MLP along the other.
#[test]
fn two_axes() {
    let (dtype, tolerance) = PRECISIONS[0];
    let expected = single_device(dtype);
    let run = launch::threads(4).run(|world| {
        let mesh = Mesh::new(&world, [("dp", 2), ("tp", 2)])?;
        let (dp, tp) = (mesh.axis("dp")?, mesh.axis("tp")?);
        let device = Device::flex().autodiff();
        let loss = |model: &Mlp, x, target| {
            let [gain, w1, b1, w2, b2] = [&model.gain, &model.w1, &model.b1, &model.w2, &model.b2]
                .map(|parameter| layout::copy_to_group(parameter.clone(), &dp));
            let copied = Mlp { gain: gain?, w1: w1?, b1: b1?, w2: w2?, b2: b2? };
            layout::reduce_from_group(squares(copied.tensor_parallel(x, &tp)?, target), &dp)
        };
        let lies = |whole: &Dense| whole.part(0, dp.size(), dp.rank());
        let back = |loss: &Tensor<1>| layout::backward(loss, &world);
        let found = train(Mlp::new(&device, dtype, Some(&tp)), &device, dtype, lies, loss, back)?;
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            found.0.assert_near(&expected.0, tolerance, "loss");
            for (index, layout) in LAYOUTS.into_iter().enumerate() {
                let due = held(layout, &expected.2[index], Some(&tp));
                found.2[index].assert_near(&due, tolerance, &format!("parameter {index} after step {step}"));
            }
        }
        Ok(())
    });
    run.unwrap();
}
