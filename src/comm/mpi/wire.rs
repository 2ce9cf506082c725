//! MPI itself: messages of bytes between processes, begun now and done later.
//!
//! MPI is the process's, not ours: it is initialised once, and a rank's threads must not all call it as they like. Every
//! call here is one that does not block, under one lock of the process. That asks no more of MPI than
//! `MPI_THREAD_SERIALIZED`, which every MPI gives without loss, and a thread that waits keeps no other from working.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{ptr, thread};

use mpi_sys as sys;

use crate::Error;
use crate::comm::wired::{Ticket, Wire};

/// Bytes of one MPI message: counts are C ints. What is longer goes as several.
const SEGMENT: usize = 1 << 30;

/// MPI, initialised.
#[derive(Debug)]
pub(super) struct Mpi {
    turn: Mutex<()>,
    thread: thread::ThreadId,
    /// Whether it was initialised here, and is to be finalised here.
    ours: bool,
}

// A request is a pointer or a number, as the MPI likes.
const _: () = assert!(size_of::<sys::MPI_Request>() <= 8);

fn ticket(request: sys::MPI_Request) -> Ticket {
    let mut bits = 0u64;
    // SAFETY: there is room, and the bits of a request are initialised.
    unsafe { (&raw mut bits).cast::<sys::MPI_Request>().write_unaligned(request) };
    Ticket(bits)
}

/// The request of a ticket, in its place.
fn request(ticket: &mut Ticket) -> *mut sys::MPI_Request {
    (&raw mut ticket.0).cast()
}

fn check(code: c_int, what: &str) -> Result<(), Error> {
    if code == sys::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; sys::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the buffer is as long as MPI asks for.
    unsafe { sys::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    let text = String::from_utf8_lossy(&text[..(len.max(0) as usize).min(text.len())]).into_owned();
    Err(Error::Engine { engine: "mpi", problem: format!("{what}: {text}") })
}

impl Mpi {
    /// Initialises MPI, or joins whoever has.
    pub fn init() -> Result<Arc<Self>, Error> {
        let problem = |problem: &str| Err(Error::Engine { engine: "mpi", problem: problem.into() });
        let (mut before, mut after, mut provided) = (0, 0, 0);
        // SAFETY: both may be called at any time.
        unsafe {
            check(sys::MPI_Initialized(&mut before), "MPI_Initialized")?;
            check(sys::MPI_Finalized(&mut after), "MPI_Finalized")?;
        }
        if after != 0 {
            return problem("MPI has been finalised in this process, and cannot be initialised a second time");
        }
        // SAFETY: not initialised so far, or initialised and not finalised.
        unsafe {
            if before == 0 {
                let wanted = sys::RSMPI_THREAD_SERIALIZED;
                let code = sys::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), wanted, &mut provided);
                check(code, "MPI_Init_thread")?;
            } else {
                check(sys::MPI_Query_thread(&mut provided), "MPI_Query_thread")?;
            }
            if provided < sys::RSMPI_THREAD_SERIALIZED {
                return problem("this MPI allows one thread only; initialise it with MPI_THREAD_SERIALIZED or more");
            }
        }
        Ok(Arc::new(Self { turn: Mutex::default(), thread: thread::current().id(), ours: before == 0 }))
    }

    /// This process's turn to call MPI.
    pub fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ends MPI, if it was begun here. Waits for all processes.
    pub fn finalize(&self) {
        if self.ours && thread::current().id() == self.thread {
            let _turn = self.turn();
            // SAFETY: initialised here, and finalised once, for whoever owns the session does it last.
            unsafe { sys::MPI_Finalize() };
        }
    }
}

/// All processes of a world, and an MPI communicator of its own to talk to them.
#[derive(Debug)]
pub(super) struct MpiWire {
    mpi: Arc<Mpi>,
    comm: sys::MPI_Comm,
    rank: usize,
    size: usize,
    /// Largest tag.
    tags: u64,
}

// SAFETY: the communicator is used under the lock of the process.
unsafe impl Send for MpiWire {}
unsafe impl Sync for MpiWire {}

impl MpiWire {
    /// A communicator of all processes, made with all of them.
    pub fn new(mpi: Arc<Mpi>, timeout: Duration) -> Result<Self, Error> {
        let (mut rank, mut size) = (0, 0);
        // MPI writes the handle when the communicator is complete: it must be there however this ends.
        let mut comm = Box::new(unsafe { sys::RSMPI_COMM_NULL });
        let mut request = unsafe { sys::RSMPI_REQUEST_NULL };
        let mut bound: *mut c_int = ptr::null_mut();
        let mut has_bound = 0;
        {
            let _turn = mpi.turn();
            // SAFETY: MPI is initialised; the places outlive the calls, `comm` and `request` until the loop below ends.
            unsafe {
                let world = sys::RSMPI_COMM_WORLD;
                check(sys::MPI_Comm_rank(world, &mut rank), "MPI_Comm_rank")?;
                check(sys::MPI_Comm_size(world, &mut size), "MPI_Comm_size")?;
                let place: *mut *mut c_int = &mut bound;
                let key = sys::MPI_TAG_UB as c_int;
                check(sys::MPI_Comm_get_attr(world, key, place.cast(), &mut has_bound), "MPI_Comm_get_attr")?;
                check(sys::MPI_Comm_idup(world, &mut *comm, &mut request), "MPI_Comm_idup")?;
            }
        }
        // SAFETY: MPI keeps the bound as long as it runs.
        let tags = if has_bound != 0 && !bound.is_null() { (unsafe { *bound }) as u64 } else { 32767 };
        let mut wire = Self { mpi, comm: *comm, rank: rank as usize, size: size as usize, tags };
        let since = Instant::now();
        let mut tickets = vec![ticket(request)];
        while !wire.progress(&mut tickets)? {
            if since.elapsed() > timeout {
                Box::leak(comm);
                let problem = format!(
                    "the other ranks did not come to make a world within {timeout:.1?}; raise the limit with \
                     BURN_PARALLEL_TIMEOUT_S if they were only slow"
                );
                return Err(Error::Engine { engine: "mpi", problem });
            }
            thread::sleep(Duration::from_micros(200));
        }
        let comm = *comm;
        wire.comm = comm;
        // SAFETY: the communicator is complete. An error is to come back, not to end the process.
        check(unsafe { sys::MPI_Comm_set_errhandler(comm, sys::RSMPI_ERRORS_RETURN) }, "MPI_Comm_set_errhandler")?;
        Ok(wire)
    }
}

