//! Checks that an optimizer suits parameters that are split, and updates them.

mod given;
mod joined;
mod meeting;
mod moments;
mod optimizer_error;
mod other_ranks;
mod own_parts;
mod panicked;
mod parts;
mod sharded;
mod split;
mod update;
mod whole;
mod whole_owners;

pub(super) use self::sharded::ShardedStep;
pub(super) use self::split::SplitStep;
pub(crate) use self::whole_owners::whole_owners;
