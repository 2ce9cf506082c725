//! Checkpoints of any bytes: an index and files of tensors, restored by one rank or by two.
//!
//! `BURN_PARALLEL_FUZZ_SEEDS=DIR checkpoint` writes inputs to begin with: checkpoints of several meshes.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock};

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, DataPosition, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Parallel;

#[path = "../../tests/checkpoint/sealed.rs"]
mod sealed;
#[path = "../../tests/checkpoint/wrong_json.rs"]
mod wrong_json;

use sealed::{INDEX, put_index, sealed as seal};
use wrong_json::wrong;
use xxhash_rust::xxh3::xxh3_64;

const STEP: &str = "step-000000001";
/// Files of tensors that an input has at most.
const MOST_FILES: usize = 4;

fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

fn model() -> Linear {
    let ones = burn::nn::Initializer::Ones;
    LinearConfig::new(2, 3).with_initializer(ones).init(&Device::flex().autodiff())
}

fn wrapped(world: &Rank, axes: (usize, usize), sharding: Sharding) -> Result<Parallel<Linear>, Error> {
    let (dp, tp) = axes;
    let mut strategy = Strategy::new().with_dp(dp);
    strategy.data.sharding = sharding;
    if tp > 1 {
        strategy = strategy.with_tp(tp, Plan::new().shard_padded("weight", 1).shard_padded("bias", 0));
    }
    model().parallelize(world, &strategy)
}

fn values<M: Module>(model: &M) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().into_data().iter::<f32>());
        }
    }
    let mut values = Values(Vec::new());
    model.visit(&mut values);
    values.0
}

fn schedule() -> ModuleLrScheduler {
    CosineAnnealingLrSchedulerConfig::new(0.1, 10).init().expect("it is one")
}

/// Ranks that wait for a checkpoint to restore.
struct World {
    restore: Vec<Sender<()>>,
    restored: Receiver<()>,
}

impl World {
    /// The ranks are threads that stay: they are started once.
    fn start(ranks: usize, root: &'static Path) -> Self {
        let (restore, waiting): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel::<()>()).unzip();
        let waiting: Vec<_> = waiting.into_iter().map(|waiting| Mutex::new(Some(waiting))).collect();
        let (done, restored) = channel();
        std::thread::spawn(move || {
            let run = launch::threads(ranks).threads_per_rank(1).run(|world| {
                let waiting = waiting[world.rank()].lock().expect("nobody panics").take().expect("one for each");
                let pristine = wrapped(&world, (1, ranks), Sharding::None)?;
                let before = values(pristine.local());
                let mut checkpoints = Checkpointer::new(&world, root, CheckpointConfig::new())?;
                while waiting.recv().is_ok() {
                    let (mut model, mut position) = (pristine.clone(), DataPosition::default());
                    let (mut optim, mut schedule): (ModuleOptimizer, _) = (AdamWConfig::new().init(), schedule());
                    let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
                    let state = state.with_scheduler("lr", &mut schedule);
                    let restored = checkpoints.restore_step(1, state.with_value("position", &mut position));
                    if let Err(error) = restored {
                        let said = error.to_string();
                        assert!(matches!(error, Error::Checkpoint { .. }) && said.contains(STEP), "{said}");
                        assert!(!said.contains("panicked"), "{said}");
                        assert_eq!(values(model.local()), before);
                        assert!(optim.to_record().is_empty() && position == DataPosition::default());
                    }
                    done.send(()).expect("the fuzzer waits");
                }
                Ok(())
            });
            run.expect("there is no other error");
        });
        Self { restore, restored }
    }

    fn restore(&self) {
        self.restore.iter().for_each(|rank| rank.send(()).expect("it waits"));
        self.restore.iter().for_each(|_| self.restored.recv().expect("it goes on"));
    }
}

/// A directory of this process, with a checkpoint in it that is replaced by each input; and those who restore it.
struct Place {
    dir: PathBuf,
    worlds: Mutex<[World; 2]>,
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        let root = std::env::temp_dir().join(format!("burn-parallel-fuzz-{}", std::process::id()));
        let root: &'static Path = Box::leak(root.into_boxed_path());
        let dir = root.join(STEP);
        fs::create_dir_all(&dir).expect("there is a place for files");
        Place { dir, worlds: Mutex::new([1, 2].map(|ranks| World::start(ranks, root))) }
    })
}

/// A panic of this crate ends the fuzzer. burn refuses some records by panics, which this crate catches.
fn begin() {
    std::panic::set_hook(Box::new(|panic| {
        let of_burn = panic.location().is_some_and(|place| place.file().contains("/registry/src/"));
        if !of_burn {
            eprintln!("{panic}");
            std::process::abort();
        }
    }));
    if let Some(seeds) = std::env::var_os("BURN_PARALLEL_FUZZ_SEEDS") {
        write_seeds(Path::new(&seeds));
        std::process::exit(0);
    }
}

