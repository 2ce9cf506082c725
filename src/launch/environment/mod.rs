//! Rank and world size from the environment variables of torchrun, Slurm, Open MPI and MPICH.

mod invalid;
mod master;
mod run_names;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use self::invalid::invalid;
#[cfg(unix)]
pub(super) use self::run_names::RUN;
pub use self::run_names::RunNames;
use crate::Error;

/// Says to a rank how often [`launch::processes`](super::processes) has started the ranks before.
pub(super) const RESTART: &str = "BURN_PARALLEL_RESTART";

/// Who started this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// torchrun, [`launch::processes`](super::processes), or anything else that sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `mpirun` of MPICH, Intel MPI and other PMI launchers.
    Mpich,
    /// `srun`.
    Slurm,
}

impl Launcher {
    const ALL: [Self; 4] = [Self::Torchrun, Self::OpenMpi, Self::Mpich, Self::Slurm];

    /// Whose variables this process has, whether or not they make sense: see [`of_variables`](Self::of_variables).
    pub fn of_env() -> Option<Self> {
        Self::of_variables(&variables_of_env())
    }

    /// Whose variables these are: those of rank or world size of some launcher, of several the one that
    /// [`ProcessInfo::from_variables`] reads. `None` where no launcher has started the process. So a program that can
    /// do without a launcher tells that from variables that are incomplete or wrong.
    ///
    /// ```
    /// use burn_parallel::launch::{Launcher, ProcessInfo};
    ///
    /// let variables = [("RANK".to_owned(), "0".to_owned())].into();
    /// assert_eq!(Launcher::of_variables(&variables), Some(Launcher::Torchrun));
    /// assert!(ProcessInfo::from_variables(&variables).is_err()); // WORLD_SIZE is missing
    /// assert_eq!(Launcher::of_variables(&Default::default()), None);
    /// ```
    pub fn of_variables(variables: &BTreeMap<String, String>) -> Option<Self> {
        Self::all_of(variables).next()
    }

    fn all_of(variables: &BTreeMap<String, String>) -> impl Iterator<Item = Self> {
        let says = |launcher: &Self| launcher.variables()[..2].iter().any(|name| variables.contains_key(*name));
        Self::ALL.into_iter().filter(says)
    }

    /// The variables of rank, world size, local rank and local size.
    fn variables(self) -> [&'static str; 4] {
        match self {
            Self::Torchrun => ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
            Self::OpenMpi => [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ],
            Self::Mpich => ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
            Self::Slurm => ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"],
        }
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torchrun => "torchrun (RANK, WORLD_SIZE)",
            Self::OpenMpi => "Open MPI (OMPI_COMM_WORLD_*)",
            Self::Mpich => "PMI (PMI_RANK, PMI_SIZE)",
            Self::Slurm => "Slurm (SLURM_PROCID, SLURM_NTASKS)",
        })
    }
}

fn variables_of_env() -> BTreeMap<String, String> {
    let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// The place of this process among those that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Whose variables said so.
    pub launcher: Launcher,
    /// Index among all processes.
    pub rank: usize,
    /// Processes in all.
    pub size: usize,
    /// Index among those on this machine.
    pub local_rank: usize,
    /// Processes on this machine, if the launcher says.
    pub local_size: Option<usize>,
    /// Where rank 0 can be reached over TCP, if the launcher says: `MASTER_ADDR` and `MASTER_PORT`, or the port after
    /// it when torchrun itself listens there (`TORCHELASTIC_USE_AGENT_STORE`), or under Slurm the first node of the
    /// step and a port made of the job's number.
    pub master: Option<(String, u16)>,
    /// Whether a launcher of MPI has started this process, so that MPI can join it to the others.
    pub under_mpi: bool,
    /// How often the ranks were started before, after some were lost: `BURN_PARALLEL_RESTART` of
    /// [`launch::processes`](super::processes), `TORCHELASTIC_RESTART_COUNT` of torchrun, `SLURM_RESTART_COUNT` of a
    /// job that was requeued; of several the largest. 0 if there is none.
    pub restarts: usize,
    /// By what the launchers tell the run from others.
    pub run: RunNames,
}

impl fmt::Display for ProcessInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rank {} of {}, number {} on this machine, says {}",
            self.rank, self.size, self.local_rank, self.launcher
        )?;
        if self.restarts > 0 { write!(f, "; started before: {} times", self.restarts) } else { Ok(()) }
    }
}

