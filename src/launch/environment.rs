//! What the variables of a launcher say of a rank.

use std::collections::BTreeMap;
use std::fmt;

use crate::Error;

/// Who started this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// torchrun, [`launch::processes`](super::processes), or anything else that sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `mpirun` of MPICH, Intel MPI and their kin (PMI).
    Mpich,
    /// `srun`.
    Slurm,
}

impl Launcher {
    const ALL: [Self; 4] = [Self::Torchrun, Self::OpenMpi, Self::Mpich, Self::Slurm];

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

/// The place of this process among those that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
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
    /// Where rank 0 can be reached over TCP, if the launcher says: `MASTER_ADDR` and `MASTER_PORT`, or the port after it when
    /// torchrun itself listens there (`TORCHELASTIC_USE_AGENT_STORE`), or under Slurm the first node of the step and a port
    /// made of the job's number.
    pub master: Option<(String, u16)>,
    /// Whether a launcher of MPI has started this process, so that MPI can join it to the others.
    pub under_mpi: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rank {} of {}, number {} on this machine, says {}",
            self.rank, self.size, self.local_rank, self.launcher
        )
    }
}

impl Place {
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
        let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
        Self::from_variables(&std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect())
    }

    /// Reads the variables of a launcher. The innermost one counts: torchrun started by `srun` once per node says more
    /// than Slurm does, and so does `mpirun` in a Slurm job. Slurm counts when there is no other.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the variables: when there are none; when one of a launcher's is missing, is no
    /// number or makes no sense beside the others; when torchrun's and MPI's contradict each other.
    pub fn from_variables(variables: &BTreeMap<String, String>) -> Result<Self, Error> {
        let found: Vec<Launcher> = (Launcher::ALL.into_iter())
            .filter(|launcher| launcher.variables()[..2].iter().any(|name| variables.contains_key(*name)))
            .collect();
        let Some(&launcher) = found.first() else {
            return wrong(
                "this process was not started by a launcher: none of RANK, OMPI_COMM_WORLD_RANK, PMI_RANK and \
                 SLURM_PROCID is set; start it with torchrun, mpirun or srun, or use launch::threads",
            );
        };
        let place = Self::of(launcher, variables)?;
        for other in found.into_iter().filter(|other| *other != launcher && *other != Launcher::Slurm) {
            let theirs = Self::of(other, variables)?;
            if (theirs.rank, theirs.size) != (place.rank, place.size) {
                let [[a, b, ..], [c, d, ..]] = [launcher.variables(), other.variables()];
                return wrong(format!(
                    "{a}={} and {b}={} contradict {c}={} and {d}={}: unset those of the launcher that is not used",
                    place.rank, place.size, theirs.rank, theirs.size
                ));
            }
        }
        Ok(place)
    }

    fn of(launcher: Launcher, variables: &BTreeMap<String, String>) -> Result<Self, Error> {
        let [rank_name, size_name, local_name, local_size_name] = launcher.variables();
        let number = |name: &'static str| -> Result<Option<usize>, Error> {
            let Some(value) = variables.get(name) else { return Ok(None) };
            match value.trim().parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => wrong(format!("{name}={value:?} is not a whole number")),
            }
        };
        let needed = |name: &'static str| match number(name)? {
            Some(number) => Ok(number),
            None => wrong(format!("{name} is missing, beside the other variables of {launcher}")),
        };
        let (rank, size) = (needed(rank_name)?, needed(size_name)?);
        // PMI leaves it to the launcher whether to tell the place on the machine.
        let local_rank = match launcher {
            Launcher::Mpich => number(local_name)?.unwrap_or(rank),
            _ => needed(local_name)?,
        };
        // Slurm's is a wish of the user's, not what came of it.
        let local_size = if launcher == Launcher::Slurm { None } else { number(local_size_name)? };
        if rank >= size {
            return wrong(format!("{rank_name}={rank} does not exist in {size_name}={size}: ranks go from 0"));
        }
        if local_rank > rank {
            return wrong(format!("{local_name}={local_rank} is larger than {rank_name}={rank}"));
        }
        if let Some(local_size) = local_size.filter(|local_size| local_rank >= *local_size || *local_size > size) {
            return wrong(format!(
                "{local_size_name}={local_size} does not go with {local_name}={local_rank} and {size_name}={size}"
            ));
        }
        let master =
            master(variables)?.or_else(|| if launcher == Launcher::Slurm { slurm_master(variables) } else { None });
        // What MPIs look for themselves, `srun --mpi=pmix` included.
        let under_mpi =
            ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"].iter().any(|name| variables.contains_key(*name));
        Ok(Self { launcher, rank, size, local_rank, local_size, master, under_mpi })
    }
}

