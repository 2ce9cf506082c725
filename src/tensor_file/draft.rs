//! A directory that is there as a whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::fault;
use super::problem::file_error;
use crate::Error;

/// Behind the name of a directory that is being made.
const UNFINISHED: &str = ".unfinished";
/// Behind the name of one that another takes the place of.
const REPLACED: &str = ".replaced";

/// How often what is set aside for a draft may be put back by others, who take it for what a killed save has left,
/// before the draft has its name.
const MOST_PUT_BACK: usize = 100;

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
        let beside = |suffix| dir.with_file_name(hidden(name, suffix));
        Ok(Self { made_in: beside(UNFINISHED), replaced: beside(REPLACED), dir: dir.clone(), overwrite })
    }

    /// The same with a part of its own in the hidden name, which no other draft of this directory has: so what a save
    /// that was given up still writes is in no other's.
    pub(crate) fn called(self, own: &str) -> Self {
        let name = self.dir.file_name().unwrap_or_default();
        Self { made_in: self.dir.with_file_name(hidden(name, &format!(".{own}{UNFINISHED}"))), ..self }
    }

    /// Makes the draft, empty.
    ///
    /// # Errors
    /// [`file_error`] if there is a directory of its name that must not be overwritten, or the system refuses.
    pub(crate) fn begin(&self) -> Result<(), Error> {
        // A save that was ended between two renames, or behind them, has left what it replaced.
        match self.dir.exists() {
            false if self.replaced.exists() => self.put_back()?,
            _ => remove(&self.replaced)?,
        }
        let taken = match fs::read_dir(&self.dir) {
            Ok(mut entries) => entries.next().is_some(),
            Err(why) => why.kind() != io::ErrorKind::NotFound,
        };
        if taken && self.dir.exists() && !self.dir.is_dir() {
            return Err(file_error(&self.dir, "is there already, and is no directory"));
        }
        if taken && !self.overwrite {
            let problem = "is there already, and not empty: choose another name, or say `with_overwrite(true)`";
            return Err(file_error(&self.dir, problem));
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

    /// Gives the draft its name. What is there before is there until the draft is: where the system cannot exchange two
    /// names at once, it is under its hidden name for a moment. That it cannot be removed afterwards is a warning in
    /// the log.
    ///
    /// # Errors
    /// [`file_error`] if the system refuses; what was there before is there still, unless it refuses to wait for the
    /// directory in which the draft has its name already.
    pub(crate) fn commit(&self) -> Result<(), Error> {
        sync_dir(&self.made_in)?;
        if self.dir.exists() && exchanged(&self.made_in, &self.dir) {
            self.sync_parent()?;
            fault::point("names exchanged");
            warn_of(self.discard());
            return Ok(());
        }
        for last in (0..MOST_PUT_BACK).rev() {
            let there = self.dir.exists();
            if there {
                remove(&self.replaced)?;
                fs::rename(&self.dir, &self.replaced).map_err(|why| refused(&self.dir, &why))?;
                fault::point("old renamed");
            }
            let Err(why) = fs::rename(&self.made_in, &self.dir) else { break };
            let put_back = there && self.dir.exists();
            if there && !put_back {
                self.put_back()?;
            }
            if !put_back || last == 0 {
                return Err(refused(&self.dir, &why));
            }
        }
        self.sync_parent()?;
        fault::point("new renamed");
        // As where names are exchanged, what there was has the name of the draft then: under the other it would count
        // as the one that there is, once the new one is removed and it has not been.
        match fs::rename(&self.replaced, &self.made_in) {
            Ok(()) => warn_of(self.discard()),
            Err(_) => warn_of(remove(&self.replaced)),
        }
        Ok(())
    }

    /// Gives what was set aside its name again, unless another has done so just now.
    fn put_back(&self) -> Result<(), Error> {
        match fs::rename(&self.replaced, &self.dir) {
            Err(why) if !self.dir.exists() => Err(refused(&self.replaced, &why)),
            _ => Ok(()),
        }
    }

    fn sync_parent(&self) -> Result<(), Error> {
        self.dir.parent().map_or(Ok(()), sync_dir)
    }
}

fn hidden(name: &OsStr, suffix: &str) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(suffix);
    hidden
}

/// What a save that was ended has to do with a directory that is to be read; `None` if nothing.
pub(crate) fn left_by_a_save(dir: &Path) -> Option<String> {
    let name = dir.file_name()?;
    let text = name.to_string_lossy();
    if text.starts_with('.') && text.ends_with(UNFINISHED) {
        return Some("is what a save that was ended has left, and may lack anything: save again".into());
    }
    let replaced = dir.with_file_name(hidden(name, REPLACED));
    (!dir.exists() && replaced.is_dir()).then(|| {
        format!("is not there: a save was ended as it took its place; what was there is `{}`", replaced.display())
    })
}

/// Exchanges two names at once, if the system can.
#[cfg(target_os = "linux")]
fn exchanged(one: &Path, other: &Path) -> bool {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (Ok(one), Ok(other)) = (path(one), path(other)) else { return false };
    if fault::cannot_exchange() {
        return false;
    }
    // SAFETY: both are strings that end with a zero and live until the call returns.
    let done = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            one.as_ptr(),
            libc::AT_FDCWD,
            other.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    done == 0
}

#[cfg(not(target_os = "linux"))]
fn exchanged(_: &Path, _: &Path) -> bool {
    false
}

fn remove(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(refused(dir, &why)),
        _ => Ok(()),
    }
}

/// What was replaced is needed no more: the next save removes what is left of it.
fn warn_of(removed: Result<(), Error>) {
    if let Err(why) = removed {
        log::warn!("what was replaced stays: {why}");
    }
}

/// Waits until the names in a directory are on the disk.
#[cfg(unix)]
pub(crate) fn sync_dir(dir: &Path) -> Result<(), Error> {
    let dir_file = File::open(dir).map_err(|why| refused(dir, &why))?;
    match dir_file.sync_all() {
        // Some file systems, as those of networks, have no way to wait for a directory.
        Err(why) if !matches!(why.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Err(refused(dir, &why))
        }
        _ => Ok(()),
    }
}

/// Other systems have no way to wait for a directory.
#[cfg(not(unix))]
pub(crate) fn sync_dir(_: &Path) -> Result<(), Error> {
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::path::Path;

    use super::sync_dir;

    #[test]
    fn a_directory_that_cannot_be_waited_for_is_no_error() {
        sync_dir(Path::new("/proc")).unwrap();
        assert!(sync_dir(Path::new("/proc/none")).is_err());
    }
}
