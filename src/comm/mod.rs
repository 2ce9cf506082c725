//! The communicator layer: the only room where ranks meet.
//!
//! A [`Communicator`] joins the ranks of one group. It carries burn tensors of any rank and plain buffers through
//! [collectives](Operation) and tagged messages, on whatever engine ([`Transport`]) the ranks share. The embedded engine
//! is [`local`]: ranks are threads of one process, nothing to install. [`tcp`] joins processes, on one machine or many, and
//! with the feature `mpi`, `mpi` does so over the MPI of a cluster.
//!
//! ```
//! use burn_parallel::prelude::*;
//!
//! let sums = launch::threads(3).run(|rank| {
//!     let mine = vec![rank.rank() as f32; 4];
//!     rank.all_reduce(mine, ReduceOp::Sum)
//! })?;
//! assert_eq!(sums, vec![vec![3.0; 4]; 3]);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Rules of a group
//!
//! - Every rank issues the same operations on a group in the same order. A rank that does not is found out: all ranks
//!   get the same [`Error`](crate::Error), which says what each of them called.
//! - Different groups are independent; collectives of several groups may be in flight at once.
//! - Every wait ends: with the result, with an error, or with a [time-out](local::WorldConfig).
//! - The first failure anywhere in a world fails every group of that world, so nobody waits for the dead.

mod blame;
mod call;
mod carry;
mod coalesced;
mod collectives;
mod communicator;
mod counters;
#[cfg(feature = "cubecl")]
pub(crate) mod device;
pub(crate) mod element;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub(crate) mod host;
pub mod local;
#[cfg(any(feature = "cuda", test))]
mod marks;
mod messages;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "cuda")]
pub mod nccl;
mod operation;
mod partition;
mod payload;
mod pending;
pub(crate) mod reduce;
pub(crate) mod room;
pub mod tcp;
mod ticks;
mod transport;
mod watch;
mod wired;

pub use call::{Call, Extent};
pub use communicator::Communicator;
pub use counters::{Counters, Tally};
#[cfg(feature = "cubecl")]
pub(crate) use device::same_buffer;
#[cfg(feature = "cubecl")]
pub use device::{DeviceTensor, DeviceTransport};
pub use element::Element;
pub use operation::{Operation, ReduceOp};
pub use partition::part;
pub use payload::{Payload, TensorHome, TensorKind};
pub use pending::Pending;
pub(crate) use pending::panic_message;
pub use transport::{Arrival, BufferMut, BufferRef, Message, Output, Transfer, Transport};
pub use watch::CallLog;