fn master(variables: &BTreeMap<String, String>) -> Result<Option<(String, u16)>, Error> {
    match (variables.get("MASTER_ADDR"), variables.get("MASTER_PORT")) {
        (None, None) => Ok(None),
        (Some(_), None) => wrong("MASTER_ADDR is set and MASTER_PORT is missing"),
        (None, Some(_)) => wrong("MASTER_PORT is set and MASTER_ADDR is missing"),
        (Some(address), _) if address.trim().is_empty() => wrong("MASTER_ADDR is empty"),
        (Some(address), Some(port)) => match port.trim().parse() {
            Ok(0) | Err(_) => wrong(format!("MASTER_PORT={port:?} is not a port: a number from 1 to 65535")),
            Ok(number) => Ok(Some((address.trim().to_owned(), beside_torchrun(number, variables)))),
        },
    }
}

/// torchrun's own store may listen at the port that it names: then the ranks meet at the next.
fn beside_torchrun(port: u16, variables: &BTreeMap<String, String>) -> u16 {
    let taken = variables.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    match taken {
        true => port.checked_add(1).unwrap_or(port - 1),
        false => port,
    }
}

/// The first node of the step, and a port that all its ranks work out alike.
fn slurm_master(variables: &BTreeMap<String, String>) -> Option<(String, u16)> {
    let nodes = variables.get("SLURM_STEP_NODELIST").or_else(|| variables.get("SLURM_JOB_NODELIST"))?;
    let job: u64 = variables.get("SLURM_JOB_ID")?.parse().ok()?;
    Some((first_node(nodes)?, 20_000 + (job % 20_000) as u16))
}

/// The first of a list like `gpu[07-09,12],login1`.
fn first_node(nodes: &str) -> Option<String> {
    let first = match (nodes.find('['), nodes.find(',')) {
        (Some(bracket), comma) if comma.is_none_or(|comma| bracket < comma) => {
            let (name, rest) = nodes.split_at(bracket);
            let (inside, after) = rest[1..].split_once(']')?;
            let number = inside.split([',', '-']).next()?;
            format!("{name}{number}{}", after.split(',').next()?)
        }
        _ => nodes.split(',').next()?.to_owned(),
    };
    (!first.is_empty()).then_some(first)
}

