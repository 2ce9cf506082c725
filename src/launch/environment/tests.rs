//! What launchers set is understood, and what does not go together is refused.

use std::collections::BTreeMap;

use super::{Launcher, ProcessInfo, RunNames};
use crate::Error;

fn read(variables: &[(&str, &str)]) -> Result<ProcessInfo, Error> {
    ProcessInfo::from_variables(&variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
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
        let run = read(&[&TORCHRUN[..], &SLURM[4..]].concat()).unwrap().run;
        let run = if launcher == Launcher::Slurm { run } else { RunNames::default() };
        Ok(ProcessInfo { launcher, rank, size, local_rank, local_size, master, under_mpi, restarts: 0, run })
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
fn how_often_the_ranks_were_started_before() {
    let torchrun = [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")];
    let with = |more: &[(&str, &str)]| {
        let all = torchrun.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        ProcessInfo::from_variables(&all.collect()).map(|place| place.restarts)
    };
    assert_eq!(with(&[]), Ok(0));
    assert_eq!(with(&[("TORCHELASTIC_RESTART_COUNT", "2"), ("SLURM_RESTART_COUNT", "1")]), Ok(2));
    assert_eq!(with(&[("SLURM_RESTART_COUNT", "1")]), Ok(1));
    // torchrun starts anew in a job that was requeued.
    assert_eq!(with(&[("TORCHELASTIC_RESTART_COUNT", "0"), ("SLURM_RESTART_COUNT", "1")]), Ok(1));
    assert_eq!(with(&[("BURN_PARALLEL_RESTART", "3")]), Ok(3));
    assert!(with(&[("BURN_PARALLEL_RESTART", "x")]).is_err());
}

/// What a run has saved is its own when it is started again, and not that of another with the same job or the same
/// flags.
#[test]
fn a_run_is_known_by_its_names() {
    let run = |variables: &[(&str, &str)]| read(&[&TORCHRUN[..], variables].concat()).unwrap().run;
    let goes_on = |from: &[(&str, &str)], now: &[(&str, &str)]| run(now).include(&run(from).names());
    let own = |name| [("BURN_PARALLEL_RUN", name), ("BURN_PARALLEL_RESTART", "1")];
    assert!(run(&[]).is_empty() && !goes_on(&[], &[]));
    assert!(goes_on(&own("a"), &own("a")) && !goes_on(&own("a"), &own("b")) && !goes_on(&[], &own("b")));

    let torchrun = |dir, id, count| {
        [("TORCHELASTIC_ERROR_FILE", dir), ("TORCHELASTIC_RUN_ID", id), ("TORCHELASTIC_RESTART_COUNT", count)]
    };
    let (first, again) =
        ("/tmp/torchelastic_a/none_b/attempt_0/3/error.json", "/tmp/torchelastic_a/none_b/attempt_1/0/error.json");
    let other = "/tmp/torchelastic_c/none_d/attempt_1/0/error.json";
    assert!(goes_on(&torchrun(first, "none", "0"), &torchrun(again, "none", "1")));
    // Nodes that come later are not counted as a restart.
    assert!(goes_on(&torchrun(first, "none", "0"), &torchrun(first, "none", "0")));
    assert!(!goes_on(&torchrun(first, "none", "0"), &torchrun(other, "none", "1")));
    // Rank 0 is on another node, or somebody has run the same command again.
    assert!(goes_on(&torchrun(first, "job", "0"), &torchrun(other, "job", "1")));
    assert!(!goes_on(&torchrun(first, "job", "0"), &torchrun(other, "job", "0")));

    let slurm = |count| [SLURM[4], ("SLURM_RESTART_COUNT", count)];
    assert!(goes_on(&SLURM[4..], &slurm("1")) && !goes_on(&SLURM[4..], &SLURM[4..]));
    assert!(!goes_on(&[("SLURM_JOB_ID", "7")], &slurm("1")));
    // A job that starts the ranks by itself, and is requeued.
    let both = |name, count| [&own(name)[..], &slurm(count)].concat();
    assert!(goes_on(&both("a", "0"), &both("b", "1")) && !goes_on(&both("a", "0"), &both("b", "0")));
}
