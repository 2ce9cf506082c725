//! Messages that do not come, or are not what was asked for; and those that come all the same.

use std::thread;
use std::time::Duration;

use burn::tensor::{Device, Int, Tensor};
use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::{ReduceOp, local};
use burn_parallel::{Error, launch};

use super::harness::{LIMIT, LONG, PURPOSE, SHORT, SIZES, failure, failure_of_threads, says, tells_the_log, within};

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
