//! Demands that all replicas are wrapped with the same settings: they decide which collectives the ranks call.

use super::config::DataParallelConfig;
use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::params::share_text;

/// Collective, unless there is a single replica.
///
/// # Errors
/// [`Error::InvalidArgument`], the same on all ranks, with the first rank whose settings are not those of rank 0, and
/// the first of these; those of [`Communicator`].
pub(super) fn agree_on_settings(config: &DataParallelConfig, group: &Communicator) -> Result<(), Error> {
    if group.size() == 1 {
        return Ok(());
    }
    let mine = lines(config)?;
    let theirs = share_text(&mine, group)?;
    let differs = if mine == theirs { u64::MAX } else { group.rank() as u64 };
    let first = group.all_reduce(vec![differs], ReduceOp::Min)?[0];
    if first == u64::MAX {
        return Ok(());
    }
    let rank = first as usize;
    let its = group.share_bytes(mine.into_bytes(), rank)?;
    let its = String::from_utf8_lossy(&its);
    let (its, theirs) = its.lines().zip(theirs.lines()).find(|(its, theirs)| its != theirs).unwrap_or_default();
    let problem = format!(
        "rank {rank} of group `{}` is wrapped with `{its}`, and rank 0 with `{theirs}`: give all ranks the same \
         `DataParallelConfig` (`[data]` of a strategy)",
        group.group()
    );
    let error = Error::invalid("data_parallel", problem);
    group.fail(error.clone());
    Err(error)
}

/// Every setting in a line of its own, as a file has it.
fn lines(config: &DataParallelConfig) -> Result<String, Error> {
    let wrong = |problem: serde_json::Error| Error::invalid("data_parallel", problem.to_string());
    let mut settings = serde_json::to_value(config).map_err(wrong)?;
    let settings = settings.as_object_mut().map(std::mem::take).unwrap_or_default();
    // What is left out where there is none.
    let all = |key: &str| settings.get(key).map(ToString::to_string).unwrap_or_else(|| "none".into());
    let mut keys: Vec<&str> = settings.keys().map(String::as_str).collect();
    keys.extend(["reduce_dtype", "sharding_ranks"]);
    keys.sort_unstable();
    keys.dedup();
    let hook = if config.has_hook() { "present" } else { "none" };
    let lines = keys.into_iter().map(|key| format!("{key} = {}\n", all(key)));
    Ok(lines.chain([format!("comm_hook = {hook}\n")]).collect())
}