fn wrong<T>(problem: impl Into<String>) -> Result<T, Error> {
    Err(Error::invalid("launch::from_env", problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Place, Error> {
        Place::from_variables(&variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    const TORCHRUN: [(&str, &str); 3] = [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")];
    const OPEN_MPI: [(&str, &str); 4] = [
        ("OMPI_COMM_WORLD_RANK", "5"),
        ("OMPI_COMM_WORLD_SIZE", "8"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ];
    const SLURM: [(&str, &str); 5] = [
        ("SLURM_PROCID", "2"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_STEP_NODELIST", "gpu[07-09,12]"),
        ("SLURM_JOB_ID", "1234567"),
    ];

    #[test]
    fn each_launcher_is_understood() {
        let place = |launcher, rank, size, local_rank, local_size, master: Option<(&str, u16)>| {
            let master = master.map(|(address, port)| (address.to_owned(), port));
            let under_mpi = matches!(launcher, Launcher::OpenMpi | Launcher::Mpich);
            Ok(Place { launcher, rank, size, local_rank, local_size, master, under_mpi })
        };
        assert_eq!(read(&TORCHRUN), place(Launcher::Torchrun, 5, 8, 1, None, None));
        let master = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), ("LOCAL_WORLD_SIZE", "4")];
        let found = read(&[&TORCHRUN[..], &master].concat());
        assert_eq!(found, place(Launcher::Torchrun, 5, 8, 1, Some(4), Some(("10.0.0.1", 29500))));
        assert_eq!(read(&OPEN_MPI), place(Launcher::OpenMpi, 5, 8, 1, Some(4), None));
        let store = [("TORCHELASTIC_USE_AGENT_STORE", "True")];
        let found = read(&[&TORCHRUN[..], &master, &store].concat()).map(|place| place.master);
        assert_eq!(found, Ok(Some(("10.0.0.1".into(), 29501))), "torchrun's store has the port itself");
        let found = read(&[&OPEN_MPI[..], &master].concat());
        assert_eq!(found, place(Launcher::OpenMpi, 5, 8, 1, Some(4), Some(("10.0.0.1", 29500))));
        let pmi = [("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        assert_eq!(read(&pmi), place(Launcher::Mpich, 1, 2, 1, None, None));
        let pmi = [&pmi[..], &[("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "1")]].concat();
        assert_eq!(read(&pmi), place(Launcher::Mpich, 1, 2, 0, Some(1), None));
        assert_eq!(read(&SLURM), place(Launcher::Slurm, 2, 4, 0, None, Some(("gpu07", 34567))));
        assert_eq!(read(&[("RANK", " 0 "), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")]).map(|p| p.rank), Ok(0));
    }

    #[test]
    fn the_innermost_launcher_counts() {
        // mpirun in a Slurm job: Slurm speaks of mpirun's own process.
        let both = [&OPEN_MPI[..], &SLURM].concat();
        assert_eq!(read(&both).map(|place| (place.launcher, place.rank)), Ok((Launcher::OpenMpi, 5)));
        // torchrun by srun, once per node.
        let both = [&TORCHRUN[..], &SLURM].concat();
        assert_eq!(read(&both).map(|place| (place.launcher, place.rank)), Ok((Launcher::Torchrun, 5)));
        // A script that hands MPI's numbers on by torchrun's names.
        let both = [&TORCHRUN[..], &OPEN_MPI].concat();
        assert_eq!(
            read(&both).map(|place| (place.launcher, place.rank, place.under_mpi)),
            Ok((Launcher::Torchrun, 5, true))
        );
        // srun, with and without a process manager for MPI.
        let pmix = [&SLURM[..], &[("PMIX_RANK", "2")]].concat();
        assert_eq!(read(&pmix).map(|place| (place.launcher, place.under_mpi)), Ok((Launcher::Slurm, true)));
        assert_eq!(read(&SLURM).map(|place| place.under_mpi), Ok(false));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |base: &[(&'static str, &'static str)], changes: &[(&'static str, Option<&'static str>)]| {
            let mut all: BTreeMap<&str, &str> = base.iter().copied().collect();
            for (name, value) in changes {
                match value {
                    Some(value) => all.insert(name, value),
                    None => all.remove(name),
                };
            }
            read(&all.into_iter().collect::<Vec<_>>()).unwrap_err().to_string()
        };
        let says = |message: String, words: &[&str]| {
            words.iter().for_each(|word| assert!(message.contains(word), "`{word}` is missing in: {message}"));
        };
        says(with(&[], &[]), &["not started by a launcher", "RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"]);
        says(with(&TORCHRUN, &[("WORLD_SIZE", None)]), &["WORLD_SIZE is missing"]);
        says(with(&TORCHRUN, &[("RANK", None)]), &["RANK is missing"]);
        says(with(&TORCHRUN, &[("LOCAL_RANK", None)]), &["LOCAL_RANK is missing"]);
        says(with(&OPEN_MPI, &[("OMPI_COMM_WORLD_SIZE", None)]), &["OMPI_COMM_WORLD_SIZE is missing"]);
        says(with(&SLURM, &[("SLURM_LOCALID", None)]), &["SLURM_LOCALID is missing"]);
        for value in ["", "x", "-1", "1.5", "99999999999999999999999"] {
            says(with(&TORCHRUN, &[("RANK", Some(value))]), &[&format!("RANK={value:?} is not a whole number")]);
        }
        says(with(&TORCHRUN, &[("RANK", Some("8"))]), &["RANK=8", "WORLD_SIZE=8"]);
        says(with(&TORCHRUN, &[("WORLD_SIZE", Some("0"))]), &["WORLD_SIZE=0"]);
        says(with(&TORCHRUN, &[("LOCAL_RANK", Some("6"))]), &["LOCAL_RANK=6", "RANK=5"]);
        says(with(&OPEN_MPI, &[("OMPI_COMM_WORLD_LOCAL_SIZE", Some("1"))]), &["OMPI_COMM_WORLD_LOCAL_SIZE=1"]);
        says(with(&TORCHRUN, &[("MASTER_ADDR", Some("a"))]), &["MASTER_PORT is missing"]);
        says(with(&TORCHRUN, &[("MASTER_PORT", Some("1"))]), &["MASTER_ADDR is missing"]);
        for port in ["0", "65536", "-1", "http"] {
            let changes = [("MASTER_ADDR", Some("a")), ("MASTER_PORT", Some(port))];
            says(with(&TORCHRUN, &changes), &["MASTER_PORT", "not a port"]);
        }
        let contradiction = with(&[&TORCHRUN[..], &OPEN_MPI].concat(), &[("OMPI_COMM_WORLD_RANK", Some("4"))]);
        says(contradiction, &["RANK=5", "OMPI_COMM_WORLD_RANK=4", "contradict"]);
    }

    #[test]
    fn the_first_node_of_a_list() {
        let lists = [
            ("n1", Some("n1")),
            ("n1,n2", Some("n1")),
            ("gpu[07-09,12],x", Some("gpu07")),
            ("gpu[3,5]", Some("gpu3")),
            ("a,gpu[3,5]", Some("a")),
            ("r[1-2]-ib,x", Some("r1-ib")),
            ("", None),
            ("gpu[3", None),
        ];
        for (list, first) in lists {
            assert_eq!(first_node(list).as_deref(), first, "{list}");
        }
    }
}
