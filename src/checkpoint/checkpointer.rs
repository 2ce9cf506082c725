//! Saves and restores: the entry.

use std::fmt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::json;

use super::agree::{attempt, together};
use super::background::Running;
use super::config::CheckpointConfig;
use super::contents::{OwnSteps, Snapshot};
use super::directory::{put_back, steps};
use super::job::{self, Saved};
use super::moments::KnownStates;
use super::opened::Opened;
use super::order::as_written;
use super::params::Statistics;
use super::reading::{JointReading, Unread};
use super::restore::{self, Restored};
use super::state::TrainState;
use super::{checkpoint_error, file_problem, value};
use crate::Error;
use crate::comm::Communicator;
use crate::train::ParallelModule;

/// How often a checkpoint that is removed while it is read is followed by another try, with the latest then.
const MOST_GONE: usize = 4;

/// Writes checkpoints into a directory, and reads them. One for each rank of a world; all its calls are collective, in
/// the same order on all ranks.
///
/// The directory is in one file system that all ranks see. Of the ranks rank 0 makes and removes directories, and says
/// which checkpoint is the latest; every rank reads and writes its own part.
///
/// One run at a time saves in a directory, with one `Checkpointer`; any number may read there meanwhile.
pub struct Checkpointer {
    group: Communicator,
    opened: Opened,
    config: CheckpointConfig,
    /// What is known of the optimizers that were saved.
    known: KnownStates,
    steps: OwnSteps,
    /// The save that runs in the background.
    running: Option<Running>,
    /// Why nothing is saved or read any more.
    stuck: Option<Error>,
}

impl Checkpointer {
    /// Opens a directory of checkpoints for the ranks of `world`, which are all that the model is spread over. It is
    /// made if it is not there. What a save that was ended has left in it stays until the first save, so others may
    /// open the directory of a run, and read, while that saves. Collective.
    ///
    /// # Errors
    /// On all ranks alike: [`Error::Checkpoint`] if the directory cannot be made or read, or is itself the checkpoint
    /// of a step; [`Error::Settings`] if ranks [pass different ones](Communicator::agree_on_directory) or other
    /// configs; the error of the world.
    pub fn new(world: &Communicator, dir: impl AsRef<Path>, config: CheckpointConfig) -> Result<Self, Error> {
        let group = world.split_named("checkpoint", 0, world.rank() as i64)?;
        let dir = dir.as_ref();
        group.agree_on_directory("directory", dir)?;
        group.agree_on(&json!({ "CheckpointConfig": config }))?;
        let opened = Opened::new(dir, &group)?;
        Ok(Self {
            group,
            opened,
            config,
            known: KnownStates::default(),
            steps: OwnSteps::default(),
            running: None,
            stuck: None,
        })
    }

    /// Saves a state as the checkpoint of a step, and waits until it is on the disk: the model has made so many steps.
    /// One of the same step is replaced, and those that were written before are removed as the
    /// [config](CheckpointConfig::with_keep_last) says.
    ///
    /// Every rank writes the slices that it holds; what several hold alike is written once, by those that have least to
    /// write. Replicas may have seen different data: of running statistics those of the first are saved. Beside the
    /// state a rank holds copies of a few moments at a time, those of 2 MiB of parameters or of one, and of parameters
    /// that are on a device or not contiguous, one at a time.
    ///
    /// # Errors
    /// On all ranks alike: [`Error::Checkpoint`] if a rank cannot write, if another run saves in the same directory, if
    /// the ranks hold different models, or if a moment or a value cannot be saved: the state stays as it is, and so do
    /// the checkpoints that there are, so that training can go on. [`Error::Pipeline`]'s words in it if a pipeline is
    /// not cut yet. [`Error::Optimizer`], with which the world fails, if the ranks have not updated the model alike, in
    /// the last update or before. The error of the world. Old checkpoints that cannot be removed are a warning in the
    /// log.
    pub fn save<P: ParallelModule>(&mut self, step: u64, state: TrainState<'_, P>) -> Result<Saved, Error> {
        self.wait()?;
        let snapshot = together(attempt(|| self.snapshot(step, &state)), &self.group)?;
        job::run(snapshot, &self.opened, &self.config, &self.group)
    }

