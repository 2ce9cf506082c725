//! The directory of all checkpoints: their names, what a killed run left, and what is kept.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io, thread};

use super::config::CheckpointConfig;
use super::draft_lock::DraftWriter;
use super::fault;
use super::file_problem;
use super::index::{INDEX, INDEX_CHECKSUM};
use super::write::is_file_of_rank;
use crate::Error;

/// Behind the hidden name of a checkpoint that is being written.
const DRAFT: &str = "unfinished";
/// Of one that another takes the place of.
const REPLACED: &str = "replaced";
/// Of one that is being removed.
const REMOVED: &str = "removed";

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
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses.
pub(super) fn names(root: &Path) -> Result<Vec<String>, Error> {
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

/// The step of which a directory is the checkpoint, whole or damaged: an older one in the place of one that lost its
/// index would be silent. It gets its name when it is whole: what is called like one and has neither the index nor the
/// checksum of it is none of ours.
pub(super) fn checkpoint_of(dir: &Path) -> Option<u64> {
    step_of(dir.file_name()?.to_str()?).filter(|_| may_be_file(&dir.join(INDEX)) || is_checkpoint(dir))
}

/// The steps of which there are checkpoints, in order.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses.
pub(super) fn steps(root: &Path) -> Result<Vec<u64>, Error> {
    let mut steps: Vec<u64> = names(root)?.iter().filter_map(|name| checkpoint_of(&root.join(name))).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// The steps of which there are checkpoints in a directory, in order: without a world, and without a change of the
/// directory. Also the one that a killed save has left under a hidden name, which has its own again once a
/// [`Checkpointer`](super::Checkpointer) opens the directory. None if the directory is not there.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses, or if it is no directory.
pub fn saved_steps(dir: impl AsRef<Path>) -> Result<Vec<u64>, Error> {
    let (root, mut steps) = (dir.as_ref(), Vec::new());
    // Listed once: while it is replaced, a checkpoint has the one name or the other.
    for name in names(root)? {
        steps.extend(checkpoint_of(&root.join(&name)).or_else(|| step_of(aside(root, &name)?)));
    }
    steps.sort_unstable();
    steps.dedup();
    Ok(steps)
}

/// The name of the checkpoint that a name stands for as long as nothing has that, set aside to be replaced.
fn aside<'a>(root: &Path, name: &'a str) -> Option<&'a str> {
    let (of, what) = left(name)?;
    (what == REPLACED && !root.join(of).exists() && is_checkpoint(&root.join(name))).then_some(of)
}

/// Of which checkpoint a save, or a removal, has left something under a hidden name while it runs, and what.
fn left(name: &str) -> Option<(&str, &str)> {
    let (hidden, what) = name.strip_prefix('.')?.rsplit_once('.')?;
    // Each draft has a name of its own, and keeps it while it is removed.
    let of = if what == REPLACED { hidden } else { hidden.split('.').next().unwrap_or_default() };
    (step_of(of).is_some() && [DRAFT, REPLACED, REMOVED].contains(&what)).then_some((of, what))
}

/// Whether it is the name of a checkpoint that is being written, or was.
pub(super) fn is_draft(name: &str) -> bool {
    left(name).is_some_and(|(_, what)| what == DRAFT)
}

/// Whether a directory is a checkpoint that a save has made, whole or damaged: nobody else writes such a file.
fn is_checkpoint(dir: &Path) -> bool {
    may_be_file(&dir.join(INDEX_CHECKSUM))
}

/// Whether there is a file, or the system does not tell this process: to read it is an error then, and an older
/// checkpoint in its place would be silent.
fn may_be_file(path: &Path) -> bool {
    match path.metadata() {
        Ok(found) => found.is_file(),
        Err(why) => why.kind() == io::ErrorKind::PermissionDenied,
    }
}

/// Whether there is nothing in a directory but what saves make: a checkpoint, or what a save that was ended has left or
/// half removed. What else there is would go with it.
fn is_of_a_save(dir: &Path) -> bool {
    somebodys(dir).is_ok_and(|name| name.is_none())
}

