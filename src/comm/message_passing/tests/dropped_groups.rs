//! Groups that a rank drops on its way out, or goes on without.

use std::thread;
use std::time::Duration;

use super::TestWorld;
use super::memory_endpoint::MemoryNetwork;
use crate::Error;
use crate::comm::Communicator;

/// Rank 0 drops a part of the world, and does this a good while later; the others wait for it there.
fn outcome(then: impl Fn(&Communicator) -> Result<(), Error> + Sync) -> Error {
    let world = TestWorld::new(3, 0..3, MemoryNetwork::default());
    let mut outcomes = world.run(|comm| {
        let part = comm.split(0, 0)?;
        if comm.rank() == 0 {
            drop(part);
            thread::sleep(Duration::from_millis(300));
            return then(comm);
        }
        part.barrier()
    });
    let error = outcomes.pop().unwrap().unwrap_err();
    assert_eq!(outcomes[1].as_ref(), Err(&error));
    error
}

#[test]
fn why_a_rank_has_dropped_a_group_is_told_however_long_it_takes() {
    let error = outcome(|comm| {
        comm.abort("the disk is full");
        Ok(())
    });
    assert!(matches!(&error, Error::Aborted { rank: 0, reason, .. } if reason == "the disk is full"), "{error}");
}

/// The thread of a transport on top of this one polls, whatever its rank does meanwhile.
#[test]
fn a_poll_does_not_tell_of_groups_that_the_rank_has_dropped() {
    let error = outcome(|comm| {
        assert!(comm.transport_arc().try_receive(1, 0)?.is_none());
        thread::sleep(Duration::from_millis(300));
        comm.abort("the disk is full");
        Ok(())
    });
    assert!(matches!(&error, Error::Aborted { rank: 0, .. }), "{error}");
}

#[test]
fn a_rank_that_goes_on_without_a_group_is_missed_there() {
    let lost = |error: &Error| matches!(error, Error::RankLost { group, rank: 0, .. } if &**group == "world/0");
    let error = outcome(|comm| comm.barrier());
    assert!(lost(&error), "{error}");
    let error = outcome(|comm| comm.recv::<Vec<u8>>(1, 0).map(drop));
    assert!(lost(&error), "{error}");
    let error = outcome(|comm| {
        comm.send(vec![1u8], 1, 0)?;
        thread::sleep(Duration::from_millis(300));
        Ok(())
    });
    assert!(lost(&error), "{error}");
}
