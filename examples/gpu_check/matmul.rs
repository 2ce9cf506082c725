//! The multiplications by a weight that is split over ranks on one device: values and gradients beside a product that
//! is not split, and times beside the product and its collective one after the other.
//!
//! Ranks that share a device do not compute faster together than one. What tells is the overlapped product beside the
//! same work without overlap: `overlapped / apart` is below 1 where a collective is hidden.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_parallel::comm::{nccl, part};
use burn_parallel::layout;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::functional::{
    Overlap, all_gather_matmul, column_parallel, matmul_reduce_scatter, row_parallel,
};

use crate::device::{Choice, nccl_for};
use crate::report::{Figures, Shortfall, figure};
use crate::section::Checks;

type Product = fn(Tensor<2>, Tensor<2>, &Communicator) -> Result<Tensor<2>, Error>;

/// A split product, and the dims along which its factors and its value are split; `None` where every rank has all of
/// it.
struct Form {
    name: &'static str,
    overlapped: Product,
    apart: Product,
    x: Option<usize>,
    weight: usize,
    y: Option<usize>,
}

const FORMS: [Form; 4] = [
    Form {
        name: "column_parallel",
        overlapped: |x, weight, comm| column_parallel(x, weight, comm, Overlap::auto()),
        apart: |x, weight, comm| Ok(layout::copy_to_group(x, comm)?.matmul(weight)),
        x: None,
        weight: 1,
        y: Some(1),
    },
    Form {
        name: "row_parallel",
        overlapped: |x, weight, comm| row_parallel(x, weight, comm, Overlap::auto()),
        apart: |x, weight, comm| layout::reduce_from_group(x.matmul(weight), comm),
        x: Some(1),
        weight: 0,
        y: None,
    },
    Form {
        name: "all_gather_matmul",
        overlapped: |x, weight, comm| all_gather_matmul(x, weight, comm, Overlap::auto()),
        apart: |x, weight, comm| Ok(layout::gather_and_copy_to_group(x, 0, comm)?.matmul(weight)),
        x: Some(0),
        weight: 1,
        y: Some(1),
    },
    Form {
        name: "matmul_reduce_scatter",
        overlapped: |x, weight, comm| matmul_reduce_scatter(x, weight, comm, Overlap::auto()),
        apart: |x, weight, comm| layout::reduce_scatter_to_group(x.matmul(weight), 0, comm),
        x: Some(1),
        weight: 0,
        y: Some(0),
    },
];

pub fn run(checks: &mut Checks) {
    let choice = checks.device;
    let sizes: &[[usize; 3]] = match (choice, checks.quick) {
        (Choice::Cuda, false) => &[
            [512, 512, 512],
            [1024, 1024, 1024],
            [4096, 1024, 4096],
            [4096, 4096, 4096],
            [8192, 4096, 8192],
            [777, 1234, 999],
        ],
        (Choice::Cuda, true) => &[[1024, 1024, 1024], [777, 1234, 999]],
        (_, false) => &[[256, 256, 256], [77, 123, 99]],
        (_, true) => &[[64, 64, 64], [7, 13, 9]],
    };
    let floats = |dtype: &DType| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    for dtype in choice.dtypes().iter().copied().filter(floats) {
        for (&size, ranks) in sizes.iter().flat_map(|size| [(size, 2), (size, 4)]) {
            together(checks, "threads", dtype, size, ranks, || {
                choice.open(0)?;
                let device = |rank: &Rank| match choice {
                    Choice::Cuda => Device::cuda(rank.rank() % choice.count()),
                    // There is one.
                    choice => choice.open(0).unwrap_or_else(|_| Device::flex()),
                };
                Ok(launch::threads(ranks).run(|rank| one_rank(&rank, &device(&rank), dtype, size)))
            });
            if choice == Choice::Cuda {
                together(checks, "NCCL", dtype, size, ranks, || {
                    let gpus = nccl_for(choice, ranks)?;
                    choice.open(0)?;
                    Ok(launch::threads(ranks).run(|rank| {
                        let gpu = rank.rank() % gpus;
                        one_rank(&nccl::join(&rank, gpu)?, &Device::cuda(gpu), dtype, size)
                    }))
                });
            }
        }
    }
}

