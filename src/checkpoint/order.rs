//! The order in which checkpoints were written: a run goes on from the last of them.
//!
//! It is the order of their steps until a run goes back. From then on a file lists it. What the file does not list
//! counts as later, so a commit alone makes a checkpoint the latest, whenever the process is ended. Of a checkpoint
//! that is about to be replaced the file has the checksum as well: it lists that one, and not the next of this step.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use super::directory::{failed, name_of, steps};
use super::file_problem;
use super::index::{INDEX_CHECKSUM, open_file};
use crate::Error;
use crate::tensor_file::{sync_dir, write_file};

/// The name of the file: one step a line, and behind it the checksum of the index if the line is of no other.
const ORDER: &str = ".order";

/// More characters than a checksum has.
const LONGEST_CHECKSUM: u64 = 64;

/// The steps of which there are checkpoints, in the order in which they were written.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses, or if the file is not what a save writes.
pub(super) fn as_written(root: &Path) -> Result<Vec<u64>, Error> {
    ordered(root, &[])
}

/// The same, where `own` are the steps that a run has restored or written last, in this order.
///
/// # Errors
/// As [`as_written`].
pub(super) fn ordered(root: &Path, own: &[u64]) -> Result<Vec<u64>, Error> {
    let (mut steps, listed) = (steps(root)?, listed(root)?);
    // One that is not listed came later: a run was ended before it could list it, or somebody has put it there.
    let place = |steps: &[u64], step: u64| steps.iter().rposition(|other| *other == step);
    steps.sort_by_key(|step| (place(own, *step), place(&listed, *step).unwrap_or(usize::MAX), *step));
    Ok(steps)
}

/// Puts down that `own`, the steps that this run has restored or written, came after all others, in this order; and
/// with `next` that the checkpoint of this step, which is to be written, comes after all of them as soon as it is
/// there. Of a run that has never gone back that is the order of the steps, and there is no file of it.
///
/// # Errors
/// [`Error::Checkpoint`] if the system refuses.
pub(super) fn put_down_order(root: &Path, own: &[u64], next: Option<u64>) -> Result<(), Error> {
    let order = ordered(root, own)?;
    let then = order.iter().filter(|step| Some(**step) != next).chain(&next);
    let line = |step: &u64| match (Some(*step) == next).then(|| index_checksum(root, *step)).flatten() {
        Some(checksum) => format!("{step} {checksum}\n"),
        None => format!("{step}\n"),
    };
    let text: String = match order.is_sorted() && then.is_sorted() {
        true => String::new(),
        false => order.iter().map(line).collect(),
    };
    if text == read(root)? {
        return Ok(());
    }
    let path = root.join(ORDER);
    let refused = |why: io::Error| failed(&path, &why);
    if text.is_empty() {
        fs::remove_file(&path).map_err(refused)?;
    } else {
        let draft = root.join(format!("{ORDER}.unfinished"));
        write_file(&draft, text.as_bytes())?;
        fs::rename(&draft, &path).map_err(refused)?;
    }
    sync_dir(root)
}

/// The checksum that the checkpoint of a step has of its index, if there is one.
pub(super) fn index_checksum(root: &Path, step: u64) -> Option<String> {
    let file = open_file(&root.join(name_of(step)).join(INDEX_CHECKSUM)).ok()?;
    let mut text = String::new();
    file.take(LONGEST_CHECKSUM).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned()).filter(|checksum| !checksum.is_empty())
}

/// The text of the file; none if it is not there.
fn read(root: &Path) -> Result<String, Error> {
    let path = root.join(ORDER);
    // What is no file, as a pipe, would not end.
    if path.exists() && !path.is_file() {
        return Err(file_problem(&path, "is not a file: move it elsewhere, and the highest step is the latest"));
    }
    match fs::read_to_string(&path) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text.map_err(|why| failed(&path, &why)),
    }
}

/// The steps that the file lists, but for those of which there is another checkpoint now.
fn listed(root: &Path) -> Result<Vec<u64>, Error> {
    let mut steps = Vec::new();
    for line in read(root)?.lines() {
        let (step, checksum) = line.split_once(' ').map_or((line, None), |(step, checksum)| (step, Some(checksum)));
        let step = step.parse().map_err(|why| {
            let problem = format!("is no list of steps: {why}; remove it, and the highest step is the latest again");
            file_problem(&root.join(ORDER), problem)
        })?;
        if checksum.is_none_or(|checksum| index_checksum(root, step).is_none_or(|found| found == checksum)) {
            steps.push(step);
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{ORDER, as_written, put_down_order};
    use crate::checkpoint::directory::name_of;
    use crate::checkpoint::index::{INDEX, INDEX_CHECKSUM};
    use crate::tensor_file::killed::Dir;

    /// A step that is about to be replaced has its checksum on its line, and counts as later when it has another.
    #[test]
    fn one_that_is_replaced_comes_last() {
        let dir = Dir::new();
        let put = |step, checksum: &str| {
            let at = dir.0.join(name_of(step));
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join(INDEX), "").unwrap();
            fs::write(at.join(INDEX_CHECKSUM), checksum).unwrap();
        };
        let listed = || fs::read_to_string(dir.0.join(ORDER)).unwrap_or_default();
        let put_down = |own: &[u64], next| put_down_order(&dir.0, own, next).unwrap();
        [1, 2, 3].into_iter().for_each(|step| put(step, "aa\n"));
        // Nothing but the order of the steps.
        for next in [None, Some(3), Some(4)] {
            put_down(&[], next);
            assert_eq!(listed(), "");
        }
        put_down(&[1], Some(2));
        assert_eq!(listed(), "2 aa\n3\n1\n");
        assert_eq!(as_written(&dir.0).unwrap(), [2, 3, 1]);
        put(2, "bb\n");
        assert_eq!(as_written(&dir.0).unwrap(), [3, 1, 2]);
        put_down(&[1, 2], None);
        assert_eq!(listed(), "3\n1\n2\n");
        // A lower step, and one that is written again.
        fs::remove_file(dir.0.join(ORDER)).unwrap();
        put_down(&[3], Some(2));
        assert_eq!(listed(), "1\n2 bb\n3\n");
        put(2, "cc\n");
        assert_eq!(as_written(&dir.0).unwrap(), [1, 3, 2]);
    }
}
