//! A process that is ended in the middle of a save, at every point: the directory before is untouched, what is half
//! written is no directory, and the next save goes through.

use std::fs;
use std::path::Path;
use std::process::Command;

use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;

use super::config::SaveConfig;
use super::save;
use crate::Error;
use crate::hf::mapping::Mapping;
use crate::hf::weights::open;
use crate::launch::{self, Rank};
use crate::params::SliceSource;
use crate::plan::Plan;
use crate::tensor_file::fault::NO_EXCHANGE;
use crate::tensor_file::killed::{self as process, Dir, killed, two_ranks};
use crate::tensor_parallel::TensorParallel;

/// Where a rank in a process of its own saves, and the value of all elements.
const DIR: &str = "BURN_PARALLEL_TEST_HF";
const VALUE: &str = "BURN_PARALLEL_TEST_HF_VALUE";

/// The points of a save, and whether the new directory is there at each.
const POINTS: [(&str, bool); 7] = [
    ("planned", false),
    ("draft made", false),
    ("half written", false),
    ("tensors written", false),
    ("files written", false),
    ("names exchanged", true),
    ("committed", true),
];

/// Two ranks write halves of a matrix, of which one sends to the other, in several files and many rounds.
fn save_model(rank: &Rank, dir: &Path, value: f64) -> Result<(), Error> {
    let constant = burn::nn::Initializer::Constant { value };
    let model: Linear = LinearConfig::new(6, 8).with_initializer(constant).init(&Device::flex().autodiff());
    let model = model.tensor_parallel(rank, Plan::new().shard("weight", 1).shard("bias", 0))?;
    let config = SaveConfig::new(Mapping::identity()).with_overwrite(true).with_piece_bytes(40).with_shard_bytes(100);
    save(&model, rank, dir, &config).map(drop)
}

/// Run by the tests in a process of its own: a rank of two, or both.
#[test]
#[ignore = "a helper of the other tests"]
fn some_ranks() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let value = std::env::var(VALUE).unwrap().parse().unwrap();
    let run = |rank: Rank| save_model(&rank, &Path::new(&dir).join("out"), value);
    match std::env::var_os("RANK") {
        Some(_) => launch::from_env().unwrap().run(run).unwrap(),
        None => drop(launch::threads(2).run(run).unwrap()),
    }
}

fn helper(dir: &Dir, value: u8, kill: Option<&str>) -> Command {
    let mut command = process::helper("hf::save::killed::some_ranks", kill);
    command.env(DIR, &dir.0).env(VALUE, value.to_string());
    command
}

/// Demands a whole directory whose weights are all this value.
#[track_caller]
fn holds(dir: &Path, value: u8, at: &str) {
    let mut weights = open(dir).unwrap_or_else(|error| panic!("killed at `{at}`: {error}"));
    let weight = weights.read("weight", &[0..6, 0..8]).unwrap().try_to_vec::<f32>().unwrap();
    assert!(weight.iter().all(|x| *x == f32::from(value)), "killed at `{at}`: not all of {weight:?} are {value}");
    assert_eq!(weights.names().collect::<Vec<_>>(), ["bias", "weight"]);
}

/// What is left of a killed save is none to be read, and the next save leaves nothing of it.
fn goes_on(dir: &Dir, at: &str) {
    let half = dir.0.join(".out.unfinished");
    if half.exists() {
        let said = open(&half).unwrap_err().to_string();
        assert!(said.contains("a save that was ended has left"), "{said}");
    }
    launch::threads(2).run(|rank| save_model(&rank, &dir.0.join("out"), 3.0)).unwrap();
    holds(&dir.0.join("out"), 3, at);
    assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1, "killed at `{at}`");
}

#[test]
fn all_ranks_are_killed_at_every_point() {
    for (point, there) in POINTS {
        let dir = Dir::new();
        let out = dir.0.join("out");
        // Where nothing was before, nothing is there.
        let first = killed(helper(&dir, 1, Some(point)).spawn().unwrap());
        assert_eq!(first, point != "names exchanged", "{point}");
        assert_eq!(out.exists(), there, "{point}");
        assert!(helper(&dir, 1, None).status().unwrap().success());
        holds(&out, 1, point);
        assert!(killed(helper(&dir, 2, Some(point)).spawn().unwrap()), "{point}");
        holds(&out, if there { 2 } else { 1 }, point);
        goes_on(&dir, point);
    }
}

/// A system that has no way to exchange two names.
#[test]
fn it_is_known_where_the_old_directory_is() {
    for point in ["old renamed", "new renamed"] {
        let dir = Dir::new();
        let out = dir.0.join("out");
        assert!(helper(&dir, 1, None).status().unwrap().success());
        assert!(killed(helper(&dir, 2, Some(point)).env(NO_EXCHANGE, "1").spawn().unwrap()), "{point}");
        if point == "old renamed" {
            let said = open(&out).unwrap_err().to_string();
            assert!(said.contains("what was there is") && said.contains(".out.replaced"), "{said}");
            holds(&dir.0.join(".out.replaced"), 1, point);
        } else {
            holds(&out, 2, point);
        }
        goes_on(&dir, point);
    }
}

/// The other rank ends with an error.
#[test]
fn one_rank_is_killed() {
    for (rank, point) in [(1, "draft made"), (0, "half written"), (1, "half written"), (0, "files written")] {
        let dir = Dir::new();
        assert!(helper(&dir, 1, None).status().unwrap().success());
        let (victim, other) = two_ranks(rank, |kill| helper(&dir, 2, kill.then_some(point)));
        assert!(killed(victim), "{rank} {point}");
        assert!(!other.wait_with_output().unwrap().status.success(), "{rank} {point}");
        holds(&dir.0.join("out"), 1, point);
        goes_on(&dir, point);
    }
}
