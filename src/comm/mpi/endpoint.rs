//! The endpoint over MPI: non-blocking messages of bytes.
//!
//! No call here blocks, and each takes the process's [lock](Mpi::lock): a thread that waits keeps no other from
//! working.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{ptr, thread};

use mpi_sys as sys;

use super::process::{Mpi, check};
use crate::Error;
use crate::comm::host_buffer::zeroed;
use crate::comm::message_passing::{Endpoint, EndpointInfo, RecvBytes, Request, SendBytes, Thresholds};
use crate::lock::lock;

/// Bytes of one MPI message: counts are C ints. What is longer is sent as several.
const SEGMENT: usize = 1 << 30;
/// Most bytes of a control message: errors with the calls of all ranks.
const TAKEN: usize = 16 << 20;

// A request is a pointer or a number, as the MPI likes.
const _: () = assert!(size_of::<sys::MPI_Request>() <= 8);

fn wrap(raw: sys::MPI_Request) -> Request {
    let mut bits = 0u64;
    // SAFETY: there is room, and the bits of a request are initialised.
    unsafe { (&raw mut bits).cast::<sys::MPI_Request>().write_unaligned(raw) };
    Request(bits)
}

/// The address of the MPI request in a request.
fn raw_request(request: &mut Request) -> *mut sys::MPI_Request {
    (&raw mut request.0).cast()
}

/// The endpoint of a process: an MPI communicator of all processes of a world.
#[derive(Debug)]
pub(super) struct MpiEndpoint {
    mpi: Arc<Mpi>,
    comm: sys::MPI_Comm,
    info: EndpointInfo,
    /// Messages that are being received, the oldest first.
    incoming: Mutex<Vec<IncomingMessage>>,
}

/// A message that MPI has matched, and whose bytes may not have arrived.
#[derive(Debug)]
struct IncomingMessage {
    from: usize,
    tag: u64,
    bytes: Vec<u8>,
    request: Request,
}

impl Drop for MpiEndpoint {
    fn drop(&mut self) {
        // MPI may still write there.
        std::mem::forget(std::mem::take(&mut *lock(&self.incoming)));
    }
}

// SAFETY: the communicator is used under the lock of the process.
unsafe impl Send for MpiEndpoint {}
unsafe impl Sync for MpiEndpoint {}

