//! Differences of the loss against the gradient, and rounding.

use burn::tensor::{DType, Device, Tensor, activation};
use burn_parallel::Error;
use burn_parallel::comm::Communicator;
use burn_parallel::layout;
use burn_parallel::prelude::launch;

use crate::common::dense::Dense;

/// Something curved through every kind of move; `[7, 5]`, sharded along its first dim.
fn curved(x: Tensor<2>, comm: &Communicator) -> Result<Tensor<1>, Error> {
    let weight = Dense::fractions(&[7, 5], 40 + comm.rank() as u64).tensor::<2>(&x.device(), DType::F64);
    let whole = layout::gather_and_copy_to_group(x, 0, comm)?;
    let partial = activation::tanh(whole * weight);
    let rows = layout::reduce_scatter_to_group(partial, 0, comm)?;
    let columns = activation::sigmoid(layout::all_to_all(rows, 0, 1, comm)?);
    let whole = layout::gather_from_group(columns, 1, comm)?;
    let again = layout::scatter_to_group(whole.clone() * whole, 0, comm)?;
    let scaled = again * (comm.rank() as f64 + 1.0);
    layout::reduce_from_group(scaled.powf_scalar(3.0).sum(), comm)
}

#[test]
fn differences_of_the_loss() {
    const STEP: f64 = 1e-5;
    for size in 2..=4 {
        let run = launch::threads(size).run(|world| {
            let x = Dense::fractions(&[7, 5], 1).part(0, world.size(), world.rank());
            let leaf = x.tensor::<2>(&Device::flex().autodiff(), DType::F64).require_grad();
            let grads = layout::backward(&curved(leaf.clone(), &world)?, &world)?;
            let gradient = Dense::of(&leaf.grad(&grads).expect("a gradient"));
            let loss_at =
                |x: Dense| Ok::<_, Error>(Dense::of(&curved(x.tensor(&Device::flex(), DType::F64), &world)?).values[0]);
            for moving in 0..world.size() {
                let elements = Dense::zeros(&[7, 5]).part(0, world.size(), moving).values.len();
                for index in 0..elements {
                    let mut losses = [0.0; 2];
                    for (loss, step) in losses.iter_mut().zip([STEP, -STEP]) {
                        let mut x = x.clone();
                        if world.rank() == moving {
                            x.values[index] += step;
                        }
                        *loss = loss_at(x)?;
                    }
                    if world.rank() == moving {
                        let (slope, found) = ((losses[0] - losses[1]) / (2.0 * STEP), gradient.values[index]);
                        assert!((slope - found).abs() < 1e-7 * slope.abs().max(1.0), "{found} for {slope} at {index}");
                    }
                }
            }
            Ok(())
        });
        run.unwrap();
    }
}

/// Sums of 16-bit floats are made in 32 bits and rounded once.
#[test]
fn narrow_floats() {
    for (dtype, unit) in [(DType::F32, 1.2e-7), (DType::F16, 9.8e-4), (DType::BF16, 7.9e-3)] {
        let run = launch::threads(4).run(|world| {
            let device = Device::flex().autodiff();
            let brought: Vec<Dense> =
                (0..4).map(|rank| Dense::of(&Dense::fractions(&[9, 3], rank).tensor::<2>(&device, dtype))).collect();
            let leaf = brought[world.rank()].tensor::<2>(&device, dtype).require_grad();
            let sum = layout::reduce_from_group(leaf.clone(), &world)?;
            Dense::of(&sum).assert_near(&Dense::sum(brought), unit, "sum");
            let back = layout::copy_to_group(sum, &world)?;
            let grads = layout::backward(&(back * 0.3).sum(), &world)?;
            let expected = Dense { dims: vec![9, 3], values: vec![1.2; 27] };
            Dense::of(&leaf.grad(&grads).unwrap()).assert_near(&expected, 2.0 * unit, "gradient");
            Ok(())
        });
        run.unwrap();
    }
}
