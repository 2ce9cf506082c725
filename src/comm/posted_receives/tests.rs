//! Tests of the posted receives, with a mailbox in place of NCCL.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, sleep, yield_now};
use std::time::{Duration, Instant};

use super::{Asked, PostedReceives, SourceAndTag};

const LIMIT: Duration = Duration::from_secs(20);
const A: SourceAndTag = (1, 7);
const B: SourceAndTag = (1, 8);

/// A mailbox, and the thread that fetches from it.
#[derive(Default, Clone)]
struct TestMailbox {
    messages: Arc<Mutex<BTreeMap<SourceAndTag, VecDeque<u32>>>>,
    posted: Arc<PostedReceives<u32>>,
    /// Fetching waits for it.
    held_up: Arc<AtomicBool>,
}

impl TestMailbox {
    fn send(&self, key: SourceAndTag, message: u32) {
        self.messages.lock().unwrap().entry(key).or_default().push_back(message);
    }

    fn look(&self, key: SourceAndTag) -> Option<u32> {
        self.messages.lock().unwrap().get_mut(&key).and_then(VecDeque::pop_front)
    }

    fn expect(&self, key: SourceAndTag) {
        if self.posted.expect(key) {
            let mailbox = self.clone();
            thread::spawn(move || {
                let fetch = |_, message: u32| {
                    while mailbox.held_up.load(Ordering::Acquire) {
                        yield_now();
                    }
                    match message {
                        0 => Err("broken"),
                        message => Ok(message + 100),
                    }
                };
                mailbox.posted.serve(|key| Ok(mailbox.look(key)), fetch)
            });
        }
    }

    /// As a rank does: what was fetched, or else what comes.
    fn receive(&self, key: SourceAndTag) -> u32 {
        let _turn = match self.posted.take(key, LIMIT) {
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
        while self.messages.lock().unwrap().values().any(|messages| !messages.is_empty()) {
            assert!(began.elapsed() < LIMIT, "nobody fetches it");
            yield_now();
        }
    }
}

#[test]
fn what_is_expected_is_fetched_before_it_is_asked_for_and_in_order() {
    let mailbox = TestMailbox::default();
    mailbox.expect(A);
    mailbox.expect(A);
    [1, 2, 3].into_iter().for_each(|message| mailbox.send(A, message));
    let began = Instant::now();
    while mailbox.messages.lock().unwrap()[&A].len() > 1 {
        assert!(began.elapsed() < LIMIT, "nobody fetches them");
        yield_now();
    }
    sleep(Duration::from_millis(20));
    assert_eq!(mailbox.messages.lock().unwrap()[&A], [3], "no more than was posted");
    assert_eq!([mailbox.receive(A), mailbox.receive(A), mailbox.receive(A)], [101, 102, 3]);
}

#[test]
fn one_that_does_not_come_holds_up_no_other() {
    let mailbox = TestMailbox::default();
    mailbox.expect(A);
    mailbox.expect(B);
    mailbox.send(B, 5);
    mailbox.until_mail_is_taken();
    assert_eq!(mailbox.receive(B), 105);
    // Nothing has come: it is received as if it had not been expected.
    let late = mailbox.clone();
    let asks = thread::spawn(move || late.receive(A));
    sleep(Duration::from_millis(20));
    mailbox.send(A, 6);
    assert_eq!(asks.join().unwrap(), 6);
}

#[test]
fn one_that_is_on_its_way_is_waited_for() {
    let mailbox = TestMailbox::default();
    mailbox.held_up.store(true, Ordering::Release);
    mailbox.expect(A);
    [1, 2].into_iter().for_each(|message| mailbox.send(A, message));
    let began = Instant::now();
    while mailbox.messages.lock().unwrap()[&A].len() == 2 {
        assert!(began.elapsed() < LIMIT, "nobody fetches it");
    }
    let late = mailbox.posted.take(A, Duration::from_millis(30));
    assert!(matches!(late, Asked::Late), "not for longer than is said, and not the next in its place");
    let asks = mailbox.clone();
    let asked = thread::spawn(move || asks.receive(A));
    sleep(Duration::from_millis(20));
    mailbox.held_up.store(false, Ordering::Release);
    assert_eq!(asked.join().unwrap(), 101, "the oldest, although another is there");
    assert_eq!(mailbox.receive(A), 2);
}

#[test]
fn whoever_asks_first_gets_the_oldest() {
    let mailbox = TestMailbox::default();
    mailbox.expect(A);
    mailbox.expect(A);
    mailbox.expect(B);
    let Asked::NotYet(turn) = mailbox.posted.take(A, LIMIT) else { panic!("nothing has come") };
    [1, 2].into_iter().for_each(|message| mailbox.send(A, message));
    // Others are fetched meanwhile.
    mailbox.send(B, 5);
    let began = Instant::now();
    while !mailbox.messages.lock().unwrap()[&B].is_empty() {
        assert!(began.elapsed() < LIMIT, "nobody fetches it");
    }
    assert_eq!(mailbox.receive(B), 105);
    assert_eq!(mailbox.look(A), Some(1));
    sleep(Duration::from_millis(20));
    assert_eq!(mailbox.messages.lock().unwrap()[&A], [2], "he does not have it yet");
    drop(turn);
    mailbox.until_mail_is_taken();
    assert_eq!(mailbox.receive(A), 102);
}

#[test]
fn nobody_waits_for_what_failed_or_was_closed() {
    let mailbox = TestMailbox::default();
    mailbox.expect(A);
    mailbox.send(A, 0);
    mailbox.until_mail_is_taken();
    assert!(matches!(mailbox.posted.take(A, LIMIT), Asked::NotYet(_)));
    mailbox.send(A, 9);
    mailbox.expect(A);
    assert_eq!(mailbox.receive(A), 9, "nothing is fetched any more");
    let mailbox = TestMailbox::default();
    mailbox.expect(B);
    mailbox.posted.close();
    assert!(matches!(mailbox.posted.take(B, LIMIT), Asked::NotYet(_)));
}
