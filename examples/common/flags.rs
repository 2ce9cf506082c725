//! The values that several flags take, and what is wrong with them in one line.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::time::Duration;

use clap::error::ErrorKind;

/// Flags that make no sense together.
pub fn wrong<T>(why: String) -> Result<T, clap::Error> {
    Err(clap::Error::raw(ErrorKind::ValueValidation, why))
}

/// What is wrong with the flags, in one line.
pub fn one_line(wrong: &clap::Error) -> String {
    // The first paragraph says what is wrong, the others of clap how the usage is.
    let message = wrong.to_string();
    let lines: Vec<&str> = message.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = lines.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

pub fn up_to<const MOST: usize>(value: &str) -> Result<usize, String> {
    match value.parse::<i128>() {
        Ok(n) if n < 1 => Err("it must be at least 1".into()),
        Ok(n) if n > MOST as i128 => Err(format!("it must be at most {MOST}")),
        Ok(n) => Ok(n as usize),
        Err(_) => Err("it must be a whole number".into()),
    }
}

/// So many of what one of is called so.
pub fn count(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

/// Bytes, as a number with or without a unit.
pub fn bytes(value: &str) -> Result<u64, String> {
    let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    let unit = units.into_iter().find_map(|(unit, bits)| Some((value.strip_suffix(unit)?, bits)));
    let (number, bits) = unit.unwrap_or((value, 0));
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << bits)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("it must be bytes, as 500M or 6G (powers of 1024)".into()),
    }
}

pub fn seconds(value: &str) -> Result<Duration, String> {
    let seconds = value.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|time| !time.is_zero()).ok_or_else(|| "it must be a positive number of seconds".into())
}

pub fn learning_rate(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(rate) if rate > 0.0 && rate <= 1.0 => Ok(rate),
        Ok(_) => Err("it must be greater than 0 and at most 1".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

pub fn norm(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(norm) if norm > 0.0 && f64::is_finite(norm) => Ok(norm),
        Ok(_) => Err("it must be greater than 0 and finite".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

/// Finds out before the training, not after it, that the outcome can't be written; leaves no file behind.
pub fn writable(json: &Path, text: Option<&Path>) -> Result<(), String> {
    let existed = json.exists();
    if existed && text.is_some_and(|text| json.canonicalize().ok() == text.canonicalize().ok()) {
        return Err(format!("--json {json:?} would overwrite the text"));
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(json)
        .map_err(|why| format!("cannot write --json {json:?}: {why}"))?;
    if existed {
        return Ok(());
    }
    match fs::remove_file(json) {
        // Other ranks find it out as well.
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(format!("cannot write --json {json:?}: {why}")),
        _ => Ok(()),
    }
}
