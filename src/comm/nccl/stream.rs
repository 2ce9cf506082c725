//! The CUDA streams of a rank's NCCL calls, and their order against the streams of burn.
//!
//! burn's kernels are enqueued by a thread of the device, in the order in which closures are submitted to it. For a
//! collective
//!
//! 1. a first closure finds the addresses of the buffers and records an event, *ready*, on the stream of the calling
//!    thread, which goes on meanwhile: where it can, it synchronizes with the other ranks while the device's thread
//!    does this;
//! 2. the calling thread, not that of the device, makes NCCL's stream wait for *ready*, calls NCCL, and records *done*:
//!    NCCL's first calls may take long, and two ranks that share a device must not wait for each other on its one
//!    thread;
//! 3. a second closure makes the stream of the calling thread wait for *done*, and releases the buffers: whoever gets
//!    their memory next is enqueued behind.
//!
//! Nothing of this waits for the device. A call that runs in the background has a stream of its own to burn, that of
//! the thread that runs it: what the rank computes meanwhile does not wait for *done*. The thread that takes the result
//! makes its own stream wait for *done* when it does. It could not leave that to CubeCL, which considers streams
//! synchronised once one has waited for the other after a buffer was *made*: here the buffer is filled later.
//!
//! A sent message skips the third step: what the sender computes next has nothing to wait for, and the buffer is held
//! until *done* is seen to be over (see `watchdog.rs`).

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use burn_cubecl::tensor::CubeTensor;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_environment::stream::StreamId;
use cubecl_server::server::ServerStorage;
use cubecl_server::storage::{ComputeStorage, ManagedResource};
use cubecl_server::stream::WriteScoped;
use cudarc::driver::{result as driver, sys as cuda};
use cudarc::nccl::sys::cudaStream_t;

use super::event::CudaEvent;
use super::gpu::{Gpu, Server, refused};
use crate::Error;
use crate::comm::pending::{in_background, on_wait};

/// A pinned buffer: its memory is neither moved nor given to others.
type PinnedBuffer = ManagedResource<<<Server as ServerStorage>::Storage as ComputeStorage>::Resource>;

/// A CUDA stream for NCCL, of high priority: other work waits for it.
#[derive(Debug)]
pub(super) struct NcclStream {
    gpu: Gpu,
    stream: cuda::CUstream,
}

// SAFETY: CUDA takes streams from any thread.
unsafe impl Send for NcclStream {}
unsafe impl Sync for NcclStream {}

/// Buffers whose addresses are being found.
pub(super) struct Preparing {
    found: Receiver<Result<(Vec<PinnedBuffer>, CudaEvent), Error>>,
    server: DeviceHandle<Server>,
    stream: StreamId,
}

/// Buffers whose addresses are known, and the point in burn's stream from which on they may be used.
pub(super) struct Prepared {
    held: Vec<PinnedBuffer>,
    pub ready: Arc<CudaEvent>,
    server: DeviceHandle<Server>,
    stream: StreamId,
}

/// Makes what burn enqueues on this thread wait for an event, and what the thread enqueues that takes the result of the
/// background job under way here.
pub(super) fn follow_here(gpu: &Gpu, tensor: &CubeTensor, event: Arc<CudaEvent>) {
    let server = gpu.server(tensor).clone();
    follow(&server, event.clone());
    on_wait(move || follow(&server, event));
}

/// Makes what burn enqueues on this thread from now on wait for an event.
fn follow(server: &DeviceHandle<Server>, event: Arc<CudaEvent>) {
    let stream = StreamId::current();
    server.submit(move |server: &mut Server| {
        if let Err(error) = compute_stream(server, stream).and_then(|stream| event.make_wait(stream)) {
            // The device is lost: every later call says so.
            log::error!("{error}");
        }
    });
    server.flush_queue();
}

/// Makes what burn enqueues on this thread from now on wait for what the stream has been given that a tensor comes
/// from: CubeCL looks only at when a buffer was made, not at what was written to it since.
pub(super) fn wait_for_origin(gpu: &Gpu, tensor: &CubeTensor) {
    let (here, origin) = (StreamId::current(), tensor.handle.stream);
    if here == origin {
        return;
    }
    let (server, gpu) = (gpu.server(tensor).clone(), gpu.clone());
    server.submit(move |server: &mut Server| {
        let mut wait =
            || CudaEvent::record(&gpu, compute_stream(server, origin)?)?.make_wait(compute_stream(server, here)?);
        if let Err(error) = wait() {
            // The device is lost: every later call says so.
            log::error!("{error}");
        }
    });
    server.flush_queue();
}

/// Makes the thread that takes the result of the background job under way here wait for what this thread has enqueued.
pub(super) fn record_for_waiter(gpu: &Gpu, tensor: &CubeTensor) {
    if !in_background() {
        return;
    }
    let (here, server, gpu) = (StreamId::current(), gpu.server(tensor).clone(), gpu.clone());
    let (sender, done) = sync_channel(1);
    server.submit(move |server: &mut Server| {
        // Whoever takes the result may have given up.
        let _ = sender.send(compute_stream(server, here).and_then(|stream| CudaEvent::record(&gpu, stream)));
    });
    server.flush_queue();
    on_wait(move || match done.recv().map_err(|error| lost(&error)).flatten() {
        Ok(event) => follow(&server, Arc::new(event)),
        Err(error) => log::error!("{error}"),
    });
}

