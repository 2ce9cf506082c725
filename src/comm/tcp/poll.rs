//! Waits for sockets with `poll`, and sets their options.

use std::io;
use std::net::TcpStream;
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Wakes a parked thread whose message another thread has received.
#[derive(Debug)]
pub(super) struct Waker {
    #[cfg(unix)]
    ends: (UnixStream, UnixStream),
}

impl Waker {
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

    /// Wakes the parked threads.
    pub fn wake(&self) {
        #[cfg(unix)]
        // Full: it has been woken already.
        let _ = io::Write::write(&mut &self.ends.0, &[0]);
    }

    /// As [`ready`], but blocks until a stream is ready or the waker is used.
    #[cfg(unix)]
    pub fn park(&self, connections: &[(usize, &TcpStream, bool)], longest: Duration) {
        use std::os::fd::AsRawFd;
        let fds = connections.iter().map(|(_, stream, writes)| (stream.as_raw_fd(), *writes));
        let woken =
            poll(fds.chain([(self.ends.1.as_raw_fd(), false)]), longest).last().is_some_and(|fd| fd.revents != 0);
        if woken {
            let _ = io::Read::read(&mut &self.ends.1, &mut [0; 64]);
        }
    }

    #[cfg(not(unix))]
    pub fn park(&self, _: &[(usize, &TcpStream, bool)], longest: Duration) {
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

/// Which of the connections are readable, or writable if that is wanted. All of them where the system cannot tell.
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

/// Sets the options of a socket: no delay, non-blocking, and keep-alive to notice a silent machine.
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
            // Milliseconds that sent data may stay unacknowledged.
            (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 30_000),
        ];
        for (level, option, value) in options {
            // SAFETY: the value is an int, and outlives the call. A system that does not know the option goes on
            // without.
            unsafe {
                libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), size_of::<i32>() as u32)
            };
        }
    }
    Ok(())
}
