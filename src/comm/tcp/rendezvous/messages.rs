//! The final reply of the rendezvous, and streams with a deadline.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{Digest, rendezvous_error, wrongly_given};
use crate::Error;

/// A connection with a deadline, however slowly the bytes arrive.
pub(super) struct Limited<'a> {
    pub stream: &'a mut TcpStream,
    pub until: Instant,
}

impl Limited<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Reads so many bytes. Allocates memory as they arrive: the other side may claim any number.
pub(super) fn read_bytes(stream: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(len as u64).read_to_end(&mut bytes)?;
    if bytes.len() == len { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

pub(super) fn framed(reply: &[u8], digest: Digest) -> Vec<u8> {
    [&(reply.len() as u64).to_le_bytes()[..], reply, &digest].concat()
}

/// The final reply of rank 0: the blobs of all, or an error.
pub(super) fn write_reply(reply: Result<&[Vec<u8>], &Error>) -> Vec<u8> {
    match reply {
        Ok(blobs) => {
            let mut bytes = vec![1];
            for blob in blobs {
                bytes.extend((blob.len() as u64).to_le_bytes());
                bytes.extend(blob);
            }
            bytes
        }
        Err(Error::Transport { problem, .. }) => [&[0], problem.as_bytes()].concat(),
        Err(Error::InvalidArgument { problem, .. }) => [&[2], problem.as_bytes()].concat(),
        Err(_) => [&[0], "the host failed".as_bytes()].concat(),
    }
}

pub(super) fn read_reply(reply: &[u8], count: usize) -> Option<Result<Vec<Vec<u8>>, Error>> {
    let (kind, mut rest) = reply.split_first()?;
    match *kind {
        0 => return Some(Err(rendezvous_error(String::from_utf8_lossy(rest)))),
        2 => return Some(Err(wrongly_given(String::from_utf8_lossy(rest)))),
        _ => {}
    }
    let mut blobs = Vec::new();
    while !rest.is_empty() {
        let (len, after) = rest.split_at_checked(8)?;
        let len = usize::try_from(u64::from_le_bytes(len.try_into().ok()?)).ok()?;
        let (blob, after) = after.split_at_checked(len)?;
        blobs.push(blob.to_vec());
        rest = after;
    }
    (blobs.len() == count).then_some(Ok(blobs))
}
