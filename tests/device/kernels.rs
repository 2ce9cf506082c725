//! Sharded products and kernels on a GPU, or on what Vulkan offers in its place.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::functional::{Activation, Overlap, bias_activation};
use burn_parallel::tensor_parallel::layers::{
    ColumnParallelLinearConfig, RowParallelLinearConfig, vocab_parallel_cross_entropy,
};

use super::trials::{Trials, gpu};
use crate::common::dense::Dense;
use crate::common::products::compare;

pub fn add_to(trials: &mut Trials) {
    trials.add("products", products);
    trials.add("products_of_aligned_windows", products_of_aligned_windows);
    trials.add("products_of_nothing", products_of_nothing);
    trials.add("sixteen_bits", sixteen_bits);
    trials.add("bias_and_activation", bias_and_activation);
    trials.add("cross_entropy", cross_entropy);
    trials.add("cross_entropy_of_many_rows_and_large_scores", cross_entropy_of_many_rows_and_large_scores);
    trials.add("layers_train", layers_train);
}

fn on_ranks(size: usize, body: impl Fn(&Rank) -> Result<(), Error> + Sync) {
    launch::threads(size).run(|rank| body(&rank)).unwrap();
}

fn cuts() -> [Overlap; 4] {
    let cut = |chunks| Overlap::auto().with_chunks(chunks);
    [Overlap::auto(), Overlap::none(), cut(3).in_background(true), cut(2).in_background(false)]
}

fn products() {
    for size in [1, 2, 3] {
        on_ranks(size, |rank| {
            let device = gpu().autodiff();
            for overlap in cuts() {
                compare(rank, &device, DType::F32, [2, 7, 9, 11], overlap)?;
            }
            Ok(())
        });
    }
    on_ranks(8, |rank| {
        compare(rank, &gpu().autodiff(), DType::F32, [1, 13, 8, 8], Overlap::auto().with_chunks(2).in_background(true))
    });
}

/// Rows of 64 floats begin on every alignment that devices ask for: chunks are views, and written where they belong.
fn products_of_aligned_windows() {
    on_ranks(2, |rank| {
        let device = gpu().autodiff();
        for overlap in cuts() {
            compare(rank, &device, DType::F32, [2, 48, 128, 128], overlap)?;
        }
        Ok(())
    });
}

fn products_of_nothing() {
    on_ranks(3, |rank| {
        let device = gpu().autodiff();
        for overlap in cuts() {
            for dims in [[1, 3, 2, 3], [2, 1, 4, 1]] {
                compare(rank, &device, DType::F32, dims, overlap)?;
            }
        }
        Ok(())
    });
}

/// Where the device multiplies them.
fn sixteen_bits() {
    for dtype in [DType::F16, DType::BF16] {
        if !gpu().supports_dtype(dtype) {
            eprintln!("{dtype:?} is not a dtype of this device");
            continue;
        }
        on_ranks(2, |rank| compare(rank, &gpu().autodiff(), dtype, [2, 5, 6, 7], Overlap::auto()));
    }
}

const ACTIVATIONS: [Activation; 4] =
    [Activation::Identity, Activation::Relu, Activation::Gelu, Activation::GeluApproximate];

/// The kernels against burn's operations on the CPU in 64 bits, slopes against differences of those.
fn bias_and_activation() {
    let device = gpu().autodiff();
    for activation in ACTIVATIONS {
        for dims in [[1, 1, 1], [2, 3, 5], [3, 37, 130], [0, 2, 4]] {
            let mut x = Dense::fractions(&dims, 1);
            // Away from the kink of relu.
            x.values.iter_mut().for_each(|value| *value = *value * 3.0 + 0.011);
            let (bias, dy) = (Dense::fractions(&dims[2..], 2), Dense::fractions(&dims, 3));
            let (of_x, of_bias) = (
                x.tensor::<3>(&device, DType::F32).require_grad(),
                bias.tensor::<1>(&device, DType::F32).require_grad(),
            );
            let y = bias_activation(of_x.clone(), Some(of_bias.clone()), activation);
            let grads = (y.clone() * dy.tensor(&device, DType::F32)).sum().backward();

            let at = |shift: f64| {
                let [x, bias] = [
                    x.tensor::<3>(&Device::flex(), DType::F64),
                    bias.tensor::<1>(&Device::flex(), DType::F64).unsqueeze(),
                ];
                Dense::of(&bias_activation(x + bias + shift, None, activation))
            };
            const STEP: f64 = 1e-5;
            let (above, below) = (at(STEP), at(-STEP));
            let slopes = above.values.iter().zip(&below.values).map(|(above, below)| (above - below) / (2.0 * STEP));
            let dx = Dense { values: slopes.zip(&dy.values).map(|(slope, dy)| slope * dy).collect(), ..dy.clone() };
            let mut dbias = Dense::zeros(&dims[2..]);
            dx.values.iter().enumerate().for_each(|(index, dx)| dbias.values[index % dims[2]] += dx);

            let say = |what: &str| format!("{what} of {activation:?} {dims:?}");
            Dense::of(&y).assert_near(&at(0.0), 1e-5, &say("value"));
            Dense::of(&of_x.grad(&grads).unwrap()).assert_near(&dx, 1e-5, &say("dx"));
            Dense::of(&of_bias.grad(&grads).unwrap()).assert_near(&dbias, 1e-4, &say("dbias"));
        }
    }
}

