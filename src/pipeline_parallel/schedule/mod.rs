//! Schedules as data: what each rank of a pipeline does, in order.

mod action;
mod costs;
mod csv;
mod events;
mod forward_only;
mod gpipe;
mod grid;
mod interleaved;
mod lower;
mod one_forward_one_backward;
mod routes;
mod schedule_error;
mod simulate;
mod timetable;
mod validate;
mod zero_bubble;

pub use action::{Action, Direction, Unit};
pub use costs::{Costs, StageCosts};
pub use events::Event;
use events::events;
pub(crate) use forward_only::timetable as evaluation;
pub use routes::{Edge, Routes};
pub(crate) use schedule_error::schedule_error;
pub use simulate::Simulation;
pub use timetable::Timetable;
pub use validate::PeakActivations;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Error;

/// In which order the stages of a pipeline take their micro-batches.
///
/// `p` is the number of ranks, `m` that of micro-batches, `v` that of stages on each rank. The idle share is that of a
/// step in which forward takes 1, backward 2 (1 for inputs and 1 for weights), and communication nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// All forwards, then all backwards: fill and drain (GPipe, Huang et al. 2018, arXiv:1811.06965). Idle share
    /// `(p - 1) / (m + p - 1)`; keeps all `m` micro-batches alive.
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward in turn once the pipeline is full (PipeDream-Flush, Narayanan et al. 2020,
    /// arXiv:2006.09503). As idle as GPipe, but stage `s` keeps `min(m, p - s)` micro-batches alive.
    #[default]
    #[serde(rename = "1f1b")]
    OneForwardOneBackward,
    /// 1F1B over several stages on each rank, dealt round: rank `r` holds stages `r`, `r + p`, ... (Narayanan et al.
    /// 2021, arXiv:2104.04473). Idle share `((p - 1) / v) / (m + (p - 1) / v)` if `p` divides `m`; more messages, more
    /// memory.
    Interleaved {
        /// `v`.
        stages_per_rank: usize,
    },
    /// 1F1B with the backward split, so that gradients of weights fill the gaps (ZB-H1, Qi et al. 2023,
    /// arXiv:2401.10241). Idle share `(p - 1) / (3m + p - 1)`; no rank keeps more than `min(m, p)` micro-batches alive.
    #[serde(rename = "zb_h1")]
    ZeroBubbleH1,
    /// Forwards alone, for evaluation; stages are dealt round as with [`Interleaved`](Self::Interleaved). A model that
    /// is cut for any other schedule evaluates as well, by
    /// [`forward_with`](crate::train::ParallelModule::forward_with); one that is cut for this cannot be trained.
    ForwardOnly {
        /// `v`.
        stages_per_rank: usize,
    },
    /// A timetable of one's own, with or without sends and receives.
    Custom(Timetable),
}

/// Micro-batches in stages that a timetable is written out for at most: beyond any training, and within a rank's
/// memory.
const MOST_UNITS: usize = 1 << 22;

impl Schedule {
    /// The timetable for this many ranks and micro-batches, without sends and receives.
    ///
    /// # Errors
    /// [`Error::Schedule`] for no rank, no micro-batch or no stage, for more than four million micro-batches in stages,
    /// and if a [custom](Self::Custom) timetable is for other numbers.
    pub fn timetable(&self, ranks: usize, micro_batches: usize) -> Result<Timetable, Error> {
        for (number, of) in
            [(ranks, "ranks"), (micro_batches, "micro-batches"), (self.stages_per_rank(), "stages per rank")]
        {
            if number == 0 {
                return Err(schedule_error(format!("{self} for 0 {of} was asked for; ask for at least 1")));
            }
        }
        let stages = ranks.checked_mul(self.stages_per_rank());
        if stages.and_then(|stages| stages.checked_mul(micro_batches)).is_none_or(|units| units > MOST_UNITS) {
            return Err(schedule_error(format!(
                "{ranks} ranks with {} stages each and {micro_batches} micro-batches are more than the {MOST_UNITS} \
                 micro-batches in stages that a timetable is for at most; ask for fewer micro-batches",
                self.stages_per_rank()
            )));
        }
        match self {
            Self::GPipe => gpipe::timetable(ranks, micro_batches),
            Self::OneForwardOneBackward => one_forward_one_backward::timetable(ranks, micro_batches),
            Self::Interleaved { stages_per_rank } => interleaved::timetable(ranks, *stages_per_rank, micro_batches),
            Self::ZeroBubbleH1 => zero_bubble::timetable(ranks, micro_batches),
            Self::ForwardOnly { stages_per_rank } => {
                let stage_ranks: Vec<usize> = (0..ranks * stages_per_rank).map(|stage| stage % ranks).collect();
                forward_only::timetable(&stage_ranks, ranks, micro_batches)
            }
            Self::Custom(timetable) => {
                let found = (timetable.ranks(), timetable.micro_batches());
                if found != (ranks, micro_batches) {
                    let (for_ranks, for_batches) = found;
                    return Err(schedule_error(format!(
                        "the custom timetable is for {for_ranks} ranks and {for_batches} micro-batches, and the pipeline has \
                         {ranks} ranks and {micro_batches} micro-batches"
                    )));
                }
                Ok(timetable.clone())
            }
        }
    }

    /// Whether it has backward passes. Without any, steps give a loss and no gradients.
    pub fn trains(&self) -> bool {
        match self {
            Self::ForwardOnly { .. } => false,
            Self::Custom(timetable) => timetable.trains(),
            _ => true,
        }
    }

    /// How many stages each rank holds; for a custom timetable, the most that any rank holds.
    pub fn stages_per_rank(&self) -> usize {
        match self {
            Self::GPipe | Self::OneForwardOneBackward | Self::ZeroBubbleH1 => 1,
            Self::Interleaved { stages_per_rank } | Self::ForwardOnly { stages_per_rank } => *stages_per_rank,
            Self::Custom(timetable) => {
                (0..timetable.ranks()).map(|rank| timetable.stages_of(rank).len()).max().unwrap_or_default()
            }
        }
    }
}

/// By the name that it has in a strategy file; a custom one without its timetable, which prints itself.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GPipe => f.write_str("gpipe"),
            Self::OneForwardOneBackward => f.write_str("1f1b"),
            Self::Interleaved { stages_per_rank } => write!(f, "interleaved, {stages_per_rank} stages on each rank"),
            Self::ZeroBubbleH1 => f.write_str("zb_h1"),
            Self::ForwardOnly { stages_per_rank } => write!(f, "forward_only, {stages_per_rank} stages on each rank"),
            Self::Custom(timetable) => write!(f, "custom, {} stages", timetable.stages()),
        }
    }
}
