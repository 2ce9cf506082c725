//! Ranks that do not agree on what they do.

use std::fmt::Debug;

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::{Error, launch};

use super::harness::{LONG, SHORT, SIZES, failure, is_mismatch, says, tells_the_log};

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
            is_mismatch(&error, size, culprit, 2, words);
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
fn another_name_or_order_of_splits() {
    let split = |name: &'static str| move |comm: &Communicator| comm.split_named(name, 0, comm.rank() as i64).map(drop);
    mismatch(&["called split(left)", "called split(right)"], split("left"), split("right"));
    mismatch(&["called split(left)"], |comm: &Communicator| comm.split(0, 0).map(drop), split("left"));
    // The names of all ranks are the same, their colors need not be.
    launch::threads(4).run(|rank| rank.split_named("half", rank.rank() as u64 / 2, 0)?.barrier()).unwrap();
}

/// The rank that alone calls something else comes first, and is told to be alone.
#[test]
fn a_stray_barrier_is_told_to_be_of_one_rank() {
    for (size, culprit) in [(3, 1), (4, 0), (4, 3)] {
        let error = failure(size, LONG, None, move |rank| {
            if rank.rank() == culprit {
                rank.barrier()?;
            }
            rank.all_reduce(vec![1.0f32; 6], ReduceOp::Sum).map(drop)
        });
        says(&error, &[&format!("collective #2: rank {culprit} called barrier, unlike all others: rank ")]);
        assert_eq!(error.to_string().matches("called all_reduce(Sum) of F32 [6]").count(), size - 1, "{error}");
    }
    // Of two ranks neither is the odd one.
    let error = failure(2, LONG, None, |rank| match rank.rank() {
        0 => rank.barrier(),
        _ => rank.all_reduce(vec![1.0f32; 6], ReduceOp::Sum).map(drop),
    });
    says(&error, &["rank 0 called barrier, rank 1 called all_reduce"]);
}

/// One barrier too many, behind the last call of the others or beside one in another group: whoever waits is not told
/// that only the others can be wrong.
#[test]
fn a_barrier_too_many_may_be_what_is_wrong() {
    let error = failure(2, LONG, Some(1), |rank| match rank.rank() {
        0 => rank.barrier(),
        _ => Ok(()),
    });
    assert!(matches!(&error, Error::RankLost { rank: 1, .. }), "{error:?}");
    says(
        &error,
        &["rank 1 left group `world` while barrier was waiting for it", "or the rank that waits calls one more"],
    );
    let error = failure(2, SHORT, None, |rank| {
        let half = rank.split_named("half", 0, rank.rank() as i64)?;
        if rank.rank() == 1 {
            rank.barrier()?;
        }
        half.all_reduce(vec![1.0f32; 6], ReduceOp::Sum).map(drop)
    });
    assert!(matches!(&error, Error::Timeout { .. }), "{error:?}");
    says(&error, &["waits in turn in another call", "a call that the others do not make", "barrier (waiting for"]);
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
fn another_number_of_coalesced_buffers() {
    let coalesced = |lens: &'static [usize]| {
        move |comm: &Communicator| {
            let payloads: Vec<Vec<f32>> = lens.iter().map(|len| vec![1.0; *len]).collect();
            comm.all_reduce_coalesced(payloads, ReduceOp::Sum)
        }
    };
    mismatch(&["of F32 [6] in 3 buffers", "of F32 [6] in 2 buffers"], coalesced(&[1, 2, 3]), coalesced(&[3, 3]));
    mismatch(&["of F32 [6] in 3 buffers"], coalesced(&[1, 2, 3]), coalesced(&[3, 2, 1]));
    mismatch(&["of F32 [6] in 3 buffers", "in 0 buffers"], coalesced(&[1, 2, 3]), coalesced(&[]));
    mismatch(&["of F32 [6] in 3 buffers"], coalesced(&[1, 2, 3]), |comm| {
        comm.all_reduce(vec![1.0f32; 6], ReduceOp::Sum)
    });
}

#[test]
fn a_root_that_has_nothing_to_scatter() {
    for size in SIZES {
        let error = failure(size, LONG, None, |rank| rank.scatter(None::<Vec<f32>>, 0).map(drop));
        assert!(matches!(&error, Error::InvalidArgument { operation: "scatter", .. }), "{error:?}");
        says(&error, &["rank 0 is the root and passes nothing"]);
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
