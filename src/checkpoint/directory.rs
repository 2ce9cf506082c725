//! The directory of all checkpoints: their names, what a killed run left, and what is kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::config::CheckpointConfig;
use super::fault;
use super::file_problem;
use super::index::INDEX;
use crate::Error;

/// The name of the checkpoint of a step.
pub(super) fn name_of(step: u64) -> String {
    format!("step-{step:09}")
}

fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (name_of(step) == name).then_some(step)
}

pub(super) fn failed(path: &Path, why: &io::Error) -> Error {
    file_problem(path, format!("cannot be used: {why}"))
}

/// The names in a directory; none if it is not there.
fn names(root: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(root) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|why| failed(root, &why))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|why| failed(root, &why))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

/// The steps of which there are checkpoints, in order.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses.
pub(super) fn steps(root: &Path) -> Result<Vec<u64>, Error> {
    let mut steps: Vec<u64> = names(root)?.iter().filter_map(|name| step_of(name)).collect();
    // A checkpoint gets its name when it is whole. What is called like one and has no index is none of ours.
    steps.retain(|step| root.join(name_of(*step)).join(INDEX).is_file());
    steps.sort_unstable();
    Ok(steps)
}

/// Removes what runs that were killed have left half written or half removed.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses.
pub(super) fn clean_up(root: &Path) -> Result<(), Error> {
    for name in names(root)? {
        let Some((hidden, what)) = name.strip_prefix('.').and_then(|name| name.rsplit_once('.')) else { continue };
        // Each draft has a name of its own.
        let hidden = match what {
            "unfinished" => hidden.split('.').next().unwrap_or_default(),
            _ => hidden,
        };
        if step_of(hidden).is_none() || !["unfinished", "replaced", "removed"].contains(&what) {
            continue;
        }
        let (path, whole) = (root.join(&name), root.join(hidden));
        if what == "replaced" && !whole.exists() {
            // The run was killed between two renames.
            fs::rename(&path, &whole).map_err(|why| failed(&path, &why))?;
            continue;
        }
        log::info!("removes {}, which a save that was ended has left", path.display());
        remove(&path)?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(failed(path, &why)),
        _ => Ok(()),
    }
}

/// Removes the checkpoints that are not to be kept, of all in the order in which they were written. One is renamed
/// first, so that none that looks whole lacks files.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses.
pub(super) fn prune(root: &Path, config: &CheckpointConfig, steps: &[u64]) -> Result<(), Error> {
    let Some(last) = config.keep_last else { return Ok(()) };
    let old = &steps[..steps.len().saturating_sub(last.max(1))];
    // Nothing is kept as a multiple of 0.
    let keeps = |step: u64| config.keep_every.is_some_and(|every| every > 0 && step.is_multiple_of(every));
    for step in old.iter().filter(|step| !keeps(**step)) {
        let path = root.join(name_of(*step));
        let removed: PathBuf = root.join(format!(".{}.removed", name_of(*step)));
        remove(&removed)?;
        fs::rename(&path, &removed).map_err(|why| failed(&path, &why))?;
        fault::point("removing");
        remove(&removed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{name_of, step_of};

    #[test]
    fn names_of_steps() {
        assert_eq!(name_of(7), "step-000000007");
        assert_eq!(name_of(u64::MAX), "step-18446744073709551615");
        for step in [0, 7, 999_999_999, 1_000_000_000, u64::MAX] {
            assert_eq!(step_of(&name_of(step)), Some(step));
        }
        for name in ["step-7", "step-", "step--00000001", "step-00000000x", "other", "step-000000001x"] {
            assert_eq!(step_of(name), None, "{name}");
        }
    }
}
