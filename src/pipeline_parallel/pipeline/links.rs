//! Agrees on which stages exchange tensors.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::Error;
use crate::comm::Communicator;
use crate::pipeline_parallel::schedule::{Edge, Routes, Timetable, schedule_error};
use crate::pipeline_parallel::{Stage, stage_error};

/// What one rank says about itself.
struct RankStages {
    timetable: u64,
    stages: Vec<usize>,
    /// With the stage that names them.
    edges: Vec<(usize, Edge)>,
}

/// Collects the edges that the stages of all ranks name, and demands that they fit. Collective; all ranks come to the
/// same result.
///
/// # Errors
/// [`Error::Schedule`] if the ranks bring different timetables, or one for another number of ranks; [`Error::Pipeline`]
/// if a rank holds other stages than the timetable says, or the stages at the two ends of an edge do not say the same.
pub(super) fn agree<I, S: Stage<I>>(comm: &Communicator, timetable: &Timetable, stages: &[S]) -> Result<Routes, Error> {
    let accounts = exchange(comm, timetable, stages)?;
    if let Some(rank) = (1..accounts.len()).find(|rank| accounts[*rank].timetable != accounts[0].timetable) {
        return Err(schedule_error(format!(
            "rank {rank} of group `{}` brought another timetable than rank 0; make the same one on every rank",
            comm.group()
        )));
    }
    if timetable.ranks() != comm.size() {
        let (rows, ranks, group) = (timetable.ranks(), comm.size(), comm.group());
        return Err(schedule_error(format!("the timetable is for {rows} ranks, and group `{group}` has {ranks}")));
    }
    for (rank, account) in accounts.iter().enumerate() {
        let mut held = account.stages.clone();
        held.sort_unstable();
        let expected = timetable.stages_of(rank);
        if held != expected {
            return Err(stage_error(format!(
                "rank {rank} of group `{}` brought the stages {held:?}, and the timetable gives it {expected:?}",
                comm.group()
            )));
        }
    }
    let named: Vec<(usize, Edge)> = accounts.into_iter().flat_map(|account| account.edges).collect();
    for (stage, edge) in &named {
        let other = if *stage == edge.from { edge.to } else { edge.from };
        if *stage != edge.from && *stage != edge.to {
            return Err(stage_error(format!("stage {stage} names an edge of others, {edge:?}")));
        }
        let says = named.iter().find(|(by, theirs)| *by == other && (theirs.from, theirs.to) == (edge.from, edge.to));
        if says.is_none_or(|(_, theirs)| theirs.tensors != edge.tensors) {
            let theirs = says.map_or("nothing of it".to_owned(), |(_, theirs)| format!("{} tensors", theirs.tensors));
            let Edge { from, to, tensors } = edge;
            return Err(stage_error(format!(
                "stage {stage} says that {tensors} tensors go from stage {from} to stage {to}, and stage {other} says \
                 {theirs}; the two ends of an edge must agree"
            )));
        }
    }
    Routes::new(named.into_iter().filter(|(stage, edge)| *stage == edge.from).map(|(_, edge)| edge))
}

fn exchange<I, S: Stage<I>>(
    comm: &Communicator,
    timetable: &Timetable,
    stages: &[S],
) -> Result<Vec<RankStages>, Error> {
    let mut hasher = DefaultHasher::new();
    timetable.hash(&mut hasher);
    let edges: Vec<(usize, Edge)> =
        stages.iter().flat_map(|stage| stage.edges().into_iter().map(|edge| (stage.index(), edge))).collect();
    let mut words = vec![hasher.finish(), stages.len() as u64];
    words.extend(stages.iter().map(|stage| stage.index() as u64));
    words.push(edges.len() as u64);
    for (stage, Edge { from, to, tensors }) in edges {
        words.extend([stage, from, to, tensors].map(|number| number as u64));
    }
    let mut words = comm.all_gather(words)?.into_iter();
    let accounts = (0..comm.size()).map(|_| {
        let mut next = || words.next();
        let timetable = next()?;
        let held = next()?;
        let stages = (0..held).map(|_| next().map(|stage| stage as usize)).collect::<Option<Vec<_>>>()?;
        let named = next()?;
        let mut number = || next().map(|number| number as usize);
        let edges = (0..named).map(|_| Some((number()?, Edge::new(number()?, number()?, number()?))));
        let edges = edges.collect::<Option<Vec<_>>>()?;
        Some(RankStages { timetable, stages, edges })
    });
    let accounts: Option<Vec<RankStages>> = accounts.collect();
    accounts.ok_or_else(|| stage_error("the ranks' accounts of their stages came incomplete"))
}
