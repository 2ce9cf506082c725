//! Waiting for connections, and what the system is told about them.

use std::io;
use std::net::TcpStream;
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Ends the rest of another thread, whose message has come to whoever worked the connections.
#[derive(Debug)]
pub(super) struct Alarm {
    #[cfg(unix)]
    ends: (UnixStream, UnixStream),
}

impl Alarm {
    #[cfg(unix)]
    pub fn new() -> io::Result<Self> {
        let ends = UnixStream::pair()?;
        ends.0.set_nonblocking(true)?;
        ends.1.set_nonblocking(true)?;
        Ok(Self { ends })
    }

    #[cfg(not(unix))]
    pub fn new() -> io::Result<Self> {
        Ok(Self {})
    }

    /// Wakes whoever rests.
    pub fn ring(&self) {
        #[cfg(unix)]
        // Full: it is ringing already.
        let _ = io::Write::write(&mut &self.ends.0, &[0]);
    }

    /// As [`ready`], or until the alarm rings.
    #[cfg(unix)]
    pub fn rest(&self, connections: &[(usize, &TcpStream, bool)], longest: Duration) {
        use std::os::fd::AsRawFd;
        let fds = connections.iter().map(|(_, stream, writes)| (stream.as_raw_fd(), *writes));
        let rings =
            poll(fds.chain([(self.ends.1.as_raw_fd(), false)]), longest).last().is_some_and(|fd| fd.revents != 0);
        if rings {
            let _ = io::Read::read(&mut &self.ends.1, &mut [0; 64]);
        }
    }

    #[cfg(not(unix))]
    pub fn rest(&self, _: &[(usize, &TcpStream, bool)], longest: Duration) {
        std::thread::sleep(longest);
    }
}

#[cfg(unix)]
fn poll(fds: impl Iterator<Item = (std::os::fd::RawFd, bool)>, longest: Duration) -> Vec<libc::pollfd> {
    let entry = |(fd, writes)| {
        let events = libc::POLLIN | if writes { libc::POLLOUT } else { 0 };
        libc::pollfd { fd, events, revents: 0 }
    };
    let mut fds: Vec<libc::pollfd> = fds.map(entry).collect();
    let longest = longest.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: as many entries as said, and they outlive the call.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, longest) };
    fds
}

/// Which of the connections can be read, or written if that is wanted. All of them where the system can't tell.
#[cfg(unix)]
pub(super) fn ready(connections: &[(usize, &TcpStream, bool)]) -> Vec<usize> {
    use std::os::fd::AsRawFd;
    let fds = poll(connections.iter().map(|(_, stream, writes)| (stream.as_raw_fd(), *writes)), Duration::ZERO);
    connections.iter().zip(&fds).filter(|(_, fd)| fd.revents != 0).map(|((rank, ..), _)| *rank).collect()
}

#[cfg(not(unix))]
pub(super) fn ready(connections: &[(usize, &TcpStream, bool)]) -> Vec<usize> {
    connections.iter().map(|(rank, ..)| *rank).collect()
}

/// Small messages go at once, nothing blocks, and a silent machine is noticed.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
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
