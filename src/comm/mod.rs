//! The communicator layer: collectives and messages between ranks, over interchangeable transports.
//!
//! A [`Communicator`] joins the ranks of one group. It runs [collectives](Operation) on burn tensors of any rank and on
//! plain buffers, and sends tagged messages, over any [`Transport`]. The default transport is [`local`]: ranks are
//! threads of one process, nothing to install. [`tcp`] joins processes, on one machine or many, and with the feature
//! `mpi`, `mpi` does so over the MPI of a cluster. Transports of your own implement the trait.
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
//! - Every rank issues the same operations on a group in the same order. If one does not, all ranks get the same
//!   [`Error`](crate::Error), which says what each of them called.
//! - Different groups are independent; collectives of several groups may be in flight at once.
//! - Every wait ends: with the result, with an error, or with a [time-out](WorldConfig).
//! - The first failure anywhere in a world fails every group of that world, so nobody waits for a rank that is gone.

mod agreed_names;
pub(crate) mod backoff;
mod call;
mod call_log;
mod coalesced;
mod collectives;
mod communicator;
mod config;
mod counters;
mod departed;
#[cfg(feature = "cubecl")]
pub(crate) mod device;
mod directory;
mod dispatch;
pub(crate) mod element;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod group_names;
pub(crate) mod host_buffer;
pub mod local;
#[cfg(any(feature = "cuda", test))]
mod message_header;
mod message_passing;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(any(feature = "cuda", test))]
mod nan_mask;
#[cfg(feature = "cuda")]
pub mod nccl;
mod operation;
mod panicked;
mod part;
mod payload;
mod pending;
mod point_to_point;
#[cfg(any(feature = "cuda", test))]
mod posted_receives;
pub(crate) mod receive_buffer;
pub(crate) mod reduce;
#[cfg(any(feature = "cuda", test))]
mod sent_messages;
mod settings;
mod step_part;
pub mod tcp;
mod ticks;
mod transport;
mod wait_graph;

pub(crate) use agreed_names::{ANOTHER_NORM, BATCH_LEFT, NEW_OPTIMIZER, keep as agreed_number};
pub use call::{Call, CallShape};
pub use call_log::{CallHistory, CallLog};
pub use communicator::Communicator;
pub use config::WorldConfig;
pub use counters::{Counters, Tally};
#[cfg(feature = "cubecl")]
pub(crate) use device::same_buffer;
#[cfg(feature = "cubecl")]
pub use device::{DeviceTensor, DeviceTransport};
pub(crate) use directory::machine;
pub use element::Element;
pub(crate) use group_names::{GATHERED_PARAMETERS, WANTED_PARAMETERS};
pub use operation::{Operation, ReduceOp};
pub(crate) use panicked::panic_message;
pub(crate) use part::check_part;
pub use part::part;
pub use payload::{Payload, TensorKind, TensorOrigin};
pub use pending::Pending;
pub use reduce::reduce_contributions;
pub(crate) use step_part::StepPart;
pub use transport::{Arrival, BufferMut, BufferRef, Message, OutputAllocator, Transfer, Transport};
