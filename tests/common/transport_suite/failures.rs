//! Whatever one rank does wrong, every rank returns, soon, and with the same error, which says what happened.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp};

use super::WorldFactory;
use crate::common::failing::{
    self, LONG, PURPOSE, SHORT, is_mismatch, prelude, says, stays_failed, until_it_fails, wait_of,
};

/// How long after the failure, or after the time-out, the last rank may return: long before [`LONG`] is over.
const LIMIT: Duration = Duration::from_secs(20);

pub(super) type Script<'a> = &'a dyn Fn(Communicator) -> Result<(), Error>;

/// Runs `script` on every rank of a fresh world, after two collectives for the log to tell of. All ranks but the
/// `culprit` must return the same error.
pub(super) fn failure(
    factory: &dyn WorldFactory,
    timeout: Duration,
    culprit: Option<usize>,
    script: Script<'_>,
) -> Error {
    let comm = factory.world(timeout);
    let (rank, size) = (comm.rank(), comm.size());
    prelude(&comm).unwrap();
    let began = Instant::now();
    let watched = (culprit != Some(rank)).then(|| comm.clone());
    let result = catch_unwind(AssertUnwindSafe(|| script(comm)));
    assert!(began.elapsed() < LIMIT + wait_of(timeout), "rank {rank} came back after {:?}", began.elapsed());
    let said = match (watched, result) {
        (None, _) => None,
        (Some(comm), Ok(Err(error))) => {
            stays_failed(&comm, &error);
            Some(error)
        }
        (Some(_), Ok(Ok(()))) => panic!("rank {rank} did not fail"),
        (Some(_), Err(panic)) => std::panic::resume_unwind(panic),
    };
    // Nothing of the failed world is in the way of a fresh one, where the ranks compare what they were told.
    let fresh = factory.world(LONG);
    let text = said.as_ref().map_or_else(String::new, exact);
    let lens = fresh.all_gather(vec![text.len() as u64]).unwrap();
    let all = fresh.all_gather(text.into_bytes()).unwrap();
    let mut place = 0;
    let mut texts = Vec::new();
    for len in lens {
        texts.push(String::from_utf8(all[place..place + len as usize].to_vec()).unwrap());
        place += len as usize;
    }
    let told: Vec<&String> = texts.iter().filter(|text| !text.is_empty()).collect();
    assert_eq!(told.len(), size - usize::from(culprit.is_some()));
    assert!(told.iter().all(|text| *text == told[0]), "the ranks were told different things: {told:#?}");
    said.unwrap_or_else(|| Error::User(told[0].clone()))
}

/// All that an error holds: its message, and what that rounds or leaves out.
fn exact(error: &Error) -> String {
    match error {
        Error::Timeout { waited, .. } => format!("{error}\n{waited:?}"),
        Error::Mismatch { calls, .. } => format!("{error}\n{calls:?}"),
        _ => error.to_string(),
    }
}

/// The message ends with the last collectives of every rank.
#[track_caller]
fn tells_the_log(factory: &dyn WorldFactory, error: &Error, size: usize) {
    if matches!(error, Error::User(_)) {
        // The culprit's own copy, as text.
        return;
    }
    failing::tells_the_log(error, size, factory.calls());
}

pub(super) fn drop_of<T>(result: Result<T, Error>) -> Result<(), Error> {
    result.map(drop)
}

/// One rank calls `odd`, the others `usual`. All ranks return a mismatch that holds these words.
pub(super) fn mismatch(factory: &dyn WorldFactory, words: &[&str], usual: Script<'_>, odd: Script<'_>) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        let error = failure(factory, LONG, None, &|comm| match comm.rank() == culprit {
            true => odd(comm),
            false => usual(comm),
        });
        is_mismatch(&error, size, culprit, factory.calls() + 2, words);
        tells_the_log(factory, &error, size);
    }
}

fn mismatches(factory: &dyn WorldFactory) {
    let usual: Script<'_> = &|comm| drop_of(comm.all_reduce(vec![1.0f32; 6], ReduceOp::Sum));
    mismatch(factory, &["called barrier"], usual, &|comm| comm.barrier());
    mismatch(factory, &["called all_gather of F32 [6]"], usual, &|comm| drop_of(comm.all_gather(vec![1.0f32; 6])));
    mismatch(factory, &["called split"], usual, &|comm| drop_of(comm.split(0, 0)));
    mismatch(factory, &["of F32 [6]", "of F32 [7]"], usual, &|comm| {
        drop_of(comm.all_reduce(vec![1.0f32; 7], ReduceOp::Sum))
    });
    mismatch(factory, &["of F32 [6]", "of F64 [6]"], usual, &|comm| {
        drop_of(comm.all_reduce(vec![1.0f64; 6], ReduceOp::Sum))
    });
    mismatch(factory, &["(Sum)", "(Max)"], usual, &|comm| drop_of(comm.all_reduce(vec![1.0f32; 6], ReduceOp::Max)));
    mismatch(factory, &["in 2 buffers"], usual, &|comm| {
        drop_of(comm.all_reduce_coalesced(vec![vec![1.0f32; 3]; 2], ReduceOp::Sum))
    });
    let named = |name: &'static str| move |comm: Communicator| drop_of(comm.split_named(name, 0, 0));
    mismatch(factory, &["called split(left)", "called split(right)"], &named("left"), &named("right"));
    let root = |root: usize| move |comm: Communicator| drop_of(comm.broadcast(vec![1u8], root));
    mismatch(factory, &["root 0", "root 1"], &root(0), &root(1));
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, &Device::flex());
    mismatch(factory, &["[2, 3]", "[2, 4]"], &move |comm| drop_of(comm.all_gather(ones([2, 3]))), &move |comm| {
        drop_of(comm.all_gather(ones([2, 4])))
    });
}

