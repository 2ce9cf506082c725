//! Whether ranks name one directory.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Communicator;
use crate::Error;

/// A directory as a rank names it.
#[derive(Serialize, Deserialize)]
struct NamedDirectory {
    name: String,
    absolute: bool,
    place: String,
    machine: String,
}

impl NamedDirectory {
    fn of(dir: &Path) -> Self {
        let text = |path: &Path| path.display().to_string();
        Self { name: text(dir), absolute: dir.is_absolute(), place: text(&place(dir)), machine: machine() }
    }

    /// Whether it may be the same as another rank's. Other machines may have a file system in other places, as other
    /// containers of this one may; a name that is not absolute is of no place by itself.
    fn is(&self, other: &Self) -> bool {
        let elsewhere = self.machine != other.machine || self.machine.is_empty();
        self.place == other.place || self.name == other.name && (self.absolute || elsewhere)
    }
}

impl Communicator {
    /// Makes sure that all ranks of the group name one directory, whether it is there yet or not: by where it is,
    /// behind all links, from whatever working directory it is named. On other machines, which may have a file system
    /// in other places, the same name will do as well. An error calls it by `name`, as a flag. Collective.
    ///
    /// # Errors
    /// As [`agree_on`](Self::agree_on).
    pub fn agree_on_directory(&self, name: &str, dir: impl AsRef<Path>) -> Result<(), Error> {
        let own = NamedDirectory::of(dir.as_ref());
        let unreadable = |why: serde_json::Error| Error::invalid("agree_on_directory", why.to_string());
        let first = self.share_bytes(serde_json::to_vec(&own).map_err(unreadable)?, 0)?;
        let first: NamedDirectory = serde_json::from_slice(&first).map_err(unreadable)?;
        self.agree_on(&json!({ name: if own.is(&first) { first.place } else { own.place } }))
    }
}

/// Where a directory is, or would be. What there is of the path is followed through its links, and `..` behind one is
/// where the link leads.
fn place(dir: &Path) -> PathBuf {
    let whole = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
    let there = whole.ancestors().find_map(|part| Some((part, part.canonicalize().ok()?)));
    let (mut place, rest) = match &there {
        Some((part, real)) => (real.clone(), whole.strip_prefix(part).unwrap_or(&whole)),
        None => (PathBuf::new(), whole.as_path()),
    };
    for part in rest.components() {
        match part {
            Component::CurDir => {}
            // There is something before it again, maybe.
            Component::ParentDir => {
                place.pop();
                let behind = rest.components().skip_while(|it| !matches!(it, Component::ParentDir)).skip(1);
                return self::place(&place.join(behind.collect::<PathBuf>()));
            }
            part => place.push(part),
        }
    }
    place
}

/// Names a machine, from one start to the next; empty if it has no such name.
pub(crate) fn machine() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.split('-').take(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_place_are_one() {
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        let of = |name: &str| place(Path::new(name));
        assert_eq!(of("runs/a"), here.join("runs").join("a"));
        for name in ["runs/./a", "./runs/a/", "runs//a", "runs/b/../a"] {
            assert_eq!(of(name), of("runs/a"), "{name}");
        }
        assert_eq!(of(&here.join("runs/a").display().to_string()), of("runs/a"));
        assert!(of("7") != of("07") && of("../7") != of("7"));
    }

    #[test]
    #[cfg(unix)]
    fn links_are_followed_as_far_as_there_are_any() {
        let dir = crate::tensor_file::killed::Dir::new();
        let root = dir.0.canonicalize().unwrap();
        fs::create_dir_all(root.join("one/two")).unwrap();
        std::os::unix::fs::symlink(root.join("one/two"), root.join("link")).unwrap();
        for name in ["link", "link/", "./link/.", "one/two", "link/../two"] {
            assert_eq!(place(&root.join(name)), root.join("one/two"), "{name}");
        }
        // Behind the link is another place than before it.
        assert_eq!(place(&root.join("link/../new/a")), root.join("one/new/a"));
        assert_eq!(place(&root.join("new/../link/a")), root.join("one/two/a"));
    }

    #[test]
    fn the_same_name_is_the_same_on_another_machine() {
        let named = |name: &str, place: &str, machine: &str| NamedDirectory {
            name: name.into(),
            absolute: name.starts_with('/'),
            place: place.into(),
            machine: machine.into(),
        };
        let first = named("runs/a", "/home/u/runs/a", "m");
        assert!(named("a", "/home/u/runs/a", "m").is(&first));
        assert!(named("runs/a", "/scratch/u/runs/a", "n").is(&first));
        // Not where it was started in another directory.
        assert!(!named("runs/a", "/home/v/runs/a", "m").is(&first));
        assert!(!named("runs/b", "/scratch/u/runs/b", "n").is(&first));
        let absolute = named("/data/a", "/mnt/data/a", "m");
        assert!(named("/data/a", "/data/a", "m").is(&absolute));
    }
}
