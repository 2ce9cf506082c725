//! Ranks that have left while others need them: how long those wait for the reason, and their error.
//!
//! A rank that fails drops its communicators while it returns or unwinds, and only then can its launcher say why. If
//! its peers took the first for the failure, they would be told that it has left a group, and not why. So a transport
//! tells of a group that a rank has dropped when that rank next calls something, in whatever group (a thread that polls
//! for it, with `try_receive`, does not), or holds nothing of the world any more: its launcher holds on to the world
//! until it has said why. A rank that drops a group, and then neither calls anything nor ends, is missed after the
//! time-out.

use std::sync::Arc;
use std::time::Duration;

use super::CallLog;
use crate::Error;

/// How long a rank that finds a peer gone waits for the reason, which may be on its way still: that of another rank, on
/// other connections, or of a rank that nobody has launched.
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
