//! Names of the numbers that ranks agree on, which say what a group is split for, or what is gathered: so errors and
//! logs have a name to say.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{LazyLock, Mutex, MutexGuard};

use super::StepPart;
use crate::lock::lock;

/// What ranks tell each other whose optimizer is new, where a model is divided.
pub(crate) const NEW_OPTIMIZER: &str = "the moments of a new optimizer";

/// What ranks that divide rows call which do not take the norm that came with the step.
pub(crate) const ANOTHER_NORM: &str = "another norm than the one of the step";

/// What ranks with different numbers of batches call before each step.
pub(crate) const BATCH_LEFT: &str = "whether any rank has a batch left";

/// Names that are known before anybody gives them.
const FIXED: [&str; 3] = [NEW_OPTIMIZER, ANOTHER_NORM, BATCH_LEFT];

/// Most bytes of a name that is kept.
const LONGEST: usize = 48;

/// So many names are kept: names come from peers as well, which must not fill the memory with them.
const MOST: usize = 4096;

static KNOWN: Mutex<BTreeMap<u64, Box<str>>> = Mutex::new(BTreeMap::new());

/// The number of a name, 0 of none; without the two highest bits, which [`Call`](super::Call) and [`StepPart`] have a
/// use for.
pub(super) fn number(name: &str) -> u64 {
    if name.is_empty() {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish() >> 2
}

/// The number of a name, on which ranks can agree. The name is kept if it is short and there is room.
pub(crate) fn keep(name: &str) -> u64 {
    let number = number(name);
    let harmless = (1..=LONGEST).contains(&name.len()) && !name.contains(char::is_control);
    let mut known = known();
    if harmless && known.len() < MOST {
        known.entry(number).or_insert_with(|| name.into());
    }
    number
}

/// The name of a number, if it is a part of a step or was kept.
pub(super) fn name(number: u64) -> Option<String> {
    StepPart::described(number).or_else(|| kept(number))
}

/// The name of a number, if it was kept.
pub(super) fn kept(number: u64) -> Option<String> {
    static NUMBERS: LazyLock<[u64; FIXED.len()]> = LazyLock::new(|| FIXED.map(self::number));
    match NUMBERS.iter().position(|fixed| *fixed == number) {
        Some(place) => Some(FIXED[place].into()),
        None => known().get(&number).map(|name| name.to_string()),
    }
}

fn known() -> MutexGuard<'static, BTreeMap<u64, Box<str>>> {
    lock(&KNOWN)
}
