//! A row-parallel product in chunks against the product and then its all-reduce, on two ranks of one thread.
//!
//! Both take turns within one run, in changing order; what counts is the median over rounds of the ratio of their
//! times, that of the slower rank. First over the transport between threads, whose collectives are the work of the
//! ranks' own cores. Then over the same behind a made-up network: a collective takes the time that its bytes would take
//! on a link of 1 GB/s, during which the cores are free, as they are with a GPU or a network card of its own.
//!
//! `cargo bench --bench sharded_matmul -- [ROUNDS]`

#[path = "../tests/common/forwarding.rs"]
#[allow(dead_code, reason = "what tests need of it")]
mod forwarding;

mod figures;

use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use burn_parallel::comm::Communicator;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::functional::{Overlap, row_parallel};
use figures::{Figures, median};
use forwarding::Forwarding;

/// Bytes a second of the made-up network.
const LINK: f64 = 1e9;

/// Rows, features of each rank, output features.
const SIZES: [[usize; 3]; 10] = [
    [16, 64, 64],
    [64, 256, 256],
    [256, 16, 1024],
    [256, 256, 1024],
    [1024, 16, 1024],
    [1024, 256, 1024],
    [1024, 1024, 1024],
    [4096, 16, 2048],
    [4096, 64, 2048],
    [4096, 512, 1024],
];

/// Takes as long as a collective that sends so many bytes would on the network.
fn travel(bytes: u64) {
    std::thread::sleep(Duration::from_secs_f64(bytes as f64 / LINK));
}

/// Median over rounds of: seconds of the plain way, seconds of each overlapped way, and the ratio of each to the plain
/// way.
fn compare(
    rank: &Rank,
    comm: &Communicator,
    [rows, k, n]: [usize; 3],
    ways: &[Overlap],
    rounds: usize,
) -> Result<(f64, Vec<f64>), Error> {
    let numbers = |dims: [usize; 2], salt: usize| {
        let values =
            (0..dims[0] * dims[1]).map(|i| ((i * 7919 + salt) % 1000) as f32 / 500.0 - 1.0).collect::<Vec<_>>();
        Tensor::<2>::from_data(TensorData::new(values, dims), &rank.device())
    };
    let (x, weight) = (numbers([rows, k], rank.rank()), numbers([k, n], 7 + rank.rank()));
    let plain = || comm.all_reduce(x.clone().matmul(weight.clone()), ReduceOp::Sum);
    let ways: Vec<Box<dyn Fn() -> Result<Tensor<2>, Error> + '_>> = std::iter::once(Box::new(plain) as Box<_>)
        .chain(ways.iter().map(|way| {
            let (x, weight) = (&x, &weight);
            Box::new(move || row_parallel(x.clone(), weight.clone(), comm, *way)) as Box<dyn Fn() -> _>
        }))
        .collect();
    // Turns of about 10 ms, and one round for the caches; all ranks by the watch of the slowest.
    ways.iter().try_for_each(|way| way().map(|_| ()))?;
    rank.barrier()?;
    let began = Instant::now();
    drop(plain()?);
    let once = rank.all_reduce(vec![began.elapsed().as_secs_f64()], ReduceOp::Max)?[0];
    let turns = (0.01 / once).ceil().clamp(1.0, 500.0) as usize;
    let mut times = vec![Vec::new(); ways.len()];
    for round in 0..rounds {
        let mut time = vec![0.0; ways.len()];
        for place in 0..ways.len() {
            let way = (place + round) % ways.len();
            rank.barrier()?;
            let began = Instant::now();
            for _ in 0..turns {
                drop(ways[way]()?);
            }
            time[way] = began.elapsed().as_secs_f64() / turns as f64;
        }
        let slowest = rank.all_reduce(time, ReduceOp::Max)?;
        times.iter_mut().zip(slowest).for_each(|(times, time)| times.push(time));
    }
    let ratio = |way: &Vec<f64>| median(way.iter().zip(&times[0]).map(|(time, plain)| time / plain));
    Ok((median(times[0].iter().copied()), times[1..].iter().map(ratio).collect()))
}

fn main() {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("sharded_matmul"));
    let rounds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(15);
    let explore = arguments.iter().any(|argument| argument == "explore");
    let cut = |chunks, background| Overlap::auto().with_chunks(chunks).in_background(background);
    let ways = match explore {
        false => vec![Overlap::auto()],
        true => std::iter::once(Overlap::auto())
            .chain([1, 2, 4, 8, 16].map(|chunks| cut(chunks, false)))
            .chain([1, 2, 4].map(|chunks| cut(chunks, true)))
            .collect(),
    };
    for network in [false, true] {
        println!("{}", if network { "over a network of 1 GB/s" } else { "between threads" });
        println!("rows x features x outputs: multiply then all-reduce; overlapped over that");
        let run = launch::threads(2).threads_per_rank(1).run(|rank| {
            let comm = match network {
                true => Forwarding::over(rank.split(0, rank.rank() as i64)?, travel),
                false => rank.split(0, rank.rank() as i64)?,
            };
            let mut found = Vec::new();
            for size in SIZES {
                let (plain, ratios) = compare(&rank, &comm, size, &ways, rounds)?;
                if rank.rank() == 0 {
                    let ratios: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
                    println!("{size:?}: {:.3} ms; {}", 1e3 * plain, ratios.join(" "));
                }
                found.push((size, plain, ratios));
            }
            Ok(found)
        });
        let over = if network { "1 GB/s" } else { "threads" };
        for (size, plain, ratios) in run.expect("a world of threads").swap_remove(0) {
            figures.note(format!("{over}, {size:?}: plain"), 1e3 * plain, "ms");
            figures.note(format!("{over}, {size:?}: overlapped over plain"), ratios[0], "ratio");
        }
    }
    figures.finish();
}
