//! Whatever one rank does wrong, every rank returns, soon, and with the same error, which says what happened.
//!
//! Failures that are found at once run with a time-out that is far longer than the limit within which the ranks must be
//! back: nobody may need the time-out to find out.

use std::fmt::Debug;
use std::sync::{Mutex, Once, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Int, Tensor};
use burn_parallel::Error;
use burn_parallel::comm::local::{self, WorldConfig};
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::launch::{self, Rank};

/// A time-out that no test waits for.
const LONG: Duration = Duration::from_secs(60);
/// A time-out that some tests wait for.
const SHORT: Duration = Duration::from_millis(400);
/// How long after the failure, or after the time-out, the last rank may return.
const LIMIT: Duration = Duration::from_secs(4);

const SIZES: [usize; 3] = [2, 3, 4];
const PURPOSE: &str = "panics on purpose";

/// Runs `f` on a thread and fails the test if it does not return in time.
fn within<R: Send + 'static>(limit: Duration, f: impl FnOnce() -> R + Send + 'static) -> R {
    let (done, result) = mpsc::channel();
    let body = thread::spawn(move || done.send(f()));
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the ranks were not back after {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(body.join().unwrap_err()),
    }
}

/// Keeps the panics that the tests make from cluttering the output.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let said = info.payload().downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| info.payload().downcast_ref::<&str>().copied());
            if !said.is_some_and(|text| text.contains(PURPOSE)) {
                usual(info);
            }
        }));
    });
}

/// Two collectives that succeed, for the log to tell of.
fn prelude(comm: &Communicator) -> Result<(), Error> {
    comm.barrier()?;
    let size = comm.size() as f32;
    assert_eq!(comm.all_reduce(vec![1.0f32; 3], ReduceOp::Sum)?, [size; 3]);
    Ok(())
}

/// Everything fails at once with `error` on a communicator of a failed world.
fn stays_failed(comm: &Communicator, error: &Error) {
    let began = Instant::now();
    let other = (comm.rank() + 1) % comm.size();
    assert_eq!(comm.failure().as_ref(), Some(error));
    assert_eq!(comm.barrier().as_ref(), Err(error));
    assert_eq!(comm.all_reduce(vec![0i64], ReduceOp::Max).as_ref(), Err(error));
    assert_eq!(comm.all_gather(Vec::<u8>::new()).as_ref(), Err(error));
    assert_eq!(comm.send(vec![1.0f64], other, 0).as_ref(), Err(error));
    assert_eq!(comm.recv::<Vec<f64>>(other, 0).as_ref(), Err(error));
    assert_eq!(comm.start_recv::<Vec<f64>>(other, 0).wait().as_ref(), Err(error));
    assert_eq!(comm.start(|comm| comm.barrier()).wait().as_ref(), Err(error));
    assert_eq!(comm.split(0, 0).err().as_ref(), Some(error));
    comm.abort("too late to matter");
    assert_eq!(comm.failure().as_ref(), Some(error));
    assert!(began.elapsed() < Duration::from_secs(2), "a failed world must not make anybody wait");
}

/// Runs `f` on `size` ranks after the prelude and returns the error of the world, which every rank but the `culprit` must
/// return from `f`. The culprit may return what it likes, or panic.
fn failure(
    size: usize,
    timeout: Duration,
    culprit: Option<usize>,
    f: impl Fn(&Rank) -> Result<(), Error> + Send + Sync + 'static,
) -> Error {
    quiet();
    let limit = LIMIT + if timeout == LONG { Duration::ZERO } else { timeout };
    let error = within(limit, move || {
        let said: Vec<Mutex<Option<Result<(), Error>>>> = (0..size).map(|_| Mutex::new(None)).collect();
        let run = launch::threads(size).threads_per_rank(1).timeout(timeout).run(|rank| {
            prelude(&rank)?;
            let result = f(&rank);
            *said[rank.rank()].lock().unwrap() = Some(result.clone());
            if let (true, Err(error)) = (culprit != Some(rank.rank()), &result) {
                stays_failed(&rank, error);
            }
            result
        });
        let error = run.expect_err("the world must fail");
        for (rank, said) in said.iter().enumerate().filter(|(rank, _)| culprit != Some(*rank)) {
            assert_eq!(said.lock().unwrap().as_ref(), Some(&Err(error.clone())), "what rank {rank} returned");
        }
        error
    });
    a_fresh_world_works(size);
    error
}