/// By rank, what it found of each form.
type World = Result<Vec<Vec<Found>>, Error>;

/// A row for each form, of one world that computes them all.
fn together(
    checks: &mut Checks,
    engine: &str,
    dtype: DType,
    size: [usize; 3],
    ranks: usize,
    world: impl Fn() -> Result<World, Shortfall>,
) {
    let mut ran = None;
    for (number, form) in FORMS.iter().enumerate() {
        checks.check(format!("{} {dtype:?} {size:?}, {ranks} ranks, {engine}", form.name), || {
            let found = match &ran {
                Some(found) => found,
                None => ran.insert(world()?),
            };
            match found {
                Ok(ranks) => verdict(&ranks.iter().map(|forms| forms[number]).collect::<Vec<_>>(), dtype, size),
                Err(error) => Err(error.clone().into()),
            }
        });
    }
}

/// Seconds of a product.
#[derive(Debug, Clone, Copy)]
struct Times {
    forward: f64,
    /// Forward and backward.
    both: f64,
}

/// What a rank found of a form: the largest errors of the value and of the gradients, relative to the largest values,
/// and times.
#[derive(Debug, Clone, Copy)]
struct Found {
    errors: [f64; 3],
    plain: f64,
    apart: Times,
    overlapped: Times,
}

fn one_rank(comm: &Communicator, device: &Device, dtype: DType, [m, k, n]: [usize; 3]) -> Result<Vec<Found>, Error> {
    // Every rank has the same operands: those of rank 0.
    let random = |dims: [usize; 2]| {
        comm.broadcast(Tensor::<2>::random(dims, Distribution::Uniform(-1.0, 1.0), (device, dtype)), 0)
    };
    let (x, weight, dy) = (random([m, k])?, random([k, n])?, random([m, n])?);
    let wide = |tensor: &Tensor<2>| tensor.clone().cast(DType::F32);
    let y = wide(&x).matmul(wide(&weight));
    let dx = wide(&dy).matmul(wide(&weight).transpose());
    let dweight = wide(&x).transpose().matmul(wide(&dy));
    // On one rank while the others wait: they may share the device.
    let mut plain = 0.0;
    if comm.rank() == 0 {
        let product = || {
            let _ = x.clone().matmul(weight.clone());
            Ok(())
        };
        [plain] = seconds(device, [&product])?;
    }
    let measure = |form: &Form| {
        comm.barrier()?;
        let mine = |tensor: &Tensor<2>, dim: Option<usize>| match dim {
            None => tensor.clone(),
            // Cut once, as a layer's weights are.
            Some(dim) => {
                let own = part(tensor.dims()[dim], comm.size(), comm.rank());
                tensor.clone().slice_dim(dim, own)
            }
        };
        let (own_x, own_weight, own_dy) = (mine(&x, form.x), mine(&weight, Some(form.weight)), mine(&dy, form.y));
        let forward = |product: Product| product(own_x.clone(), own_weight.clone(), comm);
        let backward = |product: Product| {
            let leaf = |tensor: &Tensor<2>| tensor.clone().autodiff().require_grad();
            let (x, weight) = (leaf(&own_x), leaf(&own_weight));
            let loss = (product(x.clone(), weight.clone(), comm)? * own_dy.clone().autodiff()).sum();
            let grads = layout::backward(&loss, comm)?;
            let missing = || Error::user("a factor has no gradient");
            Ok::<_, Error>((x.grad(&grads).ok_or_else(missing)?, weight.grad(&grads).ok_or_else(missing)?))
        };
        let (found_dx, found_dweight) = backward(form.overlapped)?;
        let errors = [
            error_of(forward(form.overlapped)?, mine(&y, form.y), &y),
            error_of(found_dx, mine(&dx, form.x), &dx),
            error_of(found_dweight, mine(&dweight, Some(form.weight)), &dweight),
        ];
        let [apart_forward, overlapped_forward, apart_both, overlapped_both] = seconds(
            device,
            [
                &|| forward(form.apart).map(drop),
                &|| forward(form.overlapped).map(drop),
                &|| backward(form.apart).map(drop),
                &|| backward(form.overlapped).map(drop),
            ],
        )?;
        let times = |forward, both| Times { forward, both };
        let (apart, overlapped) = (times(apart_forward, apart_both), times(overlapped_forward, overlapped_both));
        Ok(Found { errors, plain, apart, overlapped })
    };
    FORMS.iter().map(measure).collect()
}

