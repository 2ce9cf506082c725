//! Our all-reduce beside the bare call of NCCL: times on the device, and time of the host for each call, by size.
//!
//! The bare loop calls `ncclAllReduce` on a stream of its own, in place, as a C program would: on a communicator that
//! blocks, as such programs do, and on one that does not, as ours, which recent versions of NCCL give a thread for each
//! call. All are measured in turns.

use std::ffi::c_void;
use std::thread::yield_now;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use burn_parallel::comm::nccl;
use burn_parallel::prelude::*;
use cudarc::driver::result as driver;
use cudarc::nccl::{result as raw, sys};

use crate::device::nccl_for;
use crate::report::{Figures, Shortfall, figure};
use crate::section::Checks;
use crate::waits;

pub fn run(checks: &mut Checks) {
    let (choice, quick) = (checks.device, checks.quick);
    let largest = if quick { 1 << 20 } else { 256 << 20 };
    for ranks in [1, 2] {
        checks.check(format!("{ranks} ranks: where the host waits in a call"), || waits::figures(choice, ranks));
    }
    let sizes = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20];
    for ranks in [1, 2] {
        for bytes in sizes.into_iter().filter(|bytes| *bytes <= largest) {
            checks.check(format!("{ranks} ranks, {} KiB", bytes >> 10), || {
                let gpus = nccl_for(choice, ranks)?;
                choice.open(0)?;
                let found = launch::threads(ranks).run(|rank| one_rank(&rank, rank.rank() % gpus, bytes / 4))?;
                figures(&found, bytes)
            });
        }
    }
}

/// Seconds for each call: until the device is done, and until the host goes on.
#[derive(Debug, Clone, Copy)]
struct Times {
    device: f64,
    host: f64,
}

impl Times {
    const NONE: Self = Self { device: f64::INFINITY, host: f64::INFINITY };

    fn least(self, other: Self) -> Self {
        Self { device: self.device.min(other.device), host: self.host.min(other.host) }
    }
}

fn one_rank(rank: &Rank, gpu: usize, elements: usize) -> Result<[Times; 3], Error> {
    let comm = nccl::join(rank, gpu)?;
    let device = Device::cuda(gpu);
    let mut blocking = Bare::new(rank, gpu, elements, true)?;
    let mut polled = Bare::new(rank, gpu, elements, false)?;
    let calls = if elements > 1 << 22 { 20 } else { 200 };
    let mut tensor = Tensor::<1>::zeros([elements], &device);
    let mut times = [Times::NONE; 3];
    for round in 0..7 {
        rank.barrier()?;
        let raw = blocking.run(calls)?;
        rank.barrier()?;
        let raw_polled = polled.run(calls)?;
        device.sync().map_err(Error::user)?;
        rank.barrier()?;
        let began = Instant::now();
        for _ in 0..calls {
            tensor = comm.all_reduce(tensor, ReduceOp::Sum)?;
        }
        let host = began.elapsed().as_secs_f64() / calls as f64;
        // What was enqueued behind the last call waits for it.
        tensor = tensor.mul_scalar(1.0);
        device.sync().map_err(Error::user)?;
        let ours = Times { device: began.elapsed().as_secs_f64() / calls as f64, host };
        // The first round makes connections and compiles kernels.
        if round > 0 {
            times = [times[0].least(ours), times[1].least(raw), times[2].least(raw_polled)];
        }
    }
    Ok(times)
}

/// NCCL as it is.
struct Bare {
    comm: sys::ncclComm_t,
    stream: cudarc::driver::sys::CUstream,
    buffer: cudarc::driver::sys::CUdeviceptr,
    elements: usize,
}