/// Something in a directory that no save has made.
///
/// # Errors
/// If the directory cannot be listed: nobody knows what is in it.
fn somebodys(dir: &Path) -> io::Result<Option<String>> {
    // So systems call what they keep by themselves and nobody misses: NFS and FUSE a file that was removed while
    // somebody had it open, macOS what its Finder remembers of a directory and the attributes of files. They would have
    // checkpoints stay for ever that somebody has looked at.
    let is_file = |name: &str| [INDEX, INDEX_CHECKSUM, ".DS_Store"].contains(&name) || is_file_of_rank(name);
    let of_system = |name: &str| [".nfs", ".fuse_hidden"].iter().any(|it| name.starts_with(it));
    let is_made = |name: &str| is_file(name.strip_prefix("._").unwrap_or(name)) || of_system(name);
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !is_made(&name) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// That no directory of somebody else is in the place of the checkpoint of a step, or where it is set aside.
///
/// # Errors
/// [`Error::Checkpoint`] if one is.
pub(super) fn check_free(root: &Path, step: u64) -> Result<(), Error> {
    let (dir, aside) = (root.join(name_of(step)), root.join(format!(".{}.{REPLACED}", name_of(step))));
    for path in [&dir, &aside].into_iter().filter(|path| path.symlink_metadata().is_ok()) {
        let (what, it) = match somebodys(path) {
            Ok(None) if is_checkpoint(path) || *path == aside => continue,
            Ok(Some(name)) if is_checkpoint(path) => (format!("has `{name}` in it, which no save has made"), "that"),
            Err(why) if path.is_dir() => (format!("cannot be listed ({why})"), "it"),
            _ => (format!("is none ({INDEX_CHECKSUM} is missing in it)"), "it"),
        };
        let problem = format!(
            "is in the place of the checkpoint of step {step}, and {what}, so it stays as it is: move {it} elsewhere, or save \
             into another directory"
        );
        return Err(file_problem(path, problem));
    }
    Ok(())
}

/// Gives checkpoints their names again that runs which were killed between two renames have left without one. Who may
/// not write there can read the others: returned is the error of who wants to know the latest.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses for another reason.
pub(super) fn put_back(root: &Path) -> Result<Option<Error>, Error> {
    let mut forbidden = None;
    for name in names(root)? {
        let Some(of) = aside(root, &name) else { continue };
        let (path, whole) = (root.join(&name), root.join(of));
        fault::point("puts back");
        match fs::rename(&path, &whole) {
            // Another has done so, or the save has gone on.
            Err(why) if whole.exists() || why.kind() == io::ErrorKind::NotFound => {}
            Err(why) if is_forbidden(&why) => {
                if is_there_soon(&whole) {
                    continue;
                }
                let problem = format!(
                    "is the checkpoint `{of}`, which a save that was ended has left under this name, and cannot be called so: \
                     {why}; have a process open the directory that may write there, or restore another step by its number"
                );
                log::warn!("{} {problem}", path.display());
                forbidden.get_or_insert(file_problem(&path, problem));
            }
            renamed => renamed.map_err(|why| failed(&path, &why))?,
        }
    }
    Ok(forbidden)
}

/// Whether another run, which replaces a checkpoint at the moment, has done so soon.
fn is_there_soon(whole: &Path) -> bool {
    (0..20).any(|_| {
        thread::sleep(Duration::from_millis(10));
        whole.exists()
    })
}

fn is_forbidden(why: &io::Error) -> bool {
    matches!(why.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Removes what runs that have ended have left half written or half removed, and nothing else; of whom a draft is,
/// `writer` knows. What cannot be removed is a warning in the log.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses to look.
pub(super) fn clean_up(root: &Path, writer: impl Fn(&str) -> DraftWriter) -> Result<(), Error> {
    put_back(root)?;
    for name in names(root)? {
        let Some((of, what)) = left(&name) else { continue };
        let path = root.join(&name);
        let (_held, removed) = match what {
            DRAFT => match writer(&name) {
                DraftWriter::Ended(held) => (held, name.replace(DRAFT, REMOVED)),
                DraftWriter::Lives | DraftWriter::Unknown => continue,
            },
            // What has its name is somebody's: it is the only one there is.
            REPLACED if is_checkpoint(&path) && !is_checkpoint(&root.join(of)) => {
                log::warn!("{} is a checkpoint, and what is called `{of}` is none: both stay", path.display());
                continue;
            }
            // Half removed it would count as the one that there is, once the other is removed.
            REPLACED => (None, format!("{name}.{REMOVED}")),
            _ => (None, name.clone()),
        };
        if !is_of_a_save(&path) {
            log::warn!("{} is called as what a save leaves, and has something else in it: it stays", path.display());
            continue;
        }
        log::info!("removes {}, which a save that was ended has left", path.display());
        if let Err(error) = remove(&path, &root.join(removed)) {
            log::warn!("what a save that was ended has left stays: {error}");
        }
    }
    Ok(())
}

/// Removes a directory under the name `removed`: from then on nobody finds it who still writes into it, and none that
/// looks whole lacks files.
fn remove(path: &Path, removed: &Path) -> Result<(), Error> {
    let is_gone = |outcome: io::Result<()>, path| match outcome {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(failed(path, &why)),
        _ => Ok(()),
    };
    if path != removed {
        if is_of_a_save(removed)
            && let Err(why) = is_gone(fs::remove_dir_all(removed), removed)
        {
            log::warn!("{why}");
        }
        is_gone(fs::rename(path, removed), path)?;
        fault::point("removing");
    }
    is_gone(fs::remove_dir_all(removed), removed)
}

/// Removes the checkpoints that are not to be kept, of all in the order in which they were written; what saves have not
/// made stays.
///
/// # Errors
/// [`Error::Checkpoint`] with the first that cannot be removed; the others are.
pub(super) fn prune(root: &Path, config: &CheckpointConfig, steps: &[u64]) -> Result<(), Error> {
    let Some(last) = config.keep_last else { return Ok(()) };
    let old = &steps[..steps.len().saturating_sub(last.max(1))];
    // Nothing is kept as a multiple of 0.
    let keeps = |step: u64| config.keep_every.is_some_and(|every| every > 0 && step.is_multiple_of(every));
    let mut outcome = Ok(());
    for step in old.iter().filter(|step| !keeps(**step)) {
        let path = root.join(name_of(*step));
        if !is_checkpoint(&path) {
            log::warn!("{} has no {INDEX_CHECKSUM}, as every checkpoint has: it stays", path.display());
            continue;
        }
        let is = match somebodys(&path) {
            Ok(None) => None,
            Ok(Some(name)) => Some(format!("has `{name}` in it, which no save has made")),
            Err(why) => Some(format!("cannot be listed ({why})")),
        };
        if let Some(is) = is {
            log::warn!("{} {is}: it stays", path.display());
            continue;
        }
        let removed: PathBuf = root.join(format!(".{}.{REMOVED}", name_of(*step)));
        outcome = outcome.and(remove(&path, &removed));
    }
    outcome
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{name_of, somebodys, step_of};
    use crate::tensor_file::killed::Dir;

    #[test]
    fn what_systems_keep_is_nobodys() {
        let dir = Dir::new();
        let files =
            [".nfs0000000000a1b2c300000001", ".fuse_hidden0000a1b200000001", "._rank-00000.safetensors", ".DS_Store"];
        for name in files.iter().chain(&["checkpoint.json", "checkpoint.json.xxh3", "rank-00000.safetensors"]) {
            fs::write(dir.0.join(name), "").unwrap();
            assert_eq!(somebodys(&dir.0).unwrap(), None, "{name}");
        }
        for name in ["notes.txt", "._notes.txt", ".DS_Store-notes"] {
            fs::write(dir.0.join(name), "").unwrap();
            assert_eq!(somebodys(&dir.0).unwrap().as_deref(), Some(name));
            fs::remove_file(dir.0.join(name)).unwrap();
        }
        assert!(somebodys(&dir.0.join("none")).is_err());
    }

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
