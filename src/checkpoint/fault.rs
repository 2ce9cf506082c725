//! Points at which the tests end a process in the middle of a save.

/// The program comes here in a save.
#[cfg(not(test))]
pub(super) fn point(_: &str) {}

/// Ends the process, as `kill -9` does, at the point that `BURN_PARALLEL_TEST_KILL` names.
#[cfg(test)]
pub(super) fn point(name: &str) {
    if std::env::var(VARIABLE).is_ok_and(|wanted| wanted == name) {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        // The signal may come a moment later.
        std::thread::sleep(std::time::Duration::from_secs(10));
    }
}

#[cfg(test)]
pub(super) const VARIABLE: &str = "BURN_PARALLEL_TEST_KILL";

/// All points, in their order.
#[cfg(test)]
pub(super) const POINTS: [&str; 7] =
    ["planned", "draft made", "half written", "tensors written", "index written", "committed", "removing"];
