//! Sizes at which transports change how they move data, and groups that do not wait for each other.
//!
//! Each transport chooses what it sends eagerly, in chunks or in windows. These sizes are at and beside all limits of the
//! transports of the crate, and are repeated: a message that is lost now and then is found by many.

use std::thread;
use std::time::Duration;

use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp, part};

/// Bytes at which something changes: mailbox entries, headers, slots, eager messages, data frames, windows, turns, credit.
const THRESHOLDS: [usize; 7] = [2 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 4 << 20, 8 << 20];
/// Larger ones are moved by fewer operations.
const LARGE: usize = 1 << 20;

fn input(rank: usize, len: usize) -> Vec<u8> {
    let period: Vec<u8> = (0..251u32).map(|place| (place * 7) as u8 ^ (rank * 37) as u8).collect();
    repeated(&period, 0..len)
}

/// That part of a sequence that repeats itself. By copies of blocks: an iterator takes long where it isn't optimised.
fn repeated(period: &[u8], range: std::ops::Range<usize>) -> Vec<u8> {
    let begin = range.start % period.len();
    let mut repeated = period.repeat((begin + range.len()).div_ceil(period.len()));
    repeated.truncate(begin + range.len());
    repeated.drain(..begin);
    repeated
}

fn sum(size: usize, range: std::ops::Range<usize>) -> Vec<u8> {
    let at = |place: u32| (0..size).fold(0u8, |sum, rank| sum.wrapping_add((place * 7) as u8 ^ (rank * 37) as u8));
    let period: Vec<u8> = (0..251).map(at).collect();
    repeated(&period, range)
}

fn gathers(comm: &Communicator, len: usize) -> Result<(), Error> {
    let all = comm.all_gather(input(comm.rank(), len))?;
    assert!(all.chunks(len).enumerate().all(|(rank, theirs)| theirs == input(rank, len)), "all_gather of {len}");
    Ok(())
}

fn others(comm: &Communicator, len: usize) -> Result<(), Error> {
    let (size, rank) = (comm.size(), comm.rank());
    let mine = || input(rank, len);
    let share = part(len, size, rank);
    assert!(comm.all_reduce(mine(), ReduceOp::Sum)? == sum(size, 0..len), "all_reduce of {len}");
    assert!(comm.reduce_scatter(mine(), ReduceOp::Sum)? == sum(size, share.clone()), "reduce_scatter of {len}");
    assert!(comm.broadcast(mine(), size - 1)? == input(size - 1, len), "broadcast of {len}");
    let scattered = comm.scatter((rank == 0).then(mine), 0)?;
    assert!(scattered == input(0, len)[share.clone()], "scatter of {len}");
    let gathered = comm.gather(mine(), 0)?;
    assert!(gathered.is_none_or(|all| all.chunks(len).enumerate().all(|(rank, theirs)| theirs == input(rank, len))));
    let exchanged = comm.all_to_all(mine())?;
    let expected: Vec<u8> = (0..size).flat_map(|from| input(from, len)[share.clone()].to_vec()).collect();
    assert!(exchanged == expected, "all_to_all of {len}");
    comm.send(mine(), (rank + 1) % size, 3)?;
    let previous = (rank + size - 1) % size;
    assert!(comm.recv::<Vec<u8>>(previous, 3)? == input(previous, len), "a message of {len}");
    Ok(())
}

/// All thresholds, on the world and on groups of it.
pub fn all(comm: &Communicator) -> Result<(), Error> {
    for threshold in THRESHOLDS {
        for len in [threshold - 1, threshold, threshold + 1] {
            gathers(comm, len)?;
            if threshold < LARGE {
                others(comm, len)?;
            }
        }
    }
    others(comm, (4 << 20) + 1)?;
    // As shares: what each rank sends to each is at the threshold.
    for threshold in [256 << 10, 512 << 10] {
        others(comm, comm.size() * threshold + 1)?;
    }
    ahead(comm)
}

/// The axes of a mesh: ranks that are late on one of them are waited for on the other, by ranks with large messages under way.
fn ahead(comm: &Communicator) -> Result<(), Error> {
    let (row, column) = (comm.rank() / 2, comm.rank() % 2);
    let (rows, columns) = (comm.split(row as u64, 0)?, comm.split(column as u64, 0)?);
    for round in 0..12 {
        if (row + round) % 3 == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        columns.send(input(comm.rank(), 5 << 20), (columns.rank() + 1) % columns.size(), 1)?;
        let gathered = rows.all_gather(input(comm.rank(), (8 << 20) - 4 * round))?;
        let len = (8 << 20) - 4 * round;
        let expected = (0..rows.size()).map(|other| input(2 * row + other, len));
        assert!(gathered.chunks(len).map(<[u8]>::to_vec).eq(expected), "all_gather of a row");
        let previous = (columns.rank() + columns.size() - 1) % columns.size();
        let came: Vec<u8> = columns.recv(previous, 1)?;
        assert!(came == input(2 * previous + column, 5 << 20), "a message of a column");
    }
    Ok(())
}
