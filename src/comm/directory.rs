//! Whether ranks name one directory.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

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
    /// containers of this one may; a name that is not absolute is of no place by itself. Machines without a name count
    /// as one: an error says to give an absolute name, while two directories that are taken for one tell nobody.
    fn is(&self, other: &Self) -> bool {
        let elsewhere = self.machine != other.machine;
        self.place == other.place || self.name == other.name && (self.absolute || elsewhere)
    }

    /// By what ranks of one machine are compared: numbers for the machine, for the place, and for the name if that is
    /// absolute.
    fn words(&self) -> [u64; 3] {
        let name = if self.absolute { &self.name } else { &self.place };
        [&self.machine, &self.place, name].map(|text| xxh3_64(text.as_bytes()))
    }
}

impl Communicator {
    /// Makes sure that all ranks of the group name one directory, whether it is there yet or not: by where it is,
    /// behind all links, from whatever working directory it is named. On other machines, which may have a file system
    /// in other places, the same name will do as well, if all ranks there mean one directory by it. Where machines have
    /// no name, as those of macOS and Windows, an absolute one does. An error calls the directory by `name`, as a flag.
    /// Collective.
    ///
    /// # Errors
    /// As [`agree_on`](Self::agree_on).
    pub fn agree_on_directory(&self, name: &str, dir: impl AsRef<Path>) -> Result<(), Error> {
        self.agree_on_named(name, NamedDirectory::of(dir.as_ref()))
    }

    fn agree_on_named(&self, name: &str, own: NamedDirectory) -> Result<(), Error> {
        let unreadable = |why: serde_json::Error| Error::invalid("agree_on_directory", why.to_string());
        let first = self.share_bytes(serde_json::to_vec(&own).map_err(unreadable)?, 0)?;
        let first: NamedDirectory = serde_json::from_slice(&first).map_err(unreadable)?;
        // Both of two ranks of another machine may have the name of the first rank's, and mean two directories.
        let words = own.words();
        let told = self.all_gather(words.to_vec())?;
        let beside = told.as_chunks::<3>().0.iter().find(|other| other[0] == words[0]).unwrap_or(&words);
        let alike = beside[1] == words[1] || own.absolute && beside[2] == words[2];
        let place = match own.is(&first) {
            true if alike => first.place,
            true if own.place == first.place => format!("{} on another machine", own.place),
            _ => own.place,
        };
        self.agree_on(&json!({ name: place }))
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
    use crate::launch;

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

    fn named(name: &str, place: &str, machine: &str) -> NamedDirectory {
        let absolute = name.starts_with('/');
        NamedDirectory { name: name.into(), absolute, place: place.into(), machine: machine.into() }
    }

    #[test]
    fn the_same_name_is_the_same_on_another_machine() {
        let first = named("runs/a", "/home/u/runs/a", "m");
        assert!(named("a", "/home/u/runs/a", "m").is(&first));
        assert!(named("runs/a", "/scratch/u/runs/a", "n").is(&first));
        // Not where it was started in another directory.
        assert!(!named("runs/a", "/home/v/runs/a", "m").is(&first));
        assert!(!named("runs/b", "/scratch/u/runs/b", "n").is(&first));
        let absolute = named("/data/a", "/mnt/data/a", "m");
        assert!(named("/data/a", "/data/a", "m").is(&absolute));
        // Without names of machines it is not known whether they are others.
        assert!(!named("runs/a", "/home/v/runs/a", "").is(&named("runs/a", "/home/u/runs/a", "")));
        assert!(named("/data/a", "/mnt/data/a", "").is(&named("/data/a", "/data/a", "")));
    }

    type Named = (&'static str, &'static str, &'static str);

    /// What ranks say that name these directories.
    fn agreed(all: &'static [Named]) -> Result<(), String> {
        let run = launch::threads(all.len()).run(|rank| {
            let (name, place, machine) = all[rank.rank()];
            rank.agree_on_named("--save", named(name, place, machine))
        });
        run.map(drop).map_err(|why| why.to_string())
    }

    #[test]
    fn ranks_of_one_machine_mean_one_directory() {
        const ALIKE: [Named; 4] = [
            ("runs", "/home/u/runs", "m"),
            ("../u/runs", "/home/u/runs", "m"),
            ("runs", "/scratch/u/runs", "n"),
            ("runs", "/scratch/u/runs", "n"),
        ];
        assert_eq!(agreed(&ALIKE), Ok(()));
        const APART: [Named; 4] = [
            ("runs", "/home/u/runs", "m"),
            ("runs", "/home/u/runs", "m"),
            ("runs", "/scratch/u/runs", "n"),
            ("runs", "/scratch/v/runs", "n"),
        ];
        let said = agreed(&APART).unwrap_err();
        assert!(said.contains("/scratch/v/runs") && said.contains("rank 3"), "{said}");
        // Where the first rank of its machine has it by its name alone, another has it by its place.
        const CROSSED: [Named; 3] =
            [("runs", "/home/u/runs", "m"), ("runs", "/scratch/u/runs", "n"), ("../u/runs", "/home/u/runs", "n")];
        assert!(agreed(&CROSSED).unwrap_err().contains("/home/u/runs on another machine"));
        const NAMELESS: [Named; 2] = [("runs", "/home/u/runs", ""), ("runs", "/home/v/runs", "")];
        assert!(agreed(&NAMELESS).unwrap_err().contains("/home/v/runs"));
    }
}
