//! The transport between threads, as one that works beside the ranks' threads: a network card, or a GPU.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::DType;
use burn_parallel::comm::{Call, CallLog, Communicator, Message, Operation, Transfer, Transport};
use burn_parallel::prelude::*;

/// A transport that has another do its collectives, sums of `f32` and gathers, and does not say that it works on the
/// threads that call it. It carries no messages.
#[derive(Debug)]
pub struct Forwarding {
    comm: Communicator,
    /// Called at the end of a collective with the bytes that it sent.
    sent: fn(u64),
    /// Whether it says that it gathers in place.
    in_place: bool,
    /// Called at the end of a gather with whether its input lay in its output.
    gathered: fn(bool),
}

impl Forwarding {
    /// A communicator over `comm`; `sent` is called with the bytes that each collective sends.
    pub fn over(comm: Communicator, sent: fn(u64)) -> Communicator {
        Communicator::new(Arc::new(Self { comm, sent, in_place: false, gathered: |_| () }))
    }

    /// One that gathers in place, or says nothing of it; `gathered` is called with whether the input of a gather lay in
    /// its output.
    pub fn gathering(comm: Communicator, in_place: bool, gathered: fn(bool)) -> Communicator {
        Communicator::new(Arc::new(Self { comm, sent: |_| (), in_place, gathered }))
    }

    fn refused<T>(&self, what: impl std::fmt::Display) -> Result<T, Error> {
        Err(Error::user(format!("the forwarding transport carries no {what}")))
    }
}

impl Transport for Forwarding {
    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        if call.dtype.is_some_and(|dtype| dtype != DType::F32) {
            return self.refused(call);
        }
        // Of a ring: what a rank has goes past every other rank.
        let passed = |elements: usize| (4 * elements * (self.size() - 1) / self.size()) as u64;
        let bytes = match (call.operation, transfer) {
            (Operation::AllReduce(ReduceOp::Sum), Transfer::InPlace(buffers)) => {
                let mut bytes = 0;
                for buffer in buffers {
                    let (data, elements) = (buffer.as_mut_ptr().cast::<f32>(), buffer.elements());
                    // SAFETY: it is of f32, and lent for writing.
                    let values = unsafe { std::slice::from_raw_parts_mut(data, elements) };
                    self.comm.all_reduce_in_place(values, ReduceOp::Sum)?;
                    bytes += 2 * passed(elements);
                }
                bytes
            }
            (Operation::AllGather | Operation::ReduceScatter(_), Transfer::OutOfPlace { input, output }) => {
                // SAFETY: it is of f32, and lent for reading.
                let rows = unsafe { std::slice::from_raw_parts(input.as_ptr().cast::<f32>(), input.elements()) };
                let mut dims = call.shape.dims().to_vec();
                let result = match call.operation {
                    Operation::ReduceScatter(op) => {
                        dims[0] /= self.size();
                        self.comm.reduce_scatter(rows.to_vec(), op)?
                    }
                    _ => {
                        dims[0] *= self.size();
                        self.comm.all_gather(rows.to_vec())?
                    }
                };
                let mut place = output.allocate(&dims, DType::F32)?;
                assert_eq!(place.elements(), result.len());
                if call.operation == Operation::AllGather {
                    let begin = place.as_mut_ptr().addr();
                    (self.gathered)((begin..begin + 4 * result.len()).contains(&input.as_ptr().addr()));
                }
                // SAFETY: it is of f32, lent for writing, and as long.
                unsafe { place.as_mut_ptr().cast::<f32>().copy_from(result.as_ptr(), result.len()) };
                passed(result.len().max(rows.len()))
            }
            (Operation::Barrier, Transfer::Nothing) => {
                self.comm.barrier()?;
                0
            }
            _ => return self.refused(call),
        };
        (self.sent)(bytes);
        Ok(bytes)
    }

    fn name(&self) -> &'static str {
        "forwarding"
    }

    fn group(&self) -> &Arc<str> {
        self.comm.group()
    }

    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world_rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn send(&self, to: usize, tag: u64, _: Message) -> Result<(), Error> {
        self.refused(format!("message {tag} to {to}"))
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        self.refused(format!("message {tag} of {from}"))
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let Self { sent, in_place, gathered, .. } = *self;
        Ok(Arc::new(Self { comm: self.comm.split_named(name, color, key)?, sent, in_place, gathered }))
    }

    fn gathers_in_place(&self) -> bool {
        self.in_place
    }

    fn abort(&self, error: Error) {
        self.comm.abort(error);
    }

    fn leave(&self) {}

    fn failure(&self) -> Option<Error> {
        self.comm.failure()
    }

    fn log(&self) -> CallLog {
        self.comm.log()
    }
}
