//! The transport over NCCL: collectives and messages on tensors of CUDA devices, without a copy through the host.
//!
//! NCCL moves the data and does nothing else. It is put **on top of** a communicator over any other transport, the
//! *host transport*, which goes on doing what NCCL cannot: comparing what the ranks call before anything is enqueued,
//! noticing lost ranks, time-outs, the log, and collectives on host data. NCCL's id is exchanged over it too, so
//! whatever joins the ranks (threads, MPI) is all that is needed:
//!
//! ```no_run
//! use burn::tensor::{Device, Tensor};
//! use burn_parallel::comm::nccl;
//! use burn_parallel::prelude::*;
//!
//! // One thread for each of two GPUs.
//! launch::threads(2).run(|rank| {
//!     let gpu = rank.rank();
//!     let comm = nccl::join(&rank, gpu)?;
//!     let sum = comm.all_reduce(Tensor::<1>::ones([1 << 20], &Device::cuda(gpu)), ReduceOp::Sum)?;
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```
//!
//! # Order on the device
//! A collective runs on a stream of NCCL's own. An event makes it wait for what burn had enqueued before it on the
//! rank's stream, another makes what burn enqueues afterwards wait for it. The host waits for neither; it waits only
//! for the other ranks to *call* the same, and for NCCL to take the call. Buffers are held until the second event.
//!
//! With [`start`](Communicator::start) the rank's own thread waits for nothing at all; what it enqueues before it uses
//! the result overlaps with the collective. [`all_reduce_coalesced`](Communicator::all_reduce_coalesced) of several
//! tensors is one launch.
//!
//! A message is transferred when its receiver calls [`recv`](Communicator::recv), or as soon as it has been sent if the
//! receiver has called [`start_recv`](Communicator::start_recv): its header goes over the host transport, with its tag,
//! and the data between two streams that are kept for this direction between the two ranks. Until then the sender's
//! tensor is held on the device. Ranks may send to each other before either receives.
//!
//! A rank may drop its communicator before its messages have been received: they are kept until their receiver receives
//! them, or drops its own, for as long as the time-out.
//!
//! # Reductions
//! They are the same as over every transport, see [`ReduceOp`]. NCCL by itself adds 16-bit numbers in 16 bits, rounds
//! factors to 16 bits, and ignores NaN in maxima and minima; so sums, means and products of `f16` and `bf16` are
//! reduced as `f32`, and maxima and minima of floats with a NaN mask, each of which is twice the bytes (counters tell
//! those of the tensors). Sums and means of `f32` and `f64`, of integers, and whatever is not reduced, need no
//! conversion. NCCL reduces in an order of its own, the same on all ranks, and makes a mean by multiplying with `1 /
//! n`: the last bit of a result may differ from that of other transports.
//!
//! # Failures
//! When a rank is lost, the host transport fails the world; a watchdog thread then aborts every communicator of it, so
//! that no stream waits for ever for a kernel of a rank that is gone. It does the same if NCCL reports an error, or if
//! an operation that the device could have started is not done after the time-out.
//!
//! # What goes through the host all the same
//! Tensors of other devices or of dtypes that NCCL does not know (`i16`, `u16`).

mod collective;
mod conversion;
mod event;
mod gpu;
mod library;
mod messages;
mod nccl_comm;
mod receiver;
mod shape_exchange;
mod stream;
mod transport;
mod watchdog;

use std::sync::Arc;

use burn::backend::DispatchDevice;
use burn::tensor::Device;

pub use library::{Library, Version, devices, library};

use self::gpu::Gpu;
use self::nccl_comm::NcclComm;
use self::stream::NcclStream;
use self::transport::NcclTransport;
use self::watchdog::Watchdog;
use super::{Communicator, ReduceOp};
use crate::Error;

/// The group of `host`, with NCCL for the tensors of CUDA device `index`. Collective over `host`, which stays usable.
///
/// # Errors
/// [`Error::Gpu`], on every rank, before anything is touched, if some rank has no libcuda, no libnccl, too old ones, or
/// no such device, or if two ranks of one machine use the same device and NCCL is older than 2.30; [`Error::Nccl`] if
/// NCCL refuses; the error of the world.
pub fn join(host: &Communicator, index: usize) -> Result<Communicator, Error> {
    let identity = library().and_then(|library| library.device_identity(index));
    check_all(host, &identity)?;
    let (library, identity) = identity?;
    let identities = host.all_gather(identity.to_vec())?;
    let identities: Vec<&[u64]> = identities.chunks(identity.len()).collect();
    let duplicates = identities.iter().enumerate().find_map(|(second, identity)| {
        identities[..second].iter().position(|first| first == identity).map(|first| (first, second))
    });
    if let Some((first, second)) = duplicates
        && !library.shares_devices()
    {
        return Err(Error::Gpu {
            problem: format!(
                "ranks {first} and {second} of group `{}` bring the same GPU, which NCCL {} refuses: give each rank a GPU of \
                 its own, or take NCCL 2.30 or newer and set NCCL_MULTI_RANK_GPU_ENABLE=1; several ranks on one GPU work \
                 without NCCL too",
                host.group(),
                library.nccl
            ),
        });
    }
    let id = match host.rank() {
        0 => nccl_comm::unique_id()?,
        _ => nccl_comm::no_id(),
    };
    let id = host.broadcast(id.to_vec(), 0)?;
    let gpu = Gpu::new(index)?;
    gpu.enter()?;
    let device = Device::cuda(index);
    let DispatchDevice::Cube(cube) = device.as_dispatch().clone() else {
        return Err(Error::Gpu { problem: format!("burn does not take {device:?} for a CUDA device") });
    };
    let transport = host.transport_arc();
    let stream = Arc::new(NcclStream::new(&gpu)?);
    // In a group of its own, which it may stay in for longer than this rank is in others: peers see who has left those.
    let kept = transport.split("nccl", 0, host.rank() as i64)?;
    let watchdog = Watchdog::new(kept, host.outstanding_jobs().clone(), gpu);
    let raw = NcclComm::init(&id, host.size(), host.rank(), &transport)?;
    Ok(host.over(Arc::new(NcclTransport::new(transport, raw, stream, watchdog, (device, cube))?)))
}

/// Makes every rank return an error if one has found something missing, so that nobody waits for it in NCCL.
fn check_all<T>(host: &Communicator, found: &Result<T, Error>) -> Result<(), Error> {
    let missing = host.all_gather(vec![u8::from(found.is_err())])?;
    match (found, missing.iter().position(|missing| *missing != 0)) {
        (Err(error), _) => Err(error.clone()),
        (Ok(_), Some(rank)) => {
            let problem = format!("rank {rank} of group `{}` cannot use NCCL; its own error says why", host.group());
            Err(Error::Gpu { problem })
        }
        (Ok(_), None) => {
            // The reduction is there only to keep the ranks together until all have seen the answer.
            host.all_reduce(vec![0u8], ReduceOp::Max).map(drop)
        }
    }
}
