//! How the gradients of a model lie over ranks, for their norm.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::ParamId;

use crate::comm::{Communicator, Counters};
use crate::lock::lock;

/// How the parameters of a model lie over ranks.
#[derive(Debug, Default)]
pub struct GradientLayout {
    /// The groups over which parts lie, one along each axis; before them that of the replicas that divide rows.
    pub groups: Vec<Communicator>,
    /// The parameters that this rank holds and another one counts.
    pub elsewhere: HashSet<ParamId>,
    /// This rank in the world.
    pub rank: usize,
    /// The number of the step that the gradients are of; 0 if nobody counts.
    pub step: u64,
    /// The group over which gradients were averaged, and the path of the first parameter of which this rank brought a
    /// gradient that was not finite.
    pub averaged: Option<(Communicator, Option<Arc<str>>)>,
    /// Whether the caller has said how layers that are split by hand lie.
    pub by_hand: bool,
    /// Where it is kept what clipping has done.
    pub clipping: ClipRecord,
}

/// What clipping has done to a model so far. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct ClipRecord(Arc<Done>);

#[derive(Debug, Default)]
struct Done {
    /// Steps that were skipped.
    skipped: AtomicU64,
    /// What was communicated for norms, by group.
    communicated: Mutex<BTreeMap<Arc<str>, Counters>>,
}

impl ClipRecord {
    /// Counts one more step that is skipped.
    pub fn skip(&self) {
        self.0.skipped.fetch_add(1, Relaxed);
    }

    /// How many steps were skipped.
    pub fn skipped(&self) -> u64 {
        self.0.skipped.load(Relaxed)
    }

    /// Runs what communicates for a norm over these groups, and counts it.
    pub fn count<T>(&self, groups: &[Communicator], run: impl FnOnce() -> T) -> T {
        let before: Vec<Counters> = groups.iter().map(Communicator::counters).collect();
        let result = run();
        let mut communicated = self.communicated();
        for (group, before) in groups.iter().zip(before) {
            let sum = communicated.entry(group.group().clone()).or_default();
            *sum = std::mem::take(sum) + (group.counters() - before);
        }
        result
    }

    /// What was communicated for norms, over all groups.
    pub fn counters(&self) -> Counters {
        self.communicated().values().fold(Counters::default(), |sum, more| sum + more.clone())
    }

    /// What was communicated for norms over a group.
    pub fn of(&self, group: &Communicator) -> Counters {
        self.communicated().get(group.group()).cloned().unwrap_or_default()
    }

    /// What a group has done beside that.
    pub fn beside(&self, group: &Communicator) -> Counters {
        group.counters() - self.of(group)
    }

    fn communicated(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, Counters>> {
        lock(&self.0.communicated)
    }
}
