//! Where a directory is, whether it is there yet or not.

use std::path::{Component, Path, PathBuf};
use std::{env, fs};

/// Where a directory is, from wherever it is named: as text, by which ranks make sure that they were given the same.
/// Links stay what they are called: machines may have the same file system in other places behind them.
pub(crate) fn place(dir: &Path) -> String {
    let mut place = PathBuf::new();
    for part in here().join(dir).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(place.pop()),
            part => place.push(part),
        }
    }
    place.display().to_string()
}

/// The working directory, by the name that the shell has for it.
fn here() -> PathBuf {
    let here = env::current_dir().unwrap_or_default();
    let called = env::var_os("PWD").map(PathBuf::from).filter(|called| called.is_absolute());
    called.filter(|called| fs::canonicalize(called).is_ok_and(|called| called == here)).unwrap_or(here)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_place_are_one() {
        let of = |name: &str| place(Path::new(name));
        assert_eq!(of("runs/a"), here().join("runs").join("a").display().to_string());
        for name in ["runs/./a", "./runs/a/", "runs//a", "runs/b/../a"] {
            assert_eq!(of(name), of("runs/a"), "{name}");
        }
        assert_eq!(of(&here().join("runs/a").display().to_string()), of("runs/a"));
        assert!(of("7") != of("07") && of("../7") != of("7"));
    }
}
