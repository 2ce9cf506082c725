//! The streams on which a rank's NCCL calls run, and their order against the streams of burn.
//!
//! burn's kernels are enqueued by a thread of the device, in the order in which closures are submitted to it. For a collective
//!
//! 1. a first closure finds where the buffers lie and records an event, *ready*, on the stream of the calling thread;
//! 2. the calling thread, not that of the device, makes NCCL's stream wait for *ready*, calls NCCL, and records *done*: NCCL's
//!    first calls may take long, and two ranks that share a device must not wait for each other on its one thread;
//! 3. a second closure makes the stream of the calling thread wait for *done*, and lets go of the buffers: whoever gets their
//!    memory next is enqueued behind.
//!
//! Nothing of this waits for the device. A call that runs in the background has a stream of its own to burn, that of the
//! thread that runs it: what the rank computes meanwhile does not wait for *done*. The thread that takes the result makes its
//! own stream wait for *done* when it does. It could not leave that to CubeCL, which takes streams for synchronised once one
//! has waited for the other after a buffer was *made*: here the buffer is filled later.
//!
//! A message that is sent goes without the third step: what the sender computes next has nothing to wait for, and the buffer
//! is held until *done* is seen to be over (see `keeper.rs`).

use std::ffi::c_void;
use std::sync::Arc;

use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl_common::device::DeviceId;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_environment::stream::StreamId;
use cubecl_server::runtime::Runtime;
use cubecl_server::server::ServerStorage;
use cubecl_server::storage::{ComputeStorage, ManagedResource};
use cubecl_server::stream::WriteScoped;
use cudarc::driver::{result as driver, sys as cuda};
use cudarc::nccl::sys::cudaStream_t;

use crate::Error;
use crate::comm::pending::when_taken;

/// Nameable although `cubecl_cuda::compute` is private.
type Server = <CudaRuntime as Runtime>::Server;
/// A buffer that is held: its memory is neither moved nor given to others.
type Held = ManagedResource<<<Server as ServerStorage>::Storage as ComputeStorage>::Resource>;

/// A GPU, as CUDA's calls mean it: its primary context, which burn uses too, and which is kept for the life of the process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gpu(cuda::CUcontext);

// SAFETY: CUDA takes contexts from any thread.
unsafe impl Send for Gpu {}
unsafe impl Sync for Gpu {}

impl Gpu {
    pub fn new(index: usize) -> Result<Self, Error> {
        let failed = |error| refused("a GPU cannot be opened", error);
        let device = driver::device::get(index as i32).map_err(failed)?;
        // SAFETY: the device exists.
        unsafe { driver::primary_ctx::retain(device) }.map(Self).map_err(failed)
    }

    /// Makes the device the one that this thread's CUDA calls mean.
    pub fn enter(self) -> Result<(), Error> {
        // SAFETY: the context is retained for ever.
        unsafe { driver::ctx::set_current(self.0) }.map_err(|error| refused("the GPU cannot be entered", error))
    }
}

/// A stream of a device, of high priority: what it does is waited for.
#[derive(Debug)]
pub(super) struct Lane {
    gpu: Gpu,
    stream: cuda::CUstream,
}

// SAFETY: CUDA takes streams from any thread.
unsafe impl Send for Lane {}
unsafe impl Sync for Lane {}

/// A point in a stream. CUDA keeps what waits for it waiting, however early the event is destroyed.
#[derive(Debug)]
pub(super) struct Event(cuda::CUevent);

// SAFETY: CUDA takes events from any thread.
unsafe impl Send for Event {}
unsafe impl Sync for Event {}

/// Buffers whose places are known, and the point in burn's stream from which on they may be used.
pub(super) struct Prepared {
    held: Vec<Held>,
    pub ready: Arc<Event>,
    server: DeviceHandle<Server>,
    device: DeviceId,
    stream: StreamId,
}

/// Makes what burn enqueues on this thread from now on wait for an event.
fn follow(device: DeviceId, event: Arc<Event>) {
    let (server, stream) = (DeviceHandle::<Server>::new(device), StreamId::current());
    server.submit(move |server: &mut Server| {
        if let Err(error) = compute_stream(server, stream).and_then(|stream| event.hold_up(stream)) {
            // The device is lost: every later call says so.
            log::error!("{error}");
        }
    });
    server.flush_queue();
}

