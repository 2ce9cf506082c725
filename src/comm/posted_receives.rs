//! The posted receives of a rank: a thread fetches their messages as they arrive, while the rank computes.
//!
//! The thread polls for posted receives; it matches a message under the lock, so that a thread which receives one of
//! that key itself knows whether the oldest is still to arrive, being fetched, or here. What a thread receives itself
//! is left alone until it has it: whoever asks first gets the oldest. The fetching thread sleeps while no receive is
//! posted, and polls less often the longer nothing arrives.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::lock::lock;

/// How often it polls: at first, and when nothing has arrived for a while.
const SOON: Duration = Duration::from_micros(20);
const LATER: Duration = Duration::from_millis(1);

/// Sending rank and tag.
pub(super) type SourceAndTag = (usize, u64);

/// The posted receives, and the messages that have been fetched for them.
pub(super) struct PostedReceives<T> {
    state: Mutex<PostedState<T>>,
    condvar: Condvar,
}

struct PostedState<T> {
    /// How many of each are still to be fetched.
    wanted: BTreeMap<SourceAndTag, usize>,
    /// Being fetched just now.
    fetching: Option<SourceAndTag>,
    /// How many of each a thread is receiving itself.
    asked: BTreeMap<SourceAndTag, usize>,
    /// Fetched messages, the oldest first.
    fetched: BTreeMap<SourceAndTag, VecDeque<T>>,
    /// Whether there is a thread that fetches.
    served: bool,
    /// Nothing is fetched any more.
    closed: bool,
}

impl<T> Default for PostedReceives<T> {
    fn default() -> Self {
        let (wanted, asked, fetched) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let state = PostedState { wanted, fetching: None, asked, fetched, served: false, closed: false };
        Self { state: Mutex::new(state), condvar: Condvar::new() }
    }
}

/// The result of asking for a message.
pub(super) enum Asked<'a, T> {
    /// The oldest.
    Fetched(T),
    /// It has not arrived: the caller receives it itself, and holds this until it has it.
    NotYet(FetchTurn<'a, T>),
    /// It has arrived, but was not fetched within the limit. Another must not be received in its place.
    Late,
}

/// Nothing of this kind is fetched meanwhile.
pub(super) struct FetchTurn<'a, T> {
    posted: &'a PostedReceives<T>,
    key: SourceAndTag,
}

impl<T> Drop for FetchTurn<'_, T> {
    fn drop(&mut self) {
        less(&mut self.posted.lock().asked, self.key);
        self.posted.condvar.notify_all();
    }
}

impl<T> PostedReceives<T> {
    fn lock(&self) -> MutexGuard<'_, PostedState<T>> {
        lock(&self.state)
    }

    /// Posts one more receive of this key. Returns whether a thread must be started that [serves](Self::serve) them.
    pub fn expect(&self, key: SourceAndTag) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        *state.wanted.entry(key).or_default() += 1;
        self.condvar.notify_all();
        !std::mem::replace(&mut state.served, true)
    }

    /// The oldest message of this key, if it is here or being fetched, for which nobody waits longer than `limit`. If
    /// not, one posted receive is removed.
    pub fn take(&self, key: SourceAndTag, limit: Duration) -> Asked<'_, T> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(oldest) = state.fetched.get_mut(&key).and_then(VecDeque::pop_front) {
                return Asked::Fetched(oldest);
            }
            if state.fetching != Some(key) {
                less(&mut state.wanted, key);
                *state.asked.entry(key).or_default() += 1;
                return Asked::NotYet(FetchTurn { posted: self, key });
            }
            let Some(left) = limit.checked_sub(began.elapsed()) else { return Asked::Late };
            state = self.condvar.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Fetches nothing more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.condvar.notify_all();
    }

    /// Fetches the messages of the posted receives, until it is closed or something fails. `look` takes a message if it
    /// has arrived, and does not wait for it.
    pub fn serve<M, E>(
        &self,
        mut look: impl FnMut(SourceAndTag) -> Result<Option<M>, E>,
        mut fetch: impl FnMut(SourceAndTag, M) -> Result<T, E>,
    ) -> Result<(), E> {
        let outcome = self.serve_until(&mut look, &mut fetch);
        self.close();
        outcome
    }

    fn serve_until<M, E>(
        &self,
        look: &mut dyn FnMut(SourceAndTag) -> Result<Option<M>, E>,
        fetch: &mut dyn FnMut(SourceAndTag, M) -> Result<T, E>,
    ) -> Result<(), E> {
        let mut pause = SOON;
        let mut state = self.lock();
        while !state.closed {
            let mut come = None;
            for key in state.wanted.keys().filter(|key| !state.asked.contains_key(key)) {
                if let Some(message) = look(*key)? {
                    come = Some((*key, message));
                    break;
                }
            }
            let Some((key, message)) = come else {
                let idle = state.wanted.keys().all(|key| state.asked.contains_key(key));
                state = match idle {
                    true => self.condvar.wait(state).unwrap_or_else(PoisonError::into_inner),
                    false => self.condvar.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0,
                };
                pause = if idle { SOON } else { (pause * 2).min(LATER) };
                continue;
            };
            less(&mut state.wanted, key);
            state.fetching = Some(key);
            drop(state);
            let fetched = fetch(key, message);
            state = self.lock();
            state.fetching = None;
            state.fetched.entry(key).or_default().push_back(fetched?);
            self.condvar.notify_all();
            pause = SOON;
        }
        Ok(())
    }
}

fn less(counts: &mut BTreeMap<SourceAndTag, usize>, key: SourceAndTag) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests;
