//! CUDA events: points in streams that other streams wait for.
//!
//! Events are reused: a stream that waits for one waits for the point that it marked when the wait was enqueued,
//! whatever it marks later.

use cudarc::driver::{result as driver, sys as cuda};

use super::gpu::{Gpu, refused};
use crate::Error;

/// A point in a stream. Streams go on waiting for it, however early the event is destroyed or marks another.
#[derive(Debug)]
pub(super) struct CudaEvent {
    event: cuda::CUevent,
    gpu: Gpu,
}

// SAFETY: CUDA takes events from any thread.
unsafe impl Send for CudaEvent {}
unsafe impl Sync for CudaEvent {}

impl CudaEvent {
    /// Marks where `stream` is now. The device must be current on this thread.
    pub fn record(gpu: &Gpu, stream: cuda::CUstream) -> Result<Self, Error> {
        let failed = |error| refused("an event could not be recorded", error);
        let spare = gpu.spare().pop();
        let event = match spare {
            Some(event) => event,
            None => driver::event::create(cuda::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?,
        };
        let event = Self { event, gpu: gpu.clone() };
        // SAFETY: both live.
        unsafe { driver::event::record(event.event, stream) }.map_err(failed)?;
        Ok(event)
    }

    /// Makes a stream wait for this point.
    pub fn make_wait(&self, stream: cuda::CUstream) -> Result<(), Error> {
        let whole = cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { driver::stream::wait_event(stream, self.event, whole) }
            .map_err(|error| refused("a stream cannot wait for another", error))
    }

    /// Whether the device has passed this point, as far as it can still be asked.
    pub fn is_over(&self) -> Result<bool, Error> {
        // SAFETY: the event lives.
        match unsafe { driver::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(driver::DriverError(cuda::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(refused("the GPU failed", error)),
        }
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        let mut spare = self.gpu.spare();
        if spare.len() < Gpu::SPARE {
            return spare.push(self.event);
        }
        drop(spare);
        // SAFETY: nobody else has it; CUDA keeps what it needs of an event that is waited for.
        let _ = unsafe { driver::event::destroy(self.event) };
    }
}