    /// As [`save`](Self::save), in the background: returns at once, while training goes on. A save that still runs is
    /// waited for first. The outcome is that of [`wait`](Self::wait), or an error of the next call.
    ///
    /// Nothing is copied beforehand: the save shares the tensors, and what trains on writes its new values elsewhere.
    /// So until the save is done, parameters and moments take memory twice as they change.
    ///
    /// # Errors
    /// As [`save`](Self::save), also that of the save before.
    pub fn save_async<P: ParallelModule>(&mut self, step: u64, state: TrainState<'_, P>) -> Result<(), Error> {
        self.wait()?;
        let snapshot = together(attempt(|| self.snapshot(step, &state)), &self.group)?;
        let progress = snapshot.progress.clone();
        let (opened, config, group) = (self.opened.clone(), self.config.clone(), self.group.clone());
        // The save begins when all ranks have a thread for it: until then its group is this thread's.
        let running = Running::prepare(step, progress, move || job::run(snapshot, &opened, &config, &group));
        let running = together(running, &self.group)?;
        running.begin();
        self.running = Some(running);
        Ok(())
    }

    fn snapshot<P: ParallelModule>(&self, step: u64, state: &TrainState<'_, P>) -> Result<Snapshot, Error> {
        Snapshot::of(step, state, self.group.rank() == 0, (self.known.clone(), self.steps.clone()))
    }