impl Bare {
    fn new(rank: &Rank, gpu: usize, elements: usize, blocking: bool) -> Result<Self, Error> {
        let failed = |error: driver::DriverError| Error::user(format!("{error:?}"));
        let id = match rank.rank() {
            0 => raw::get_uniqueid().map_err(|error| Error::user(format!("{:?}", error.0)))?.internal,
            _ => [0; 128],
        };
        let id = rank.broadcast(id.map(|byte| byte as u8).to_vec(), 0)?;
        let mut internal = [0; 128];
        internal.iter_mut().zip(id).for_each(|(to, from)| *to = from as _);
        let mut comm = std::ptr::null_mut();
        // SAFETY: the context is that of burn, which is kept; the buffer is as long as is said, and is this one's
        // alone.
        unsafe {
            let context =
                driver::primary_ctx::retain(driver::device::get(gpu as i32).map_err(failed)?).map_err(failed)?;
            driver::ctx::set_current(context).map_err(failed)?;
            let id = sys::ncclUniqueId { internal };
            let mut settings = settings(blocking);
            raw::comm_init_rank_config(&mut comm, rank.size() as i32, id, rank.rank() as i32, &mut settings)
                .map_err(|error| Error::user(format!("{:?}", error.0)))?;
            taken(comm)?;
            let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking).map_err(failed)?;
            let buffer = driver::malloc_sync(elements * 4).map_err(failed)?;
            driver::memset_d8_sync(buffer, 0, elements * 4).map_err(failed)?;
            Ok(Self { comm, stream, buffer, elements })
        }
    }

    fn run(&mut self, calls: usize) -> Result<Times, Error> {
        let failed = |error: raw::NcclError| Error::user(format!("{:?}", error.0));
        let began = Instant::now();
        for _ in 0..calls {
            let place = self.buffer as *mut c_void;
            let (kind, op) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
            // SAFETY: the buffer has so many elements, and the stream lives.
            unsafe { raw::all_reduce(place, place, self.elements, kind, op, self.comm, self.stream as _) }
                .map_err(failed)?;
            taken(self.comm)?;
        }
        let host = began.elapsed().as_secs_f64() / calls as f64;
        // SAFETY: the stream lives.
        unsafe { driver::stream::synchronize(self.stream) }.map_err(|error| Error::user(format!("{error:?}")))?;
        Ok(Times { device: began.elapsed().as_secs_f64() / calls as f64, host })
    }
}

/// Waits until NCCL has taken a call; at once where calls block.
fn taken(comm: sys::ncclComm_t) -> Result<(), Error> {
    loop {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives; `state` is a local.
        match (unsafe { sys::ncclCommGetAsyncError(comm, &mut state) }, state) {
            (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclSuccess) => return Ok(()),
            (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclInProgress) => yield_now(),
            (asked, state) => return Err(Error::user(format!("{asked:?}, {state:?}"))),
        }
    }
}

/// What `NCCL_CONFIG_INITIALIZER` of nccl.h writes, but for `blocking`.
fn settings(blocking: bool) -> sys::ncclConfig_t {
    // SAFETY: plain numbers and pointers, for which zero is a value.
    let mut settings: sys::ncclConfig_t = unsafe { std::mem::zeroed() };
    settings.size = size_of::<sys::ncclConfig_t>();
    settings.magic = 0xcafe_beef;
    settings.version = 22_800;
    settings.blocking = blocking.into();
    for undefined in [
        &mut settings.cgaClusterSize,
        &mut settings.minCTAs,
        &mut settings.maxCTAs,
        &mut settings.splitShare,
        &mut settings.trafficClass,
        &mut settings.collnetEnable,
        &mut settings.CTAPolicy,
        &mut settings.shrinkShare,
        &mut settings.nvlsCTAs,
        &mut settings.nChannelsPerNetPeer,
        &mut settings.nvlinkCentricSched,
        &mut settings.graphUsageMode,
        &mut settings.numRmaCtx,
        &mut settings.maxP2pPeers,
    ] {
        *undefined = i32::MIN;
    }
    settings
}

impl Drop for Bare {
    fn drop(&mut self) {
        // SAFETY: all three are this one's alone, and nothing is under way.
        unsafe {
            let _ = raw::comm_finalize(self.comm);
            let _ = taken(self.comm);
            let _ = raw::comm_destroy(self.comm);
            let _ = driver::free_sync(self.buffer);
            let _ = driver::stream::destroy(self.stream);
        }
    }
}

/// Figures of the slowest rank. Whether they are good is for the reader: they depend on the machine.
fn figures(found: &[[Times; 3]], bytes: usize) -> Result<Figures, Shortfall> {
    let slowest =
        |which: usize, time: fn(&Times) -> f64| found.iter().map(|times| time(&times[which])).fold(0.0, f64::max);
    let (ours, bare) = (slowest(0, |times| times.device), slowest(1, |times| times.device));
    Ok(vec![
        figure("ours", ours * 1e6, "us"),
        figure("NCCL", bare * 1e6, "us"),
        figure("ours", bytes as f64 / ours / 1e9, "GB/s"),
        figure("more", (ours / bare - 1.0) * 100.0, "%"),
        figure("host, ours", slowest(0, |times| times.host) * 1e6, "us"),
        figure("host, NCCL", slowest(1, |times| times.host) * 1e6, "us"),
        figure("host, NCCL polled", slowest(2, |times| times.host) * 1e6, "us"),
        figure("NCCL polled", slowest(2, |times| times.device) * 1e6, "us"),
    ])
}
