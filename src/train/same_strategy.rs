//! Demands that all ranks spread a model alike: else they would wait for each other in different collectives.

use crate::Error;
use crate::comm::Communicator;

/// How many ranks each axis has, and whether steps are captured. Collective over the world.
///
/// # Errors
/// [`Error::Strategy`], the same on all ranks, with the first rank that has others; those of [`Communicator`].
pub(super) fn agree(world: &Communicator, [dp, pp, tp]: [usize; 3], captured: bool) -> Result<(), Error> {
    let mine = [dp as u64, pp as u64, tp as u64, u64::from(captured)];
    let all = world.all_gather(mine.to_vec())?;
    let mut ranks = all.chunks_exact(mine.len());
    let first = ranks.next().unwrap_or(&mine[..]);
    let Some((before, theirs)) = ranks.enumerate().find(|(_, theirs)| *theirs != first) else { return Ok(()) };
    let axes = |words: &[u64]| format!("dp {}, pp {} and tp {}", words[0], words[1], words[2]);
    let engine = |words: &[u64]| if words[3] == 0 { "eager steps" } else { "captured steps" };
    let (own, firsts, knobs) = match theirs[..3] == first[..3] {
        true => {
            (engine(theirs).to_string(), engine(first).to_string(), "`engine`, and what it goes by if it is \"auto\"")
        }
        false => (axes(theirs), axes(first), "axes"),
    };
    let problem = format!("rank {} has {own}, and rank 0 {firsts}: give all ranks the same {knobs}", before + 1);
    let error = Error::Strategy { problem };
    world.fail(error.clone());
    Err(error)
}
