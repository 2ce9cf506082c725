//! All-reduce and the other collectives over threads, beside the memory traffic they cannot do without.
//!
//! For every size, in one run: the floor (the bare reads, adds and writes of a two-rank all-reduce, on two threads that
//! meet at a spinning barrier before and after), then our collectives on buffers and on tensors.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use burn_parallel::comm::Communicator;
use burn_parallel::prelude::*;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

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

/// The loop at the heart of the floor, for the vectors of this machine as the library's own.
fn add_both(left: &mut [f32], right: &mut [f32]) {
    #[inline(always)]
    fn body(left: &mut [f32], right: &mut [f32]) {
        for (l, r) in left.iter_mut().zip(right) {
            let sum = *l + *r;
            (*l, *r) = (sum, sum);
        }
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(left: &mut [f32], right: &mut [f32]) {
            body(left, right);
        }
        #[target_feature(enable = "avx2")]
        fn avx2(left: &mut [f32], right: &mut [f32]) {
            body(left, right);
        }
        // SAFETY: the features have just been detected.
        unsafe {
            if is_x86_feature_detected!("avx512f") {
                return avx512(left, right);
            }
            if is_x86_feature_detected!("avx2") {
                return avx2(left, right);
            }
        }
    }
    body(left, right);
}

struct SpinBarrier {
    arrived: AtomicUsize,
    generation: AtomicUsize,
    size: usize,
}

impl SpinBarrier {
    fn wait(&self) {
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.size {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation.fetch_add(1, Ordering::Release);
        } else {
            let mut spins = 0;
            while self.generation.load(Ordering::Acquire) == generation {
                spin_loop();
                spins += 1;
                if spins > 20_000 {
                    std::thread::yield_now();
                }
            }
        }
    }
}

/// What a two-rank all-reduce must do at the least: each thread reads its half of both buffers, adds, writes both.
fn floor(bytes: usize, iterations: u64) -> Duration {
    struct Shared([*mut f32; 2]);
    unsafe impl Sync for Shared {}
    let elements = bytes / 4;
    let mut buffers = [vec![0f32; elements], vec![0f32; elements]];
    let shared = Shared(buffers.each_mut().map(|buffer| buffer.as_mut_ptr()));
    let barrier = SpinBarrier { arrived: AtomicUsize::new(0), generation: AtomicUsize::new(0), size: 2 };
    let run = |thread: usize| {
        let (shared, half) = (&shared, elements / 2);
        let mut began = Instant::now();
        for iteration in 0..=iterations {
            if iteration == 1 {
                began = Instant::now();
            }
            barrier.wait();
            // SAFETY: the halves are disjoint, and the barriers keep the threads apart.
            let [left, right] =
                shared.0.map(|place| unsafe { std::slice::from_raw_parts_mut(place.add(thread * half), half) });
            add_both(left, right);
            barrier.wait();
        }
        began.elapsed()
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        run(0).max(other.join().unwrap())
    })
}

fn all_reduce(c: &mut Criterion) {
    let mut group = c.benchmark_group("all_reduce");
    for bytes in SIZES {
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_with_input(BenchmarkId::new("floor_2", bytes), &bytes, |b, bytes| {
            b.iter_custom(|iterations| floor(*bytes, iterations));
        });
        for ranks in [2, 4] {
            group.bench_with_input(BenchmarkId::new(format!("slices_{ranks}"), bytes), &bytes, |b, bytes| {
                b.iter_custom(|iterations| {
                    on_ranks(ranks, iterations, |rank, iterations| {
                        let mut buffer = vec![0f32; bytes / 4];
                        repeat(rank, iterations, || rank.all_reduce_in_place(&mut buffer, ReduceOp::Sum).unwrap())
                    })
                });
            });
        }
        group.bench_with_input(BenchmarkId::new("tensors_2", bytes), &bytes, |b, bytes| {
            b.iter_custom(|iterations| {
                on_ranks(2, iterations, |rank, iterations| {
                    let mut tensor = Some(Tensor::<1>::zeros([bytes / 4], &Device::flex()));
                    repeat(rank, iterations, || {
                        tensor = tensor.take().map(|tensor| rank.all_reduce(tensor, ReduceOp::Sum).unwrap());
                    })
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
criterion_main!(benches);
