//! A checkpoint that the ranks of a group read together, while another run may save in the same directory, and remove
//! it.

use std::path::{Path, PathBuf};

use super::agree::{attempt, together};
use super::directory::name_of;
use super::file_problem;
use super::index::{Index, index_text};
use super::order::index_checksum;
use crate::Error;
use crate::comm::Communicator;

/// A checkpoint by the index that rank 0 has read: so it is the same one that all ranks read.
pub(super) struct JointReading<'a> {
    pub(super) dir: PathBuf,
    root: &'a Path,
    step: u64,
    group: &'a Communicator,
    /// Of the index, on rank 0.
    checksum: Option<String>,
    text: Vec<u8>,
}

/// Why the ranks have not read a checkpoint.
pub(super) enum Unread {
    /// It is not there, or not any more.
    Gone(Error),
    /// Something else.
    Other(Error),
}

impl Unread {
    pub(super) fn why(self) -> Error {
        match self {
            Self::Gone(why) | Self::Other(why) => why,
        }
    }
}

impl<'a> JointReading<'a> {
    /// Begins with the checkpoint of a step. Collective.
    pub(super) fn begin(root: &'a Path, step: u64, group: &'a Communicator) -> Result<Self, Unread> {
        let (dir, first) = (root.join(name_of(step)), group.rank() == 0);
        let checksum = if first { index_checksum(root, step) } else { None };
        let mut reading = Self { dir, root, step, group, checksum, text: Vec::new() };
        let text = if first { attempt(|| index_text(&reading.dir)) } else { Ok(Vec::new()) };
        let text = together(text, group).map_err(|why| reading.unread(why))?;
        reading.text = group.share_bytes(text, 0).map_err(Unread::Other)?;
        Ok(reading)
    }

    /// # Errors
    /// As [`Index::of`]; [`Error::Checkpoint`] if it is the index of another step.
    pub(super) fn index(&self) -> Result<Index, Error> {
        let index = Index::of(&self.dir, &self.text)?;
        if index.step != self.step {
            let own = name_of(index.step);
            let problem = format!("is the checkpoint of step {}: it was renamed, call it `{own}` again", index.step);
            return Err(file_problem(&self.dir, problem));
        }
        Ok(index)
    }

    /// What it is if all ranks return an error: that, or that the checkpoint is another by now, or gone. Collective.
    pub(super) fn unread(&self, why: Error) -> Unread {
        // Others are of the group: nobody asks that any more.
        if !matches!(why, Error::Checkpoint { .. }) {
            return Unread::Other(why);
        }
        let is = match self.is_gone() {
            Ok(Gone::No) => return Unread::Other(why),
            Ok(Gone::Before) => "is no checkpoint that can be read: `Checkpointer::steps` has those that there are",
            Ok(Gone::Meanwhile) => {
                "was removed or replaced while it was read, by a run that saves here and keeps the last checkpoints alone: \
                 restore the latest, or have that run keep more of them (`with_keep_last`)"
            }
            Err(lost) => return Unread::Other(lost),
        };
        Unread::Gone(file_problem(&self.dir, format!("{is} ({why})")))
    }

    fn is_gone(&self) -> Result<Gone, Error> {
        let gone = match index_checksum(self.root, self.step) {
            _ if self.group.rank() > 0 || !self.root.is_dir() => Gone::No,
            // What is there and has no checksum is damaged.
            None if self.checksum.is_none() && !self.dir.is_dir() => Gone::Before,
            now if self.dir.is_dir() && now == self.checksum => Gone::No,
            _ => Gone::Meanwhile,
        };
        let told = self.group.broadcast(vec![gone as u64], 0)?[0];
        Ok([Gone::No, Gone::Before].into_iter().find(|it| *it as u64 == told).unwrap_or(Gone::Meanwhile))
    }
}

/// Whether a checkpoint is gone that is being read.
#[derive(Clone, Copy)]
enum Gone {
    No,
    /// It was not there to begin with.
    Before,
    Meanwhile,
}