impl MpiEndpoint {
    /// A communicator of all processes, made with all of them.
    pub fn new(mpi: Arc<Mpi>, timeout: Duration) -> Result<Self, Error> {
        let (mut rank, mut size) = (0, 0);
        // MPI writes the handle when the communicator is complete: it must be there however this ends.
        let mut comm = Box::new(unsafe { sys::RSMPI_COMM_NULL });
        let mut raw = unsafe { sys::RSMPI_REQUEST_NULL };
        let mut bound: *mut c_int = ptr::null_mut();
        let mut has_bound = 0;
        {
            let _locked = mpi.lock();
            // SAFETY: MPI is initialised; the places outlive the calls, `comm` and `raw` the loop below as well.
            unsafe {
                let world = sys::RSMPI_COMM_WORLD;
                check(sys::MPI_Comm_rank(world, &mut rank), "MPI_Comm_rank")?;
                check(sys::MPI_Comm_size(world, &mut size), "MPI_Comm_size")?;
                let place: *mut *mut c_int = &mut bound;
                let key = sys::MPI_TAG_UB as c_int;
                check(sys::MPI_Comm_get_attr(world, key, place.cast(), &mut has_bound), "MPI_Comm_get_attr")?;
                check(sys::MPI_Comm_idup(world, &mut *comm, &mut raw), "MPI_Comm_idup")?;
            }
        }
        // SAFETY: MPI keeps the bound as long as it runs.
        let tags = if has_bound != 0 && !bound.is_null() { (unsafe { *bound }) as u64 } else { 32767 };
        let info = EndpointInfo {
            name: "mpi",
            rank: rank as usize,
            size: size as usize,
            tags,
            can_reclaim: false,
            wakes_on_arrival: false,
            shares_memory: true,
            thresholds: Thresholds::STANDARD,
        };
        let mut endpoint = Self { mpi, comm: *comm, info, incoming: Mutex::default() };
        let since = Instant::now();
        let mut requests = vec![wrap(raw)];
        let made = loop {
            match endpoint.test(&mut requests) {
                Ok(true) => break Ok(()),
                Ok(false) if since.elapsed() > timeout => {
                    let problem = format!(
                        "the other ranks did not come to make a world within {timeout:.1?}; raise the limit with \
                         BURN_PARALLEL_TIMEOUT_S if they were only slow"
                    );
                    break Err(Error::Transport { transport: "mpi", problem });
                }
                Ok(false) => thread::sleep(Duration::from_micros(200)),
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = made {
            Box::leak(comm);
            return Err(error);
        }
        let comm = *comm;
        endpoint.comm = comm;
        // SAFETY: the communicator is complete. An error is to come back, not to end the process.
        check(unsafe { sys::MPI_Comm_set_errhandler(comm, sys::RSMPI_ERRORS_RETURN) }, "MPI_Comm_set_errhandler")?;
        Ok(endpoint)
    }

    /// Starts a message segment by segment: `segment` gets the start of each and its bytes.
    fn begin(
        &self,
        call: &'static str,
        len: usize,
        requests: &mut Vec<Request>,
        mut segment: impl FnMut(usize, c_int, &mut sys::MPI_Request) -> c_int,
    ) -> Result<(), Error> {
        let _locked = self.mpi.lock();
        for start in segments(len) {
            let mut raw = unsafe { sys::RSMPI_REQUEST_NULL };
            check(segment(start, SEGMENT.min(len - start) as c_int, &mut raw), call)?;
            requests.push(wrap(raw));
        }
        Ok(())
    }
}

impl MpiEndpoint {
    /// Starts to receive a message that MPI has matched, if there is one. MPI is locked.
    fn probe(&self, from: Option<usize>, tag: u64) -> Result<Option<IncomingMessage>, Error> {
        // SAFETY: a plain struct of numbers, which MPI fills.
        let mut status: sys::MPI_Status = unsafe { std::mem::zeroed() };
        // SAFETY: handles of MPI.
        let (mut message, mut raw) = unsafe { (sys::RSMPI_MESSAGE_NULL, sys::RSMPI_REQUEST_NULL) };
        let (mut found, mut count) = (0, 0);
        let source = from.map_or(unsafe { sys::RSMPI_ANY_SOURCE }, |from| from as c_int);
        // SAFETY: the places outlive the calls, which wait for nobody.
        unsafe {
            let code = sys::MPI_Improbe(source, tag as c_int, self.comm, &mut found, &mut message, &mut status);
            check(code, "MPI_Improbe")?;
            if found == 0 {
                return Ok(None);
            }
            check(sys::MPI_Get_count(&status, sys::RSMPI_UINT8_T, &mut count), "MPI_Get_count")?;
        }
        let (from, len) = (status.MPI_SOURCE as usize, count.max(0) as usize);
        let Some(mut bytes) = zeroed::<u8>(len).filter(|_| len <= TAKEN) else {
            let problem = format!(
                "rank {from} announces {len} bytes where {TAKEN} are the most, or more than there is memory for"
            );
            return Err(Error::Transport { transport: "mpi", problem });
        };
        // SAFETY: the bytes are on the heap and as many as that; they are kept until they are there, or for good.
        let code =
            unsafe { sys::MPI_Imrecv(bytes.as_mut_ptr().cast(), count, sys::RSMPI_UINT8_T, &mut message, &mut raw) };
        if let Err(error) = check(code, "MPI_Imrecv") {
            std::mem::forget(bytes);
            return Err(error);
        }
        Ok(Some(IncomingMessage { from, tag, bytes, request: wrap(raw) }))
    }
}

/// Whether a request is done. MPI is locked.
fn is_done(request: &mut Request) -> Result<bool, Error> {
    let mut done = 0;
    // SAFETY: the request is of this MPI and not done so far.
    let code = unsafe { sys::MPI_Test(raw_request(request), &mut done, sys::RSMPI_STATUS_IGNORE) };
    check(code, "MPI_Test").map(|()| done != 0)
}

impl Endpoint for MpiEndpoint {
    fn info(&self) -> &EndpointInfo {
        &self.info
    }

    unsafe fn start_send(
        &self,
        to: usize,
        tag: u64,
        SendBytes { data, len }: SendBytes,
        _control: bool,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        self.begin("MPI_Isend", len, requests, |start, count, raw| {
            // SAFETY: passed on.
            unsafe {
                let data = data.add(start).cast::<c_void>();
                sys::MPI_Isend(data, count, sys::RSMPI_UINT8_T, to as c_int, tag as c_int, self.comm, raw)
            }
        })
    }

    unsafe fn start_receive(
        &self,
        from: usize,
        tag: u64,
        RecvBytes { data, len }: RecvBytes,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        self.begin("MPI_Irecv", len, requests, |start, count, raw| {
            // SAFETY: passed on.
            unsafe {
                let data = data.add(start).cast::<c_void>();
                sys::MPI_Irecv(data, count, sys::RSMPI_UINT8_T, from as c_int, tag as c_int, self.comm, raw)
            }
        })
    }

    fn test(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        let _locked = self.mpi.lock();
        let mut index = 0;
        while index < requests.len() {
            if is_done(&mut requests[index])? {
                requests.swap_remove(index);
            } else {
                index += 1;
            }
        }
        Ok(requests.is_empty())
    }

    fn cancel(&self, requests: &mut Vec<Request>) {
        let _locked = self.mpi.lock();
        // A receive that has found its message cannot be cancelled, and its sender may be stopped: nobody waits for
        // that.
        requests.retain_mut(|request| {
            // SAFETY: the request is of this MPI and not done.
            let cancelled = unsafe { sys::MPI_Cancel(raw_request(request)) };
            !check(cancelled, "MPI_Cancel").and_then(|()| is_done(request)).unwrap_or(false)
        });
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let _locked = self.mpi.lock();
        let mut incoming = lock(&self.incoming);
        // Messages of one rank arrive in order: none behind one that is incomplete is taken.
        let mut behind = Vec::new();
        for place in 0..incoming.len() {
            let one = &mut incoming[place];
            if one.tag != tag || from.is_some_and(|from| from != one.from) || behind.contains(&one.from) {
                continue;
            }
            if is_done(&mut one.request)? {
                let one = incoming.remove(place);
                return Ok(Some((one.from, one.bytes)));
            }
            behind.push(one.from);
        }
        if from.is_some() && !behind.is_empty() {
            return Ok(None);
        }
        let Some(mut one) = self.probe(from, tag)? else { return Ok(None) };
        if !behind.contains(&one.from) && is_done(&mut one.request)? {
            return Ok(Some((one.from, one.bytes)));
        }
        incoming.push(one);
        Ok(None)
    }

    fn abort(&self) -> ! {
        // SAFETY: may be called at any time, and does not return. The lock may be held by a thread that is stuck.
        unsafe { sys::MPI_Abort(self.comm, 1) };
        std::process::abort()
    }
}

fn segments(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(SEGMENT)
}
