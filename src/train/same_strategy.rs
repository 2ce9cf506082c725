//! Demands that all ranks spread a model alike: else they would wait for each other in different collectives.

use crate::Error;
use crate::comm::Communicator;
use crate::sharding::Sharding;

/// How many ranks each axis has, what replicas divide, and whether steps are captured. Collective over the world.
///
/// # Errors
/// [`Error::Strategy`], the same on all ranks, with the first rank that has others; those of [`Communicator`].
pub(super) fn agree(
    world: &Communicator,
    [dp, pp, tp]: [usize; 3],
    sharding: Sharding,
    captured: bool,
) -> Result<(), Error> {
    // One replica divides nothing.
    let divided = if dp == 1 { Sharding::None } else { sharding };
    let mine = [dp as u64, pp as u64, tp as u64, divided.zero_stage() as u64, u64::from(captured)];
    let all = world.all_gather(mine.to_vec())?;
    let mut ranks = all.chunks_exact(mine.len());
    let first = ranks.next().unwrap_or(&mine[..]);
    let Some((before, theirs)) = ranks.enumerate().find(|(_, theirs)| *theirs != first) else { return Ok(()) };
    let axes = |words: &[u64]| format!("dp {}, pp {} and tp {}", words[0], words[1], words[2]);
    let sharding = |words: &[u64]| format!("ZeRO {}", words[3]);
    let engine = |words: &[u64]| if words[4] == 0 { "eager steps" } else { "captured steps" }.to_owned();
    let (own, firsts, knobs) = match (theirs[..3] == first[..3], theirs[3] == first[3]) {
        (false, _) => (axes(theirs), axes(first), "axes"),
        (true, false) => (sharding(theirs), sharding(first), "`sharding`"),
        (true, true) => (engine(theirs), engine(first), "`engine`, and what it goes by if it is \"auto\""),
    };
    let problem = format!("rank {} has {own}, and rank 0 {firsts}: give all ranks the same {knobs}", before + 1);
    let error = Error::Strategy { problem };
    world.fail(error.clone());
    Err(error)
}
