//! Checkpoints against plain writes and reads of the same bytes by as many threads, and what a save in the background
//! costs the steps.
//!
//! Turns are taken within one run, round by round, who is first by turns, and what counts is the median over rounds of
//! their ratio. Files are in the page cache when they are read; writes end when they are on the disk, and in the place
//! of what was there before. Until then that stays, here as there: who truncates a file first writes into the pages of
//! it, and who needs new ones may have to wait for each, where the machine is a virtual one that has given free memory
//! back to its host.
//!
//! `cargo bench --bench checkpoint -- [DIRECTORY] [ROUNDS]`; the directory, for 2 GB of files, is that of the system
//! for temporary files if none is named.

mod figures;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::prelude::*;
use figures::Figures;

/// The side of a weight, of 16 MiB.
const SIDE: usize = 2048;

#[derive(Module, Debug)]
struct Net {
    up: Vec<Linear>,
    down: Vec<Linear>,
}

impl Net {
    fn new(layers: usize, device: &Device) -> Self {
        let some = || (0..layers / 2).map(|_| LinearConfig::new(SIDE, SIDE).with_bias(false).init(device)).collect();
        Self { up: some(), down: some() }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        let layers = self.up.iter().zip(&self.down);
        layers.fold(x, |x, (up, down)| down.forward(up.forward(x).tanh())).powi_scalar(2).mean()
    }
}

