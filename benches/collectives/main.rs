//! All-reduce and the other collectives over threads.
//!
//! First the all-reduce of two ranks beside the memory traffic it cannot do without, by turns (see `floor.rs`), then
//! every collective by itself, under criterion.
//!
//! `cargo bench --bench collectives -- [floor|CRITERION FILTER]`

#[path = "../figures/mod.rs"]
mod figures;
mod floor;

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use burn_parallel::comm::Communicator;
use burn_parallel::prelude::*;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};

const SIZES: [usize; 5] = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];

/// Times `iterations` of `work` on every rank and returns the slowest rank's time.
fn on_ranks(ranks: usize, iterations: u64, work: impl Fn(&Rank, u64) -> Duration + Sync) -> Duration {
    launch::threads(ranks)
        .run(|rank| Ok(work(&rank, iterations)))
        .expect("a world of threads")
        .into_iter()
        .max()
        .unwrap()
}

/// Times a collective that works on a buffer of its own in every iteration.
fn repeat(comm: &Communicator, iterations: u64, mut collective: impl FnMut()) -> Duration {
    collective();
    comm.barrier().unwrap();
    let began = Instant::now();
    for _ in 0..iterations {
        collective();
    }
    began.elapsed()
}

fn all_reduce(c: &mut Criterion) {
    let mut group = c.benchmark_group("all_reduce");
    for bytes in SIZES {
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_with_input(BenchmarkId::new("slices_4", bytes), &bytes, |b, bytes| {
            b.iter_custom(|iterations| {
                on_ranks(4, iterations, |rank, iterations| {
                    let mut buffer = vec![0f32; bytes / 4];
                    repeat(rank, iterations, || rank.all_reduce_in_place(&mut buffer, ReduceOp::Sum).unwrap())
                })
            });
        });
    }
    group.finish();
}

fn others(c: &mut Criterion) {
    for bytes in SIZES {
        let mut group = c.benchmark_group(format!("2_ranks_{bytes}"));
        group.throughput(Throughput::Bytes(bytes as u64));
        let elements = bytes / 4;
        group.bench_function("all_gather", |b| {
            b.iter_custom(|iterations| {
                on_ranks(2, iterations, |rank, iterations| {
                    let (half, mut whole) = (vec![0f32; elements / 2], vec![0f32; elements]);
                    repeat(rank, iterations, || rank.all_gather_into(&half, &mut whole).unwrap())
                })
            });
        });
        group.bench_function("reduce_scatter", |b| {
            b.iter_custom(|iterations| {
                on_ranks(2, iterations, |rank, iterations| {
                    let whole = Tensor::<1>::zeros([elements], &Device::flex());
                    repeat(rank, iterations, || drop(rank.reduce_scatter(whole.clone(), ReduceOp::Sum).unwrap()))
                })
            });
        });
        group.bench_function("broadcast", |b| {
            b.iter_custom(|iterations| {
                on_ranks(2, iterations, |rank, iterations| {
                    let mut buffer = vec![0f32; elements];
                    repeat(rank, iterations, || rank.broadcast_in_place(&mut buffer, 0).unwrap())
                })
            });
        });
        group.bench_function("ping_pong", |b| {
            b.iter_custom(|iterations| {
                on_ranks(2, iterations, |rank, iterations| {
                    let mut tensor = Some(Tensor::<1>::zeros([elements], &Device::flex()));
                    let other = 1 - rank.rank();
                    repeat(rank, iterations, || {
                        if rank.rank() == 0 {
                            rank.send(tensor.take().unwrap(), other, 0).unwrap();
                            tensor = Some(rank.recv(other, 0).unwrap());
                        } else {
                            let received: Tensor<1> = rank.recv(other, 0).unwrap();
                            rank.send(received, other, 0).unwrap();
                        }
                    })
                })
            });
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = all_reduce, others
}

fn main() {
    let filter = figures::arguments().into_iter().next();
    if filter.as_deref().is_none_or(|filter| filter == "floor") {
        floor::report(9);
    }
    if filter.as_deref() != Some("floor") {
        benches();
        Criterion::default().configure_from_args().final_summary();
    }
}
