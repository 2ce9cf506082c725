//! The synchronization primitives of the barrier. `tests/loom/local.rs` compiles `event_count.rs` and `barrier.rs`
//! against a module of this name made of loom's primitives, so those two files name nothing else of the crate or of
//! `std::sync`.

pub(super) use std::hint::spin_loop;
pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
pub(super) use std::sync::{Condvar, Mutex};
pub(super) use std::thread::yield_now;

/// A sequentially consistent fence, right after an atomic read-modify-write of this thread. On x86 that instruction is
/// one already, and a second one would take as long as the rest of the barrier of two ranks; only the compiler must be
/// kept from moving anything across. (Linux calls it `smp_mb__after_atomic`.)
pub(super) fn fence_after_rmw() {
    #[cfg(target_arch = "x86_64")]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(target_arch = "x86_64"))]
    fence(Ordering::SeqCst);
}

/// `std::cell::UnsafeCell` with loom's interface.
#[derive(Debug)]
pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(super) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub(super) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    pub(super) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