/// An input: how long the index is (two bytes), how it is taken (one byte), the index, the files; each file but the
/// last with its length (two bytes) before it.
fn parse(bytes: &[u8]) -> Option<(u8, &[u8], Vec<(String, &[u8])>)> {
    let [low, high, how, rest @ ..] = bytes else { return None };
    let split = |rest: &[u8], length: [u8; 2]| usize::from(u16::from_le_bytes(length)).min(rest.len());
    let (index, mut rest) = rest.split_at(split(rest, [*low, *high]));
    let mut files = Vec::new();
    for rank in 0..usize::from(how >> 1) % MOST_FILES {
        let Some((length, behind)) = rest.split_first_chunk() else { break };
        let (file, behind) = behind.split_at(split(behind, *length));
        files.push((file_name(rank), file));
        rest = behind;
    }
    files.push((file_name(files.len()), rest));
    Some((*how, index, files))
}

/// What [`parse`] takes apart.
fn put_together<F: AsRef<[u8]>>(how: u8, index: &[u8], files: &[F]) -> Vec<u8> {
    let mut input = (index.len() as u16).to_le_bytes().to_vec();
    input.push(how);
    input.extend(index);
    for (number, file) in files.iter().map(AsRef::as_ref).enumerate() {
        if number + 1 < files.len() {
            input.extend((file.len() as u16).to_le_bytes());
        }
        input.extend(file);
    }
    input
}

/// An input with one thing wrong in its index or in the header of a file, chosen by any numbers.
fn damaged(input: &[u8], seed: u64) -> Option<Vec<u8>> {
    let (how, index, files) = parse(input)?;
    let (place, what) = (usize::from((seed >> 16) as u16), (seed >> 32) as usize);
    // Right checksums make an index anew, without keys that it has twice: as often it stays as it is.
    let how = how & !1 | (seed >> 62 & 1) as u8;
    let (mut index, mut files): (_, Vec<Vec<u8>>) =
        (index.to_vec(), files.into_iter().map(|(_, file)| file.to_vec()).collect());
    // The index as often as all files.
    let choices = 2 * files.len();
    match files.get_mut(usize::from(seed as u16) % choices) {
        None => index = wrong(&index, place, what)?,
        Some(file) => {
            let (length, rest) = file.split_first_chunk::<8>()?;
            let (header, data) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
            let header = wrong(header, place, what)?;
            *file = [&(header.len() as u64).to_le_bytes()[..], &header, data].concat();
        }
    }
    Some(put_together(how, &index, &files))
}

// JSON is refused in as many places as there are values in it, which bytes that change by chance are slow to find.
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let seed = xxh3_64(&seed.to_le_bytes());
    let input = if seed >> 63 == 1 { damaged(&data[..size], seed) } else { None };
    match input.filter(|input| input.len() <= max_size) {
        Some(input) => {
            data[..input.len()].copy_from_slice(&input);
            input.len()
        }
        None => libfuzzer_sys::fuzzer_mutate(data, size, max_size),
    }
});

libfuzzer_sys::fuzz_target!(init: begin(), |bytes: &[u8]| {
    let Some((how, index, files)) = parse(bytes) else { return };
    let place = place();
    // Without right checksums no input would get far.
    let right = if how & 1 == 1 { seal(index, &files) } else { None };
    put_index(&place.dir, right.as_deref().unwrap_or(index));
    for rank in 0..MOST_FILES {
        let path = place.dir.join(file_name(rank));
        match files.get(rank) {
            Some((_, bytes)) => fs::write(path, bytes).expect("it is written"),
            None => drop(fs::remove_file(path)),
        }
    }
    let worlds = place.worlds.lock().expect("one input at a time");
    worlds[usize::from(how >> 3 & 1)].restore();
});

/// Checkpoints of a step of training under several meshes, as inputs, each for one rank and for two.
fn write_seeds(seeds: &Path) {
    let meshes = [
        ("whole", (1, 1), Sharding::None),
        ("split", (1, 2), Sharding::None),
        ("thirds", (1, 3), Sharding::None),
        ("rows", (2, 1), Sharding::Optimizer),
        ("gathered", (2, 1), Sharding::Parameters),
        ("both", (2, 2), Sharding::Gradients),
    ];
    for (name, (dp, tp), sharding) in meshes {
        let root = seeds.join(format!(".{name}"));
        let run = launch::threads(dp * tp).run(|world| {
            let (mut model, mut position) = (wrapped(&world, (dp, tp), sharding)?, DataPosition::default());
            let (mut optim, mut schedule): (ModuleOptimizer, _) = (AdamWConfig::new().init(), schedule());
            let x = Tensor::<2>::ones([2, 2], &Device::flex().autodiff());
            let gave = model.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?;
            model = model.optimize(&mut optim, 0.01, gave)?;
            let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
            let state = state.with_scheduler("lr", &mut schedule);
            let config = CheckpointConfig::new().with_strategy(name);
            Checkpointer::new(&world, &root, config)?.save(1, state.with_value("position", &mut position))
        });
        run.expect("the model trains");
        let read = |name: &str| fs::read(root.join(STEP).join(name));
        let index = read(INDEX).expect("it was written");
        let files: Vec<Vec<u8>> = (0..MOST_FILES).map_while(|rank| read(&file_name(rank)).ok()).collect();
        for (reader, bit) in [("one", 0), ("two", 1 << 3)] {
            let how = 1 | ((files.len() - 1) as u8) << 1 | bit;
            let input = put_together(how, &index, &files);
            fs::write(seeds.join(format!("{name}-{reader}")), input).expect("it is written");
        }
        fs::remove_dir_all(root).expect("it is ours");
    }
}
