//! The flags of the command line, and what was given, to be compared with other ranks.

use std::env;
use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, FromArgMatches};

use super::given::Given;

/// The flags of the command line; and what was given, to be compared with other ranks.
pub fn parse<F: CommandFactory + FromArgMatches>() -> Result<(F, Given), clap::Error> {
    // `--steps -1` is a wrong number of steps, not a flag that nobody knows.
    let command = F::command().mut_args(|flag| flag.allow_negative_numbers(true));
    let given: Vec<OsString> = env::args_os().collect();
    let matches = command.clone().try_get_matches_from(&given).map_err(|wrong| match wrong.kind() {
        ErrorKind::MissingRequiredArgument => named(wrong, &command, &given),
        ErrorKind::UnknownArgument => behind_equals(wrong, &command, &given),
        _ => wrong,
    })?;
    Ok((F::from_arg_matches(&matches)?, Given::of(&command, &matches)))
}

/// The error of a word behind a flag that takes it behind `=` alone: clap says that nobody expects it.
fn behind_equals(wrong: clap::Error, command: &Command, given: &[OsString]) -> clap::Error {
    let flags = command.get_arguments().filter(|flag| flag.is_require_equals_set()).filter_map(|flag| flag.get_long());
    let flags: Vec<String> = flags.map(|name| format!("--{name}")).collect();
    let words = given.windows(2).map(|pair| (pair[0].to_string_lossy(), pair[1].to_string_lossy()));
    let unknown =
        |word: &str| matches!(wrong.get(ContextKind::InvalidArg), Some(ContextValue::String(it)) if it == word);
    let mut words = words.filter(|(flag, word)| flags.iter().any(|it| it == flag) && unknown(word));
    match words.next() {
        Some((flag, word)) => {
            clap::Error::raw(wrong.kind(), format!("{flag} takes what it is given behind `=`: {flag}={word}"))
        }
        None => wrong,
    }
}

/// The error of a flag that needs another: clap names that one alone. The first is the one without which nothing is
/// missing.
fn named(wrong: clap::Error, command: &Command, given: &[OsString]) -> clap::Error {
    let is_flag = |word: &OsString| word.to_string_lossy().starts_with("--");
    let needs = (1..given.len()).filter(|at| is_flag(&given[*at])).find(|at| {
        let behind = given[at + 1..].iter().position(is_flag).map_or(given.len(), |next| at + 1 + next);
        let others = given[..*at].iter().chain(&given[behind..]);
        let error = command.clone().try_get_matches_from(others).err();
        error.is_none_or(|error| error.kind() != ErrorKind::MissingRequiredArgument)
    });
    let (Some(at), Some(ContextValue::Strings(missing))) = (needs, wrong.get(ContextKind::InvalidArg)) else {
        return wrong;
    };
    let flag = given[at].to_string_lossy().into_owned();
    let flag = flag.split('=').next().unwrap_or_default();
    clap::Error::raw(wrong.kind(), format!("{flag} needs {}, which is not given", missing.join(" and ")))
}