/// The largest difference, relative to the largest value of the whole.
fn error_of(found: Tensor<2>, expected: Tensor<2>, whole: &Tensor<2>) -> f64 {
    if found.dims() != expected.dims() {
        return f64::INFINITY;
    }
    if found.dims().contains(&0) {
        return 0.0;
    }
    let largest = whole.clone().abs().max().into_scalar::<f32>().max(f32::MIN_POSITIVE);
    let difference = (found.cast(DType::F32) - expected).abs().max().into_scalar::<f32>();
    f64::from(difference) / f64::from(largest)
}

/// The shortest time of each, of several rounds in turns.
fn seconds<const N: usize>(device: &Device, products: [&dyn Fn() -> Result<(), Error>; N]) -> Result<[f64; N], Error> {
    const ROUNDS: usize = 4;
    const TIMES: usize = 8;
    let mut best = [f64::INFINITY; N];
    for _ in 0..ROUNDS {
        for (best, product) in best.iter_mut().zip(products) {
            device.sync().map_err(Error::user)?;
            let began = Instant::now();
            (0..TIMES).try_for_each(|_| product())?;
            device.sync().map_err(Error::user)?;
            *best = best.min(began.elapsed().as_secs_f64() / TIMES as f64);
        }
    }
    Ok(best)
}

fn verdict(found: &[Found], dtype: DType, [m, k, n]: [usize; 3]) -> Result<Figures, Shortfall> {
    let limit = match dtype {
        DType::BF16 => 2e-2,
        DType::F16 => 4e-3,
        // Tensor cores may multiply f32 with fewer bits.
        _ => 2e-3,
    };
    // Not `f64::max`, which passes a NaN by.
    let larger = |a: f64, b: f64| if a.is_nan() || a >= b { a } else { b };
    let worst = |which: usize| found.iter().map(|one| one.errors[which]).fold(0.0, larger);
    let errors = [worst(0), worst(1), worst(2)];
    for (error, what) in errors.into_iter().zip(["value", "gradient of x", "gradient of the weight"]) {
        if error > limit || error.is_nan() {
            let problem = format!("the {what} is off by {error:.1e} of the largest; {limit:.0e} is allowed");
            return Err(Shortfall::Failed(problem));
        }
    }
    let slowest = |time: fn(&Found) -> f64| found.iter().map(time).fold(0.0, f64::max);
    let (apart, overlapped) = (slowest(|one| one.apart.forward), slowest(|one| one.overlapped.forward));
    let (apart_both, overlapped_both) = (slowest(|one| one.apart.both), slowest(|one| one.overlapped.both));
    let flops = 2.0 * (m * k * n) as f64;
    Ok(vec![
        figure("apart", apart * 1e6, "us"),
        figure("overlapped", overlapped * 1e6, "us"),
        figure("overlapped / apart", overlapped / apart, ""),
        figure("with backward, apart", apart_both * 1e6, "us"),
        figure("overlapped", overlapped_both * 1e6, "us"),
        figure("overlapped / apart", overlapped_both / apart_both, ""),
        figure("plain", flops / found[0].plain / 1e12, "TFLOP/s"),
        figure("apart", flops / apart / 1e12, "TFLOP/s"),
        figure("overlapped", flops / overlapped / 1e12, "TFLOP/s"),
        figure("with backward, overlapped", 3.0 * flops / overlapped_both / 1e12, "TFLOP/s"),
        figure("error", errors.into_iter().fold(0.0, larger), ""),
    ])
}
