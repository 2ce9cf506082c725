//! What a rank will ask for: fetched by a thread of its own as it comes, while the rank computes.
//!
//! The thread looks for what is expected; it sees and takes a message under the lock, so that whoever asks for one of that kind
//! himself knows whether the oldest is still to come, on its way, or here. What somebody receives himself it leaves alone until
//! he has it: whoever asks first gets the oldest. It sleeps while nothing is expected, and looks less often the longer nothing
//! comes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often it is looked: at first, and when nothing has come for a while.
const SOON: Duration = Duration::from_micros(20);
const LATER: Duration = Duration::from_millis(1);

/// Sending rank and tag.
pub(super) type Key = (usize, u64);

/// Messages that will be asked for, and those of them that are here.
pub(super) struct Expected<T> {
    state: Mutex<State<T>>,
    bell: Condvar,
}

struct State<T> {
    /// How many of each are still to be fetched.
    wanted: BTreeMap<Key, usize>,
    /// Being fetched just now.
    fetching: Option<Key>,
    /// How many of each somebody is receiving himself.
    asked: BTreeMap<Key, usize>,
    /// What is here, the oldest first.
    here: BTreeMap<Key, VecDeque<T>>,
    /// Whether there is a thread that fetches.
    served: bool,
    /// Nothing is fetched any more.
    closed: bool,
}

impl<T> Default for Expected<T> {
    fn default() -> Self {
        let (wanted, asked, here) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let state = State { wanted, fetching: None, asked, here, served: false, closed: false };
        Self { state: Mutex::new(state), bell: Condvar::new() }
    }
}

/// What becomes of asking for a message.
pub(super) enum Asked<'a, T> {
    /// The oldest.
    Fetched(T),
    /// It has not come: whoever asks receives it himself, and holds this until he has it.
    NotYet(Turn<'a, T>),
    /// It has come, but is not here within the limit. Another must not be received in its place.
    Late,
}

/// Nothing of this kind is fetched meanwhile.
pub(super) struct Turn<'a, T> {
    expected: &'a Expected<T>,
    key: Key,
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        less(&mut self.expected.lock().asked, self.key);
        self.expected.bell.notify_all();
    }
}

impl<T> Expected<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that one more message of this kind will be asked for. Returns whether a thread must be started that
    /// [serves](Self::serve).
    pub fn expect(&self, key: Key) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        *state.wanted.entry(key).or_default() += 1;
        self.bell.notify_all();
        !std::mem::replace(&mut state.served, true)
    }

    /// The oldest message of this kind, if it is here or on its way, for which nobody waits longer than `limit`. If not, one
    /// less is expected.
    pub fn take(&self, key: Key, limit: Duration) -> Asked<'_, T> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(oldest) = state.here.get_mut(&key).and_then(VecDeque::pop_front) {
                return Asked::Fetched(oldest);
            }
            if state.fetching != Some(key) {
                less(&mut state.wanted, key);
                *state.asked.entry(key).or_default() += 1;
                return Asked::NotYet(Turn { expected: self, key });
            }
            let Some(left) = limit.checked_sub(began.elapsed()) else { return Asked::Late };
            state = self.bell.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Fetches nothing more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.bell.notify_all();
    }

    /// Fetches what is expected, until it is closed or something fails. `look` takes a message if it is there, and does not
    /// wait for it.
    pub fn serve<M, E>(
        &self,
        mut look: impl FnMut(Key) -> Result<Option<M>, E>,
        mut fetch: impl FnMut(Key, M) -> Result<T, E>,
    ) -> Result<(), E> {
        let outcome = self.serve_until(&mut look, &mut fetch);
        self.close();
        outcome
    }

    fn serve_until<M, E>(
        &self,
        look: &mut dyn FnMut(Key) -> Result<Option<M>, E>,
        fetch: &mut dyn FnMut(Key, M) -> Result<T, E>,
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
                    true => self.bell.wait(state).unwrap_or_else(PoisonError::into_inner),
                    false => self.bell.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0,
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
            state.here.entry(key).or_default().push_back(fetched?);
            self.bell.notify_all();
            pause = SOON;
        }
        Ok(())
    }
}

fn less(counts: &mut BTreeMap<Key, usize>, key: Key) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests;