impl ProcessInfo {
    /// The names of all variables by which launchers other than torchrun say who is who.
    pub(super) fn of_other_launchers() -> impl Iterator<Item = &'static str> {
        let others = Launcher::ALL.into_iter().filter(|launcher| *launcher != Launcher::Torchrun);
        others.flat_map(Launcher::variables).chain(["PMIX_RANK"])
    }

    /// Reads the variables of this process.
    ///
    /// # Errors
    /// See [`from_variables`](Self::from_variables).
    pub fn from_env() -> Result<Self, Error> {
        Self::from_variables(&variables_of_env())
    }

    /// Reads the variables of a launcher. The innermost one counts: torchrun started by `srun` once per node says more
    /// than Slurm does, and so does `mpirun` in a Slurm job. Slurm counts when there is no other.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the variables: when there are none; when one of a launcher's is missing,
    /// is no number or makes no sense beside the others; when torchrun's and MPI's contradict each other.
    pub fn from_variables(variables: &BTreeMap<String, String>) -> Result<Self, Error> {
        let found: Vec<Launcher> = Launcher::all_of(variables).collect();
        let Some(&launcher) = found.first() else {
            return invalid(
                "this process was not started by a launcher: none of RANK, OMPI_COMM_WORLD_RANK, PMI_RANK and \
                 SLURM_PROCID is set; start it with torchrun, mpirun or srun, or use launch::threads",
            );
        };
        let info = Self::of(launcher, variables)?;
        for other in found.into_iter().filter(|other| *other != launcher && *other != Launcher::Slurm) {
            let theirs = Self::of(other, variables)?;
            if (theirs.rank, theirs.size) != (info.rank, info.size) {
                let [[a, b, ..], [c, d, ..]] = [launcher.variables(), other.variables()];
                return invalid(format!(
                    "{a}={} and {b}={} contradict {c}={} and {d}={}: unset those of the launcher that is not used",
                    info.rank, info.size, theirs.rank, theirs.size
                ));
            }
        }
        Ok(info)
    }

    fn of(launcher: Launcher, variables: &BTreeMap<String, String>) -> Result<Self, Error> {
        let [rank_name, size_name, local_name, local_size_name] = launcher.variables();
        let number = |name: &'static str| -> Result<Option<usize>, Error> {
            let Some(value) = variables.get(name) else { return Ok(None) };
            match value.trim().parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => invalid(format!("{name}={value:?} is not a whole number")),
            }
        };
        let needed = |name: &'static str| match number(name)? {
            Some(number) => Ok(number),
            None => invalid(format!("{name} is missing, beside the other variables of {launcher}")),
        };
        let (rank, size) = (needed(rank_name)?, needed(size_name)?);
        // PMI leaves it to the launcher whether to tell the place on the machine.
        let local_rank = match launcher {
            Launcher::Mpich => number(local_name)?.unwrap_or(rank),
            _ => needed(local_name)?,
        };
        // Slurm's variable says what was asked for, not what was granted.
        let local_size = if launcher == Launcher::Slurm { None } else { number(local_size_name)? };
        if rank >= size {
            return invalid(format!("{rank_name}={rank} does not exist in {size_name}={size}: ranks go from 0"));
        }
        if local_rank > rank {
            return invalid(format!("{local_name}={local_rank} is larger than {rank_name}={rank}"));
        }
        if let Some(local_size) = local_size.filter(|local_size| local_rank >= *local_size || *local_size > size) {
            return invalid(format!(
                "{local_size_name}={local_size} does not go with {local_name}={local_rank} and {size_name}={size}"
            ));
        }
        let master = master::named(variables)?
            .or_else(|| if launcher == Launcher::Slurm { master::of_slurm(variables) } else { None });
        // What MPIs look for themselves, `srun --mpi=pmix` included.
        let under_mpi =
            ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"].iter().any(|name| variables.contains_key(*name));
        let processes = number(RESTART)?.filter(|_| launcher == Launcher::Torchrun);
        let torchrun = number("TORCHELASTIC_RESTART_COUNT")?.filter(|_| launcher == Launcher::Torchrun);
        let slurm = number("SLURM_RESTART_COUNT")?;
        let restarts = processes.or(torchrun).max(slurm).unwrap_or(0);
        let again = |restarts: Option<usize>| restarts.is_some_and(|restarts| restarts > 0);
        let run = RunNames::of(launcher, variables, (again(torchrun), again(slurm)));
        Ok(Self { launcher, rank, size, local_rank, local_size, master, under_mpi, restarts, run })
    }
}
