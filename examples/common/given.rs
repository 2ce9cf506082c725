//! What each rank was given: the same on all, or they would train on with other numbers, or wait in vain.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn_parallel::prelude::*;
use clap::{ArgMatches, Command};
use serde_json::Value;

use super::program::refused;

/// Flags that may differ: what a rank computes on, how it was started, what it tells and where; and names of files,
/// which machines may have in other places: of these what was read is compared.
const OF_A_RANK: [&str; 9] = ["data", "device", "eval", "json", "launch", "model", "peak", "strategy", "text"];

/// Flags that name directories which all ranks share, from wherever they are named.
const DIRECTORIES: [&str; 2] = ["resume", "save"];

/// Flags whose text may look like a number, and is none.
const TEXTS: [&str; 1] = ["generate"];

/// In the place of a flag: what is wrong with them.
const WRONG: &str = "(flags)";

/// What a rank was given.
#[derive(Clone, Debug)]
pub struct Given {
    /// By the names of the flags.
    flags: BTreeMap<String, Value>,
    /// Those that name directories.
    directories: BTreeMap<String, PathBuf>,
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

/// What a flag of this name was given.
fn value_of(name: &str, words: &str) -> Value {
    match name {
        // That it was is compared with the others.
        _ if DIRECTORIES.contains(&name) => true.into(),
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
        let directory = |name: &str| Some((format!("--{name}"), matches.try_get_raw(name).ok()??.next()?.into()));
        let directories = DIRECTORIES.into_iter().filter_map(directory).collect();
        let json = matches.try_contains_id("json").unwrap_or(false);
        Self { flags: flags.collect(), directories, json }
    }

    /// Of a rank whose own flags or files are wrong: those of all others are something else, and are told so first.
    pub fn wrong(why: &str) -> Self {
        Self { flags: BTreeMap::from([(WRONG.into(), why.into())]), directories: BTreeMap::new(), json: false }
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
        let other = |why| match why {
            Error::Settings { .. } => refused(why),
            why => why,
        };
        world.agree_on(&self.flags).map_err(other)?;
        for (name, dir) in &self.directories {
            world.agree_on_directory(name, dir).map_err(other)?;
        }
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

/// What a rank was told of another that was given what is [wrong](Given::wrong), in words; other errors as they are.
pub fn in_words(why: Error) -> Error {
    match why {
        Error::Settings { rank, name, value, value_of_0, .. } if name == WRONG => {
            let said = |value: &str| serde_json::from_str::<String>(value);
            let (rank, why) = said(&value).map_or((0, said(&value_of_0)), |why| (rank, Ok(why)));
            Error::user(format!("rank {rank} was given what is wrong: {}", why.unwrap_or_default()))
        }
        why => why,
    }
}
