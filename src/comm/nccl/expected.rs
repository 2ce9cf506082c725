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
mod tests {
    use std::collections::{BTreeMap, VecDeque};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::thread::{self, sleep, yield_now};
    use std::time::{Duration, Instant};

    use super::{Asked, Expected, Key};

    const LIMIT: Duration = Duration::from_secs(20);
    const A: Key = (1, 7);
    const B: Key = (1, 8);

    /// Where messages come in, and the thread that fetches them.
    #[derive(Default, Clone)]
    struct Post {
        mail: Arc<Mutex<BTreeMap<Key, VecDeque<u32>>>>,
        expected: Arc<Expected<u32>>,
        /// Fetching waits for it.
        held_up: Arc<AtomicBool>,
    }

    impl Post {
        fn send(&self, key: Key, message: u32) {
            self.mail.lock().unwrap().entry(key).or_default().push_back(message);
        }

        fn look(&self, key: Key) -> Option<u32> {
            self.mail.lock().unwrap().get_mut(&key).and_then(VecDeque::pop_front)
        }

        fn expect(&self, key: Key) {
            if self.expected.expect(key) {
                let post = self.clone();
                thread::spawn(move || {
                    let fetch = |_, message: u32| {
                        while post.held_up.load(Ordering::Acquire) {
                            yield_now();
                        }
                        match message {
                            0 => Err("broken"),
                            message => Ok(message + 100),
                        }
                    };
                    post.expected.serve(|key| Ok(post.look(key)), fetch)
                });
            }
        }

        /// As a rank does: what was fetched, or else what comes.
        fn receive(&self, key: Key) -> u32 {
            let _turn = match self.expected.take(key, LIMIT) {
                Asked::Fetched(message) => return message,
                Asked::NotYet(turn) => turn,
                Asked::Late => panic!("it does not arrive"),
            };
            let began = Instant::now();
            loop {
                match self.look(key) {
                    Some(message) => return message,
                    None => assert!(began.elapsed() < LIMIT, "nothing comes"),
                }
                yield_now();
            }
        }

        fn until_mail_is_taken(&self) {
            let began = Instant::now();
            while self.mail.lock().unwrap().values().any(|mail| !mail.is_empty()) {
                assert!(began.elapsed() < LIMIT, "nobody fetches it");
                yield_now();
            }
        }
    }

    #[test]
    fn what_is_expected_is_fetched_before_it_is_asked_for_and_in_order() {
        let post = Post::default();
        post.expect(A);
        post.expect(A);
        [1, 2, 3].into_iter().for_each(|message| post.send(A, message));
        let began = Instant::now();
        while post.mail.lock().unwrap()[&A].len() > 1 {
            assert!(began.elapsed() < LIMIT, "nobody fetches them");
            yield_now();
        }
        sleep(Duration::from_millis(20));
        assert_eq!(post.mail.lock().unwrap()[&A], [3], "no more than was expected");
        assert_eq!([post.receive(A), post.receive(A), post.receive(A)], [101, 102, 3]);
    }

    #[test]
    fn one_that_does_not_come_holds_up_no_other() {
        let post = Post::default();
        post.expect(A);
        post.expect(B);
        post.send(B, 5);
        post.until_mail_is_taken();
        assert_eq!(post.receive(B), 105);
        // Nothing has come: it is received as if it had not been expected.
        let late = post.clone();
        let asks = thread::spawn(move || late.receive(A));
        sleep(Duration::from_millis(20));
        post.send(A, 6);
        assert_eq!(asks.join().unwrap(), 6);
    }

    #[test]
    fn one_that_is_on_its_way_is_waited_for() {
        let post = Post::default();
        post.held_up.store(true, Ordering::Release);
        post.expect(A);
        [1, 2].into_iter().for_each(|message| post.send(A, message));
        let began = Instant::now();
        while post.mail.lock().unwrap()[&A].len() == 2 {
            assert!(began.elapsed() < LIMIT, "nobody fetches it");
        }
        let late = post.expected.take(A, Duration::from_millis(30));
        assert!(matches!(late, Asked::Late), "not for longer than is said, and not the next in its place");
        let asks = post.clone();
        let asked = thread::spawn(move || asks.receive(A));
        sleep(Duration::from_millis(20));
        post.held_up.store(false, Ordering::Release);
        assert_eq!(asked.join().unwrap(), 101, "the oldest, although another is there");
        assert_eq!(post.receive(A), 2);
    }

    #[test]
    fn whoever_asks_first_gets_the_oldest() {
        let post = Post::default();
        post.expect(A);
        post.expect(A);
        post.expect(B);
        let Asked::NotYet(turn) = post.expected.take(A, LIMIT) else { panic!("nothing has come") };
        [1, 2].into_iter().for_each(|message| post.send(A, message));
        // Others are fetched meanwhile.
        post.send(B, 5);
        let began = Instant::now();
        while !post.mail.lock().unwrap()[&B].is_empty() {
            assert!(began.elapsed() < LIMIT, "nobody fetches it");
        }
        assert_eq!(post.receive(B), 105);
        assert_eq!(post.look(A), Some(1));
        sleep(Duration::from_millis(20));
        assert_eq!(post.mail.lock().unwrap()[&A], [2], "he does not have it yet");
        drop(turn);
        post.until_mail_is_taken();
        assert_eq!(post.receive(A), 102);
    }

    #[test]
    fn nobody_waits_for_what_failed_or_was_closed() {
        let post = Post::default();
        post.expect(A);
        post.send(A, 0);
        post.until_mail_is_taken();
        assert!(matches!(post.expected.take(A, LIMIT), Asked::NotYet(_)));
        post.send(A, 9);
        post.expect(A);
        assert_eq!(post.receive(A), 9, "nothing is fetched any more");
        let post = Post::default();
        post.expect(B);
        post.expected.close();
        assert!(matches!(post.expected.take(B, LIMIT), Asked::NotYet(_)));
    }
}
