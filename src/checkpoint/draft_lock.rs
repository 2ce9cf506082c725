//! Who writes a draft: its run holds a lock on it, which the system lets go when the process ends. A draft is removed
//! under the same lock, so that nobody takes one that is new for what a killed run has left.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;

use crate::comm::machine;

/// What comes of an attempt to lock a directory.
pub(super) enum Lock {
    /// Nobody else has it as long as this is open.
    Own(File),
    Anothers,
    /// The directory is not there.
    Gone,
    /// The system does not lock this directory, as some network file systems do not.
    Refused,
}

pub(super) fn lock_of(dir: &Path) -> Lock {
    // What is none, as a pipe, might not be opened before somebody writes.
    if dir.exists() && !dir.is_dir() {
        return Lock::Refused;
    }
    let dir = match File::open(dir) {
        Ok(dir) => dir,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Lock::Gone,
        Err(_) => return Lock::Refused,
    };
    match dir.try_lock() {
        Ok(()) => Lock::Own(dir),
        Err(TryLockError::WouldBlock) => Lock::Anothers,
        Err(TryLockError::Error(_)) => Lock::Refused,
    }
}

/// What is known of the run that a draft is of.
pub(super) enum DraftWriter {
    Lives,
    /// It has ended: the draft is removed under this lock, if there is one.
    Ended(Option<File>),
    Unknown,
}

/// Asks for the lock of a draft, which says something on the machine alone that its name has.
pub(super) fn writer_of(draft: &Path) -> DraftWriter {
    let (name, machine) = (draft.file_name().and_then(|name| name.to_str()), machine());
    if machine.is_empty() || name.is_none_or(|name| !name.contains(&format!(".{machine}-"))) {
        return DraftWriter::Unknown;
    }
    match lock_of(draft) {
        Lock::Own(lock) => DraftWriter::Ended(Some(lock)),
        Lock::Gone => DraftWriter::Ended(None),
        Lock::Anothers => DraftWriter::Lives,
        Lock::Refused => DraftWriter::Unknown,
    }
}
