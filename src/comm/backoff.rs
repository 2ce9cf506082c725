//! The backoff of a thread that waits for peers: it spins, then yields its core, then sleeps.

/// How often a thread polls before it sleeps. Spinning wins microseconds when every rank has a core of its own, and
/// takes the core of the very rank that is waited for when it has not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backoff {
    /// Polls with a pause of the processor behind them.
    pub spins: u32,
    /// Polls after these, each of which yields the core.
    pub yields: u32,
}

/// What a thread does after a poll without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pause {
    Spin,
    Yield,
    Sleep,
}

impl Backoff {
    /// Sleeps at once.
    pub const SLEEP: Self = Self { spins: 0, yields: 0 };

    /// The pause after `polls` earlier ones.
    #[inline]
    pub fn pause(self, polls: u32) -> Pause {
        if polls < self.spins {
            Pause::Spin
        } else if polls - self.spins < self.yields {
            Pause::Yield
        } else {
            Pause::Sleep
        }
    }
}
