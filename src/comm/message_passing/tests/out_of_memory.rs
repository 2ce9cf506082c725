//! Tests with a rank that has no memory for its part.

use burn::tensor::DType;

use super::TestWorld;
use super::memory_endpoint::MemoryNetwork;
use crate::Error;
use crate::comm::{
    BufferMut, BufferRef, Call, CallShape, Communicator, Operation, OutputAllocator, ReduceOp, Transfer,
};

/// An output that one rank has no memory for.
struct LackingOutput {
    elements: Vec<u8>,
    lacks: Option<(std::sync::Arc<str>, usize)>,
}

impl OutputAllocator for LackingOutput {
    fn allocate(&mut self, dims: &[usize], _: DType) -> Result<BufferMut<'_>, Error> {
        let bytes = dims.iter().product();
        match self.lacks.clone() {
            Some((group, rank)) => Err(Error::OutOfMemory { group, rank, operation: String::new(), bytes }),
            None => {
                self.elements.resize(bytes, 0);
                Ok(BufferMut::new(&mut self.elements))
            }
        }
    }
}

/// A collective in which each rank receives as many bytes, where one has no memory for them.
fn receive(comm: &Communicator, operation: Operation, mine: &[u8], short: Option<usize>) -> Result<Vec<u8>, Error> {
    let call = Call::new(operation, Some(DType::U8), CallShape::flat(mine.len()));
    let lacks = (short == Some(comm.rank())).then(|| (comm.group().clone(), comm.rank()));
    let mut output = LackingOutput { elements: Vec::new(), lacks };
    let transfer = Transfer::OutOfPlace { input: BufferRef::new(mine), output: &mut output };
    comm.run(&call, |transport| transport.collective(&call, transfer))?;
    Ok(output.elements)
}

/// Gathers so many bytes of each rank.
fn gather(comm: &Communicator, each: usize, short: Option<usize>) -> Result<Vec<u8>, Error> {
    receive(comm, Operation::AllGather, &vec![comm.rank() as u8; each], short)
}

fn all(size: usize, each: usize) -> Vec<u8> {
    (0..size).flat_map(|rank| vec![rank as u8; each]).collect()
}

/// What every rank of a world does.
type Script<'a> = &'a (dyn Fn(&Communicator) + Sync);

/// No data has moved, so only this call fails: over an endpoint, and among threads whatever the size.
fn only_the_call_fails(size: usize, each: usize, run: &dyn Fn(Script<'_>)) {
    for short in [0, size - 1] {
        run(&|comm| {
            assert_eq!(gather(comm, each, None), Ok(all(size, each)));
            let error = gather(comm, each, Some(short)).unwrap_err();
            let Error::OutOfMemory { rank, bytes, .. } = &error else { panic!("{error:?}") };
            assert_eq!((*rank, *bytes), (short, size * each));
            let message = error.to_string();
            let words = format!("rank {short} of group `world` has no memory for the {} bytes", size * each);
            assert!(message.contains(&words), "{message}");
            assert_eq!(comm.failure(), None);
            assert_eq!(comm.all_reduce(vec![1i64], ReduceOp::Sum), Ok(vec![size as i64]));
            assert_eq!(gather(comm, each, None), Ok(all(size, each)));
            // The number of a collective does not count agreements.
            let odd = comm.rank() == 0;
            let outcome = if odd { comm.barrier() } else { comm.all_gather(vec![0u8]).map(drop) };
            let error = outcome.unwrap_err();
            assert!(matches!(error, Error::Mismatch { sequence: 4, .. }), "{error}");
        });
    }
}

#[test]
fn a_large_collective_fails_alone() {
    for size in [2, 3, 4] {
        only_the_call_fails(size, (16 << 20) / size + 1, &|script| {
            TestWorld::new(size, 0..size, MemoryNetwork::default()).run(script);
        });
    }
}

/// A rank that has begun to receive cannot turn back over such an endpoint: all ask earlier.
#[test]
fn where_buffers_cannot_be_reclaimed_a_collective_fails_alone() {
    for size in [2, 3] {
        let run = |script: Script<'_>| {
            let world = TestWorld::new(size, 0..size, MemoryNetwork::never_returning(None, None));
            world.run(script);
        };
        only_the_call_fails(size, (64 << 10) / size + 1, &run);
        run(&|comm| {
            let sum = Operation::ReduceScatter(ReduceOp::Sum);
            let (mine, all) = (vec![1; size * (64 << 10)], vec![size as u8; 64 << 10]);
            assert_eq!(receive(comm, sum, &mine, None), Ok(all.clone()));
            let error = receive(comm, sum, &mine, Some(size - 1)).unwrap_err();
            let Error::OutOfMemory { rank, bytes, .. } = &error else { panic!("{error:?}") };
            assert_eq!((*rank, *bytes), (size - 1, 64 << 10));
            assert_eq!((comm.failure(), receive(comm, sum, &mine, None)), (None, Ok(all)));
        });
    }
}

#[test]
fn among_threads_every_collective_fails_alone() {
    for (size, each) in [(1, 10), (2, 10), (3, 1000), (4, 1 << 20)] {
        let run = |script: Script<'_>| {
            let config = crate::comm::WorldConfig::from_env().unwrap();
            let comms = crate::comm::local::world(size, config).unwrap();
            std::thread::scope(|scope| comms.iter().for_each(|comm| drop(scope.spawn(move || script(comm)))));
        };
        if size == 1 {
            run(&|comm| {
                assert!(matches!(gather(comm, each, Some(0)), Err(Error::OutOfMemory { rank: 0, bytes: 10, .. })));
                assert_eq!(gather(comm, each, None), Ok(all(1, each)));
            });
        } else {
            only_the_call_fails(size, each, &run);
        }
    }
}

/// Where the others may have moved data, the world fails with it, and no process.
#[test]
fn a_small_collective_fails_the_world() {
    for (size, short) in [(2, 1), (3, 0)] {
        let world = TestWorld::new(size, 0..size, MemoryNetwork::default());
        let outcomes = world.run(|comm| {
            let outcome = gather(comm, 100, Some(short));
            (outcome, comm.barrier())
        });
        for (rank, (outcome, afterwards)) in outcomes.into_iter().enumerate() {
            let error = afterwards.unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { rank, bytes, .. } if rank == short && bytes == size * 100));
            if rank == short {
                assert_eq!(outcome, Err(error));
            }
        }
    }
}