fn leaving(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        let error = failure(factory, LONG, Some(culprit), &|comm| match comm.rank() == culprit {
            true => {
                thread::sleep(Duration::from_millis(30));
                Ok(())
            }
            false => drop_of(comm.all_reduce(vec![1i32; 4], ReduceOp::Sum)),
        });
        says(&error, &[&format!("rank {culprit} left group `world`")]);
        if let Error::RankLost { rank, .. } = &error {
            assert_eq!(*rank, culprit);
            says(&error, &["left group `world`", "all_reduce(Sum) of I32 [4]"]);
        } else {
            assert!(matches!(error, Error::User(_)), "{error:?}");
        }
        tells_the_log(factory, &error, size);
        let error = failure(factory, LONG, Some(culprit), &|comm| {
            // What leaves the group at last is not the thread that panics.
            let elsewhere = comm.clone();
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(30));
                drop(elsewhere);
            });
            assert!(comm.rank() != culprit, "{PURPOSE}");
            drop_of(comm.all_to_all(vec![1i32; 4]))
        });
        match &error {
            Error::User(text) => assert!(text.contains(&format!("rank {culprit} panicked")), "{text}"),
            error => assert!(matches!(error, Error::RankPanicked { rank, .. } if *rank == culprit), "{error:?}"),
        }
    }
}

fn receiving(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    let culprit = size - 1;
    // Each waits for the next, the last for nobody: it leaves, but what it has sent is still received.
    let error = failure(factory, LONG, Some(culprit), &|comm| match comm.rank() {
        rank if rank == culprit => {
            comm.send(vec![7u8; 100_000], rank - 1, 4)?;
            comm.send(vec![8u8], rank - 1, 3)
        }
        rank => {
            if rank + 1 == culprit {
                assert_eq!(comm.recv::<Vec<u8>>(culprit, 3)?, [8]);
                assert_eq!(comm.recv::<Vec<u8>>(culprit, 4)?, [7; 100_000]);
            }
            drop_of(comm.recv::<Tensor<1>>(rank + 1, 3))
        }
    });
    if !matches!(error, Error::User(_)) {
        says(&error, &[&format!("rank {culprit} left group `world` while recv(from {culprit}, tag 3)")]);
    }
    tells_the_log(factory, &error, size);
    let error = failure(factory, LONG, None, &|comm| match comm.rank() {
        0 => drop_of(comm.recv::<Vec<f32>>(1, 7)),
        1 => comm.send(vec![1.0f64; 3], 0, 7).and_then(|()| comm.barrier()),
        _ => comm.barrier(),
    });
    assert!(matches!(&error, Error::UnexpectedMessage { from: 1, to: 0, tag: 7, .. }), "{error:?}");
    says(&error, &["rank 0 of group `world`", "f32", "from rank 1 with tag 7", "F64 [3]"]);
}

fn time_outs(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        let error = failure(factory, SHORT, None, &|comm| {
            if comm.rank() == culprit {
                until_it_fails(&comm);
            }
            drop_of(comm.all_reduce(vec![1.0f32; 5], ReduceOp::Sum))
        });
        let Error::Timeout { rank, waited, missing, .. } = &error else { panic!("{error:?}") };
        assert!(*rank != culprit && *waited >= SHORT && *missing == format!("rank {culprit}"), "{error:?}");
        says(&error, &["`world`", "all_reduce(Sum) of F32 [5]", "BURN_PARALLEL_TIMEOUT_S"]);
        tells_the_log(factory, &error, size);
    }
    let error = failure(factory, SHORT, None, &|comm| match comm.rank() {
        0 => drop_of(comm.recv::<Vec<f32>>(1, 7)),
        1 => {
            comm.send(vec![1.0f32], 0, 8)?;
            comm.send(vec![1.0f32], 0, 9)?;
            comm.barrier()
        }
        _ => comm.barrier(),
    });
    let Error::Timeout { rank, .. } = &error else { panic!("{error:?}") };
    match rank {
        0 => says(&error, &["recv(from 1, tag 7)", "for rank 1;", "tags", "[8, 9]"]),
        _ => says(&error, &["barrier", "for rank 0;", "recv(from 1, tag 7) (waiting"]),
    }
    tells_the_log(factory, &error, size);
}

