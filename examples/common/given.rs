//! What each rank was given: the same on all, or they would train on with other numbers, or wait in vain.

use std::collections::BTreeMap;

use burn_parallel::prelude::*;
use clap::{ArgMatches, Command};
use serde_json::Value;

use super::program::refused;

/// Flags that may differ: what a rank computes on, how it was started, what it tells and where; and names of files,
/// which machines may have in other places: of these what was read is compared.
const OF_A_RANK: [&str; 9] = ["data", "device", "eval", "json", "launch", "model", "peak", "strategy", "text"];

/// What a rank was given, by the names of the flags.
#[derive(Clone, Debug)]
pub struct Given(BTreeMap<String, Value>);

/// A number, however it is written, or a text.
fn value(word: &str) -> Value {
    // Those that have no fraction, and are exact, are told without one.
    let whole = |number: f64| number.fract() == 0.0 && (0.0..9e15).contains(&number);
    let of_float = |number: f64| if whole(number) { Value::from(number as u64) } else { Value::from(number) };
    let number = word.parse::<u64>().map(Value::from).or_else(|_| word.parse().map(of_float));
    number.ok().filter(|it| !it.is_null()).unwrap_or(word.into())
}

impl Given {
    /// The flags as they were given, or their defaults.
    pub fn of(command: &Command, matches: &ArgMatches) -> Self {
        let flags = command.get_arguments().filter_map(|flag| {
            let name = flag.get_long().filter(|name| !OF_A_RANK.contains(name))?;
            let words = matches.try_get_raw(flag.get_id().as_str()).ok()??;
            let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
            Some((format!("--{name}"), value(&words.join(" "))))
        });
        Self(flags.collect())
    }

    /// The same with something that was read: flags are compared first.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.insert(name.into(), value.into());
        self
    }

    /// Makes sure that all ranks were given the same. Collective.
    ///
    /// # Errors
    /// The flag, two ranks, and what these were given, the same on all ranks: the program ends with exit code 2.
    pub fn agree(&self, world: &Communicator) -> Result<(), Error> {
        world.agree_on(&self.0).map_err(|why| match why {
            Error::Settings { .. } => refused(why),
            why => why,
        })
    }
}
