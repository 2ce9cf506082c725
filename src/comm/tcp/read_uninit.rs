//! Reads from a stream into uninitialised memory.
//!
//! `std` reads into slices, and there is no slice of uninitialised memory; writing zeros to a tensor before it is
//! received costs a pass over it. The system calls take an address.

use std::io::{self, Read};
use std::net::TcpStream;

/// A stream that can read into uninitialised memory.
pub(super) trait ReadUninit: Read {
    /// Reads what has arrived into `len` bytes at `place`, and what is left over into `rest`. Returns how many bytes
    /// were read.
    ///
    /// # Safety
    /// `len` bytes may be written, and `rest` is somewhere else.
    unsafe fn read_uninit(&mut self, place: *mut u8, len: usize, rest: &mut [u8]) -> io::Result<usize> {
        let most = rest.len().min(len);
        let n = self.read(&mut rest[..most])?.min(most);
        // SAFETY: passed on.
        unsafe { place.copy_from_nonoverlapping(rest.as_ptr(), n) };
        Ok(n)
    }
}

#[cfg(not(unix))]
impl ReadUninit for TcpStream {}

#[cfg(unix)]
impl ReadUninit for TcpStream {
    unsafe fn read_uninit(&mut self, place: *mut u8, len: usize, rest: &mut [u8]) -> io::Result<usize> {
        use std::os::fd::AsRawFd;
        let places = [(place, len), (rest.as_mut_ptr(), rest.len())];
        let places = places.map(|(base, len)| libc::iovec { iov_base: base.cast(), iov_len: len });
        // SAFETY: both may be written, and outlive the call.
        let n = unsafe { libc::readv(self.as_raw_fd(), places.as_ptr(), 2) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::Write;
    use std::mem::MaybeUninit;
    use std::net::TcpListener;

    use super::*;

    impl ReadUninit for VecDeque<u8> {}

    /// Reads five uninitialised bytes, and some beyond. Returns all.
    fn filled(stream: &mut impl ReadUninit) -> Vec<u8> {
        let (mut place, mut rest, mut came) = ([MaybeUninit::<u8>::uninit(); 5], [0; 4], 0);
        while came < 8 {
            if came < 5 {
                // SAFETY: within the place.
                let n = unsafe { stream.read_uninit(place[came..].as_mut_ptr().cast(), 5 - came, &mut rest) }.unwrap();
                came += n;
                assert!(n > 0);
            } else {
                came += stream.read(&mut rest[came - 5..]).unwrap();
            }
        }
        // SAFETY: all of it has been written.
        place.map(|byte| unsafe { byte.assume_init() }).into_iter().chain(rest).take(8).collect()
    }

    #[test]
    fn a_place_is_filled_before_what_is_behind_it() {
        let all: Vec<u8> = (1..=8).collect();
        assert_eq!(filled(&mut VecDeque::from(all.clone())), all);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut stream = listener.accept().unwrap().0;
        other.write_all(&all).unwrap();
        assert_eq!(filled(&mut stream), all);
        drop(other);
        // SAFETY: no bytes.
        assert_eq!(unsafe { stream.read_uninit([0u8; 1].as_mut_ptr(), 0, &mut [0]) }.unwrap(), 0, "the end");
    }
}