fn aborts(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        let error = failure(factory, LONG, None, &|comm| match comm.rank() {
            rank if rank == culprit => {
                comm.abort("the loss is NaN");
                comm.barrier()
            }
            rank if rank % 2 == 1 => drop_of(comm.recv::<Vec<f32>>(culprit, 0)),
            _ => drop_of(comm.all_reduce(vec![0.0f32], ReduceOp::Sum)),
        });
        assert!(matches!(&error, Error::Aborted { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &["the loss is NaN"]);
        tells_the_log(factory, &error, size);
    }
    // Two at once: all are told of the same one.
    let error = failure(factory, LONG, None, &|comm| {
        comm.abort(format!("rank {} was first", comm.rank()));
        comm.barrier()
    });
    says(&error, &["was first"]);
}

/// A failure in a part of the world reaches those who wait elsewhere.
fn parts(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    if size < 3 {
        return;
    }
    let split = |comm: &Communicator| comm.split(comm.rank() as u64 % 2, 0);
    let elsewhere = |comm: &Communicator, part: &Communicator| match comm.rank() {
        1 => drop_of(comm.all_reduce(vec![1u64], ReduceOp::Sum)),
        2 => drop_of(part.all_reduce(vec![1u64; 77], ReduceOp::Sum)),
        _ => drop_of(part.recv::<Vec<u64>>(0, 5)),
    };
    let error = failure(factory, LONG, None, &|comm| {
        let part = split(&comm)?;
        match comm.rank() {
            0 => part.barrier(),
            _ => elsewhere(&comm, &part),
        }
    });
    assert!(matches!(error, Error::Mismatch { sequence, .. } if sequence == factory.calls_of_part()), "{error:?}");
    says(&error, &["`world/0`", "rank 0 called barrier", "rank 1 called all_reduce(Sum) of U64 [77]"]);
    let error = failure(factory, LONG, Some(0), &|comm| {
        let part = split(&comm)?;
        match comm.rank() {
            0 => {
                (1..size).try_for_each(|other| comm.recv::<Vec<u8>>(other, 9).map(drop))?;
                thread::sleep(Duration::from_millis(300));
                part.abort("enough");
                Ok(())
            }
            _ => {
                comm.send(vec![1u8], 0, 9)?;
                elsewhere(&comm, &part)
            }
        }
    });
    if !matches!(error, Error::User(_)) {
        says(&error, &["rank 0 of group `world/0` aborted the run: enough", "(waiting"]);
    }
    // A part that was dropped is missed by those who need it, and by nobody else.
    let error = failure(factory, LONG, None, &|comm| {
        let part = split(&comm)?;
        match comm.rank() {
            0 => {
                drop(part);
                comm.barrier()
            }
            2 => part.barrier(),
            _ => comm.barrier(),
        }
    });
    assert!(matches!(&error, Error::RankLost { rank: 0, .. }), "{error:?}");
    says(&error, &["rank 0 left group `world/0` while barrier"]);
}

/// An output that does not fit is this rank's error; the others have what they wanted and hear of it in the next call.
fn outputs(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    let error = failure(factory, LONG, None, &|comm| {
        let room = size * 2 + usize::from(comm.rank() == size - 1);
        comm.all_gather_into(&[1u16; 2], &mut vec![0; room])?;
        comm.barrier()
    });
    says(&error, &[&format!("room for {} elements of U16, {} of U16 came", size * 2 + 1, size * 2)]);
    let error = failure(factory, LONG, None, &|comm| drop_of(comm.scatter(None::<Vec<f32>>, 0)));
    says(&error, &["rank 0 is the root and passes nothing"]);
}

/// Collectives in flight on two groups end with the error of the world.
fn in_flight(factory: &dyn WorldFactory) {
    let size = factory.world(LONG).size();
    let culprit = size - 1;
    failure(factory, LONG, Some(culprit), &|comm| {
        let part = comm.split(0, 0)?;
        if comm.rank() == culprit {
            comm.abort("on purpose");
            return Ok(());
        }
        let start = |comm: &Communicator| comm.start(|comm| comm.all_reduce(vec![1.0f32; 9], ReduceOp::Sum));
        let pending: Vec<_> = [&part, &comm, &part, &comm].into_iter().map(start).collect();
        let results: Vec<_> = pending.into_iter().map(|pending| pending.wait()).collect();
        let error = results[0].clone().unwrap_err();
        assert!(results.iter().all(|result| result.as_ref() == Err(&error)));
        Err(error)
    });
}

/// All of these, for two ranks or more. Returns how many there were.
pub fn run(factory: &dyn WorldFactory, tell: &dyn Fn(&str)) -> usize {
    if factory.world(LONG).size() < 2 {
        return 0;
    }
    type Check = fn(&dyn WorldFactory);
    let all: [(&str, Check); 8] = [
        ("calls that do not match", mismatches),
        ("ranks that leave or panic", leaving),
        ("receives in vain", receiving),
        ("ranks that come too late", time_outs),
        ("aborts", aborts),
        ("failures in a part of the world", parts),
        ("outputs that do not fit", outputs),
        ("failures with collectives in flight", in_flight),
    ];
    for (name, check) in all {
        tell(name);
        check(factory);
    }
    all.len()
}
