//! Loops compiled for the vectors that the machine has.

use pulp::{Arch, NullaryFnOnce};

/// Runs `work` as compiled for the widest vectors of this machine. Each element is computed by itself and nothing is
/// contracted, so the width changes no bit of a result.
///
/// `work` is compiled several times: a closure, if it is so small that it is inlined anyway; else a type whose `call`
/// is `#[inline(always)]`.
#[inline(always)]
pub(crate) fn vectorized<W: NullaryFnOnce>(work: W) -> W::Output {
    Arch::new().dispatch(work)
}
