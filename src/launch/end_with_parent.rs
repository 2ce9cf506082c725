//! Children that do not outlive this process.

use std::process::Command;

/// Has the kernel kill the child when the thread that starts it ends, and so when this process does, however it ends.
/// On Linux alone.
#[cfg(target_os = "linux")]
pub(crate) fn end_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    let parent = std::process::id();
    // SAFETY: between fork and exec only these two system calls are made, which take no lock and no memory.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            match libc::getppid() as u32 == parent {
                true => Ok(()),
                // The parent died before the kernel knew that this matters.
                false => Err(std::io::ErrorKind::NotFound.into()),
            }
        });
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn end_with_parent(_: &mut Command) {}
