//! What each rank was given: the same on all, or they would train on with other numbers, or wait in vain.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::{env, fs};

use burn_parallel::prelude::*;
use clap::{ArgMatches, Command};
use serde_json::Value;

use super::program::refused;

/// Flags that may differ: what a rank computes on, how it was started, what it tells and where; and names of files,
/// which machines may have in other places: of these what was read is compared.
const OF_A_RANK: [&str; 9] = ["data", "device", "eval", "json", "launch", "model", "peak", "strategy", "text"];

/// Flags that name directories which all ranks share: of these is compared where they are.
const DIRECTORIES: [&str; 2] = ["resume", "save"];

/// Flags whose text may look like a number, and is none.
const TEXTS: [&str; 1] = ["generate"];

/// What a rank was given.
#[derive(Clone, Debug)]
pub struct Given {
    /// By the names of the flags.
    flags: BTreeMap<String, Value>,
    /// Whether it is to write JSON.
    json: bool,
}

/// A number, however it is written, or a text.
fn value(word: &str) -> Value {
    // Those that have no fraction, and are exact, are told without one.
    let whole = |number: f64| number.fract() == 0.0 && (0.0..9e15).contains(&number);
    let of_float = |number: f64| if whole(number) { Value::from(number as u64) } else { Value::from(number) };
    let number = word.parse::<u64>().map(Value::from).or_else(|_| word.parse().map(of_float));
    number.ok().filter(|it| !it.is_null()).unwrap_or(word.into())
}

/// Where a directory is, from wherever it is named. Links stay what they are called: machines may have the same file
/// system in other places behind them.
fn place(dir: &Path) -> PathBuf {
    let mut place = PathBuf::new();
    for part in here().join(dir).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(place.pop()),
            part => place.push(part),
        }
    }
    place
}

/// The working directory, by the name that the shell has for it.
fn here() -> PathBuf {
    let here = env::current_dir().unwrap_or_default();
    let called = env::var_os("PWD").map(PathBuf::from).filter(|called| called.is_absolute());
    called.filter(|called| fs::canonicalize(called).is_ok_and(|called| called == here)).unwrap_or(here)
}

/// What a flag of this name was given.
fn value_of(name: &str, words: &str) -> Value {
    match name {
        _ if DIRECTORIES.contains(&name) => place(Path::new(words)).to_string_lossy().into(),
        _ if TEXTS.contains(&name) => words.into(),
        _ => value(words),
    }
}

impl Given {
    /// The flags as they were given, or their defaults.
    pub fn of(command: &Command, matches: &ArgMatches) -> Self {
        let flags = command.get_arguments().filter_map(|flag| {
            let name = flag.get_long().filter(|name| !OF_A_RANK.contains(name))?;
            let words = matches.try_get_raw(flag.get_id().as_str()).ok()??;
            let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
            Some((format!("--{name}"), value_of(name, &words.join(" "))))
        });
        let json = matches.try_contains_id("json").unwrap_or(false);
        Self { flags: flags.collect(), json }
    }

    /// Of a rank whose own flags or files are wrong: those of all others are something else, and are told so first.
    pub fn wrong(why: &str) -> Self {
        Self { flags: BTreeMap::from([("(flags)".into(), format!("wrong: {why}").into())]), json: false }
    }

    /// The same with something that was read: flags are compared first.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.flags.insert(name.into(), value.into());
        self
    }

    /// Makes sure that all ranks were given the same. Collective.
    ///
    /// # Errors
    /// The flag, two ranks, and what these were given, the same on all ranks: the program ends with exit code 2. So it
    /// does if a rank is to write JSON that does not, and the one that does is not.
    pub fn agree(&self, world: &Communicator) -> Result<(), Error> {
        world.agree_on(&self.flags).map_err(|why| match why {
            Error::Settings { .. } => refused(why),
            why => why,
        })?;
        let asked = world.all_gather(vec![u64::from(self.json)])?;
        match asked.iter().position(|asked| *asked == 1).filter(|first| *first > 0) {
            Some(rank) => {
                let problem = format!("`--json` is given on rank {rank}, and rank 0 writes it: give it there");
                Err(refused(Error::user(problem)))
            }
            None => Ok(()),
        }
    }
}
