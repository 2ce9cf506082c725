//! By what launchers tell a run from others.

use std::collections::BTreeMap;

use super::Launcher;

/// Says to a rank what [`launch::processes`](crate::launch::processes) calls its run.
pub(in crate::launch) const RUN: &str = "BURN_PARALLEL_RUN";

/// By what the launchers of a process tell its run from others, however often its ranks are started.
///
/// A program that saves with its checkpoints what rank 0 [finds](Self::names) knows, when its ranks are started again,
/// whether a checkpoint is [of the same run](Self::include), and not one that another run has left in the directory.
/// The ranks need not find the same: torchrun has one name on each node. So rank 0 is to tell the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunNames {
    /// Each name, and whether it is of this run alone. Not so are those that people give, and that of a job, unless
    /// the launcher says that it has started the run before.
    names: Vec<(String, bool)>,
}

impl RunNames {
    /// What these variables tell; `again` says of torchrun and of Slurm whether they have started the run before.
    pub(super) fn of(launcher: Launcher, variables: &BTreeMap<String, String>, again: (bool, bool)) -> Self {
        let value = |name: &str| variables.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
        let mut names = Vec::new();
        match value(RUN) {
            Some(run) if launcher == Launcher::Torchrun => names.push((format!("launch::processes {run}"), true)),
            _ if launcher == Launcher::Torchrun => {
                // A directory of the process that torchrun is on this node, in which each start has one of its own.
                let file = value("TORCHELASTIC_ERROR_FILE");
                let dir = file.and_then(|file| file.rsplit_once("attempt_")).map(|(dir, _)| dir);
                names.extend(dir.map(|dir| (format!("torchrun in {dir}"), true)));
                let id = value("TORCHELASTIC_RUN_ID").filter(|id| *id != "none");
                names.extend(id.map(|id| (format!("torchrun --rdzv-id {id}"), again.0)));
            }
            _ => {}
        }
        names.extend(value("SLURM_JOB_ID").map(|job| (format!("Slurm job {job}"), again.1)));
        Self { names }
    }

    /// The names, to be saved.
    pub fn names(&self) -> Vec<String> {
        self.names.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Whether no launcher has given the run a name.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether what was saved with these names was saved by this run: by these ranks, or by an earlier start of them.
    pub fn include(&self, saved: &[String]) -> bool {
        self.names.iter().any(|(name, alone)| *alone && saved.contains(name))
    }
}
