//! A directory that is there as a whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::file_error;
use crate::Error;

/// A directory in the making, beside the one that it is to be.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Where it is made: a hidden directory beside the other. One of a save that was ended is overwritten by the next.
    pub(crate) made_in: PathBuf,
    dir: PathBuf,
    /// Where a directory of the same name goes in the meantime.
    replaced: PathBuf,
    overwrite: bool,
}

impl Draft {
    /// Says where a directory is made; nothing is done.
    ///
    /// # Errors
    /// [`file_error`] if the path has no last part.
    pub(crate) fn new(dir: &Path, overwrite: bool) -> Result<Self, Error> {
        let dir = std::path::absolute(dir).map_err(|why| file_error(dir, format!("is no path: {why}")))?;
        let Some(name) = dir.file_name() else { return Err(file_error(&dir, "is no name of a directory")) };
        let beside = |suffix: &str| {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(suffix);
            dir.with_file_name(hidden)
        };
        Ok(Self { made_in: beside(".unfinished"), replaced: beside(".replaced"), dir: dir.clone(), overwrite })
    }

    /// Makes the draft, empty.
    ///
    /// # Errors
    /// [`file_error`] if there is a directory of its name that must not be overwritten, or the system refuses.
    pub(crate) fn begin(&self) -> Result<(), Error> {
        let taken = match fs::read_dir(&self.dir) {
            Ok(mut entries) => entries.next().is_some(),
            Err(why) => why.kind() != io::ErrorKind::NotFound,
        };
        if taken && !self.overwrite {
            let problem = "is there already, and not empty: choose another name, or say `with_overwrite(true)`";
            return Err(file_error(&self.dir, problem));
        }
        // A save that was ended between two renames has left what it replaced.
        if !self.dir.exists() && self.replaced.exists() {
            fs::rename(&self.replaced, &self.dir).map_err(|why| refused(&self.replaced, &why))?;
        }
        self.discard()?;
        fs::create_dir_all(&self.made_in).map_err(|why| refused(&self.made_in, &why))
    }

    /// Removes what there is of the draft.
    ///
    /// # Errors
    /// [`file_error`] if the system refuses.
    pub(crate) fn discard(&self) -> Result<(), Error> {
        remove(&self.made_in)
    }

    /// Gives the draft its name.
    ///
    /// # Errors
    /// [`file_error`] if the system refuses; what was there before is there still.
    pub(crate) fn commit(&self) -> Result<(), Error> {
        sync_dir(&self.made_in)?;
        let there = self.dir.exists();
        if there {
            remove(&self.replaced)?;
            fs::rename(&self.dir, &self.replaced).map_err(|why| refused(&self.dir, &why))?;
        }
        if let Err(why) = fs::rename(&self.made_in, &self.dir) {
            if there {
                fs::rename(&self.replaced, &self.dir).map_err(|why| refused(&self.replaced, &why))?;
            }
            return Err(refused(&self.dir, &why));
        }
        if let Some(parent) = self.dir.parent() {
            sync_dir(parent)?;
        }
        remove(&self.replaced)
    }
}

fn remove(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(refused(dir, &why)),
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|why| refused(dir, &why))
}

/// Other systems have no way to wait for a directory.
#[cfg(not(unix))]
fn sync_dir(_: &Path) -> Result<(), Error> {
    Ok(())
}

fn refused(path: &Path, why: &io::Error) -> Error {
    file_error(path, format!("cannot be written: {why}"))
}

/// Writes a file, and waits until it is on the disk.
///
/// # Errors
/// [`file_error`] if the system refuses.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|why| refused(path, &why))
}
