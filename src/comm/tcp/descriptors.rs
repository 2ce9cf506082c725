//! Reserves file descriptors: each connection takes one, and a process may only open so many.

use std::io;

/// Descriptors that are left to the rest of the program, if possible: data, logs, libraries.
#[cfg(unix)]
const SPARE: usize = 64;

/// Makes sure that this process may open `count` more descriptors: raises the limit for the process (`RLIMIT_NOFILE`)
/// as far as needed, where the system allows.
///
/// # Errors
/// What is needed and what is allowed, in words, if it does not.
#[cfg(unix)]
pub(crate) fn reserve(count: usize, what: &str) -> Result<(), String> {
    let (Some(mut limit), open) = (limit(), open()) else { return Ok(()) };
    let needed = count.saturating_add(open) as libc::rlim_t;
    let (soft, hard) = (limit.rlim_cur, limit.rlim_max);
    let wanted = needed.saturating_add(SPARE as libc::rlim_t).min(hard.max(needed));
    if soft >= wanted {
        return Ok(());
    }
    let refused = |why: String| {
        format!(
            "{what} takes {count} file descriptors in this process, where {open} are open, and the system allows {soft} \
             ({why}); raise the limit to {needed} or more with `ulimit -n`, `LimitNOFILE=` of systemd or `--ulimit nofile=` \
             of docker"
        )
    };
    if hard < needed {
        return Err(refused(format!("RLIMIT_NOFILE, which can be raised to {hard}")));
    }
    limit.rlim_cur = wanted;
    // SAFETY: the limit is there for the call.
    let raised = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0;
    match io::Error::last_os_error() {
        problem if !raised && soft < needed => Err(refused(format!("RLIMIT_NOFILE cannot be raised: {problem}"))),
        _ => {
            log::debug!("{what}: the limit of open files (RLIMIT_NOFILE) was {soft}, {wanted} are wanted");
            Ok(())
        }
    }
}

#[cfg(not(unix))]
pub(crate) fn reserve(_: usize, _: &str) -> Result<(), String> {
    Ok(())
}

/// The explanation of an I/O error, if it is that no more files can be opened.
#[cfg(unix)]
pub(super) fn exhausted(problem: &io::Error) -> Option<String> {
    let advice = match problem.raw_os_error()? {
        libc::EMFILE => {
            let limit = limit().map_or(0, |limit| limit.rlim_cur);
            format!("this process may have {limit} open (RLIMIT_NOFILE); raise that with `ulimit -n`")
        }
        libc::ENFILE => "that is a limit of the machine, fs.file-max".into(),
        _ => return None,
    };
    Some(format!("file descriptors have run out ({problem}): {advice}"))
}

#[cfg(not(unix))]
pub(super) fn exhausted(_: &io::Error) -> Option<String> {
    None
}

#[cfg(unix)]
fn limit() -> Option<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is there for the call.
    (unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0).then_some(limit)
}

/// How many are open.
#[cfg(unix)]
fn open() -> usize {
    // The descriptor that reads the list is in it.
    std::fs::read_dir("/dev/fd").map_or(0, |entries| entries.count().saturating_sub(1))
}
