//! Memory that processes of one machine share: an anonymous file, mapped by all.
//!
//! The file has no name (`memfd_create`) and the others open it through `/proc`: nothing is left behind, however the
//! processes end. Where there is no such thing, or a process may not look at another, there is no shared memory, and
//! ranks agree by messages.
//!
//! A process that maps a file which is then truncated is killed by a signal (SIGBUS) when it touches what is gone. So
//! the file is sealed before it is mapped: neither it nor another process can change its length any more, and a file
//! that is not sealed is not mapped.

use std::fmt;
use std::fs::{self, File};
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

/// The length is fixed, and nobody can change that.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// How another process finds a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::comm::message_passing) struct Address {
    /// The machine and its process namespace, by a hash.
    machine: u64,
    process: u32,
    file: u32,
    /// A random number that is written at the beginning.
    seal: u64,
}

impl Address {
    pub const BYTES: usize = 24;

    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let words = [self.machine, u64::from(self.process) << 32 | u64::from(self.file), self.seal];
        let mut bytes = [0; Self::BYTES];
        bytes.chunks_exact_mut(8).zip(words).for_each(|(target, word)| target.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// `None` if nothing is offered.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        let (machine, descriptor, seal) = (words.next()?, words.next()?, words.next()?);
        (seal != 0).then_some(Self { machine, process: (descriptor >> 32) as u32, file: descriptor as u32, seal })
    }
}

/// A mapping, zeroed when it is new. Its first word is the seal.
pub(super) struct SharedMapping {
    data: NonNull<u8>,
    len: usize,
    /// In the process that made it, until all have opened it.
    file: Option<OwnedFd>,
}

// SAFETY: plain memory; whoever uses it keeps order.
unsafe impl Send for SharedMapping {}
unsafe impl Sync for SharedMapping {}

impl fmt::Debug for SharedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMapping").field("len", &self.len).finish_non_exhaustive()
    }
}

impl SharedMapping {
    /// Bytes of the seal and its padding, before the usable memory.
    pub const SEAL: usize = 128;

    pub fn create(len: usize) -> Option<(Self, Address)> {
        // SAFETY: the name ends with 0; what is returned is a new file, or none.
        let file = unsafe {
            let fd = libc::memfd_create(c"burn-parallel".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))?
        };
        // Pages that cannot be allocated at the first write would kill the process.
        if unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len as libc::off_t) } != 0 {
            return None;
        }
        // SAFETY: the file is ours.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } != 0 {
            return None;
        }
        let machine = machine()?;
        let seal = RandomState::new().hash_one(std::process::id()).max(1);
        let address = Address { machine, process: std::process::id(), file: file.as_raw_fd() as u32, seal };
        let mut mapping = Self::map(&address_path(&address), len)?;
        mapping.file = Some(file);
        mapping.seal().store(seal, Ordering::Release);
        Some((mapping, address))
    }

    pub fn open(address: &Address, len: usize) -> Option<Self> {
        // On another machine the same path may lead to something else.
        if machine()? != address.machine {
            return None;
        }
        Self::map(&address_path(address), len).filter(|mapping| mapping.seal().load(Ordering::Acquire) == address.seal)
    }

    fn map(path: &str, len: usize) -> Option<Self> {
        let file = File::options().read(true).write(true).open(path).ok()?;
        // SAFETY: asks about a file that is open; one that has no seals is refused.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & SEALS != SEALS {
            return None;
        }
        // From here on its length is fixed.
        let found = file.metadata().ok()?;
        if !found.is_file() || found.size() != len as u64 {
            return None;
        }
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping, of a file that is as long.
        let data = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, file.as_raw_fd(), 0) };
        (data != libc::MAP_FAILED).then_some(data.cast()).and_then(NonNull::new).map(|data| Self {
            data,
            len,
            file: None,
        })
    }

    fn seal(&self) -> &AtomicU64 {
        // SAFETY: the mapping begins with it, and is aligned to a page.
        unsafe { self.data.cast().as_ref() }
    }

    /// All have opened it: closes the file.
    pub fn all_opened(&mut self) {
        self.file = None;
    }

    pub fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.len);
        // SAFETY: within the mapping, as its users lay it out.
        unsafe { self.data.as_ptr().add(offset) }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is our own, and nobody borrows it any more.
        unsafe { libc::munmap(self.data.as_ptr().cast(), self.len) };
    }
}

fn address_path(address: &Address) -> String {
    format!("/proc/{}/fd/{}", address.process, address.file)
}

/// A hash that is equal for processes of one process namespace, and in all likelihood for no others.
fn machine() -> Option<u64> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let processes = fs::read_link("/proc/self/ns/pid").ok()?;
    let mut hasher = DefaultHasher::new();
    (boot, processes).hash(&mut hasher);
    Some(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 1 << 16;

    /// The file as a peer finds it.
    fn opened(address: &Address) -> File {
        File::options().read(true).write(true).open(address_path(address)).unwrap()
    }

    #[test]
    fn nobody_can_cut_off_what_others_have_mapped() {
        // Not every machine lets processes share memory.
        let Some((mapping, address)) = SharedMapping::create(LEN) else { return };
        let peer = SharedMapping::open(&address, LEN).unwrap();
        let file = opened(&address);
        assert!(file.set_len(0).is_err() && file.set_len(2 * LEN as u64).is_err());
        // SAFETY: within the mapping.
        unsafe {
            mapping.at(LEN - 1).write(7);
            assert_eq!(peer.at(LEN - 1).read(), 7);
        }
    }

    #[test]
    fn what_could_be_cut_off_is_not_mapped() {
        // SAFETY: the name ends with 0; what is returned is a new file, or none.
        let file = unsafe {
            let fd = libc::memfd_create(c"a peer's".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            if fd < 0 {
                return;
            }
            File::from(OwnedFd::from_raw_fd(fd))
        };
        file.set_len(LEN as u64).unwrap();
        let Some(machine) = machine() else { return };
        let address = Address { machine, process: std::process::id(), file: file.as_raw_fd() as u32, seal: 5 };
        std::os::unix::fs::FileExt::write_at(&file, &5u64.to_le_bytes(), 0).unwrap();
        assert!(SharedMapping::open(&address, LEN).is_none(), "it is as long as it should be, and bears the number");
        // SAFETY: the file is ours.
        assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) }, 0);
        assert!(SharedMapping::open(&address, LEN).is_some());
        assert!(SharedMapping::open(&address, LEN / 2).is_none());
    }
}