/// Starts to find the addresses of the buffers of tensors of one device, and records when they are ready for use. Does
/// not block: nothing else may be enqueued on them from this thread until they are [released](Prepared::release).
pub(super) fn prepare<'a>(gpu: &Gpu, tensors: impl Iterator<Item = &'a CubeTensor>) -> Result<Preparing, Error> {
    let stream = StreamId::current();
    let mut server = None;
    let (mut bindings, mut origins) = (Vec::new(), Vec::new());
    for tensor in tensors {
        server = Some(gpu.server(tensor));
        bindings.push(tensor.handle.clone().binding());
        let origin = tensor.handle.stream;
        if origin != stream && !origins.contains(&origin) {
            origins.push(origin);
        }
    }
    let server = server.ok_or_else(|| Error::invalid("NCCL", "it was given no buffer"))?.clone();
    let (sender, found) = sync_channel(1);
    let gpu = gpu.clone();
    server.submit(move |server: &mut Server| {
        let mut find = || {
            let find = |binding| server.get_resource(binding, stream).map_err(|error| lost(&error));
            let held = bindings.drain(..).map(find).collect::<Result<Vec<_>, _>>()?;
            let compute = compute_stream(server, stream)?;
            // CubeCL may have seen to it, but looks only at when a buffer was made, not at what was written to it
            // since.
            for origin in &origins {
                CudaEvent::record(&gpu, compute_stream(server, *origin)?)?.make_wait(compute)?;
            }
            Ok((held, CudaEvent::record(&gpu, compute)?))
        };
        // Whoever asked may have given up: the world has failed. Nothing has been done with the buffers then.
        let _ = sender.send(find());
    });
    // Closures are submitted in batches: without it nobody would begin with this one.
    server.flush_queue();
    Ok(Preparing { found, server, stream })
}

impl Preparing {
    /// Waits for the device's thread, not for the device, and no longer than `limit`.
    pub fn finish(self, limit: Duration) -> Result<Prepared, Error> {
        let Self { found, server, stream } = self;
        // The thread drops the sender, should it panic.
        let (held, ready) = found.recv_timeout(limit).map_err(|error| lost(&error))??;
        Ok(Prepared { held, ready: Arc::new(ready), server, stream })
    }
}

impl Prepared {
    /// The addresses of the buffers, in the order in which they were given.
    pub fn places(&self) -> impl ExactSizeIterator<Item = *mut c_void> {
        self.held.iter().map(|held| held.resource().ptr as *mut c_void)
    }

    /// Makes what burn enqueues from now on wait for `done`, then releases the buffers.
    pub fn release(self, done: Arc<CudaEvent>) {
        let Self { held, server, stream, .. } = self;
        let (taken, by) = (done.clone(), server.clone());
        on_wait(move || follow(&by, taken));
        server.submit(move |server: &mut Server| {
            match compute_stream(server, stream).and_then(|stream| done.make_wait(stream)) {
                Ok(()) => drop(held),
                // The device is lost, and every later call will say so. Memory that may still be written to is not
                // given back.
                Err(_) => std::mem::forget(held),
            }
        });
        server.flush_queue();
    }
}

impl NcclStream {
    pub fn new(gpu: &Gpu) -> Result<Self, Error> {
        let failed = |error| refused("a stream for NCCL could not be made", error);
        gpu.enter()?;
        let (_, highest) = driver::stream::get_priority_range().map_err(failed)?;
        let stream = driver::stream::create_with_priority(driver::stream::StreamKind::NonBlocking, highest);
        Ok(Self { stream: stream.map_err(failed)?, gpu: gpu.clone() })
    }

    /// Enqueues what `call` does with the buffers, behind what they wait for. Returns the point where it is done, and
    /// whether the call was taken: buffers must not go before that point in any case.
    pub fn enqueue(
        &self,
        prepared: &Prepared,
        call: impl FnOnce(cudaStream_t) -> Result<(), Error>,
    ) -> Result<(Arc<CudaEvent>, Result<(), Error>), Error> {
        self.gpu.enter()?;
        prepared.ready.make_wait(self.stream)?;
        let called = call(self.stream as cudaStream_t);
        Ok((Arc::new(CudaEvent::record(&self.gpu, self.stream)?), called))
    }
}

impl Drop for NcclStream {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: the stream has no other user. What is still enqueued is finished first.
            let _ = unsafe { driver::stream::destroy(self.stream) };
        }
    }
}

/// The CUDA stream on which burn enqueues the work of stream `id`.
fn compute_stream(server: &mut Server, id: StreamId) -> Result<cuda::CUstream, Error> {
    let mut streams = server.write_streams().resolve(id, core::iter::empty()).map_err(|error| lost(&error))?;
    Ok(streams.current().sys)
}

fn lost(error: &dyn std::fmt::Debug) -> Error {
    Error::Gpu { problem: format!("burn's device thread cannot give a buffer: {error:?}") }
}
