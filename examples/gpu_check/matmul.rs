//! A multiplication split over ranks on one device, beside a plain one: the same numbers, and the times of both.
//!
//! Ranks that share a device do not compute faster together than one; their time beside the plain one tells what splitting
//! costs. Column-parallel: each rank multiplies by its columns, and the columns are gathered. Row-parallel: each multiplies
//! by its rows, and the products are summed.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_parallel::comm::{nccl, part};
use burn_parallel::prelude::*;

use crate::device::{Choice, nccl_for};
use crate::report::{Figures, Shortfall, figure};
use crate::section::Checks;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Split {
    Columns,
    Rows,
}

pub fn run(checks: &mut Checks) {
    let choice = checks.device;
    let sizes: &[[usize; 3]] = match (choice, checks.quick) {
        (Choice::Cuda, false) => &[[1024, 1024, 1024], [4096, 4096, 4096], [8192, 4096, 16384], [777, 1234, 999]],
        (Choice::Cuda, true) => &[[1024, 1024, 1024], [777, 1234, 999]],
        (_, false) => &[[256, 256, 256], [77, 123, 99]],
        (_, true) => &[[64, 64, 64], [7, 13, 9]],
    };
    for dtype in choice.dtypes().iter().copied().filter(|dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16))
    {
        for &size in sizes {
            for (split, ranks) in [(Split::Columns, 2), (Split::Rows, 2), (Split::Columns, 4), (Split::Rows, 4)] {
                let name = |engine: &str| format!("{dtype:?} {size:?} by {split:?}, {ranks} ranks, {engine}");
                checks.check(name("threads"), || {
                    choice.open(0)?;
                    let run = |rank: Rank| one_rank(&rank, &choice_device(choice, &rank), dtype, size, split);
                    verdict(launch::threads(ranks).run(run)?, dtype, size)
                });
                if choice == Choice::Cuda && dtype == DType::BF16 {
                    checks.check(name("NCCL"), || {
                        let gpus = nccl_for(choice, ranks)?;
                        choice.open(0)?;
                        let run = |rank: Rank| {
                            let gpu = rank.rank() % gpus;
                            one_rank(&nccl::join(&rank, gpu)?, &Device::cuda(gpu), dtype, size, split)
                        };
                        verdict(launch::threads(ranks).run(run)?, dtype, size)
                    });
                }
            }
        }
    }
}

fn choice_device(choice: Choice, rank: &Rank) -> Device {
    match choice {
        Choice::Cuda => Device::cuda(rank.rank() % choice.count()),
        // There is one.
        choice => choice.open(0).unwrap_or_else(|_| Device::flex()),
    }
}

/// What a rank found: the largest error relative to the largest value, and seconds of the plain and the split product.
struct Found {
    error: f64,
    plain: f64,
    split: f64,
}

fn one_rank(
    comm: &Communicator,
    device: &Device,
    dtype: DType,
    [m, k, n]: [usize; 3],
    split: Split,
) -> Result<Found, Error> {
    let options = (device, dtype);
    // Every rank has the same operands: those of rank 0.
    let random = |dims: [usize; 2]| {
        let mine = Tensor::<2>::random(dims, Distribution::Uniform(-1.0, 1.0), options);
        comm.broadcast(mine, 0)
    };
    let (x, w) = (random([m, k])?, random([k, n])?);
    let (rank, ranks) = (comm.rank(), comm.size());
    let (inner, columns) = (part(k, ranks, rank), part(n, ranks, rank));
    // Cut once, as a layer's weights are.
    let shard = match split {
        Split::Columns => w.clone().slice([0..k, columns]),
        Split::Rows => w.clone().slice([inner.clone(), 0..n]),
    };
    let mine = match split {
        Split::Columns => x.clone(),
        Split::Rows => x.clone().slice([0..m, inner]),
    };
    let together = || match split {
        // Gathered along the first dim: the product stands on its side.
        Split::Columns => comm.all_gather(mine.clone().matmul(shard.clone()).transpose()).map(Tensor::transpose),
        Split::Rows => comm.all_reduce(mine.clone().matmul(shard.clone()), ReduceOp::Sum),
    };
    let alone = || Ok(x.clone().matmul(w.clone()));
    let wide = |tensor: Tensor<2>| tensor.cast(DType::F32);
    let (found, expected) = (wide(together()?), wide(alone()?));
    let largest = expected.clone().abs().max().into_scalar::<f32>();
    let error = (found - expected).abs().max().into_scalar::<f32>() / largest.max(f32::MIN_POSITIVE);
    // The plain one is timed on one rank while the others wait: they share the device.
    let mut plain = 0.0;
    if rank == 0 {
        plain = seconds(device, alone)?;
    }
    comm.barrier()?;
    let split = seconds(device, together)?;
    Ok(Found { error: error.into(), plain, split })
}

/// The shortest time of one product, of several rounds of ten.
fn seconds(device: &Device, product: impl Fn() -> Result<Tensor<2>, Error>) -> Result<f64, Error> {
    const TIMES: usize = 10;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        device.sync().map_err(Error::user)?;
        let began = Instant::now();
        for _ in 0..TIMES {
            product()?;
        }
        device.sync().map_err(Error::user)?;
        best = best.min(began.elapsed().as_secs_f64() / TIMES as f64);
    }
    Ok(best)
}

fn verdict(found: Vec<Found>, dtype: DType, [m, k, n]: [usize; 3]) -> Result<Figures, Shortfall> {
    let limit = match dtype {
        DType::BF16 => 2e-2,
        DType::F16 => 4e-3,
        // Tensor cores may multiply f32 with fewer bits.
        _ => 2e-3,
    };
    let error = found.iter().map(|one| one.error).fold(0.0, f64::max);
    if error > limit || error.is_nan() {
        return Err(Shortfall::Failed(format!("off by {error:.1e} of the largest value; {limit:.0e} is allowed")));
    }
    let (plain, split) = (found[0].plain, found.iter().map(|one| one.split).fold(0.0, f64::max));
    let flops = 2.0 * (m * k * n) as f64;
    Ok(vec![
        figure("plain", plain * 1e6, "us"),
        figure("split", split * 1e6, "us"),
        figure("plain", flops / plain / 1e12, "TFLOP/s"),
        figure("split", flops / split / 1e12, "TFLOP/s"),
        figure("error", error, ""),
    ])
}