/// Losses and gradients of the kernels against those of the layer on the CPU.
fn both_losses(size: usize, rows: usize, vocabulary: usize, scale: f64) {
    launch::threads(size)
        .run(|rank| {
            let mut whole = Dense::fractions(&[rows, vocabulary], 5);
            whole.values.iter_mut().for_each(|score| *score *= scale);
            let own = whole.part(1, size, rank.rank());
            let targets: Vec<i64> = (0..rows).map(|row| ((row * 7919 + 3) % vocabulary) as i64).collect();
            let on = |device: &Device, dtype: DType| {
                let z = own.tensor::<2>(device, dtype).require_grad();
                let targets = Tensor::<1, Int>::from_data(TensorData::new(targets.clone(), [rows]), device);
                let losses = vocab_parallel_cross_entropy(z.clone(), targets, vocabulary, &[0], &rank)?;
                let weights = Dense::fractions(&[rows], 8).tensor::<1>(device, losses.dtype());
                let grads = layout::backward(&(losses.clone() * weights).sum(), &rank)?;
                Ok::<_, Error>((Dense::of(&losses), Dense::of(&z.grad(&grads).unwrap())))
            };
            let (losses, dz) = on(&gpu().autodiff(), DType::F32)?;
            let (expected, of_dz) = on(&Device::flex().autodiff(), DType::F32)?;
            losses.assert_near(&expected, 1e-5, "losses");
            dz.assert_near(&of_dz, 1e-5, "dz");
            Ok(())
        })
        .unwrap();
}

fn cross_entropy() {
    for size in [1, 2, 3, 4] {
        for (rows, vocabulary) in [(1, size), (5, 11), (7, 1031)] {
            both_losses(size, rows, vocabulary, 4.0);
        }
    }
}

/// More rows than a dim of a grid has cubes, and scores whose exponentials no float holds.
fn cross_entropy_of_many_rows_and_large_scores() {
    both_losses(2, 70_001, 3, 500.0);
}

/// A column- and a row-parallel layer on the device, several steps, against the same on the CPU.
fn layers_train() {
    use burn::module::Module;
    use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
    for parallel in [false, true] {
        on_ranks(2, |rank| {
            let run = |device: &Device| {
                let column = ColumnParallelLinearConfig::new(6, 10).with_seed(Some(1)).with_sequence_parallel(parallel);
                let row = RowParallelLinearConfig::new(10, 6).with_seed(Some(2)).with_sequence_parallel(false);
                let (mut a, mut b) = (column.init(rank, device)?, row.init(rank, device)?);
                let mut optims: [ModuleOptimizer; 2] = [SgdConfig::new().init(), SgdConfig::new().init()];
                let mut losses = Vec::new();
                for step in 0..4 {
                    let x = Dense::fractions(&[2, 5, 6], step);
                    let own = if parallel { x.part(1, 2, rank.rank()) } else { x };
                    assert_eq!(own.dims[1], if parallel { part(5, 2, rank.rank()).len() } else { 5 });
                    let hidden = a.forward(own.tensor::<3>(device, DType::F32))?;
                    let y = b.forward(bias_activation(hidden, None, Activation::Gelu))?;
                    let loss = y.powi_scalar(2).mean();
                    losses.push(loss.clone().into_scalar::<f64>());
                    let grads = layout::backward(&loss, rank)?;
                    let mut grads = grads;
                    let of_a = GradientsParams::from_module(&mut grads, &a);
                    let of_b = GradientsParams::from_module(&mut grads, &b);
                    a = optims[0].step(0.5, a, of_a);
                    b = optims[1].step(0.5, b, of_b);
                }
                assert!(losses[3] < losses[0], "{losses:?}");
                let _ = (a.num_params(), b.num_params());
                Ok::<_, Error>(Dense { dims: vec![4], values: losses })
            };
            let (there, here) = (run(&gpu().autodiff())?, run(&Device::flex().autodiff())?);
            there.assert_near(&here, 1e-5, "losses");
            Ok(())
        });
    }
}