/// Half of the weights by columns, half by rows, as Megatron does.
fn split(ranks: usize) -> Strategy {
    Strategy::new().with_tp(ranks, Plan::new().shard("up.*.weight", 1).shard("down.*.weight", 0))
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Memory of this process that no file is behind, in bytes.
fn anonymous() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Knows the most of it, beyond what there was at its start.
struct Most {
    before: u64,
    most: Arc<AtomicU64>,
}

impl Most {
    fn start() -> Self {
        let most = Arc::new(AtomicU64::new(0));
        let watched = Arc::downgrade(&most);
        std::thread::spawn(move || {
            while let Some(most) = watched.upgrade() {
                most.fetch_max(anonymous(), Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { before: anonymous(), most }
    }

    fn megabytes(self) -> u64 {
        self.most.load(Relaxed).saturating_sub(self.before) / 1_000_000
    }
}

/// How often this thread has had to wait for a page: of memory that is new, or of a file that is mapped.
#[cfg(target_os = "linux")]
fn page_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: it is made of numbers, for which zero will do, and the call writes them.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_minflt as u64
}

/// Other systems do not count them by thread.
#[cfg(not(target_os = "linux"))]
fn page_faults() -> u64 {
    0
}

/// What is saved and loaded.
#[derive(Clone, Copy, PartialEq)]
enum Saved {
    Parameters,
    /// With the moments of burn's AdamW, which it gives out as copies.
    Moments,
    /// With those of the fused one.
    FusedMoments,
}

impl Saved {
    fn optimizer(self) -> ModuleOptimizer {
        if self == Self::FusedMoments { AdamWConfig::new().init_fused() } else { AdamWConfig::new().init() }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Moments => "with moments",
            Self::FusedMoments => "with moments of `init_fused`",
        }
    }
}

fn plain_write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = path.with_added_extension("new");
    let mut file = File::create(&new)?;
    for piece in bytes.chunks(16 << 20) {
        file.write_all(piece)?;
    }
    file.sync_all()?;
    fs::rename(new, path)
}

fn plain_read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn main() -> Result<(), Error> {
    let mut arguments = figures::arguments().into_iter();
    let mut figures = Figures::of("checkpoint");
    let base = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let rounds: usize = arguments.next().and_then(|rounds| rounds.parse().ok()).unwrap_or(5);
    let dir = base.join(format!("burn-parallel-bench-checkpoint-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(Error::user)?;
    let mut run = || {
        sizes(&mut figures, &dir, (2, 30), Saved::Parameters, rounds)?;
        sizes(&mut figures, &dir, (2, 10), Saved::Moments, rounds)?;
        sizes(&mut figures, &dir, (2, 10), Saved::FusedMoments, rounds)?;
        for ranks in [1, 2, 4, 8] {
            sizes(&mut figures, &dir, (ranks, 8), Saved::Parameters, rounds)?;
        }
        background(&mut figures, &dir, rounds)
    };
    let outcome = run();
    if outcome.is_ok() {
        figures.finish();
    }
    let _ = fs::remove_dir_all(&dir);
    outcome
}

/// Saves replicas and loads them split.
fn sizes(
    figures: &mut Figures,
    dir: &Path,
    (ranks, layers): (usize, usize),
    saved: Saved,
    rounds: usize,
) -> Result<(), Error> {
    let moments = saved != Saved::Parameters;
    let bytes = layers * SIDE * SIDE * 4 * if moments { 3 } else { 1 };
    let root = dir.join("checkpoints");
    let times = launch::threads(ranks).run(|world| {
        let device = world.device().autodiff();
        let mut model = Net::new(layers, &device).parallelize(&world, &Strategy::new())?;
        let mut optim = saved.optimizer();
        if moments {
            let x = Tensor::<2>::ones([2, SIDE], &device);
            let step = model.step(x, Net::loss)?;
            model = model.optimize(&mut optim, 1e-6, step)?;
        }
        let mut loaded = Net::new(layers, &device).parallelize(&world, &split(ranks))?;
        let mut checkpoints = Checkpointer::new(&world, &root, CheckpointConfig::new())?;
        let own = vec![1u8; bytes / ranks];
        let path = dir.join(format!("plain.{}", world.rank()));
        let timed = |run: &mut dyn FnMut() -> Result<(), Error>| {
            world.barrier()?;
            let (began, before) = (Instant::now(), page_faults());
            run()?;
            let faults = page_faults() - before;
            world.barrier()?;
            Ok::<_, Error>((began.elapsed().as_secs_f64(), faults))
        };
        let (mut times, mut read) = (Vec::new(), 0);
        world.barrier()?;
        let most = Most::start();
        let state = TrainState::new(&mut model);
        checkpoints.save(1, if moments { state.with_optimizer("adamw", &mut optim) } else { state })?;
        let most = most.megabytes();
        for round in 0..=rounds {
            let mut time = [(0.0, 0); 4];
            for turn in [round, round + 1] {
                if turn % 2 == 0 {
                    time[0] = timed(&mut || plain_write(&path, &own).map_err(Error::user))?;
                    continue;
                }
                time[1] = timed(&mut || {
                    let state = TrainState::new(&mut model);
                    let state = if moments { state.with_optimizer("adamw", &mut optim) } else { state };
                    checkpoints.save(1, state).map(drop)
                })?;
            }
            for turn in [round, round + 1] {
                if turn % 2 == 0 {
                    time[2] =
                        timed(&mut || plain_read(&path).map(|bytes| drop(black_box(bytes))).map_err(Error::user))?;
                    continue;
                }
                time[3] = timed(&mut || {
                    let mut fresh = saved.optimizer();
                    let state = TrainState::new(&mut loaded);
                    let state = if moments { state.with_optimizer("adamw", &mut fresh) } else { state };
                    read = checkpoints.restore(state)?.map_or(0, |restored| restored.bytes_read);
                    Ok(())
                })?;
            }
            // The first round warms up.
            if round > 0 {
                times.push(time);
            }
        }
        // Rank 0 takes the time; faults and bytes are those of all ranks.
        let faults = times.iter().map(|time: &[(f64, u64); 4]| time.map(|(_, faults)| faults)).collect::<Vec<_>>();
        let faults = world.all_reduce(faults.concat(), ReduceOp::Sum)?;
        Ok((times, faults, most, world.all_reduce(vec![read], ReduceOp::Sum)?[0]))
    })?;
    let (times, faults, most, read) = &times[0];
    let column = |which: usize| median(times.iter().map(|time| time[which].0).collect());
    let ratio = |which: usize| median(times.iter().map(|time| time[which].0 / time[which + 1].0).collect());
    let faults = |which: usize| median(faults.chunks(4).map(|faults| faults[which] as f64).collect());
    let what = saved.name();
    println!("{} MB, {what}, {ranks} ranks, median of {rounds} rounds", bytes / 1_000_000);
    for (name, which) in [("saving ", 0), ("loading", 2)] {
        let (plain, ours) = (column(which), column(which + 1));
        let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
        println!(
            "  {name}: {ours:.3} s ({:.0} MB/s), plain {plain:.3} s ({:.0} MB/s): {:.0} % of the plain speed",
            rate(ours),
            rate(plain),
            100.0 * ratio(which)
        );
        println!("           {:.0} page faults, plain {:.0}", faults(which + 1), faults(which));
        let name = format!("{} MB, {what}, {ranks} ranks, {}", bytes / 1_000_000, name.trim());
        figures.note(format!("{name}: time"), 1e3 * ours, "ms");
        figures.note(format!("{name}: plain over ours"), ratio(which), "ratio");
    }
    figures.note(format!("{} MB, {what}, {ranks} ranks, memory of a save", bytes / 1_000_000), *most as f64, "MB");
    println!("  a save takes {most} MB of memory on all ranks together, a load reads {} MB", read / 1_000_000);
    fs::remove_dir_all(root).map_err(Error::user)
}

/// Steps with a save in the background at the first of each so many, against steps without.
fn background(figures: &mut Figures, dir: &Path, rounds: usize) -> Result<(), Error> {
    const STEPS: usize = 25;
    let root = dir.join("background");
    let times = launch::threads(2).run(|world| {
        let device = world.device().autodiff();
        let mut model = Net::new(4, &device).parallelize(&world, &Strategy::new())?;
        let mut optim: ModuleOptimizer = AdamWConfig::new().init();
        let mut checkpoints = Checkpointer::new(&world, &root, CheckpointConfig::new().with_keep_last(1))?;
        let mut times = Vec::new();
        for round in 0..=2 * rounds {
            let saves = round % 2 == 1;
            world.barrier()?;
            let began = Instant::now();
            for number in 0..STEPS {
                if saves && number == 0 {
                    let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
                    checkpoints.save_async(round as u64, state)?;
                }
                let x = Tensor::<2>::ones([256, SIDE], &device);
                let step = model.step(x, Net::loss)?;
                model = model.optimize(&mut optim, 1e-6, step)?;
            }
            checkpoints.wait()?;
            world.barrier()?;
            times.push(began.elapsed().as_secs_f64());
        }
        Ok(times)
    })?;
    let times = &times[0];
    let without = |round: usize| (times[round - 1] + times[round + 1]) / 2.0;
    let saving = (1..times.len() - 1).step_by(2);
    let lost = median(saving.clone().map(|round| times[round] - without(round)).collect());
    let plain = median(saving.map(without).collect());
    let bytes = 3 * 4 * SIDE * SIDE * 4;
    println!(
        "{STEPS} steps of {:.0} ms: {:.0} ms longer with a save of {} MB in the background, {:.1} %",
        1e3 * plain / STEPS as f64,
        1e3 * lost,
        bytes / 1_000_000,
        100.0 * lost / plain
    );
    figures.note("steps with a save in the background over without", 1.0 + lost / plain, "ratio");
    Ok(())
}
