//! Collectives over MPI through our layer, beside the bare C calls, in the same run:
//! `mpirun -n 2 $(cargo bench --features mpi --bench mpi --no-run ...)`, see docs/clusters.md.
//!
//! Both are timed in turns, in many short rounds, so that whatever else the machine does meets both alike. The figure
//! of a round is the slowest rank's; that of a size is the median over the rounds. Numbers as arguments are the sizes
//! in bytes to measure in place of the usual ones, and names the operations.

mod figures;

use std::time::{Duration, Instant};

use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::mpi::Session;
use burn_parallel::comm::{Communicator, ReduceOp};
use figures::Figures;
use mpi_sys as sys;

const SIZES: [usize; 5] = [64 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20];
const NAMES: [&str; 6] = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv"];
const ROUNDS: usize = 15;

/// Something timed: ours and the bare call.
struct Pair<'a> {
    name: &'static str,
    ours: Box<dyn FnMut() + 'a>,
    bare: Box<dyn FnMut() + 'a>,
}

fn main() {
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let session = Session::start().expect("MPI");
    let comm = session.world(WorldConfig::from_env().expect("settings")).expect("a world");
    let (rank, size) = (comm.rank(), comm.size());
    if size < 2 {
        println!("SKIPPED: start it with mpirun -n 2");
        return;
    }
    if rank == 0 {
        println!("{size} ranks, float32; microseconds, median of {ROUNDS} rounds; ratio = ours / bare");
        println!("{:<16}{:>10}{:>12}{:>12}{:>8}", "", "bytes", "ours", "bare MPI", "ratio");
    }
    let (arguments, mut figures) = (figures::arguments(), Figures::of("mpi"));
    let asked: Vec<usize> = arguments.iter().filter_map(|argument| argument.parse().ok()).collect();
    let named: Vec<String> = arguments.into_iter().filter(|argument| NAMES.contains(&argument.as_str())).collect();
    for bytes in if asked.is_empty() { SIZES.to_vec() } else { asked } {
        for name in NAMES.into_iter().filter(|name| named.is_empty() || named.iter().any(|other| other == name)) {
            measure(&mut figures, &session, &comm, name, bytes);
        }
    }
    if rank == 0 {
        figures.finish();
    }
}

