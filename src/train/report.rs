//! The report on how a model is run.

use std::fmt;

use burn::module::Module;

use crate::data_parallel::Eager;
use crate::partition::ShardReport;
use crate::pipeline_parallel::Pipelined;
use crate::pipeline_parallel::cut::CutReport;
use crate::sharding::Sharding;
use crate::tensor_parallel::Sharded;

/// How a model is run, and what its captured steps were given. Prints as text.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// How many replicas of the model there are.
    pub replicas: usize,
    /// What they divide among themselves.
    pub sharding: Sharding,
    /// Whether steps are captured as graphs; else the model's own eager forward runs.
    pub captured: bool,
    /// What the last captured step of a model that is split was given in collectives, and what of it could not be
    /// split: one for each axis that it is split over, first the plan's own. Empty before the first step.
    pub shards: Vec<ShardReport>,
    /// What each stage of a pipeline has, and what crosses between them; `None` before the model is cut.
    pub cut: Option<CutReport>,
}

impl Report {
    /// What the last captured step was given over the plan's own axis.
    pub fn shard(&self) -> ShardReport {
        self.shards.first().cloned().unwrap_or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engine = if self.captured { "captured" } else { "eager" };
        write!(f, "{} replicas, {engine} steps", self.replicas)?;
        match self.sharding {
            Sharding::None => writeln!(f)?,
            sharding => writeln!(f, ", divided among replicas: {sharding}")?,
        }
        self.shards.iter().try_for_each(|shard| write!(f, "{shard}"))?;
        self.cut.iter().try_for_each(|cut| write!(f, "{cut}"))
    }
}

/// What has a report, but for the replicas.
pub trait Reports {
    fn report(&self) -> Report;
}

impl<M: Module> Reports for Eager<M> {
    fn report(&self) -> Report {
        Report { replicas: 1, ..Report::default() }
    }
}

impl<M: Module> Reports for Sharded<M> {
    fn report(&self) -> Report {
        Report { replicas: 1, captured: true, shards: self.shard_reports(), ..Report::default() }
    }
}

impl<M: Module> Reports for Pipelined<M> {
    fn report(&self) -> Report {
        let (cut, shards) = self.reports();
        Report { replicas: 1, captured: true, shards, cut, ..Report::default() }
    }
}
