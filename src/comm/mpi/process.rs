//! MPI in this process: initialised once, and called under one lock.
//!
//! The lock asks no more of MPI than `MPI_THREAD_SERIALIZED`, which every MPI gives without loss.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard};
use std::{ptr, thread};

use mpi_sys as sys;

use crate::Error;
use crate::lock::lock;

/// MPI, initialised.
#[derive(Debug)]
pub(super) struct Mpi {
    calls: Mutex<()>,
    thread: thread::ThreadId,
    /// Whether it was initialised here, and is to be finalised here.
    ours: bool,
}

impl Mpi {
    /// Initialises MPI, or uses it if it is initialised already.
    pub fn init() -> Result<Arc<Self>, Error> {
        let problem = |problem: &str| Err(Error::Transport { transport: "mpi", problem: problem.into() });
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
        Ok(Arc::new(Self { calls: Mutex::default(), thread: thread::current().id(), ours: before == 0 }))
    }

    /// Locks MPI for the calls of this thread.
    pub fn lock(&self) -> MutexGuard<'_, ()> {
        lock(&self.calls)
    }

    /// Finalises MPI, if it was initialised here. Waits for all processes.
    pub fn finalize(&self) {
        if self.ours && thread::current().id() == self.thread {
            let _locked = self.lock();
            // SAFETY: initialised here, and finalised once, for whoever owns the session does it last.
            unsafe { sys::MPI_Finalize() };
        }
    }
}

/// The error of a call of this name, if there was one.
pub(super) fn check(code: c_int, what: &str) -> Result<(), Error> {
    if code == sys::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; sys::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the buffer is as long as MPI asks for.
    unsafe { sys::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    let text = String::from_utf8_lossy(&text[..(len.max(0) as usize).min(text.len())]).into_owned();
    Err(Error::Transport { transport: "mpi", problem: format!("{what}: {text}") })
}
