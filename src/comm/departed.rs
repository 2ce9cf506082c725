//! Ranks that have left while others need them: how long those wait for the reason, and their error.

use std::sync::Arc;
use std::time::Duration;

use super::CallLog;
use crate::Error;

/// How long a rank that finds a peer gone waits for the reason, which may be on its way: a rank drops its communicators
/// while it unwinds, before its launcher can report why.
pub(crate) const GRACE: Duration = Duration::from_millis(100);

/// The error of a rank that waits in `operation` for one that has left `group`: by its rank there and in the world.
pub(crate) fn rank_lost(
    group: &Arc<str>,
    (rank, world_rank): (usize, usize),
    panicked: bool,
    operation: String,
    log: CallLog,
) -> Error {
    match panicked {
        true => Error::RankPanicked { rank: world_rank, message: "see its own message".into(), log },
        false => Error::RankLost { group: group.clone(), rank, operation, log },
    }
}