/// Finds the buffers of tensors of one device, and records when they are ready for use.
pub(super) fn prepare<'a>(tensors: impl Iterator<Item = &'a CubeTensor>) -> Result<Prepared, Error> {
    let stream = StreamId::current();
    let mut device = None;
    let (mut bindings, mut origins) = (Vec::new(), Vec::new());
    for tensor in tensors {
        device = Some(tensor.client.service_id().device);
        bindings.push(tensor.handle.clone().binding());
        let origin = tensor.handle.stream;
        if origin != stream && !origins.contains(&origin) {
            origins.push(origin);
        }
    }
    let device = device.ok_or_else(|| Error::invalid("NCCL", "it was given no buffer"))?;
    let server = DeviceHandle::<Server>::new(device);
    let found = server.submit_blocking(move |server: &mut Server| {
        let find = |binding| server.get_resource(binding, stream).map_err(|error| lost(&error));
        let held = bindings.into_iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let compute = compute_stream(server, stream)?;
        // CubeCL may have seen to it, but looks only at when a buffer was made, not at what was written to it since.
        for origin in origins {
            Event::record(compute_stream(server, origin)?)?.hold_up(compute)?;
        }
        Ok::<_, Error>((held, Event::record(compute)?))
    });
    let (held, ready) = found.map_err(|error| lost(&error))??;
    Ok(Prepared { held, ready: Arc::new(ready), server, device, stream })
}

impl Prepared {
    /// The places of the buffers, in the order in which they were given.
    pub fn places(&self) -> impl ExactSizeIterator<Item = *mut c_void> {
        self.held.iter().map(|held| held.resource().ptr as *mut c_void)
    }

    /// Makes what burn enqueues from now on wait for `done`, then lets go of the buffers.
    pub fn release(self, done: Arc<Event>) {
        let Self { held, server, stream, device, .. } = self;
        let taken = done.clone();
        when_taken(move || follow(device, taken));
        server.submit(move |server: &mut Server| {
            match compute_stream(server, stream).and_then(|stream| done.hold_up(stream)) {
                Ok(()) => drop(held),
                // The device is lost, and every later call will say so. Memory that may still be written to is not given back.
                Err(_) => std::mem::forget(held),
            }
        });
        server.flush_queue();
    }
}

impl Lane {
    pub fn new(gpu: Gpu) -> Result<Self, Error> {
        let failed = |error| refused("a stream for NCCL could not be made", error);
        gpu.enter()?;
        let (_, highest) = driver::stream::get_priority_range().map_err(failed)?;
        let stream = driver::stream::create_with_priority(driver::stream::StreamKind::NonBlocking, highest);
        Ok(Self { stream: stream.map_err(failed)?, gpu })
    }

    /// Enqueues what `call` does with the buffers, behind what they wait for. Returns the point where it is done, and
    /// whether the call was taken: buffers must not go before that point in any case.
    pub fn enqueue(
        &self,
        prepared: &Prepared,
        call: impl FnOnce(cudaStream_t) -> Result<(), Error>,
    ) -> Result<(Arc<Event>, Result<(), Error>), Error> {
        self.gpu.enter()?;
        prepared.ready.hold_up(self.stream)?;
        let called = call(self.stream as cudaStream_t);
        Ok((Arc::new(Event::record(self.stream)?), called))
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: the stream is this lane's alone. What is still enqueued is finished first.
            let _ = unsafe { driver::stream::destroy(self.stream) };
        }
    }
}

impl Event {
    fn record(stream: cuda::CUstream) -> Result<Self, Error> {
        let failed = |error| refused("an event could not be recorded", error);
        let event = driver::event::create(cuda::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        let event = Self(event);
        // SAFETY: both live.
        unsafe { driver::event::record(event.0, stream) }.map_err(failed)?;
        Ok(event)
    }

    /// Makes a stream wait for this point.
    fn hold_up(&self, stream: cuda::CUstream) -> Result<(), Error> {
        let whole = cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { driver::stream::wait_event(stream, self.0, whole) }
            .map_err(|error| refused("a stream cannot wait for another", error))
    }

    /// Whether the device has passed this point, as far as it can still be asked.
    pub fn is_over(&self) -> Result<bool, Error> {
        // SAFETY: the event lives.
        match unsafe { driver::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(driver::DriverError(cuda::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(refused("the GPU failed", error)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: nobody else has it; CUDA keeps what it needs of an event that is waited for.
        let _ = unsafe { driver::event::destroy(self.0) };
    }
}

/// The CUDA stream on which burn enqueues the work of stream `id`.
fn compute_stream(server: &mut Server, id: StreamId) -> Result<cuda::CUstream, Error> {
    let mut streams = server.write_streams().resolve(id, core::iter::empty()).map_err(|error| lost(&error))?;
    Ok(streams.current().sys)
}

fn refused(what: &str, error: driver::DriverError) -> Error {
    Error::Gpu { problem: format!("{what}: {error:?}") }
}

fn lost(error: &dyn std::fmt::Debug) -> Error {
    Error::Gpu { problem: format!("burn's device thread cannot give a buffer: {error:?}") }
}
