//! Demands that the ranks of a group agree on the lines that describe a model.

use std::fmt::Write;

use crate::Error;
use crate::comm::{Communicator, ReduceOp};

/// Demands that all ranks describe their parameters alike: `(path, what it is)` in the order of the module.
///
/// # Errors
/// [`Error::ModelMismatch`], the same on all ranks, with the first rank that differs and the first path where it does.
pub(crate) fn agree(lines: &[(String, String)], group: &Communicator) -> Result<(), Error> {
    let mut text = String::new();
    for (path, what) in lines {
        let _ = writeln!(text, "{path}\t{what}");
    }
    let theirs = share_text(&text, group)?;
    let differs = theirs != text;
    let first = group.all_reduce(vec![if differs { group.rank() as u64 } else { u64::MAX }], ReduceOp::Min)?[0];
    if first == u64::MAX {
        return Ok(());
    }
    let rank = first as usize;
    let found = if group.rank() == rank { difference(lines, &theirs) } else { String::new() };
    let found = group.share_bytes(found.into_bytes(), rank)?;
    let found = String::from_utf8_lossy(&found).into_owned();
    let (path, problem) = found.split_once('\t').unwrap_or((&found, "it differs"));
    let name = group.group().clone();
    let error = Error::ModelMismatch { group: name, rank, path: path.into(), problem: problem.into() };
    group.fail(error.clone());
    Err(error)
}

/// The text that rank 0 brings, on every rank.
///
/// # Errors
/// Those of [`Communicator::broadcast`].
pub(crate) fn share_text(text: &str, group: &Communicator) -> Result<String, Error> {
    let bytes = group.share_bytes(text.as_bytes().to_vec(), 0)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first line that differs from those of rank 0, as `path<tab>problem`.
fn difference(lines: &[(String, String)], theirs: &str) -> String {
    let theirs: Vec<(&str, &str)> = theirs.lines().filter_map(|line| line.split_once('\t')).collect();
    for place in 0..lines.len().max(theirs.len()) {
        match (lines.get(place), theirs.get(place)) {
            (Some((path, what)), Some((their_path, their_what))) if path == their_path && what == their_what => {}
            (Some((path, what)), Some((their_path, their_what))) if path == their_path => {
                return format!("{path}\tit is {what} here and {their_what} on rank 0");
            }
            (Some((path, _)), Some((their_path, _))) => {
                return format!("{path}\trank 0 has `{their_path}` in its place");
            }
            (Some((path, _)), None) => return format!("{path}\trank 0 does not have it"),
            (None, Some((their_path, _))) => return format!("{their_path}\tit is missing here"),
            (None, None) => {}
        }
    }
    String::new()
}