impl Wire for MpiWire {
    fn engine(&self) -> &'static str {
        "mpi"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn tags(&self) -> u64 {
        self.tags
    }

    unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        let _turn = self.mpi.turn();
        for start in segments(len) {
            let mut request = unsafe { sys::RSMPI_REQUEST_NULL };
            let count = SEGMENT.min(len - start) as c_int;
            // SAFETY: passed on.
            let code = unsafe {
                let data = data.add(start).cast::<c_void>();
                sys::MPI_Isend(data, count, sys::RSMPI_UINT8_T, to as c_int, tag as c_int, self.comm, &mut request)
            };
            check(code, "MPI_Isend")?;
            tickets.push(ticket(request));
        }
        Ok(())
    }

    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        let _turn = self.mpi.turn();
        for start in segments(len) {
            let mut request = unsafe { sys::RSMPI_REQUEST_NULL };
            let count = SEGMENT.min(len - start) as c_int;
            // SAFETY: passed on.
            let code = unsafe {
                let data = data.add(start).cast::<c_void>();
                sys::MPI_Irecv(data, count, sys::RSMPI_UINT8_T, from as c_int, tag as c_int, self.comm, &mut request)
            };
            check(code, "MPI_Irecv")?;
            tickets.push(ticket(request));
        }
        Ok(())
    }

    fn progress(&self, tickets: &mut Vec<Ticket>) -> Result<bool, Error> {
        if tickets.is_empty() {
            return Ok(true);
        }
        let _turn = self.mpi.turn();
        let mut place = 0;
        while place < tickets.len() {
            let mut done = 0;
            // SAFETY: the request is of this MPI and not done so far.
            let code = unsafe { sys::MPI_Test(request(&mut tickets[place]), &mut done, sys::RSMPI_STATUS_IGNORE) };
            check(code, "MPI_Test")?;
            if done != 0 {
                tickets.swap_remove(place);
            } else {
                place += 1;
            }
        }
        Ok(tickets.is_empty())
    }

    fn cancel(&self, tickets: &mut Vec<Ticket>) {
        let _turn = self.mpi.turn();
        for mut ticket in tickets.drain(..) {
            // SAFETY: the request is of this MPI and not done; a receive that is cancelled ends without the other side.
            unsafe {
                sys::MPI_Cancel(request(&mut ticket));
                sys::MPI_Wait(request(&mut ticket), sys::RSMPI_STATUS_IGNORE);
            }
        }
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let _turn = self.mpi.turn();
        // SAFETY: the places outlive the calls. What is received has come: the call does not wait for anybody's code.
        unsafe {
            let mut status: sys::MPI_Status = std::mem::zeroed();
            let mut message = sys::RSMPI_MESSAGE_NULL;
            let (mut found, mut count) = (0, 0);
            let source = from.map_or(sys::RSMPI_ANY_SOURCE, |from| from as c_int);
            let code = sys::MPI_Improbe(source, tag as c_int, self.comm, &mut found, &mut message, &mut status);
            check(code, "MPI_Improbe")?;
            if found == 0 {
                return Ok(None);
            }
            check(sys::MPI_Get_count(&status, sys::RSMPI_UINT8_T, &mut count), "MPI_Get_count")?;
            let mut bytes = vec![0u8; count.max(0) as usize];
            let place = bytes.as_mut_ptr().cast();
            let ignore = sys::RSMPI_STATUS_IGNORE;
            check(sys::MPI_Mrecv(place, count, sys::RSMPI_UINT8_T, &mut message, ignore), "MPI_Mrecv")?;
            Ok(Some((status.MPI_SOURCE as usize, bytes)))
        }
    }

    fn gives_back(&self) -> bool {
        false
    }

    fn withdraw(&self, _: &mut Vec<Ticket>) {
        unreachable!("MPI does not give back");
    }

    fn rest(&self, longest: Duration) {
        thread::sleep(longest);
    }

    fn wakes(&self) -> bool {
        false
    }

    fn shares_memory(&self) -> bool {
        true
    }

    fn lost(&self) -> Vec<(usize, String)> {
        // The launcher notices.
        Vec::new()
    }

    fn close(&self, _: Duration) {}

    fn abort(&self) -> ! {
        // SAFETY: may be called at any time, and does not return. The lock may be held by a thread that is stuck.
        unsafe { sys::MPI_Abort(self.comm, 1) };
        std::process::abort()
    }
}

fn segments(len: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(SEGMENT)
}
