//! Points at which the tests end a process in the middle of a save, or do something in the midst of a read.

/// The program comes here.
#[cfg(not(test))]
pub(crate) fn point(_: &str) {}

/// What a test does when its thread comes to a point.
#[cfg(test)]
type Deed = Box<dyn FnMut()>;

#[cfg(test)]
thread_local! {
    static AT: std::cell::RefCell<Option<(&'static str, Deed)>> = const { std::cell::RefCell::new(None) };
}

/// Has this thread do something each time that it comes to a point.
#[cfg(test)]
pub(crate) fn at(name: &'static str, deed: impl FnMut() + 'static) {
    AT.set(Some((name, Box::new(deed))));
}

/// Ends the process, as `kill -9` does, at the point that `BURN_PARALLEL_TEST_KILL` names.
#[cfg(test)]
pub(crate) fn point(name: &str) {
    AT.with_borrow_mut(|at| {
        if let Some((_, deed)) = at.as_mut().filter(|(wanted, _)| *wanted == name) {
            deed();
        }
    });
    if std::env::var(VARIABLE).is_ok_and(|wanted| wanted == name) {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        // The signal may come a moment later.
        std::thread::sleep(std::time::Duration::from_secs(10));
    }
    if std::env::var(STALL).is_ok_and(|wanted| wanted == name) {
        let ms = std::env::var(STALL_MS).ok().and_then(|ms| ms.parse().ok()).unwrap_or(600_000);
        std::thread::sleep(std::time::Duration::from_millis(ms));
    }
}

/// Names a point at which the disk does not answer any more, or not for so many ms.
#[cfg(test)]
pub(crate) const STALL: &str = "BURN_PARALLEL_TEST_STALL";
#[cfg(test)]
pub(crate) const STALL_MS: &str = "BURN_PARALLEL_TEST_STALL_MS";

#[cfg(test)]
pub(crate) const VARIABLE: &str = "BURN_PARALLEL_TEST_KILL";

/// Whether names are exchanged in two steps, as on a system that has no other way.
#[cfg(all(target_os = "linux", not(test)))]
pub(super) fn cannot_exchange() -> bool {
    false
}

#[cfg(all(target_os = "linux", test))]
pub(super) fn cannot_exchange() -> bool {
    std::env::var_os(NO_EXCHANGE).is_some()
}

#[cfg(test)]
pub(crate) const NO_EXCHANGE: &str = "BURN_PARALLEL_TEST_NO_EXCHANGE";
