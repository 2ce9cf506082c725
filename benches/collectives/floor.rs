//! An all-reduce of two ranks against its floor.
//!
//! The floor is what nobody can do without: two threads meet at a spinning barrier, each reads its half of both
//! buffers, adds, writes both, and they meet again. It takes turns with the library's all-reduce within one run, on the
//! same two threads and the same buffers, and what counts is the median over rounds of their ratio: a machine that is
//! slower for a while is slower for both.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use burn_parallel::prelude::*;

use crate::SIZES;

use crate::figures::Figures;

/// What takes turns.
const MODES: [&str; 4] = ["floor", "all_reduce_in_place", "all_reduce of a tensor", "in place, a world of one"];

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

/// What a two-rank all-reduce must do at the least.
///
/// # Safety
/// Both threads call this with the same two places of `elements` floats, and touch them only here meanwhile.
unsafe fn bare(barrier: &SpinBarrier, thread: usize, places: [*mut f32; 2], elements: usize) {
    barrier.wait();
    let half = elements / 2;
    // SAFETY: the halves are disjoint, and the barriers keep the threads apart.
    let [left, right] = places.map(|place| unsafe { std::slice::from_raw_parts_mut(place.add(thread * half), half) });
    add_both(left, right);
    barrier.wait();
}

/// Seconds a call of each mode, by round.
fn rounds(number: usize, bytes: usize) -> Vec<[f64; MODES.len()]> {
    let barrier = SpinBarrier { arrived: AtomicUsize::new(0), generation: AtomicUsize::new(0), size: 2 };
    // About 20 ms a turn.
    let calls = (20e-3 / (0.3e-6 + bytes as f64 * 0.1e-9)).ceil() as usize;
    let elements = bytes / 4;
    let measured = launch::threads(2).run(|rank| {
        let alone = rank.split(rank.rank() as u64, 0)?;
        let mut buffer = vec![0f32; elements];
        let mut tensor = Some(Tensor::<1>::zeros([elements], &Device::flex()));
        let addresses = rank.all_gather(vec![buffer.as_mut_ptr().expose_provenance() as u64])?;
        let places = [0, 1].map(|rank| std::ptr::with_exposed_provenance_mut::<f32>(addresses[rank] as usize));
        let mut times = Vec::new();
        for round in 0..=number {
            let mut time = [0.0; MODES.len()];
            for (mode, time) in time.iter_mut().enumerate() {
                rank.barrier()?;
                let began = Instant::now();
                for _ in 0..calls {
                    match mode {
                        // SAFETY: both ranks are in here, with all buffers alive.
                        0 => unsafe { bare(&barrier, rank.rank(), places, elements) },
                        1 => rank.all_reduce_in_place(&mut buffer, ReduceOp::Sum)?,
                        2 => tensor = tensor.take().map(|own| rank.all_reduce(own, ReduceOp::Sum)).transpose()?,
                        _ => alone.all_reduce_in_place(&mut buffer, ReduceOp::Sum)?,
                    }
                }
                *time = began.elapsed().as_secs_f64() / calls as f64;
            }
            let slowest = rank.all_reduce(time.to_vec(), ReduceOp::Max)?;
            // The first round is for caches, pages and the clock of the processor.
            if round > 0 {
                times.push(std::array::from_fn(|mode| slowest[mode]));
            }
        }
        Ok(times)
    });
    measured.expect("a world of threads").swap_remove(0)
}

/// The least, the middle and the greatest.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

/// Prints, for every size and mode, the median time and the ratio to the floor with its spread over the rounds.
pub fn report(number: usize) {
    let mut figures = Figures::of("collectives");
    println!("f32, 2 ranks, {number} rounds by turns; ratio to the floor: median (least to greatest)");
    for bytes in SIZES {
        let times = rounds(number, bytes);
        for (mode, name) in MODES.iter().enumerate() {
            let [_, median, _] = spread(times.iter().map(|time| 1e6 * time[mode]));
            let [least, ratio, greatest] = spread(times.iter().map(|time| time[mode] / time[0]));
            println!("{bytes:>9} B  {name:<26}{median:>10.3} us  {ratio:.2} ({least:.2} to {greatest:.2})");
            figures.note(format!("{bytes} B, {name}"), median, "us");
            figures.note(format!("{bytes} B, {name} over the floor"), ratio, "ratio");
        }
    }
    figures.finish();
}
