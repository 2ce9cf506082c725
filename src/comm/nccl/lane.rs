//! The stream on which a rank's NCCL calls run, and its order against the streams of burn.
//!
//! burn's kernels are enqueued by a thread of the device, in the order in which closures are submitted to it. For a collective
//!
//! 1. a first closure finds where the buffers lie and records an event, *ready*, on the stream of the calling thread;
//! 2. the calling thread, not that of the device, makes NCCL's stream wait for *ready*, calls NCCL, and records *done*: NCCL's
//!    first calls may take long, and two ranks that share a device must not wait for each other on its one thread;
//! 3. a second closure makes the stream of the calling thread wait for *done*, and lets go of the buffers: whoever gets their
//!    memory next is enqueued behind.
//!
//! Nothing of this waits for the device.

use std::ffi::c_void;

use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_environment::stream::StreamId;
use cubecl_server::runtime::Runtime;
use cubecl_server::server::ServerStorage;
use cubecl_server::storage::{ComputeStorage, ManagedResource};
use cubecl_server::stream::WriteScoped;
use cudarc::driver::{result as driver, sys as cuda};
use cudarc::nccl::sys::cudaStream_t;

use crate::Error;

/// Nameable although `cubecl_cuda::compute` is private.
type Server = <CudaRuntime as Runtime>::Server;
type Resource = ManagedResource<<<Server as ServerStorage>::Storage as ComputeStorage>::Resource>;

/// A stream of a device, of high priority: what it does is waited for.
#[derive(Debug)]
pub(super) struct Lane {
    context: cuda::CUcontext,
    stream: cuda::CUstream,
}

// SAFETY: CUDA takes contexts and streams from any thread.
unsafe impl Send for Lane {}
unsafe impl Sync for Lane {}

/// An event that travels to the thread of the device.
struct Event(cuda::CUevent);

// SAFETY: CUDA takes events from any thread.
unsafe impl Send for Event {}

impl Lane {
    pub fn new(index: usize) -> Result<Self, Error> {
        let failed = |error| refused("a stream for NCCL could not be made", error);
        let device = driver::device::get(index as i32).map_err(failed)?;
        // SAFETY: the device exists. The primary context is the one that burn uses; it is kept for the life of the process.
        let context = unsafe { driver::primary_ctx::retain(device) }.map_err(failed)?;
        let lane = Self { context, stream: std::ptr::null_mut() };
        lane.enter()?;
        let (_, highest) = driver::stream::get_priority_range().map_err(failed)?;
        let stream = driver::stream::create_with_priority(driver::stream::StreamKind::NonBlocking, highest);
        Ok(Self { stream: stream.map_err(failed)?, ..lane })
    }

    /// Makes the device the one that this thread's CUDA calls mean.
    pub fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is retained for ever.
        unsafe { driver::ctx::set_current(self.context) }.map_err(|error| refused("the GPU cannot be entered", error))
    }

    /// Enqueues a collective from one buffer into another, which may be the same. `call` gets their places and the stream.
    pub fn enqueue(
        &self,
        input: &CubeTensor,
        output: &CubeTensor,
        call: impl FnOnce(*const c_void, *mut c_void, cudaStream_t) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.enter()?;
        let server = DeviceHandle::<Server>::new(input.client.service_id().device);
        let id = StreamId::current();
        let (from, to) = (input.handle.clone().binding(), output.handle.clone().binding());
        let found = server.submit_blocking(move |server: &mut Server| {
            // This also makes stream `id` wait for the streams that wrote the buffers.
            let from = server.get_resource(from, id).map_err(|error| lost(&error))?;
            let to = server.get_resource(to, id).map_err(|error| lost(&error))?;
            let ready = record(compute_stream(server, id)?)?;
            Ok::<_, Error>(((from, to), ready))
        });
        let ((from, to), ready) = found.map_err(|error| lost(&error))??;
        self.wait_for(ready)?;
        let called =
            call(from.resource().ptr as *const c_void, to.resource().ptr as *mut c_void, self.stream as cudaStream_t);
        // Whatever NCCL said: what it has enqueued must be over before the buffers go.
        let done = record(self.stream)?;
        server.submit(move |server: &mut Server| release(server, id, done, (from, to)));
        server.flush_queue();
        called
    }

    fn wait_for(&self, event: Event) -> Result<(), Error> {
        let whole = cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event live; destroying an event that is waited for is allowed, CUDA frees it when it is over.
        unsafe {
            driver::stream::wait_event(self.stream, event.0, whole)
                .and_then(|()| driver::event::destroy(event.0))
                .map_err(|error| refused("NCCL's stream cannot wait for burn's", error))
        }
    }
}

/// The CUDA stream on which burn enqueues the work of stream `id`.
fn compute_stream(server: &mut Server, id: StreamId) -> Result<cuda::CUstream, Error> {
    let mut streams = server.write_streams().resolve(id, core::iter::empty()).map_err(|error| lost(&error))?;
    Ok(streams.current().sys)
}

/// Makes burn's stream wait for the collective, then lets go of the buffers.
fn release(server: &mut Server, id: StreamId, done: Event, buffers: (Resource, Resource)) {
    let waits = compute_stream(server, id).is_ok_and(|stream| {
        // SAFETY: as in `wait_for`.
        unsafe {
            let whole = cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            driver::stream::wait_event(stream, done.0, whole).and_then(|()| driver::event::destroy(done.0)).is_ok()
        }
    });
    match waits {
        true => drop(buffers),
        // The device is lost, and every later call will say so. Memory that may still be written to is not given back.
        false => std::mem::forget(buffers),
    }
}

fn record(stream: cuda::CUstream) -> Result<Event, Error> {
    let failed = |error| refused("an event could not be recorded", error);
    let event = driver::event::create(cuda::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
    // SAFETY: both live.
    unsafe { driver::event::record(event, stream) }.map_err(failed)?;
    Ok(Event(event))
}

fn refused(what: &str, error: driver::DriverError) -> Error {
    Error::Gpu { problem: format!("{what}: {error:?}") }
}

fn lost(error: &dyn std::fmt::Debug) -> Error {
    Error::Gpu { problem: format!("burn's device thread cannot give a buffer: {error:?}") }
}
