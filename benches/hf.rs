//! Loading and saving a model of 538 MB on two ranks that share it, threads and then processes, against plain reads and
//! writes of the same bytes by these: each reads its half of the file into fresh memory, and writes it into a file of
//! its own.
//!
//! Turns are taken within one run, round by round, and what counts is the median over rounds of their ratio. Files are
//! in the page cache when they are read; writes are of new files, and end when these are on the disk. What the ranks
//! hold is measured in a process of its own.
//!
//! `cargo bench --bench hf -- [DIRECTORY] [ROUNDS] [MODEL]`; the directory, for 1.6 GB of files, is that of the system
//! for temporary files if none is named. The model has the sizes of SmolLM2-135M; without one, random numbers are
//! taken.

mod figures;
#[allow(dead_code, unused_imports)]
#[path = "../examples/finetune/model/mod.rs"]
mod model;

use std::ffi::OsString;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use burn::module::Module;
use burn_parallel::hf::{self, Mapping, SaveConfig};
use burn_parallel::prelude::*;
use figures::Figures;
use model::{Autocast, LlamaConfig, Rope, Scaling};

/// The sizes of SmolLM2-135M.
const SIZES: LlamaConfig = LlamaConfig {
    vocab: 49_152,
    width: 576,
    inner: 1536,
    layers: 30,
    heads: 9,
    kv_heads: 3,
    head_size: 64,
    epsilon: 1e-5,
    tied: true,
    qkv_bias: false,
    output_bias: false,
    mlp_bias: false,
    qk_norm: false,
    rope: Rope { theta: 100_000.0, scaling: Scaling::None },
    positions: 8192,
    autocast: Autocast(None),
};
const RANKS: usize = 2;

fn plan() -> Plan {
    Plan::new()
        .shard("*.q_proj.weight", 1)
        .shard("*.k_proj.weight", 1)
        .shard("*.v_proj.weight", 1)
        .shard("*.o_proj.weight", 0)
        .shard("*.gate_proj.weight", 1)
        .shard("*.up_proj.weight", 1)
        .shard("*.down_proj.weight", 0)
        .shard("model.embed_tokens.weight", 0)
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Memory of this process in bytes, pages of files included.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The most of it while `run` runs, beyond what there was.
fn most_while<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let (most, done, before) = (AtomicU64::new(0), AtomicBool::new(false), resident());
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                most.fetch_max(resident(), Relaxed);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        });
        let result = run();
        done.store(true, Relaxed);
        result
    });
    (result, most.load(Relaxed).saturating_sub(before))
}

/// This rank's half of the file, into memory of its own.
fn plain_read(path: &Path, rank: usize) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let half = file.metadata()?.len() / RANKS as u64;
    file.seek(SeekFrom::Start(rank as u64 * half))?;
    let mut bytes = vec![0; half as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn plain_write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for piece in bytes.chunks(8 << 20) {
        file.write_all(piece)?;
    }
    file.sync_all()
}

