//! Copies with non-temporal stores, for data that another core reads next.
//!
//! A cache line that another core has read has to be fetched back from it before it can be written again, one by one:
//! where cores share no cache, that is ten times slower than memory. So slots are written past the caches, and read
//! from memory.

/// Copies `len` bytes to memory that another core will read. All of it is visible before whatever this thread stores
/// next.
///
/// # Safety
/// As of [`std::ptr::copy_nonoverlapping`].
pub(in crate::comm::message_passing) unsafe fn copy_out(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        let head = to.align_offset(64).min(len);
        let lines = (len - head) / 64;
        let tail = head + 64 * lines;
        // SAFETY: passed on; the features have been looked for.
        unsafe {
            from.copy_to_nonoverlapping(to, head);
            match is_x86_feature_detected!("avx512f") {
                true => x86_64::lines_512(from.add(head), to.add(head), lines),
                false => x86_64::lines_128(from.add(head), to.add(head), lines),
            }
            from.add(tail).copy_to_nonoverlapping(to.add(tail), len - tail);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: passed on.
    unsafe {
        from.copy_to_nonoverlapping(to, len);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::*;

    /// Copies cache lines. `to` is aligned to one.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn lines_512(from: *const u8, to: *mut u8, lines: usize) {
        for line in 0..lines {
            // SAFETY: within what is copied.
            unsafe { _mm512_stream_si512(to.add(64 * line).cast(), _mm512_loadu_si512(from.add(64 * line).cast())) };
        }
        // Non-temporal stores are not ordered with others without this.
        _mm_sfence();
    }

    /// The same on any processor.
    pub unsafe fn lines_128(from: *const u8, to: *mut u8, lines: usize) {
        for part in 0..4 * lines {
            // SAFETY: within what is copied.
            unsafe { _mm_stream_si128(to.add(16 * part).cast(), _mm_loadu_si128(from.add(16 * part).cast())) };
        }
        // SAFETY: as above.
        unsafe { _mm_sfence() };
    }
}

#[cfg(test)]
mod tests {
    use super::copy_out;

    #[test]
    fn all_bytes_and_no_others_are_copied() {
        let from: Vec<u8> = (0..1000).map(|place| place as u8 | 1).collect();
        for (start, len) in [(0, 0), (3, 1), (60, 10), (0, 64), (64, 128), (1, 700), (17, 63), (64, 640)] {
            let mut to = vec![0u8; 1100];
            // SAFETY: within both.
            unsafe { copy_out(from.as_ptr().add(start), to.as_mut_ptr().add(start + 5), len) };
            let expected: Vec<u8> = (0..1100)
                .map(|place| if (start + 5..start + 5 + len).contains(&place) { from[place - 5] } else { 0 })
                .collect();
            assert_eq!(to, expected, "{len} bytes from {start}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_processor_without_wide_vectors_copies_the_same() {
        #[repr(align(64))]
        struct Lines([u8; 256]);
        let (from, mut to) = (std::array::from_fn::<u8, 257, _>(|place| place as u8), Lines([0; 256]));
        // SAFETY: within both.
        unsafe { super::x86_64::lines_128(from.as_ptr().add(1), to.0.as_mut_ptr(), 4) };
        assert_eq!(to.0, from[1..]);
    }
}
