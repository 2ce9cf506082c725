//! Where a run goes on.

use std::fs;
use std::path::{Path, PathBuf};

use burn_parallel::checkpoint::saved_steps;
use burn_parallel::launch::{ProcessInfo, RunNames};
use burn_parallel::prelude::*;

use super::flags::count;
use super::program::refused;
use super::saving::{RUN, STEPS, SaveFlags, has_checkpoints, writable};

/// How the ranks were started.
fn process() -> Option<ProcessInfo> {
    ProcessInfo::from_env().ok()
}

/// By what launchers know this run.
pub fn run_names() -> Vec<String> {
    process().map_or(Vec::new(), |process| process.run.names())
}

/// What rank 0 says.
fn of_rank_0(world: &Communicator, says: bool) -> Result<bool, Error> {
    Ok(world.broadcast(vec![u64::from(says)], 0)?[0] > 0)
}

/// Whether two paths are of one directory.
fn same(one: &Path, other: &Path) -> bool {
    real(one) == real(other)
}

/// Where a path leads, whether there is something or not.
fn real(path: &Path) -> PathBuf {
    let beside = || {
        let (parent, name) = (path.parent()?, path.file_name()?);
        Some(real(if parent == Path::new("") { Path::new(".") } else { parent }).join(name))
    };
    fs::canonicalize(path).ok().or_else(beside).unwrap_or_else(|| path.to_owned())
}

/// Why a run is not saved in a directory.
pub(super) fn taken(dir: &Path) -> String {
    format!("--save {0}: there are checkpoints already: give --resume {0} too, or another directory", dir.display())
}

/// Why no run goes on from a directory.
fn nothing(dir: &Path) -> String {
    let why = if dir.exists() && !dir.is_dir() { "it is not a directory" } else { "there is no checkpoint" };
    format!("--resume {}: {why}", dir.display())
}

/// The directory of the run whose checkpoints are in `all`, if that is within it.
fn run_of(all: &Path, folder: fn(&Path) -> PathBuf) -> Option<&Path> {
    let run = all.ancestors().find(|run| folder(run) == all)?;
    Some(if run == Path::new("") { Path::new(".") } else { run })
}

/// What is given instead of `dir`, and what that is, if it lies in the directory of a run.
fn instead_of(dir: &Path, folder: fn(&Path) -> PathBuf) -> Option<String> {
    let step = || dir.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    if let (Some(all), Some(step)) = (dir.parent(), step())
        && let Some(run) = run_of(all, folder).filter(|_| saved_steps(all).is_ok_and(|steps| steps.contains(&step)))
    {
        return Some(format!("it is one checkpoint: give --resume {} --resume-step {step}", run.display()));
    }
    let run = run_of(dir, folder).filter(|_| folder(dir) != dir && has_checkpoints(dir))?;
    Some(format!("it is where a run has its checkpoints: give --resume {}", run.display()))
}

/// The step of the checkpoint that was written last. Collective.
///
/// # Errors
/// What is wrong with the directory, for which the program ends with exit code 2.
fn latest(checkpoints: &mut Checkpointer) -> Result<Option<u64>, Error> {
    checkpoints.latest().map_err(|why| match why {
        Error::Checkpoint { problem } => refused(Error::User(problem)),
        why => why,
    })
}

/// How often a checkpoint that is gone when it is read is followed by the one that is the latest then.
const MOST_GONE: usize = 4;

/// Reads the latest checkpoint, which was that of `step`: a run that saves there may remove it meanwhile. Returns the
/// step of the one that was read, or that could not be. Collective.
fn read_latest<T>(
    checkpoints: &mut Checkpointer,
    mut step: u64,
    mut read: impl FnMut(&mut Checkpointer, u64) -> Result<T, Error>,
) -> (u64, Result<T, Error>) {
    for _ in 0..MOST_GONE {
        let outcome = read(checkpoints, step);
        let Err(Error::Checkpoint { .. }) = outcome else { return (step, outcome) };
        match latest(checkpoints) {
            Ok(Some(now)) if now != step => step = now,
            Ok(_) => return (step, outcome),
            Err(why) => return (step, Err(why)),
        }
    }
    let outcome = read(checkpoints, step);
    (step, outcome)
}

/// A checkpoint that a run goes on from.
struct Origin<'a> {
    dir: &'a Path,
    checkpoints: Checkpointer,
    /// None if there is none.
    step: Option<u64>,
}

impl SaveFlags {
    /// Whether there is nothing to go on from, nothing can be saved, or what is to be comes among checkpoints of
    /// another run, which are in `folder` of `--save`. Where a launcher may have started this run before, there may be
    /// its own there: ranks find that out together.
    pub fn check(&self, folder: fn(&Path) -> PathBuf) -> Result<(), String> {
        let known = process().is_some_and(|process| process.restarts > 0 || !process.run.is_empty());
        if let Some(dir) = &self.resume {
            if let Some(instead) = instead_of(dir, folder) {
                return Err(format!("--resume {}: {instead}", dir.display()));
            }
            if !known && !self.saves_in(dir) && !has_checkpoints(&folder(dir)) {
                return Err(nothing(dir));
            }
        }
        let resumed = |dir: &Path| self.resume.as_ref().is_some_and(|from| same(from, dir));
        match &self.save {
            Some(dir) if !known && !resumed(dir) && has_checkpoints(&folder(dir)) => Err(taken(dir)),
            Some(dir) => writable(dir),
            None => Ok(()),
        }
    }

