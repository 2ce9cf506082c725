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
    /// As [`Index::of`].
    pub(super) fn index(&self) -> Result<Index, Error> {
        Index::of(&self.dir, &self.text)
    }

    /// What it is if all ranks return an error: that, or that the checkpoint is another by now, or gone. Collective.
    pub(super) fn unread(&self, why: Error) -> Unread {
        // Others are of the group: nobody asks that any more.
        if !matches!(why, Error::Checkpoint { .. }) {
            return Unread::Other(why);
        }
        match self.is_gone() {
            Ok(false) => Unread::Other(why),
            Ok(true) => Unread::Gone(file_problem(
                &self.dir,
                "is not there, or was removed or replaced while it was read, by a run that saves here and keeps the last \
                 checkpoints alone: restore the latest, or have that run keep more of them (`with_keep_last`)",
            )),
            Err(lost) => Unread::Other(lost),
        }
    }

    fn is_gone(&self) -> Result<bool, Error> {
        let is_same = || self.dir.is_dir() && index_checksum(self.root, self.step) == self.checksum;
        let gone = self.group.rank() == 0 && self.root.is_dir() && !is_same();
        Ok(self.group.broadcast(vec![u64::from(gone)], 0)?[0] > 0)
    }
}
