//! The numbers of a learning rate schedule, in and out of burn's records.

use std::collections::BTreeMap;

use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn_pack::{Reader, Writer};

use super::scalar::StoredScalar;
use super::{checkpoint_error, unreadable};
use crate::Error;

/// The numbers of a scheduler.
///
/// # Errors
/// [`Error::Checkpoint`] if burn cannot write them.
pub(super) fn of_scheduler(name: &str, scheduler: &ModuleLrScheduler) -> Result<BTreeMap<String, StoredScalar>, Error> {
    let bytes = scheduler.to_record().into_bytes().map_err(|why| unreadable(name, why))?;
    let reader = Reader::from_bytes(bytes).map_err(|why| unreadable(name, why))?;
    Ok(reader.scalars().iter().map(|(name, scalar)| (name.clone(), (*scalar).into())).collect())
}

/// A scheduler with the numbers of a checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] if it is of another kind.
pub(super) fn restored_scheduler(
    name: &str,
    into: &ModuleLrScheduler,
    numbers: &BTreeMap<String, StoredScalar>,
) -> Result<ModuleLrScheduler, Error> {
    let own = of_scheduler(name, into)?;
    if !own.keys().eq(numbers.keys()) {
        let list = |numbers: &BTreeMap<String, StoredScalar>| numbers.keys().cloned().collect::<Vec<_>>().join(", ");
        return Err(checkpoint_error(format!(
            "scheduler `{name}` keeps [{}], but the checkpoint has [{}] of it: take the kind that was saved, or restore without it",
            list(&own),
            list(numbers)
        )));
    }
    let mut writer = Writer::new(Vec::new());
    for (key, number) in numbers {
        let number = number.read().ok_or_else(|| {
            checkpoint_error(format!("scheduler `{name}`: `{key}` is {number:?}, which is no number"))
        })?;
        writer = writer.with_scalar(key, number);
    }
    let bytes = writer.into_bytes().map_err(|why| unreadable(name, why))?;
    let record = LrSchedulerRecord::from_bytes(bytes).map_err(|why| unreadable(name, why))?;
    Ok(into.clone().load_record(record))
}