    /// Whether this is the directory that the run saves in: then it begins anew if there is no checkpoint.
    fn saves_in(&self, dir: &Path) -> bool {
        self.save.as_ref().is_some_and(|save| same(save, dir))
    }

    /// What this run has saved itself before its ranks were started again, if it has. Collective.
    fn own(
        &self,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        strategy: &Strategy,
    ) -> Result<Option<Origin<'_>>, Error> {
        let Some(dir) = &self.save else { return Ok(None) };
        let apart = self.resume.as_ref().is_none_or(|from| !same(from, dir));
        // Otherwise it goes on from the last one there in any case.
        let asks = (apart || self.resume_step.is_some()) && has_checkpoints(&folder(dir));
        if !of_rank_0(world, asks)? {
            return Ok(None);
        }
        let mut checkpoints = self.open(dir, world, folder, strategy)?;
        let Some(last) = latest(&mut checkpoints)? else { return Ok(None) };
        let saved: Vec<String> = match checkpoints.read_value(last, RUN) {
            // Whose it is cannot be told any more.
            Err(Error::Checkpoint { .. }) => Vec::new(),
            saved => saved?.unwrap_or_default(),
        };
        let (run, restarts) = process().map_or((RunNames::default(), 0), |process| (process.run, process.restarts));
        // In a directory that only this run saves in, there was nothing at its first start.
        let own = run.include(&saved) || apart && restarts > 0;
        Ok(of_rank_0(world, own)?.then_some(Origin { dir, checkpoints, step: Some(last) }))
    }

    /// Where to go on: from what this run has saved itself, or else as `--resume` and `--resume-step` say.
    fn origin(
        &self,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        strategy: &Strategy,
    ) -> Result<Option<Origin<'_>>, Error> {
        let own = self.own(world, folder, strategy)?;
        let (None, Some(dir)) = (&own, &self.resume) else { return Ok(own) };
        // A directory that is only read is not made.
        if !of_rank_0(world, self.saves_in(dir) || has_checkpoints(&folder(dir)))? {
            return Err(refused(Error::user(nothing(dir))));
        }
        let mut checkpoints = self.open(dir, world, folder, strategy)?;
        let step = match self.resume_step {
            None => latest(&mut checkpoints)?,
            step => step,
        };
        Ok(Some(Origin { dir, checkpoints, step }))
    }

    /// Goes on from a checkpoint of `--resume`, which has them in `folder`, in a run of so many steps. `restore` is
    /// given the step of it, and of another one if that is gone. Returns how many steps were made already, and the
    /// checkpoints if the run saves there too. Collective.
    pub fn resume(
        &self,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        (strategy, all): (&Strategy, usize),
        mut restore: impl FnMut(&mut Checkpointer, u64) -> Result<(), Error>,
    ) -> Result<(usize, Option<Checkpointer>), Error> {
        let Some(Origin { dir, mut checkpoints, step }) = self.origin(world, folder, strategy)? else {
            return Ok((0, None));
        };
        let saves = self.saves_in(dir);
        // Nothing is there yet: it begins.
        let Some(step) = step else {
            return match saves {
                true => Ok((0, Some(checkpoints))),
                false => Err(refused(Error::user(nothing(dir)))),
            };
        };
        let there = checkpoints.steps()?;
        if self.resume_step.is_some() && !there.contains(&step) {
            let problem = format!("--resume-step {step}: --resume {dir:?} has checkpoints of steps [{}]", list(&there));
            return Err(refused(Error::user(problem)));
        }
        let mut read = |checkpoints: &mut Checkpointer, step| {
            let was = checkpoints.read_value::<usize>(step, STEPS)?;
            restore(checkpoints, step).map(|()| was)
        };
        let (step, was) = match self.resume_step {
            None => read_latest(&mut checkpoints, step, read),
            Some(_) => (step, read(&mut checkpoints, step)),
        };
        let steps = step as usize;
        let was = was.map_err(|why| match why {
            Error::Checkpoint { problem } => {
                let others: Vec<u64> = there.iter().copied().filter(|other| *other != step).collect();
                let advice = match others.is_empty() {
                    true => String::new(),
                    false => format!("; --resume-step goes on from another one: {}", list(&others)),
                };
                let problem = problem.replace("`restore_step`", "--resume-step");
                refused(Error::user(format!("{problem}{advice}")))
            }
            Error::User(problem) => refused(Error::User(problem)),
            // Of other ranks.
            why => why,
        })?;
        if steps > all {
            return Err(refused(Error::user(format!(
                "the whole run has {all} steps, and --resume {dir:?} has made {steps}: give more steps"
            ))));
        }
        if let Some(was) = was.filter(|was| *was != all && world.rank() == 0) {
            eprintln!(
                "the whole run has {all} steps from here on, and had {was}: a schedule of learning rates over them is another"
            );
        }
        match world.rank() {
            0 if steps == all => eprintln!("nothing to do: --resume {dir:?} has made all {steps} steps of the run"),
            0 => eprintln!("goes on after step {steps} of {all}, on {}", count(world.size(), "rank")),
            _ => {}
        }
        Ok((steps, saves.then_some(checkpoints)))
    }
}

fn list(steps: &[u64]) -> String {
    steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}
