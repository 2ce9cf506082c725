//! Time in seconds: that has passed, and that a thread or all threads of this process have had of the processors.

use std::sync::LazyLock;
use std::time::Instant;

pub fn passed() -> f64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGAN.elapsed().as_secs_f64()
}

/// Of this thread; not a number where the system has no such clock.
#[cfg(unix)]
pub fn of_thread() -> f64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Of all threads of this process; not a number where the system has no such clock.
#[cfg(unix)]
pub fn of_process() -> f64 {
    read(libc::CLOCK_PROCESS_CPUTIME_ID)
}

#[cfg(unix)]
fn read(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid `timespec`, which the call fills.
    let code = unsafe { libc::clock_gettime(clock, &mut time) };
    if code == 0 { time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64 } else { f64::NAN }
}

#[cfg(not(unix))]
pub fn of_thread() -> f64 {
    f64::NAN
}

#[cfg(not(unix))]
pub fn of_process() -> f64 {
    f64::NAN
}
