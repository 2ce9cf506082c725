//! Waiting for connections, and what the system is told about them.

use std::net::TcpStream;
use std::time::Duration;

/// Which of the connections can be read, or written if that is wanted, after `longest` at most. All of them where the
/// system can't tell.
#[cfg(unix)]
pub(super) fn ready(connections: &[(usize, &TcpStream, bool)], longest: Duration) -> Vec<usize> {
    use std::os::fd::AsRawFd;
    let mut fds: Vec<libc::pollfd> = (connections.iter())
        .map(|(_, stream, writes)| {
            let events = libc::POLLIN | if *writes { libc::POLLOUT } else { 0 };
            libc::pollfd { fd: stream.as_raw_fd(), events, revents: 0 }
        })
        .collect();
    let longest = longest.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: as many entries as said, and they outlive the call.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, longest) };
    connections.iter().zip(&fds).filter(|(_, fd)| fd.revents != 0).map(|((rank, ..), _)| *rank).collect()
}

#[cfg(not(unix))]
pub(super) fn ready(connections: &[(usize, &TcpStream, bool)], longest: Duration) -> Vec<usize> {
    std::thread::sleep(longest);
    connections.iter().map(|(rank, ..)| *rank).collect()
}

/// Small messages go at once, nothing blocks, and a silent machine is noticed.
pub(super) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let options = [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 10),
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5),
            (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 4),
            // Milliseconds that what was sent may stay unanswered.
            (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 30_000),
        ];
        for (level, option, value) in options {
            // SAFETY: the value is an int, and outlives the call. A system that does not know the option goes on without.
            unsafe {
                libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), size_of::<i32>() as u32)
            };
        }
    }
    Ok(())
}