/// As [`failure`], on bare threads: `f` owns its communicator.
fn failure_of_threads(
    size: usize,
    timeout: Duration,
    culprit: usize,
    f: impl Fn(Communicator) -> Result<(), Error> + Send + Sync + 'static,
) -> Error {
    quiet();
    let limit = LIMIT + if timeout == LONG { Duration::ZERO } else { timeout };
    let error = within(limit, move || {
        let world = local::world(size, WorldConfig::from_env().unwrap().with_timeout(timeout)).unwrap();
        let results: Vec<_> = thread::scope(|scope| {
            let start = |comm: Communicator| {
                scope.spawn(|| {
                    prelude(&comm)?;
                    f(comm)
                })
            };
            let threads: Vec<_> = world.into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        let others = results.into_iter().enumerate().filter(|(rank, _)| *rank != culprit);
        let mut errors = others.map(|(_, result)| result.unwrap().expect_err("every other rank must fail"));
        let first = errors.next().unwrap();
        errors.for_each(|error| assert_eq!(error, first));
        first
    });
    a_fresh_world_works(size);
    error
}

/// Nothing of a failed world is left behind.
fn a_fresh_world_works(size: usize) {
    let sums =
        launch::threads(size).threads_per_rank(1).run(|rank| rank.all_reduce(vec![1i32], ReduceOp::Sum)).unwrap();
    assert_eq!(sums, vec![vec![size as i32]; size]);
}

/// The message holds all these words.
fn says(error: &Error, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

/// The message ends with the last collectives of every rank.
fn tells_the_log(error: &Error, size: usize) {
    let message = error.to_string();
    for rank in 0..size {
        let line = message.lines().find(|line| line.starts_with(&format!("  rank {rank}: ")));
        let line = line.unwrap_or_else(|| panic!("no line of rank {rank} in: {message}"));
        assert!(line.contains("#1 all_reduce(Sum) of F32 [3]") && line.contains("#0 barrier"), "{line}");
    }
}

#[test]
fn a_rank_that_panics() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure(size, LONG, Some(culprit), move |rank| {
            assert!(rank.rank() != culprit, "{PURPOSE} on rank {culprit}");
            rank.all_reduce(vec![1.0f32; 10], ReduceOp::Sum).map(drop)
        });
        assert!(matches!(&error, Error::RankPanicked { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &[&format!("rank {culprit} panicked: {PURPOSE} on rank {culprit}")]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_rank_that_returns_an_error() {
    for size in SIZES {
        let error = failure(size, LONG, Some(0), |rank| match rank.rank() {
            0 => Err(Error::user("the disk is full")),
            _ => rank.broadcast(vec![0u8; 100], 0).map(drop),
        });
        let cause = Box::new(Error::User("the disk is full".into()));
        assert!(matches!(&error, Error::RankFailed { rank: 0, cause: c, .. } if *c == cause), "{error:?}");
        says(&error, &["rank 0 failed: the disk is full"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_rank_that_returns_early() {
    for size in SIZES {
        let error = failure(size, LONG, Some(1), |rank| match rank.rank() {
            1 => Ok(()),
            _ => rank.reduce_scatter(vec![1.0f64; 9], ReduceOp::Mean).map(drop),
        });
        assert!(matches!(&error, Error::RankLost { rank: 1, .. }), "{error:?}");
        says(&error, &["rank 1 left group `world`", "reduce_scatter(Mean) of F64 [9]"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_rank_that_drops_its_communicator() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure_of_threads(size, LONG, culprit, move |comm| match comm.rank() == culprit {
            true => {
                thread::sleep(Duration::from_millis(30));
                Ok(())
            }
            false => comm.all_reduce(vec![1i32; 4], ReduceOp::Sum).map(drop),
        });
        assert!(matches!(&error, Error::RankLost { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &[&format!("rank {culprit} left group `world`"), "all_reduce(Sum) of I32 [4]", "keep"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_thread_that_panics_with_its_communicator() {
    for size in SIZES {
        let error = failure_of_threads(size, LONG, 0, move |comm| {
            assert!(comm.rank() != 0, "{PURPOSE}");
            comm.all_to_all(vec![1i32; 4]).map(drop)
        });
        assert!(matches!(&error, Error::RankPanicked { rank: 0, .. }), "{error:?}");
        tells_the_log(&error, size);
    }
}

/// One rank calls `odd`, the others `usual`. All ranks return a mismatch that holds these words.
fn mismatch<A: Debug, B: Debug>(
    words: &[&str],
    usual: impl Fn(&Communicator) -> Result<A, Error> + Send + Sync + Clone + 'static,
    odd: impl Fn(&Communicator) -> Result<B, Error> + Send + Sync + Clone + 'static,
) {
    for size in SIZES {
        for culprit in [0, size - 1] {
            let (usual, odd) = (usual.clone(), odd.clone());
            let error = failure(size, LONG, None, move |rank| match rank.rank() == culprit {
                true => odd(rank).map(|result| panic!("the odd one got {result:?}")),
                false => usual(rank).map(|result| panic!("rank {} got {result:?}", rank.rank())),
            });
            let Error::Mismatch { sequence: 2, calls, .. } = &error else { panic!("{error:?}") };
            assert_eq!(calls.len(), size);
            let other = (culprit + 1) % size;
            assert_ne!(calls[culprit].to_string(), calls[other].to_string(), "the message shows the difference");
            says(&error, &["`world`", "#2", &format!("rank {culprit} called {}", calls[culprit])]);
            says(&error, &[&format!("rank {other} called {}", calls[other])]);
            says(&error, words);
            tells_the_log(&error, size);
        }
    }
}

#[test]
fn another_operation() {
    let usual = |comm: &Communicator| comm.all_reduce(vec![1.0f32; 6], ReduceOp::Sum);
    mismatch(&["called barrier"], usual, |comm| comm.barrier());
    mismatch(&["called all_gather of F32 [6]"], usual, |comm| comm.all_gather(vec![1.0f32; 6]));
    mismatch(&["called reduce_scatter(Sum)"], usual, |comm| comm.reduce_scatter(vec![1.0f32; 6], ReduceOp::Sum));
    mismatch(&["called split"], usual, |comm| comm.split(0, 0).map(drop));
    mismatch(&["called scatter(root 0)"], |comm| comm.barrier(), |comm| comm.scatter(Some(vec![0i8]), 0));
    mismatch(&["called all_to_all"], |comm| comm.gather(vec![0i8], 0), |comm| comm.all_to_all(vec![0i8]));
    mismatch(&["called broadcast"], usual, |comm| comm.broadcast(vec![1.0f32; 6], 0));
}

#[test]
fn another_length_or_shape() {
    mismatch(
        &["all_reduce(Sum) of F32 [6]", "all_reduce(Sum) of F32 [7]"],
        |comm| comm.all_reduce(vec![1.0f32; 6], ReduceOp::Sum),
        |comm| comm.all_reduce(vec![1.0f32; 7], ReduceOp::Sum),
    );
    mismatch(
        &["all_reduce(Max) of I64 [1]", "all_reduce(Max) of I64 [0]"],
        |comm| comm.all_reduce_in_place(&mut [1i64], ReduceOp::Max),
        |comm| comm.all_reduce_in_place::<i64>(&mut [], ReduceOp::Max),
    );
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, &Device::flex());
    mismatch(
        &["[2, 3]", "[3, 2]"],
        move |comm| comm.all_reduce(ones([2, 3]), ReduceOp::Sum).map(drop),
        move |comm| comm.all_reduce(ones([3, 2]), ReduceOp::Sum).map(drop),
    );
    mismatch(
        &["all_gather of F32 [2, 3]", "all_gather of F32 [2, 4]"],
        move |comm| comm.all_gather(ones([2, 3])).map(drop),
        move |comm| comm.all_gather(ones([2, 4])).map(drop),
    );
    mismatch(
        &["all_to_all of F32 [6]", "all_to_all of F32 [2, 3]"],
        move |comm| comm.all_to_all(Tensor::<1>::ones([6], &Device::flex())).map(drop),
        move |comm| comm.all_to_all(ones([2, 3])).map(drop),
    );
    mismatch(
        &["broadcast(root 0) of U8 [5]", "broadcast(root 0) of U8 [4]"],
        |comm| comm.broadcast(vec![0u8; 5], 0),
        |comm| comm.broadcast(vec![0u8; 4], 0),
    );
}

#[test]
fn another_dtype() {
    mismatch(
        &["of F32 [6]", "of F64 [6]"],
        |comm| comm.all_reduce(vec![1.0f32; 6], ReduceOp::Sum),
        |comm| comm.all_reduce(vec![1.0f64; 6], ReduceOp::Sum),
    );
    mismatch(
        &["of I32 [6]", "of U32 [6]"],
        |comm| comm.all_gather(vec![1i32; 6]),
        |comm| comm.all_gather(vec![1u32; 6]),
    );
    mismatch(&["of I8 [6]", "of Bool"], |comm| comm.gather(vec![1i8; 6], 0), |comm| comm.gather(vec![true; 6], 0));
}

#[test]
fn a_scatter_of_another_dtype_than_one_receiver_expects() {
    // Rank 1 says what it takes, the others, who receive tensors, take what comes: they must not succeed meanwhile.
    for size in [3, 4] {
        let error = failure(size, LONG, None, |rank| match rank.rank() {
            0 => rank.scatter(Some(Tensor::<1>::ones([8], &Device::flex())), 0).map(drop),
            1 => rank.scatter(None::<Vec<i64>>, 0).map(drop),
            _ => rank.scatter(None::<Tensor<1>>, 0).map(drop),
        });
        assert!(matches!(&error, Error::Mismatch { .. }), "{error:?}");
        says(&error, &["rank 0 called scatter(root 0) of F32 [8]", "rank 1 called scatter(root 0) of I64 [0]"]);
    }
}

#[test]
fn a_scatter_of_another_rank_than_one_receiver_expects() {
    for size in SIZES {
        let error = failure(size, LONG, None, |rank| {
            match rank.rank() {
                0 => rank.scatter(Some(Tensor::<2>::ones([8, 2], &Device::flex())), 0).map(drop),
                1 => rank.scatter(None::<Tensor<1>>, 0).map(drop),
                _ => rank.scatter(None::<Tensor<2>>, 0).map(drop),
            }?;
            rank.barrier()
        });
        says(&error, &["a tensor of rank 1", "one of rank 2"]);
    }
}

#[test]
fn another_root() {
    mismatch(&["root 0", "root 1"], |comm| comm.broadcast(vec![1u8], 0), |comm| comm.broadcast(vec![1u8], 1));
    mismatch(&["root 0", "root 1"], |comm| comm.gather(vec![1u8], 0), |comm| comm.gather(vec![1u8], 1));
    mismatch(
        &["scatter(root 0)", "scatter(root 1)"],
        |comm| comm.scatter(Some(vec![1u8]), 0),
        |comm| comm.scatter(Some(vec![1u8]), 1),
    );
    mismatch(
        &["reduce(Sum, root 0)", "reduce(Sum, root 1)"],
        |comm| comm.reduce(vec![1u8], ReduceOp::Sum, 0),
        |comm| comm.reduce(vec![1u8], ReduceOp::Sum, 1),
    );
}

#[test]
fn another_reduction() {
    mismatch(
        &["all_reduce(Sum)", "all_reduce(Max)"],
        |comm| comm.all_reduce(vec![1u8], ReduceOp::Sum),
        |comm| comm.all_reduce(vec![1u8], ReduceOp::Max),
    );
    mismatch(
        &["reduce_scatter(Sum)", "reduce_scatter(PreMulSum(0.5))"],
        |comm| comm.reduce_scatter(vec![1.0f32; 8], ReduceOp::Sum),
        |comm| comm.reduce_scatter(vec![1.0f32; 8], ReduceOp::PreMulSum(0.5)),
    );
}

#[test]
fn another_number_of_coalesced_pieces() {
    let pieces = |lens: &'static [usize]| {
        move |comm: &Communicator| {
            let payloads: Vec<Vec<f32>> = lens.iter().map(|len| vec![1.0; *len]).collect();
            comm.all_reduce_coalesced(payloads, ReduceOp::Sum)
        }
    };
    mismatch(&["of F32 [6] in 3 pieces", "of F32 [6] in 2 pieces"], pieces(&[1, 2, 3]), pieces(&[3, 3]));
    mismatch(&["of F32 [6] in 3 pieces"], pieces(&[1, 2, 3]), pieces(&[3, 2, 1]));
    mismatch(&["of F32 [6] in 3 pieces", "in 0 pieces"], pieces(&[1, 2, 3]), pieces(&[]));
    mismatch(&["of F32 [6] in 3 pieces"], pieces(&[1, 2, 3]), |comm| comm.all_reduce(vec![1.0f32; 6], ReduceOp::Sum));
}

#[test]
fn a_root_that_has_nothing_to_scatter() {
    for size in SIZES {
        let error = failure(size, LONG, None, |rank| rank.scatter(None::<Vec<f32>>, 0).map(drop));
        assert!(matches!(&error, Error::InvalidArgument { operation: "scatter", .. }), "{error:?}");
        says(&error, &["rank 0 is the root and brings nothing"]);
    }
}

#[test]
fn an_output_of_another_length() {
    for size in SIZES {
        let error = failure(size, LONG, None, move |rank| {
            // Only the last rank finds out; the others have what they wanted and hear of it in the next call.
            let room = size * 2 + usize::from(rank.rank() == size - 1);
            rank.all_gather_into(&[1u16; 2], &mut vec![0; room])?;
            rank.barrier()
        });
        says(&error, &[&format!("room for {} elements of U16, {} of U16 came", size * 2 + 1, size * 2)]);
    }
}

#[test]
fn arguments_that_one_rank_alone_can_tell_to_be_wrong() {
    for size in SIZES {
        let results = launch::threads(size).run(|rank| {
            let missing = |result: Result<(), Error>, operation: &'static str| {
                let group = rank.group().clone();
                assert_eq!(result, Err(Error::NoSuchRank { group, rank: size, size, operation }));
            };
            missing(rank.broadcast(vec![0u8], size).map(drop), "broadcast");
            missing(rank.broadcast_in_place(&mut [0u8], size), "broadcast");
            missing(rank.reduce(vec![0u8], ReduceOp::Sum, size).map(drop), "reduce");
            missing(rank.gather(vec![0u8], size).map(drop), "gather");
            missing(rank.scatter(Some(vec![0u8]), size).map(drop), "scatter");
            missing(rank.send(vec![0u8], size, 0), "send");
            missing(rank.recv::<Vec<u8>>(size, 0).map(drop), "recv");
            let mixed = vec![Tensor::<1>::ones([1], &Device::flex()), Tensor::ones([1], (&Device::flex(), DType::F64))];
            let refused = rank.all_reduce_coalesced(mixed, ReduceOp::Sum).map(drop).unwrap_err();
            says(&refused, &["all_reduce_coalesced", "F32", "F64"]);
            // None of this has harmed the world.
            rank.barrier()
        });
        assert_eq!(results, Ok(vec![(); size]));
    }
}

#[test]
fn a_tag_that_nobody_sends() {
    for size in SIZES {
        let error = failure(size, SHORT, None, |rank| match rank.rank() {
            0 => rank.recv::<Vec<f32>>(1, 7).map(drop),
            1 => {
                rank.send(vec![1.0f32], 0, 8)?;
                rank.send(vec![1.0f32], 0, 9)?;
                rank.barrier()
            }
            _ => rank.barrier(),
        });
        // The barrier runs out at the same time as the receive; all ranks agree on which was first.
        let Error::Timeout { rank, waited, .. } = &error else { panic!("{error:?}") };
        assert!(*waited >= SHORT);
        match rank {
            0 => says(&error, &["rank 0 waited", "recv(from 1, tag 7)", "for rank 1;", "tags", "[8, 9]"]),
            _ => says(&error, &["barrier", "for rank 0;", "recv(from 1, tag 7) (waiting"]),
        }
        tells_the_log(&error, size);
    }
}

#[test]
fn a_message_that_the_receiver_does_not_expect() {
    for size in SIZES {
        let error = failure(size, LONG, None, |rank| match rank.rank() {
            0 => rank.recv::<Vec<f32>>(1, 7).map(drop),
            1 => rank.send(vec![1.0f64; 3], 0, 7).and_then(|()| rank.barrier()),
            _ => rank.barrier(),
        });
        assert!(matches!(&error, Error::UnexpectedMessage { from: 1, to: 0, tag: 7, .. }), "{error:?}");
        says(&error, &["rank 0 of group `world`", "f32", "from rank 1 with tag 7", "F64 [3]"]);
        tells_the_log(&error, size);
        let error = failure(size, LONG, None, |rank| match rank.rank() {
            0 => rank.recv::<Tensor<2, Int>>(1, 7).map(drop),
            1 => rank.send(Tensor::<1, Int>::ones([3], &Device::flex()), 0, 7).and_then(|()| rank.barrier()),
            _ => rank.barrier(),
        });
        assert!(matches!(&error, Error::UnexpectedMessage { .. }), "{error:?}");
    }
}

#[test]
fn a_rank_that_never_comes() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure(size, SHORT, None, move |rank| {
            if rank.rank() == culprit {
                thread::sleep(SHORT + Duration::from_millis(300));
            }
            rank.all_reduce(vec![1.0f32; 5], ReduceOp::Sum).map(drop)
        });
        let Error::Timeout { rank, waited, missing, .. } = &error else { panic!("{error:?}") };
        assert!(*rank < culprit && *waited >= SHORT && *missing == format!("rank {culprit}"), "{error:?}");
        says(&error, &["`world`", "all_reduce(Sum) of F32 [5]", "BURN_PARALLEL_TIMEOUT_S", "with_timeout"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn several_ranks_that_never_come() {
    let error = failure(4, SHORT, None, |rank| {
        if rank.rank() % 2 == 1 {
            thread::sleep(SHORT + Duration::from_millis(300));
        }
        rank.barrier()
    });
    assert!(matches!(&error, Error::Timeout { missing, .. } if missing == "ranks 1, 3"), "{error:?}");
}

#[test]
fn time_outs_on_all_ranks_at_once_are_one_error() {
    // The clocks of three ranks run out together; whichever fails the world, all tell the same.
    quiet();
    within(Duration::from_secs(30), || {
        for _ in 0..150 {
            let config = WorldConfig::from_env().unwrap().with_timeout(Duration::from_millis(3));
            let mut world = local::world(4, config).unwrap();
            let absent = world.pop();
            let errors: Vec<Error> = thread::scope(|scope| {
                let threads: Vec<_> = world
                    .iter()
                    .map(|comm| {
                        scope.spawn(move || match comm.rank() {
                            2 => comm.recv::<Vec<f32>>(3, 0).map(drop).unwrap_err(),
                            _ => comm.barrier().unwrap_err(),
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(matches!(errors[0], Error::Timeout { .. }), "{}", errors[0]);
            assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
            drop(absent);
        }
    });
}

#[test]
fn an_abort() {
    for size in SIZES {
        let error = failure(size, LONG, Some(0), |rank| match rank.rank() {
            0 => {
                rank.abort("the loss is NaN");
                rank.barrier()
            }
            1 => rank.recv::<Vec<f32>>(0, 0).map(drop),
            _ => rank.all_reduce(vec![0.0f32], ReduceOp::Sum).map(drop),
        });
        assert!(matches!(&error, Error::Aborted { rank: 0, .. }), "{error:?}");
        says(&error, &["rank 0 of group `world`", "the loss is NaN"]);
        tells_the_log(&error, size);
    }
}

/// Splits the world into even and odd ranks, and lets rank 0 `fail` while all others wait: rank 2 in its own group, rank 1
/// in the parent, rank 3 in the sibling group.
fn failure_in_a_part(size: usize, timeout: Duration, fail: fn(&Rank, &Communicator) -> Result<(), Error>) -> Error {
    failure(size, timeout, Some(0), move |rank| {
        let part = rank.split(rank.rank() as u64 % 2, 0)?;
        part.barrier()?;
        match rank.rank() {
            0 => fail(rank, &part),
            1 => rank.all_reduce(vec![1u64], ReduceOp::Sum).map(drop),
            2 => part.all_reduce(vec![1u64], ReduceOp::Sum).map(drop),
            _ => part.recv::<Vec<u64>>(0, 5).map(drop),
        }
    })
}

#[test]
fn a_failure_in_a_part_of_the_world_reaches_the_whole() {
    for size in [3, 4] {
        let error = failure_in_a_part(size, LONG, |_, _| panic!("{PURPOSE}"));
        assert!(matches!(&error, Error::RankPanicked { rank: 0, .. }), "{error:?}");
        let error = failure_in_a_part(size, LONG, |_, _| Err(Error::user("no")));
        assert!(matches!(&error, Error::RankFailed { rank: 0, .. }), "{error:?}");
        let error = failure_in_a_part(size, LONG, |_, part| part.barrier());
        assert!(matches!(&error, Error::Mismatch { sequence: 1, calls, .. } if calls.len() == 2), "{error:?}");
        says(&error, &["`world/0`", "rank 0 called barrier", "rank 1 called all_reduce(Sum) of U64 [1]"]);
        let error = failure_in_a_part(size, LONG, |_, part| {
            part.abort("enough");
            part.barrier()
        });
        says(&error, &["rank 0 of group `world/0` aborted the run: enough"]);
        let error = failure_in_a_part(size, SHORT, |rank, part| {
            while rank.failure().is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            part.barrier()
        });
        assert!(matches!(&error, Error::Timeout { .. }), "{error:?}");
    }
}

#[test]
fn the_log_tells_of_those_who_wait_in_other_groups() {
    let error = failure(4, LONG, Some(0), |rank| {
        let part = rank.split(rank.rank() as u64 % 2, 0)?;
        match rank.rank() {
            0 => {
                thread::sleep(Duration::from_millis(200));
                Err(Error::user("no"))
            }
            2 => part.all_reduce(vec![1u64; 77], ReduceOp::Sum).map(drop),
            _ => part.recv::<Vec<u64>>(1 - part.rank(), 99).map(drop),
        }
    });
    says(&error, &["in `world/0` rank 1: #0 all_reduce(Sum) of U64 [77] (waiting"]);
    says(
        &error,
        &["in `world/1` rank 0: #0 recv(from 1, tag 99) (waiting", "in `world/1` rank 1: #0 recv(from 0, tag"],
    );
    tells_the_log(&error, 4);
}

#[test]
fn a_rank_that_leaves_a_part_of_the_world() {
    for size in [3, 4] {
        let error = failure(size, LONG, Some(0), |rank| {
            let part = rank.split(rank.rank() as u64 % 2, 0)?;
            match rank.rank() {
                0 => {
                    drop(part);
                    rank.barrier()
                }
                2 => part.barrier(),
                _ => rank.barrier(),
            }
        });
        assert!(matches!(&error, Error::RankLost { rank: 0, .. }), "{error:?}");
        says(&error, &["rank 0 left group `world/0` while barrier"]);
    }
}

#[test]
fn a_failure_while_operations_are_in_flight() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure(size, LONG, Some(culprit), move |rank| {
            let part = rank.split(0, 0)?;
            let start = |comm: &Communicator| comm.start(|comm| comm.all_reduce(vec![1.0f32; 9], ReduceOp::Sum));
            if rank.rank() == culprit {
                let _taken_along = start(&part);
                panic!("{PURPOSE}");
            }
            let pending: Vec<_> = [&part, rank.world(), &part, rank.world()].into_iter().map(start).collect();
            let mut results: Vec<_> = pending.into_iter().map(|pending| pending.wait()).collect();
            // The first on `part` may have succeeded: the culprit started it too.
            let _ = results.remove(0);
            let error = results[0].clone().unwrap_err();
            assert!(results.iter().all(|result| result.as_ref() == Err(&error)));
            Err(error)
        });
        assert!(matches!(&error, Error::RankPanicked { rank, .. } if *rank == culprit), "{error:?}");
        tells_the_log(&error, size);
    }
}

#[test]
fn a_panic_in_the_background() {
    for size in SIZES {
        let error = failure(size, LONG, None, |rank| {
            // World rank 1 is rank 0 of its part.
            let part = rank.split(u64::from(rank.rank() > 0), 0)?;
            let pending = (rank.rank() == 1).then(|| part.start::<()>(|_| panic!("{PURPOSE}")));
            // Nobody has waited for it, and everybody hears of it.
            rank.recv::<Vec<f32>>((rank.rank() + 1) % rank.size(), 0).map(drop).inspect_err(|error| {
                if let Some(pending) = pending {
                    assert_eq!(pending.wait(), Err(error.clone()));
                }
            })
        });
        assert!(matches!(&error, Error::RankPanicked { rank: 1, .. }), "{error:?}");
        says(&error, &["rank 1 panicked", PURPOSE]);
    }
}

#[test]
fn a_failure_while_others_receive() {
    for size in SIZES {
        // Each waits for the next, the last for nobody: it panics.
        let culprit = size - 1;
        let error = failure(size, LONG, Some(culprit), move |rank| {
            assert!(rank.rank() != culprit, "{PURPOSE}");
            rank.recv::<Tensor<1>>(rank.rank() + 1, 0).map(drop)
        });
        assert!(matches!(&error, Error::RankPanicked { rank, .. } if *rank == culprit), "{error:?}");
        let error = failure_of_threads(size, LONG, culprit, move |comm| match comm.rank() {
            rank if rank == culprit => Ok(()),
            rank => comm.recv::<Tensor<1>>(rank + 1, 3).map(drop),
        });
        assert!(matches!(&error, Error::RankLost { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &[&format!("rank {culprit} left group `world` while recv(from {culprit}, tag 3)")]);
        tells_the_log(&error, size);
    }
}

#[test]
fn what_was_sent_before_leaving_is_received() {
    within(LIMIT, || {
        let mut world = local::world(2, WorldConfig::from_env().unwrap().with_timeout(LONG)).unwrap();
        let (one, zero) = (world.pop().unwrap(), world.pop().unwrap());
        let receiver = thread::spawn(move || {
            let late = zero.recv::<Vec<u8>>(1, 2).unwrap();
            (late, zero.recv::<Vec<u8>>(1, 1).unwrap(), zero.recv::<Vec<u8>>(1, 1).unwrap_err())
        });
        thread::sleep(Duration::from_millis(20));
        one.send(vec![1u8], 0, 1).unwrap();
        one.send(vec![2u8], 0, 2).unwrap();
        drop(one);
        let (late, early, error) = receiver.join().unwrap();
        assert_eq!((late, early), (vec![2], vec![1]));
        assert!(matches!(error, Error::RankLost { rank: 1, .. }), "{error}");
    });
}

#[test]
fn a_receive_blames_the_rank_it_waits_for() {
    // Rank 2 has left in peace; nobody needs it. Rank 1 is the one that rank 0 misses.
    let error = within(LIMIT, || {
        let mut world = local::world(3, WorldConfig::from_env().unwrap().with_timeout(LONG)).unwrap();
        drop(world.pop());
        let one = world.pop();
        let zero = world.pop().unwrap();
        let receiver = thread::spawn(move || zero.recv::<Vec<u8>>(1, 1).unwrap_err());
        thread::sleep(Duration::from_millis(20));
        drop(one);
        receiver.join().unwrap()
    });
    assert!(matches!(error, Error::RankLost { rank: 1, .. }), "{error}");
}

#[test]
fn many_ranks_that_find_one_gone_do_not_stand_in_each_others_way() {
    within(Duration::from_secs(30), || {
        for round in 0..30 {
            let mut world = local::world(6, WorldConfig::from_env().unwrap().with_timeout(LONG)).unwrap();
            let gone = world.pop();
            let errors: Vec<Error> = thread::scope(|scope| {
                let wait = |comm: Communicator| {
                    scope.spawn(move || match (comm.rank() + round) % 2 {
                        0 => comm.recv::<Vec<u8>>(5, 0).map(drop).unwrap_err(),
                        _ => comm.recv::<Vec<u8>>(5, 1).map(drop).unwrap_err(),
                    })
                };
                let threads: Vec<_> = world.into_iter().map(wait).collect();
                drop(gone);
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        }
    });
}

#[test]
fn a_receive_does_not_hold_up_a_collective_of_the_same_rank() {
    within(LIMIT, || {
        let got = launch::threads(2).timeout(LONG).run(|rank| {
            let sum = rank.start(|comm| {
                // Late enough that rank 0 already waits for the message.
                thread::sleep(Duration::from_millis(50));
                comm.all_reduce(vec![1i32], ReduceOp::Sum)
            });
            match rank.rank() {
                0 => {
                    // The message comes only after the sum.
                    let message = rank.recv::<Vec<i32>>(1, 0)?;
                    Ok((message, sum.wait()?))
                }
                _ => {
                    let sum = sum.wait()?;
                    rank.send(sum.clone(), 0, 0)?;
                    Ok((sum.clone(), sum))
                }
            }
        });
        assert_eq!(got, Ok(vec![(vec![2], vec![2]); 2]));
    });
}

#[test]
fn an_operation_may_start_another() {
    within(LIMIT, || {
        let got = launch::threads(2).timeout(LONG).run(|rank| {
            rank.start(|comm| {
                let first = comm.start(|comm| comm.all_reduce(vec![1i32], ReduceOp::Sum));
                let second = comm.all_reduce(vec![2i32], ReduceOp::Sum)?;
                Ok((first.wait()?, second))
            })
            .wait()
        });
        assert_eq!(got, Ok(vec![(vec![2], vec![4]); 2]));
    });
}

/// Run by the test below in a process of its own, for the environment is the process's.
#[test]
#[ignore = "a helper of `the_time_out_of_the_environment`"]
fn prints_the_time_out() {
    match WorldConfig::from_env() {
        Ok(config) => println!("<{config:?}>"),
        Err(error) => println!("<{error}>"),
    }
    let run = launch::threads(1).run(|_| Ok(()));
    println!("<{}>", run.map_or_else(|error| error.to_string(), |_| "runs".into()));
}

#[test]
fn the_time_out_of_the_environment() {
    let with = |value: Option<&std::ffi::OsStr>| {
        let mut probe = std::process::Command::new(std::env::current_exe().unwrap());
        probe.args(["--exact", "prints_the_time_out", "--ignored", "--nocapture"]);
        probe.env_remove("BURN_PARALLEL_TIMEOUT_S");
        if let Some(value) = value {
            probe.env("BURN_PARALLEL_TIMEOUT_S", value);
        }
        let output = probe.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for (value, seconds) in [(None, "300s"), (Some("1.5"), "1.5s"), (Some(" 20 "), "20s"), (Some("1e-3"), "1ms")] {
        let said = with(value.map(AsRef::as_ref));
        assert!(said.contains(&format!("timeout: {seconds},")) && said.contains("<runs>"), "{value:?}: {said}");
    }
    for value in ["", "0", "-1", "nan", "inf", "1e300", "1e-30", "ten", "5s", "1,5"] {
        let said = with(Some(value.as_ref()));
        let line =
            format!("<environment variable BURN_PARALLEL_TIMEOUT_S={value:?} is not a positive number of seconds>");
        assert_eq!(said.matches(&line).count(), 2, "{value:?}: {said}");
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let said = with(Some(std::ffi::OsStr::from_bytes(b"5\xff")));
        assert_eq!(said.matches("is not a positive number").count(), 2, "{said}");
    }
}

/// What was started and not waited for is finished before its rank leaves, in every group.
#[test]
fn a_rank_that_returns_with_operations_under_way() {
    let sums = within(LIMIT, || {
        launch::threads(3).timeout(LONG).run(|rank| {
            let group = rank.split_named("late", 0, rank.rank() as i64)?;
            let slow = Duration::from_millis(100 * rank.rank() as u64);
            let pending = group.start(move |comm| {
                thread::sleep(slow);
                comm.all_reduce(vec![1.0f32], ReduceOp::Sum)
            });
            if rank.rank() == 2 {
                drop(pending);
                return Ok(vec![]);
            }
            pending.wait()
        })
    });
    assert_eq!(sums.unwrap(), [vec![3.0], vec![3.0], vec![]]);
}

/// Two background threads of one rank that wait for each other are found out.
#[test]
fn operations_that_wait_for_each_other() {
    let error = failure(2, SHORT, Some(0), |rank| {
        let groups = [rank.split_named("left", 0, 0)?, rank.split_named("right", 0, 0)?];
        if rank.rank() == 1 {
            return rank.barrier();
        }
        let [left, right] = groups;
        let (gives, takes) = mpsc::channel();
        let first = left.start(move |_| takes.recv().map_err(Error::user));
        let second = right.start(move |_| first.wait());
        let outcome = second.wait();
        drop(gives);
        outcome
    });
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}