    /// Waits for the save in the background, if there is one, and gives its outcome. Dropping the checkpointer waits as
    /// well, and logs an error. The wait ends: a rank that does not come is an error after the world's time-out, and so
    /// is a disk that takes nothing for twice as long. The save is then left to itself, and this checkpointer does
    /// nothing any more.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn wait(&mut self) -> Result<Option<Saved>, Error> {
        if let Some(error) = &self.stuck {
            return Err(error.clone());
        }
        let Some(running) = self.running.take() else { return Ok(None) };
        match running.wait(self.group.timeout().saturating_mul(2), (self.group.rank(), &self.opened.root)) {
            Ok(outcome) => outcome.map(Some),
            Err(error) => Err(self.stuck.insert(error).clone()),
        }
    }

    /// The step of the latest checkpoint, as rank 0 finds it; none if there is none. The latest is the one that was
    /// written last: the highest step, unless a run went back to an earlier one with
    /// [`restore_step`](Self::restore_step). From its first save on that run's are the latest, though the run before
    /// has come further; the same order says which are [kept](CheckpointConfig::with_keep_last).
    ///
    /// # Errors
    /// On all ranks alike: [`Error::Checkpoint`] if the directory cannot be read, or if a save that was killed has left
    /// a checkpoint under a hidden name, which might be the latest, and this process may not write there; the error of
    /// a save in the background; that of the world.
    pub fn latest(&mut self) -> Result<Option<u64>, Error> {
        let look = |root: &Path| put_back(root)?.map_or_else(|| as_written(root), Err);
        Ok(self.found(look)?.last().copied())
    }

    /// The steps of all checkpoints, as rank 0 finds them, from the lowest on.
    ///
    /// # Errors
    /// As [`latest`](Self::latest).
    pub fn steps(&mut self) -> Result<Vec<u64>, Error> {
        self.found(|root| put_back(root).and_then(|_| steps(root)))
    }

    /// What rank 0 finds in the directory, in which all that it can put back has its name again: one that another run
    /// replaces at the moment is there.
    fn found(&mut self, look: fn(&Path) -> Result<Vec<u64>, Error>) -> Result<Vec<u64>, Error> {
        self.wait()?;
        let root = &self.opened.root;
        let found = if self.group.rank() == 0 { attempt(|| look(root)) } else { Ok(Vec::new()) };
        let found = together(found, &self.group)?;
        let bytes = self.group.share_bytes(found.iter().flat_map(|step| step.to_le_bytes()).collect(), 0)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|step| u64::from_le_bytes(*step)).collect())
    }

    /// A [value](TrainState::with_value) of the checkpoint of a step by itself, as settings that a model is made from;
    /// `None` if the checkpoint has none of this name.
    ///
    /// # Errors
    /// On all ranks alike: [`Error::Checkpoint`] if there is no checkpoint of this step, if it is damaged, or if the
    /// value is not what `T` takes for it; that of a save in the background; that of the world.
    pub fn read_value<T: DeserializeOwned>(&mut self, step: u64, name: &str) -> Result<Option<T>, Error> {
        self.wait()?;
        let reading = JointReading::begin(&self.opened.root, step, &self.group).map_err(Unread::why)?;
        let read = || {
            let value = reading.index()?.values.remove(name);
            value.map(value::from_json).transpose().map_err(|why| {
                file_problem(&reading.dir, format!("value `{name}` is not what this program takes for it: {why}"))
            })
        };
        together(attempt(read), &self.group)
    }

    /// Gives a state the values of the latest checkpoint, or leaves it as it is if there is none. Whatever mesh it was
    /// saved on: each rank reads the slices that it needs, checks them, and pads and casts them as its own parameters
    /// are. Moments are of the parameter's dtype as well where the optimizer can load such, as the
    /// [fused](crate::optim::FusedOptimizer) can; burn's own loads them in its default dtype, and from then on updates
    /// parameters of fewer bits in that. Fused ones, and those that [load on the host](crate::optim::LoadOnHost), have
    /// them on the device of their parameter alone, others on burn's default device first.
    ///
    /// A pipeline whose stages may share parameters is [prepared](ParallelModule::prepare) before its optimizer is
    /// restored: each stage that holds one needs its moments, and which do is known then. Without it the first step of
    /// one that does share some is an error.
    ///
    /// A state that asks for less than a checkpoint has, as for the model alone, reads that; but the parameters of the
    /// model must be those of the checkpoint, unless the [config](CheckpointConfig::with_allow_missing) allows for
    /// more or for fewer.
    ///
    /// A run that saves here meanwhile may remove the checkpoint that is read, as one that keeps its last alone does:
    /// then the next one is read instead, some times at most.
    ///
    /// # Errors
    /// On all ranks alike, with the state as it was: [`Error::Checkpoint`] if a file is damaged or missing, or if the
    /// checkpoint does not fit, also if the optimizer loads moments with fewer digits than their parameter: it names
    /// file, path and what to do. The error of the world.
    pub fn restore<P: ParallelModule>(&mut self, mut state: TrainState<'_, P>) -> Result<Option<Restored>, Error> {
        let mut gone = Vec::new();
        loop {
            let Some(step) = self.latest()? else { return gone.pop().map_or(Ok(None), Err) };
            match self.read(step, &mut state) {
                Err(Unread::Gone(why)) if gone.len() < MOST_GONE => gone.push(why),
                read => return read.map(Some).map_err(Unread::why),
            }
        }
    }

    /// As [`restore`](Self::restore), from the checkpoint of a step.
    ///
    /// # Errors
    /// As [`restore`](Self::restore); also if there is none of this step, or if another run removes it meanwhile.
    pub fn restore_step<P: ParallelModule>(
        &mut self,
        step: u64,
        mut state: TrainState<'_, P>,
    ) -> Result<Restored, Error> {
        self.wait()?;
        self.read(step, &mut state).map_err(Unread::why)
    }

    /// Gives a state the values of the checkpoint of a step, or leaves it as it is.
    fn read<P: ParallelModule>(&self, step: u64, state: &mut TrainState<'_, P>) -> Result<Restored, Unread> {
        let reading = JointReading::begin(&self.opened.root, step, &self.group)?;
        let before = Statistics::of(state.model);
        let (config, first) = (&self.config, self.group.rank() == 0);
        let loaded = attempt(|| restore::load(&reading, state, config, first));
        match together(loaded.map_err(|why| of_checkpoint(&reading.dir, why)), &self.group) {
            Ok(loaded) => {
                self.steps.add(step);
                Ok(loaded.put(state))
            }
            Err(error) => {
                before.put_back(state.model);
                Err(reading.unread(error))
            }
        }
    }
}

/// What is wrong with the checkpoint in this directory, which is named if it is not yet.
fn of_checkpoint(dir: &Path, why: Error) -> Error {
    let problem = match why {
        Error::Checkpoint { problem } => problem,
        Error::InvalidArgument { .. } => why.to_string(),
        why => return why,
    };
    let dir = dir.display().to_string();
    checkpoint_error(if problem.contains(&dir) { problem } else { format!("{dir}: {problem}") })
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            let error = error.to_string();
            // A lost rank is told of, with all that the ranks did, by whoever meets it.
            log::error!("the last checkpoint was not saved: {}", error.lines().next().unwrap_or_default());
        }
    }
}

impl fmt::Debug for Checkpointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpointer")
            .field("root", &self.opened.root)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
