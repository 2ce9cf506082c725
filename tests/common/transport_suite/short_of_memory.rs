//! A rank that has no memory for what the others bring, among processes: an error of all ranks, and no process ends.
#![cfg(unix)]

use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp};

/// Lets this process have no more than so many bytes beyond what it has; `None` ends that. Of memory that it may write
/// to: what allocators have only reserved is no room for anything.
fn limit_memory(more: Option<u64>) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let held = 1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the place outlives the calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_DATA, &mut limit), 0);
        limit.rlim_cur = more.map_or(limit.rlim_max, |more| held + more);
        assert_eq!(libc::setrlimit(libc::RLIMIT_DATA, &limit), 0);
    }
}

/// The error of a rank without the memory for what all gather.
fn none_to_gather(comm: &Communicator, culprit: usize, each: usize) -> Error {
    let group = comm.group().clone();
    let operation = format!("all_gather of U8 [{each}], to which rank 0 brings {each} bytes,");
    Error::OutOfMemory { group, rank: culprit, operation, bytes: comm.size() * each }
}

/// One rank has no memory for what all gather, which fails that call alone, and then for a message that is sent to it,
/// which fails the world.
pub fn for_large(comm: &Communicator, culprit: usize) -> Result<(), Error> {
    const EACH: usize = 64 << 20;
    /// More than what was brought to the collective, which has gone by then.
    const LONG: usize = 128 << 20;
    let (mine, is_short) = (vec![1u8; EACH], comm.rank() == culprit);
    comm.barrier()?;
    if is_short {
        limit_memory(Some(32 << 20));
    }
    assert_eq!(comm.all_gather(mine).unwrap_err(), none_to_gather(comm, culprit, EACH));
    assert_eq!(comm.all_reduce(vec![1u8], ReduceOp::Sum)?, [comm.size() as u8], "the group goes on");
    let sender = (culprit + 1) % comm.size();
    let outcome = match comm.rank() {
        me if me == sender => comm.send(vec![1u8; LONG], culprit, 7).and_then(|()| comm.barrier()),
        _ if is_short => comm.recv::<Vec<u8>>(sender, 7).map(drop),
        _ => comm.barrier(),
    };
    limit_memory(None);
    let said = outcome.unwrap_err().to_string();
    let words = format!("rank {culprit} of group `world` has no memory for the {LONG} bytes");
    assert!(said.contains(&words) && said.contains(&format!("that rank {sender} sends it with tag 7")), "{said}");
    Ok(())
}

/// As [`for_large`], of so little that over TCP nobody asks for it beforehand: the others move their data already, so
/// the world fails.
pub fn for_little(comm: &Communicator, culprit: usize) -> Result<(), Error> {
    const EACH: usize = 5 << 20;
    let mine = vec![1u8; EACH];
    comm.barrier()?;
    if comm.rank() == culprit {
        limit_memory(Some(4 << 20));
    }
    let outcome = comm.all_gather(mine).and_then(|_| comm.barrier());
    limit_memory(None);
    assert_eq!(outcome.unwrap_err(), none_to_gather(comm, culprit, EACH));
    Ok(())
}
