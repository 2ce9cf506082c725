//! A directory that a run saves in, which no other run does meanwhile.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::agree::{attempt, together};
use super::directory::{check_free, checkpoint_of, clean_up, is_draft, names, put_back};
use super::draft_lock::{DraftWriter, Lock, lock_of, writer_of};
use super::order::index_checksum;
use super::{fault, file_problem};
use crate::Error;
use crate::comm::tcp::nonce;
use crate::comm::{Communicator, machine};
use crate::lock::lock;
use crate::params::share_text;
use crate::tensor_file::Draft;

/// How often a run makes a draft: others may ask for its lock at the moment, and so may have the first.
const TRIES: u32 = 1000;

/// What is said of what another run has made.
const MADE: &str = "was made since this one opened the directory, and not by it";

/// The directory, and on rank 0 what was in it when it was opened: of checkpoints with the checksum of their index.
#[derive(Debug, Clone)]
pub(super) struct Opened {
    pub(super) root: PathBuf,
    there: Arc<HashMap<String, Option<String>>>,
    /// The steps whose checkpoints this run has given their names, or tried to.
    committed: Arc<Mutex<HashSet<u64>>>,
    /// A part of the names of all its drafts, which those of no other run have: the [`machine`] of rank 0 and a number.
    own: String,
}

impl Opened {
    /// Makes the directory if it is not there. Collective.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be made or read, or is a checkpoint itself; the error of the group.
    pub(super) fn new(dir: &Path, group: &Communicator) -> Result<Self, Error> {
        let open = || {
            if let Some(step) = checkpoint_of(dir) {
                let problem = format!("is itself the checkpoint of step {step}: open the directory that it is in");
                return Err(file_problem(dir, problem));
            }
            fs::create_dir_all(dir).map_err(|why| file_problem(dir, format!("cannot be made: {why}")))?;
            put_back(dir)?;
            let checksum = |name: &String| checkpoint_of(&dir.join(name)).and_then(|step| index_checksum(dir, step));
            Ok(names(dir)?.into_iter().map(|name| (name.clone(), checksum(&name))).collect())
        };
        let there = if group.rank() == 0 { attempt(open) } else { Ok(HashMap::new()) };
        let there = Arc::new(together(there, group)?);
        let lacks = |why| file_problem(dir, format!("is not there: {why}; all ranks need it in one file system"));
        let root = together(dir.canonicalize().map_err(lacks), group)?;
        let own = nonce()[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let own = share_text(&format!("{}-{own}", machine()), group)?;
        Ok(Self { root, there, committed: Arc::default(), own })
    }

    /// Where the checkpoint of this directory is made.
    ///
    /// # Errors
    /// As [`Draft::new`].
    pub(super) fn draft(&self, dir: &Path) -> Result<Draft, Error> {
        Ok(Draft::new(dir, true)?.called(&self.own))
    }

    /// Makes a draft, which is this run's until what is returned is dropped; nothing where the system has no such
    /// locks. On rank 0.
    ///
    /// # Errors
    /// As [`Draft::begin`]; [`Error::Checkpoint`] if others do not let go of it.
    pub(super) fn begin(&self, draft: &Draft) -> Result<Option<File>, Error> {
        for _ in 0..TRIES {
            draft.begin()?;
            fault::point("draft begun");
            match lock_of(&draft.made_in) {
                // Who had the lock before may have removed it.
                Lock::Own(held) if draft.made_in.is_dir() => return Ok(Some(held)),
                Lock::Refused => return Ok(None),
                Lock::Own(_) | Lock::Anothers | Lock::Gone => {}
            }
        }
        Err(file_problem(&draft.made_in, "is locked, or removed, by others again and again: end them"))
    }

    /// What is known of the run that a draft is of.
    fn writer(&self, name: &str) -> DraftWriter {
        match name.contains(&self.own) {
            true => DraftWriter::Ended(None),
            false => match writer_of(&self.root.join(name)) {
                // What was there before is taken for what a killed run has left.
                DraftWriter::Unknown if self.there.contains_key(name) => DraftWriter::Ended(None),
                writer => writer,
            },
        }
    }

    /// Removes what runs that have ended have left half written or half removed. On rank 0.
    ///
    /// # Errors
    /// As [`clean_up`].
    pub(super) fn clean_up(&self) -> Result<(), Error> {
        clean_up(&self.root, |name| self.writer(name))
    }

    /// That no other run has saved here since, or does now. On rank 0.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one has, which names what it has made; if the directory cannot be read.
    pub(super) fn check_alone(&self) -> Result<(), Error> {
        let committed = lock(&self.committed);
        let theirs = |name: &String| match (checkpoint_of(&self.root.join(name)), self.there.get(name)) {
            (Some(step), _) if committed.contains(&step) => false,
            // It may have taken the place of one that was there.
            (Some(step), Some(before)) => *before != index_checksum(&self.root, step),
            (Some(_), None) => true,
            (None, _) => is_draft(name) && !matches!(self.writer(name), DraftWriter::Ended(_)),
        };
        let Some(name) = names(&self.root)?.into_iter().find(theirs) else { return Ok(()) };
        let (is, instead) = match (is_draft(&name), self.there.contains_key(&name)) {
            (true, true) => ("is being written", ""),
            (true, false) => {
                (MADE, ". If it was killed in the middle of a save, remove that, or open this directory again")
            }
            (false, _) => (MADE, " and open this directory again"),
        };
        let problem = format!(
            "another run saves here: `{name}` {is}. Give each run a directory of its own, or end the other one{instead}"
        );
        Err(file_problem(&self.root, problem))
    }

    /// Gives a draft, that of the checkpoint of this step, its name. On rank 0.
    ///
    /// # Errors
    /// As [`check_alone`](Self::check_alone), [`check_free`] and [`Draft::commit`].
    pub(super) fn commit(&self, draft: &Draft, step: u64) -> Result<(), Error> {
        self.check_alone()?;
        check_free(&self.root, step)?;
        lock(&self.committed).insert(step);
        draft.commit()
    }

    /// Why a draft could not be written: it may be gone.
    pub(super) fn lost(&self, draft: &Draft, why: Error) -> Error {
        if !self.root.is_dir() || draft.made_in.is_dir() {
            return why;
        }
        file_problem(
            &draft.made_in,
            format!(
                "is not there while it is written ({why}): a run that saves in the same directory takes it for what a killed one \
                 has left, or this rank does not see the file system that rank 0 made it in. Give each run a directory of its \
                 own, which all its ranks see"
            ),
        )
    }
}
