//! A GPU, as CUDA and burn know it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_server::runtime::Runtime;
use cudarc::driver::{result as driver, sys as cuda};

use crate::Error;
use crate::lock::lock;

/// Nameable although `cubecl_cuda::compute` is private.
pub(super) type Server = <CudaRuntime as Runtime>::Server;

/// A GPU: its CUDA context, and burn's thread for it.
#[derive(Debug, Clone)]
pub(super) struct Gpu(Arc<GpuShared>);

struct GpuShared {
    /// The primary context, which burn uses too, and which is kept for the life of the process.
    context: cuda::CUcontext,
    /// burn's thread of the device, from the first tensor on: looked up once, not for each call.
    server: OnceLock<DeviceHandle<Server>>,
    /// Events that nobody uses just now.
    spare: Mutex<Vec<cuda::CUevent>>,
}

// SAFETY: CUDA takes contexts and events from any thread; the rest is seen to here.
unsafe impl Send for GpuShared where DeviceHandle<Server>: Send {}
unsafe impl Sync for GpuShared where DeviceHandle<Server>: Send + Sync {}

impl std::fmt::Debug for GpuShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Gpu {
    /// Spare events that are kept; more are in use at once only for a moment.
    pub(super) const SPARE: usize = 256;

    pub fn new(index: usize) -> Result<Self, Error> {
        let failed = |error| refused("a GPU cannot be opened", error);
        let device = driver::device::get(index as i32).map_err(failed)?;
        // SAFETY: the device exists.
        let context = unsafe { driver::primary_ctx::retain(device) }.map_err(failed)?;
        Ok(Self(Arc::new(GpuShared { context, server: OnceLock::new(), spare: Mutex::default() })))
    }

    /// Makes the device the one that this thread's CUDA calls mean.
    pub fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is retained for ever.
        unsafe { driver::ctx::set_current(self.0.context) }.map_err(|error| refused("the GPU cannot be entered", error))
    }

    /// burn's thread of the device on which `tensor` is.
    pub(super) fn server(&self, tensor: &CubeTensor) -> &DeviceHandle<Server> {
        self.0.server.get_or_init(|| DeviceHandle::new(tensor.client.service_id().device))
    }

    pub(super) fn spare(&self) -> MutexGuard<'_, Vec<cuda::CUevent>> {
        lock(&self.0.spare)
    }
}

impl Drop for GpuShared {
    fn drop(&mut self) {
        for event in self.spare.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: nobody else has it; CUDA keeps what it needs of an event that is waited for.
            let _ = unsafe { driver::event::destroy(event) };
        }
    }
}

pub(super) fn refused(what: &str, error: driver::DriverError) -> Error {
    Error::Gpu { problem: format!("{what}: {error:?}") }
}
