//! Loops compiled for the vectors that the machine has.

/// What is to be compiled several times: a closure, if it is so small that it is inlined anyway; else a type whose
/// `run` is `#[inline(always)]`.
pub(crate) trait Loops {
    fn run(self);
}

impl<F: FnOnce()> Loops for F {
    #[inline(always)]
    fn run(self) {
        self();
    }
}

/// Runs `work` as compiled for the widest vectors of this machine. Each element is computed by itself and nothing is
/// contracted, so the width changes no bit of a result.
#[inline(always)]
pub(crate) fn vectorized(work: impl Loops) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512(work: impl Loops) {
            work.run();
        }
        #[target_feature(enable = "avx2")]
        fn avx2(work: impl Loops) {
            work.run();
        }
        let bits_512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        // SAFETY: the features have just been detected.
        unsafe {
            if bits_512 {
                return avx512(work);
            }
            if is_x86_feature_detected!("avx2") {
                return avx2(work);
            }
        }
    }
    work.run();
}
