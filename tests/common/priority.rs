//! Which threads come first where a device and its ranks need the same processors.
#![allow(dead_code, reason = "each test binary uses the part that it needs")]

/// Lowers the priority of the threads that this thread starts from here on, as those of ranks are. Those of a device
/// that was used before keep theirs: on a software device they do most of the work, while a rank that finds CubeCL's
/// queue full, behind a kernel that is being compiled, spins for long before it sleeps.
pub fn ranks_come_last() {
    #[cfg(target_os = "linux")]
    // SAFETY: no memory is involved. On Linux this concerns the thread that calls it, and those that it starts.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 10);
    }
}