fn measure(figures: &mut Figures, session: &Session, comm: &Communicator, name: &'static str, bytes: usize) {
    let (n, rank) = (comm.size(), comm.rank());
    let elements = bytes / 4 / n * n;
    let share = elements / n;
    let (mut a, mut b) = (vec![1f32; elements], vec![1f32; elements]);
    let (part_a, part_b) = (vec![1f32; share], vec![1f32; share]);
    let mut part_c = vec![1f32; share];
    let float = || unsafe { sys::RSMPI_FLOAT };
    let world = || unsafe { sys::RSMPI_COMM_WORLD };
    let (count, part) = (elements as i32, share as i32);
    let other = if rank == 0 { 1 } else { 0 };
    let bare = |f: &mut dyn FnMut() -> i32| {
        session.exclusive(|| assert_eq!(f(), 0));
    };
    let mut pair = match name {
        "all_reduce" => Pair {
            name,
            ours: Box::new(|| comm.all_reduce_in_place(&mut a, ReduceOp::Sum).unwrap()),
            bare: Box::new(|| {
                let to = b.as_mut_ptr().cast();
                bare(&mut || unsafe { sys::MPI_Allreduce(in_place(), to, count, float(), sys::RSMPI_SUM, world()) })
            }),
        },
        "all_gather" => Pair {
            name,
            ours: Box::new(|| comm.all_gather_into(&part_a, &mut a).unwrap()),
            bare: Box::new(|| {
                let (from, to) = (part_b.as_ptr().cast(), b.as_mut_ptr().cast());
                bare(&mut || unsafe { sys::MPI_Allgather(from, part, float(), to, part, float(), world()) })
            }),
        },
        "reduce_scatter" => Pair {
            name,
            ours: Box::new(|| {
                drop(comm.reduce_scatter(std::mem::take(&mut a), ReduceOp::Sum).map(|_| a = vec![1f32; elements]))
            }),
            bare: Box::new(|| {
                // Ours takes the vector; the bare call is given the same to do.
                let mut fresh = vec![1f32; elements];
                let (from, to) = (fresh.as_mut_ptr().cast(), part_c.as_mut_ptr().cast());
                bare(&mut || unsafe { sys::MPI_Reduce_scatter_block(from, to, part, float(), sys::RSMPI_SUM, world()) })
            }),
        },
        "broadcast" => Pair {
            name,
            ours: Box::new(|| comm.broadcast_in_place(&mut a, 0).unwrap()),
            bare: Box::new(|| {
                let to = b.as_mut_ptr().cast();
                bare(&mut || unsafe { sys::MPI_Bcast(to, count, float(), 0, world()) })
            }),
        },
        "all_to_all" => Pair {
            name,
            ours: Box::new(|| a = comm.all_to_all(std::mem::take(&mut a)).unwrap()),
            bare: Box::new(|| {
                let mut fresh = vec![0f32; elements];
                let (from, to) = (b.as_ptr().cast(), fresh.as_mut_ptr().cast());
                bare(&mut || unsafe { sys::MPI_Alltoall(from, part, float(), to, part, float(), world()) });
                b = fresh;
            }),
        },
        _ => Pair {
            name: "send and receive",
            ours: Box::new(|| {
                // There and back.
                match rank {
                    0 => {
                        comm.send(std::mem::take(&mut a), 1, 0).unwrap();
                        a = comm.recv(1, 0).unwrap();
                    }
                    1 => {
                        let message: Vec<f32> = comm.recv(0, 0).unwrap();
                        comm.send(message, 0, 0).unwrap();
                    }
                    _ => {}
                }
            }),
            bare: Box::new(|| {
                if rank > 1 {
                    return;
                }
                // Ours makes room for what it receives; so does this.
                let mut fresh = vec![0f32; elements];
                let (from, to) = (b.as_ptr().cast(), fresh.as_mut_ptr().cast());
                bare(&mut || unsafe {
                    let ignore = sys::RSMPI_STATUS_IGNORE;
                    match rank {
                        0 => {
                            sys::MPI_Send(from, count, float(), other, 7, world())
                                + sys::MPI_Recv(to, count, float(), other, 7, world(), ignore)
                        }
                        _ => {
                            sys::MPI_Recv(to, count, float(), other, 7, world(), ignore)
                                + sys::MPI_Send(to.cast_const(), count, float(), other, 7, world())
                        }
                    }
                });
                b = fresh;
            }),
        },
    };
    let repeat = ((32 << 20) / bytes).clamp(2, 64);
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS + 2 {
        for (which, body) in [&mut pair.ours, &mut pair.bare].into_iter().enumerate() {
            comm.barrier().unwrap();
            let began = Instant::now();
            for _ in 0..repeat {
                body();
            }
            let slowest = comm.all_reduce(vec![began.elapsed().as_nanos() as u64], ReduceOp::Max).unwrap()[0];
            // The first rounds warm up.
            if round >= 2 {
                times[which].push(Duration::from_nanos(slowest / repeat as u64));
            }
        }
    }
    let [ours, bare] = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6
    });
    if rank == 0 {
        println!("{:<16}{bytes:>10}{ours:>12.1}{bare:>12.1}{:>8.2}", pair.name, ours / bare);
        figures.note(format!("{name}, {bytes} B"), ours, "us");
        figures.note(format!("{name}, {bytes} B, over bare MPI"), ours / bare, "ratio");
    }
}

/// `MPI_IN_PLACE`, a macro that the bindings do not have: 1 in Open MPI, -1 in MPICH.
fn in_place() -> *const std::ffi::c_void {
    let mut text = [0u8; 8192];
    let mut len = 0;
    // SAFETY: MPI_MAX_LIBRARY_VERSION_STRING is 8192 at most.
    unsafe { sys::MPI_Get_library_version(text.as_mut_ptr().cast(), &mut len) };
    let open = String::from_utf8_lossy(&text[..len as usize]).contains("Open MPI");
    std::ptr::without_provenance(if open { 1 } else { usize::MAX })
}
