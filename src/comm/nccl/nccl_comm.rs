//! A NCCL communicator: made, polled, split, aborted.
//!
//! It is non-blocking: a call that cannot be finished at once returns "in progress", and is polled here, under the
//! time-out and for as long as the world has not failed. A blocking call on a rank whose peer has died would never
//! return.

use std::ffi::CStr;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use cudarc::nccl::result::{self as nccl, NcclError, NcclStatus};
use cudarc::nccl::sys;

use crate::Error;
use crate::comm::Transport;

/// `NCCL_CONFIG_UNDEF_INT`: NCCL decides.
const UNDEFINED: i32 = i32::MIN;
pub(super) const ID_BYTES: usize = 128;

/// A new id, by which the ranks of one group find each other.
pub(super) fn unique_id() -> Result<[u8; ID_BYTES], Error> {
    let id = nccl::get_uniqueid().map_err(|error| Error::Gpu {
        problem: format!("NCCL gives no id ({}); NCCL_SOCKET_IFNAME names the network to use", said(error.0, None)),
    })?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// In place of the id, on a rank that receives it.
pub(super) fn no_id() -> [u8; ID_BYTES] {
    [0; ID_BYTES]
}

/// One rank's end of a NCCL communicator.
#[derive(Debug)]
pub(super) struct NcclComm {
    pub(super) comm: sys::ncclComm_t,
    /// The host transport: names the group, and knows when the world has failed.
    host: Arc<dyn Transport>,
}

// SAFETY: NCCL lets any thread call, one at a time; a lock is held around each call.
unsafe impl Send for NcclComm {}

impl NcclComm {
    /// Joins the group of `id`. The device must be current on this thread. Every rank of the group does the same.
    pub fn init(id: &[u8], size: usize, rank: usize, host: &Arc<dyn Transport>) -> Result<Self, Error> {
        let mut internal = [0; ID_BYTES];
        internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        let id = sys::ncclUniqueId { internal };
        let mut raw = Self { comm: std::ptr::null_mut(), host: host.clone() };
        // SAFETY: NCCL reads the settings and writes the communicator's place before it returns.
        let called = unsafe { nccl::comm_init_rank_config(&mut raw.comm, size as i32, id, rank as i32, &mut config()) };
        raw.finish("joining the group", called).inspect_err(|_| raw.abort())?;
        Ok(raw)
    }

    /// This rank's end of the part of the group that passes the same `color`. Collective.
    pub fn split(&self, color: usize, key: usize, host: &Arc<dyn Transport>) -> Result<Self, Error> {
        // NCCL writes here when the split is done, which may be after this rank has given up.
        let place: *mut sys::ncclComm_t = Box::into_raw(Box::new(std::ptr::null_mut()));
        // SAFETY: as above; the new communicator takes the settings of this one.
        let called =
            unsafe { sys::ncclCommSplit(self.comm, color as i32, key as i32, place, std::ptr::null_mut()).result() };
        // On failure the place is leaked.
        self.finish("splitting the group", called)?;
        // SAFETY: the split is done.
        let mut part = Self { comm: *unsafe { Box::from_raw(place) }, host: host.clone() };
        part.finish("splitting the group", Ok(NcclStatus::Success)).inspect_err(|_| part.abort())?;
        Ok(part)
    }

    /// Waits until NCCL has taken a call.
    pub fn finish(&self, operation: &str, called: Result<NcclStatus, NcclError>) -> Result<(), Error> {
        called.map_err(|error| self.error(operation, error.0))?;
        let (since, timeout) = (Instant::now(), self.host.timeout());
        while !self.is_idle(operation)? {
            // Asked only once NCCL makes us wait: most calls are taken at once.
            if let Some(error) = self.host.failure() {
                return Err(error);
            }
            let waited = since.elapsed();
            if waited > timeout {
                return Err(self.refused(operation, format!("no answer in {waited:.1?}: a rank has not come")));
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// Whether NCCL has taken all calls.
    pub fn is_idle(&self, operation: &str) -> Result<bool, Error> {
        if self.comm.is_null() {
            return Err(self.host.failure().unwrap_or_else(|| self.refused(operation, "it was aborted".into())));
        }
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives; `state` is a local.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) };
        match (asked, state) {
            (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclSuccess) => Ok(true),
            (sys::ncclResult_t::ncclSuccess, sys::ncclResult_t::ncclInProgress) => Ok(false),
            (sys::ncclResult_t::ncclSuccess, failed) | (failed, _) => Err(self.error(operation, failed)),
        }
    }

    /// Starts the finalisation, in which all ranks of the group take part: pending operations are finished first.
    pub fn finalize(&self) -> Result<(), Error> {
        // SAFETY: the communicator lives, and nobody uses it any more.
        let called = unsafe { nccl::comm_finalize(self.comm) };
        called.map(drop).map_err(|error| self.error("leaving the group", error.0))
    }

    /// Frees it, once it is [idle](Self::is_idle) after [`finalize`](Self::finalize).
    pub fn destroy(&mut self) {
        // SAFETY: the communicator lives, and is forgotten here.
        let _ = unsafe { nccl::comm_destroy(std::mem::replace(&mut self.comm, std::ptr::null_mut())) };
    }

    /// Aborts pending operations; nothing can be called afterwards. Kernels that wait for a peer return.
    pub fn abort(&mut self) {
        if !self.comm.is_null() {
            // SAFETY: the communicator lives, and is forgotten here.
            let _ = unsafe { nccl::comm_abort(std::mem::replace(&mut self.comm, std::ptr::null_mut())) };
        }
    }

    /// Moves the communicator out, to be closed under another group; what is left cannot be used.
    pub fn take(&mut self, host: &Arc<dyn Transport>) -> Self {
        Self { comm: std::mem::replace(&mut self.comm, std::ptr::null_mut()), host: host.clone() }
    }

    pub fn is_over(&self) -> bool {
        self.comm.is_null()
    }

    fn error(&self, operation: &str, result: sys::ncclResult_t) -> Error {
        self.refused(operation, said(result, Some(self.comm)))
    }

    pub fn refused(&self, operation: &str, problem: String) -> Error {
        Error::Nccl { group: self.host.group().clone(), rank: self.host.rank(), operation: operation.into(), problem }
    }
}

/// NCCL's text for an error.
fn said(result: sys::ncclResult_t, comm: Option<sys::ncclComm_t>) -> String {
    let text = |place: *const std::ffi::c_char| match place.is_null() {
        true => String::new(),
        // SAFETY: NCCL returns static or long-lived strings.
        false => unsafe { CStr::from_ptr(place) }.to_string_lossy().trim().to_owned(),
    };
    // SAFETY: both take any value of theirs, a null communicator included.
    let (general, last) = unsafe {
        (text(sys::ncclGetErrorString(result)), text(sys::ncclGetLastError(comm.unwrap_or(std::ptr::null_mut()))))
    };
    match last.is_empty() {
        true => general,
        false => format!("{general}: {last}"),
    }
}

fn config() -> sys::ncclConfig_t {
    // SAFETY: plain numbers and pointers, for which zero is a value.
    let mut config: sys::ncclConfig_t = unsafe { std::mem::zeroed() };
    config.size = size_of::<sys::ncclConfig_t>();
    // What the macro `NCCL_CONFIG_INITIALIZER` of nccl.h writes.
    config.magic = 0xcafe_beef;
    config.version = 22_800;
    config.blocking = 0;
    for setting in [
        &mut config.cgaClusterSize,
        &mut config.minCTAs,
        &mut config.maxCTAs,
        &mut config.splitShare,
        &mut config.trafficClass,
        &mut config.collnetEnable,
        &mut config.CTAPolicy,
        &mut config.shrinkShare,
        &mut config.nvlsCTAs,
        &mut config.nChannelsPerNetPeer,
        &mut config.nvlinkCentricSched,
        &mut config.graphUsageMode,
        &mut config.numRmaCtx,
        &mut config.maxP2pPeers,
    ] {
        *setting = UNDEFINED;
    }
    config
}
