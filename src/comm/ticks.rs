//! Measures time with the time stamp counter of the processor.
//!
//! A collective of a few kilobytes takes less time than two system calls for the clock; the counter costs half as much
//! or less. The length of a tick is computed on demand, from the system clock over all the time since this clock was
//! made, so nothing is calibrated and nothing drifts. Where there is no such counter, or it does not run at one speed
//! on all cores, a tick is a nanosecond of the system clock.

use std::time::{Duration, Instant};

/// A clock that counts ticks from when it was made.
#[derive(Debug)]
pub(crate) struct Ticks {
    began: Instant,
    /// What the counter showed then.
    first: u64,
}

impl Ticks {
    pub fn new() -> Self {
        let (began, first) = together();
        Self { began, first }
    }

    /// Ticks since this was made.
    #[inline]
    pub fn now(&self) -> u64 {
        match counter() {
            Some(now) => now.saturating_sub(self.first),
            None => self.began.elapsed().as_nanos() as u64,
        }
    }

    /// How long so many ticks last.
    pub fn duration(&self, ticks: u64) -> Duration {
        let (now, counted) = together();
        let nanoseconds = match counter() {
            Some(_) => {
                let (passed, counted) = (now.duration_since(self.began).as_nanos(), counted.saturating_sub(self.first));
                (u128::from(ticks) * passed / u128::from(counted.max(1))) as u64
            }
            None => ticks,
        };
        Duration::from_nanos(nanoseconds)
    }
}

/// The time and the counter at one moment: the best of a few tries, as the thread may lose its core between the two.
fn together() -> (Instant, u64) {
    let look = || {
        let before = counter().unwrap_or(0);
        let now = Instant::now();
        let after = counter().unwrap_or(0);
        (after.saturating_sub(before), (now, before + after.saturating_sub(before) / 2))
    };
    let first = look();
    (1..4).map(|_| look()).fold(first, |best, next| if next.0 < best.0 { next } else { best }).1
}

/// The counter of the processor, if it is good for measuring time.
#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> Option<u64> {
    use std::arch::x86_64::{__cpuid, _rdtsc};
    use std::sync::LazyLock;

    // It runs at one speed whatever the core does, says the processor.
    static INVARIANT: LazyLock<bool> = LazyLock::new(|| {
        #[allow(unused_unsafe, reason = "safe in later versions of Rust")]
        // SAFETY: every processor of this architecture has the instruction.
        let leaf = |leaf| unsafe { __cpuid(leaf) };
        leaf(0x8000_0000).eax >= 0x8000_0007 && leaf(0x8000_0007).edx & (1 << 8) != 0
    });
    // SAFETY: every processor of this architecture has the instruction.
    INVARIANT.then(|| unsafe { _rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_worth_the_time_that_passes() {
        let clock = Ticks::new();
        let both = || {
            let (began, first) = (Instant::now(), clock.now());
            std::thread::sleep(Duration::from_millis(50));
            let (counted, passed) = (clock.now() - first, began.elapsed());
            (clock.duration(counted), passed)
        };
        // The thread may lose its core between two readings, but not each time.
        let tried: Vec<_> = (0..5).map(|_| both()).collect();
        let alike = |(worth, passed): &(Duration, Duration)| worth.abs_diff(*passed) < Duration::from_millis(5);
        assert!(tried.iter().any(alike), "by the counter and by the system: {tried:?}");
    }
}