fn main() -> Result<(), Error> {
    let arguments = figures::arguments();
    let asked = std::env::args().nth(1);
    match (asked.as_deref(), arguments.as_slice()) {
        (Some("--memory"), [model, to]) => return what_is_held(Path::new(model), Path::new(to)),
        (Some("--rank"), [dir, model, rounds]) => {
            let (dir, model) = (Path::new(dir), Path::new(model));
            let rounds = rounds.parse().map_err(Error::user)?;
            return launch::from_env()?.run(|rank| measure(rank, "processes", dir, model, rounds));
        }
        _ => {}
    }
    let base = arguments.first().map_or_else(std::env::temp_dir, PathBuf::from);
    let rounds: usize = arguments.get(1).and_then(|rounds| rounds.parse().ok()).unwrap_or(7);
    let dir = base.join(format!("burn-parallel-bench-hf-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(Error::user)?;
    let outcome = bench(&dir, rounds, arguments.get(2).map(PathBuf::from));
    let _ = fs::remove_dir_all(&dir);
    outcome
}

/// The most memory of a process whose ranks load the model, and save it.
fn what_is_held(model: &Path, to: &Path) -> Result<(), Error> {
    let phase = |rank: &Rank, name: &str, run: &mut dyn FnMut() -> Result<(), Error>| {
        rank.barrier()?;
        let (result, most) = most_while(|| run().and_then(|()| rank.barrier()));
        if rank.rank() == 0 {
            println!("{name} took the process {} MB more", most / 1_000_000);
        }
        result.and_then(|()| rank.barrier())
    };
    let run = |rank: Rank| {
        let mut lazy = Some(SIZES.init(&rank.device().autodiff()).tensor_parallel(&rank, plan())?);
        let mut loaded = None;
        phase(&rank, "loading", &mut || {
            let mut weights = hf::open(model)?.mapped(Mapping::llama())?;
            loaded = lazy.take().map(|lazy| lazy.load(&mut weights)).transpose()?;
            Ok(())
        })?;
        let loaded = loaded.ok_or_else(|| Error::user("nothing was loaded"))?;
        phase(&rank, "saving", &mut || hf::save(&loaded, &rank, to, &SaveConfig::new(Mapping::llama())).map(drop))
    };
    launch::threads(RANKS).run(run).map(drop)
}

fn bench(dir: &Path, rounds: usize, model: Option<PathBuf>) -> Result<(), Error> {
    let model = match model {
        Some(model) => model,
        None => {
            let model = dir.join("model");
            launch::threads(1).run(|rank| {
                let made = SIZES.init(&rank.device().autodiff()).materialize();
                let made = made.data_parallel(&rank, DataParallelConfig::new())?;
                hf::save(&made, &rank, &model, &SaveConfig::new(Mapping::llama())).map(drop)
            })?;
            model
        }
    };
    let held = std::process::Command::new(std::env::current_exe().map_err(Error::user)?)
        .arg("--memory")
        .args([&model, &dir.join("held")])
        .status();
    let _ = fs::remove_dir_all(dir.join("held"));
    if !held.map_err(Error::user)?.success() {
        return Err(Error::user("the process that measures memory failed"));
    }
    println!("threads");
    launch::threads(RANKS).run(|rank| measure(rank, "threads", dir, &model, rounds))?;
    println!("processes");
    let rank = ["--rank".into(), dir.into(), model.into_os_string(), rounds.to_string().into()];
    let arguments = rank.into_iter().chain(figures::flags().into_iter().map(OsString::from));
    launch::processes(RANKS).program(std::env::current_exe().map_err(Error::user)?, arguments).supervise()
}

/// Takes the turns on a rank, of which the first prints the figures.
fn measure(rank: Rank, over: &str, dir: &Path, model: &Path, rounds: usize) -> Result<(), Error> {
    let file = model.join("model.safetensors");
    let bytes = fs::metadata(&file).map_err(Error::user)?.len() as f64;
    let mut times = Vec::new();
    for round in 0..rounds + 1 {
        let mut time = [0.0; 4];
        let timed = |run: &mut dyn FnMut() -> Result<(), Error>| {
            rank.barrier()?;
            let began = Instant::now();
            run()?;
            rank.barrier()?;
            Ok::<_, Error>(began.elapsed().as_secs_f64())
        };
        let mut held = Vec::new();
        time[0] = timed(&mut || {
            held = plain_read(&file, rank.rank()).map_err(Error::user)?;
            black_box(&held);
            Ok(())
        })?;
        let own = dir.join(format!("plain.{}", rank.rank()));
        time[2] = timed(&mut || plain_write(&own, &held).map_err(Error::user))?;
        fs::remove_file(&own).map_err(Error::user)?;
        drop(held);
        let mut lazy = Some(SIZES.init(&rank.device().autodiff()).tensor_parallel(&rank, plan())?);
        let mut loaded = None;
        time[1] = timed(&mut || {
            let mut weights = hf::open(model)?.mapped(Mapping::llama())?;
            loaded = lazy.take().map(|lazy| lazy.load(&mut weights)).transpose()?;
            Ok(())
        })?;
        let loaded = loaded.ok_or_else(|| Error::user("nothing was loaded"))?;
        let (saved, config) = (dir.join("saved"), SaveConfig::new(Mapping::llama()));
        time[3] = timed(&mut || hf::save(&loaded, &rank, &saved, &config).map(drop))?;
        if rank.rank() == 0 {
            fs::remove_dir_all(&saved).map_err(Error::user)?;
        }
        // The first round warms up.
        if round > 0 {
            times.push(time);
        }
    }
    if rank.rank() > 0 {
        return Ok(());
    }
    let column = |which: usize| median(times.iter().map(|time| time[which]).collect());
    let ratio = |which: usize| median(times.iter().map(|time| time[which] / time[which + 1]).collect());
    println!("{} MB on {RANKS} ranks that share the model, median of {rounds} rounds", bytes as u64 / 1_000_000);
    let mut figures = Figures::of("hf");
    for (name, plain, speed) in [("loading", 0, ratio(0)), ("saving ", 2, ratio(2))] {
        let (plain, ours) = (column(plain), column(plain + 1));
        let rate = |seconds: f64| bytes / 1e6 / seconds;
        println!(
            "{name}: {ours:.3} s ({:.0} MB/s), plain {plain:.3} s ({:.0} MB/s): {:.0} % of the plain speed",
            rate(ours),
            rate(plain),
            100.0 * speed
        );
        figures.note(format!("{over}, {}: time", name.trim()), 1e3 * ours, "ms");
        figures.note(format!("{over}, {}: plain over ours", name.trim()), speed, "ratio");
    }
    figures.finish();
    Ok(())
}
