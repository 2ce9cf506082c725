//! What every transport must do: the assertions are here, each transport provides the worlds to make them in.
//!
//! A check is a function that every rank runs, each with a world of its own to begin with; what the ranks must have
//! alike they compare over that world or, when the check has made it fail, over a fresh one.
#![allow(dead_code, reason = "each test binary uses the part that it needs")]

pub mod checks;
pub mod collectives;
#[cfg(feature = "cubecl")]
pub mod device;
#[cfg(feature = "cubecl")]
pub mod device_failures;
pub mod failures;
pub mod items;
#[cfg(feature = "cuda")]
pub mod over_nccl;
pub mod over_threads;
pub mod short_of_memory;
pub mod thresholds;

use std::time::Duration;

use burn_parallel::comm::Communicator;

use crate::common::failing::LONG;

/// Makes the worlds of a transport, on one rank. All ranks make the same worlds in the same order.
pub trait WorldFactory {
    /// A fresh world of all ranks, with this time-out.
    fn world(&self, timeout: Duration) -> Communicator;

    /// Collectives of a fresh world that making it has taken.
    fn calls(&self) -> u64 {
        0
    }

    /// Collectives of a part of a world that making it has taken.
    fn calls_of_part(&self) -> u64 {
        0
    }
}

/// All checks, on every rank. Returns how many there were.
pub fn run(factory: &dyn WorldFactory, tell: &dyn Fn(&str)) -> usize {
    successes(factory, tell) + failures::run(factory, tell)
}

/// The checks of worlds that do not fail.
pub fn successes(factory: &dyn WorldFactory, tell: &dyn Fn(&str)) -> usize {
    let mut count = 0;
    let mut check = |name: &str, body: &dyn Fn(&Communicator)| {
        tell(name);
        body(&factory.world(LONG));
        count += 1;
    };
    type Check = fn(&Communicator) -> Result<(), burn_parallel::Error>;
    let simple: [(&str, Check); 8] = [
        ("sums that everybody knows", checks::sums_that_everybody_knows),
        ("halves are rounded once", checks::halves_are_rounded_once),
        ("factors are not rounded", checks::factors_are_not_rounded),
        ("a NaN on any rank is seen", checks::a_nan_on_any_rank_is_seen),
        ("bytes and calls are exact", checks::bytes_and_calls_are_exact),
        ("tags are independent and in order", checks::tags_are_independent_and_in_order),
        ("in flight and direct calls interleave", checks::in_flight_and_direct_calls_interleave),
        ("stress", |comm| checks::stress(comm, 150)),
    ];
    for (name, body) in simple {
        check(name, &|comm| body(comm).unwrap());
    }
    check("vectors of every dtype", &|comm| {
        for (seed, len) in [(0, 0), (1, 1), (2, 7), (3, 1000), (5, 70_001)] {
            collectives::vectors_alike(comm, seed, len).unwrap();
        }
    });
    check("tensors of every dtype, rank and layout", &|comm| {
        for (seed, dims) in [(1, [0, 3, 2, 2]), (2, [5, 3, 2, 3]), (3, [10, 4, 3, 1])] {
            collectives::every_tensor(comm, seed, dims).unwrap();
        }
    });
    check("large buffers, cut in pieces", &|comm| checks::large(comm).unwrap());
    check("sizes around the thresholds of transports", &|comm| thresholds::all(comm).unwrap());
    check("groups of groups", &|comm| checks::groups_of_groups(comm).unwrap());
    count
}
