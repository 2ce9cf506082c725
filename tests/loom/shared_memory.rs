//! Models of the counters in shared memory, checked by loom over every interleaving and every permitted reordering.
//!
//! The counters are compiled here against `sync`, made of loom's primitives, so what is checked is the text that runs.
//! Slots and mailbox entries are loom's `UnsafeCell`s, which know who accessed when: loom finds reads of what is still
//! being written, and writes of what is still being read.
#![allow(dead_code, reason = "the files are used here in part")]

#[path = "../../src/comm/message_passing/shared_memory/mailbox.rs"]
mod mailbox;
#[path = "../../src/comm/message_passing/shared_memory/rounds.rs"]
mod rounds;

/// Loom's primitives under the names of `src/comm/message_passing/shared_memory/sync.rs`.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
}

use loom::cell::UnsafeCell;
use loom::thread;

use mailbox::{ENTRIES, Mailbox};
use rounds::{Counter, RoundCounters, Rounds};
use sync::AtomicU64;

use crate::explore::explore;

fn counter() -> Counter {
    Counter::new(AtomicU64::new(0))
}

/// Shared memory: what each rank writes into either slot, and its result of the first part of a round.
struct SharedMemory {
    committed: Counter,
    published: Vec<Counter>,
    written: Vec<[UnsafeCell<u64>; 2]>,
    results: Vec<[UnsafeCell<u64>; 2]>,
}

// SAFETY: loom checks every access to the cells.
unsafe impl Sync for SharedMemory {}
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    fn new(size: usize) -> Self {
        let cells = || (0..size).map(|_| [UnsafeCell::new(0), UnsafeCell::new(0)]).collect();
        Self {
            committed: counter(),
            published: (0..size).map(|_| counter()).collect(),
            written: cells(),
            results: cells(),
        }
    }

    fn counters(&self) -> RoundCounters<'_> {
        RoundCounters { committed: &self.committed, published: &self.published }
    }

    fn write(cells: &[[UnsafeCell<u64>; 2]], rounds: &Rounds, value: u64) {
        // SAFETY: loom looks.
        cells[rounds.rank()][rounds.slot()].with_mut(|entry| unsafe { *entry = value });
    }

    fn sum(cells: &[[UnsafeCell<u64>; 2]], rounds: &Rounds) -> u64 {
        // SAFETY: loom looks.
        cells.iter().map(|slots| slots[rounds.slot()].with(|entry| unsafe { *entry })).sum()
    }
}

fn wait(mut ready: impl FnMut() -> bool) {
    while !ready() {
        thread::yield_now();
    }
}

/// The contribution of a rank to a round.
fn value(rank: usize, round: u64) -> u64 {
    10 * round + rank as u64 + 1
}

/// A rank enters a collective: it writes, publishes, waits for the commit, and reads what all have written.
fn enter(shared_memory: &SharedMemory, rounds: &mut Rounds, round: u64) {
    SharedMemory::write(&shared_memory.written, rounds, value(rounds.rank(), round));
    rounds.publish(shared_memory.counters());
    if rounds.rank() == 0 {
        wait(|| rounds.all_published(shared_memory.counters()));
        rounds.commit(shared_memory.counters());
    } else {
        wait(|| rounds.committed(shared_memory.counters()));
    }
    read(shared_memory, rounds, round);
}

fn read(shared_memory: &SharedMemory, rounds: &Rounds, round: u64) {
    let expected: u64 = (0..shared_memory.published.len()).map(|rank| value(rank, round)).sum();
    assert_eq!(SharedMemory::sum(&shared_memory.written, rounds), expected);
}

/// A further round of a committed collective.
fn go_on(shared_memory: &SharedMemory, rounds: &mut Rounds, round: u64) {
    rounds.next_round();
    SharedMemory::write(&shared_memory.written, rounds, value(rounds.rank(), round));
    rounds.publish(shared_memory.counters());
    wait(|| rounds.all_published(shared_memory.counters()));
    read(shared_memory, rounds, round);
}

/// The second part of a round: each publishes its result, and the `readers` read it.
fn share(shared_memory: &SharedMemory, rounds: &mut Rounds, round: u64, reads: bool) {
    SharedMemory::write(&shared_memory.results, rounds, value(rounds.rank(), round));
    rounds.publish(shared_memory.counters());
    if reads {
        wait(|| rounds.all_published(shared_memory.counters()));
        let expected: u64 = (0..shared_memory.published.len()).map(|rank| value(rank, round)).sum();
        assert_eq!(SharedMemory::sum(&shared_memory.results, rounds), expected);
    }
}

fn ranks(size: usize, rank: impl Fn(&SharedMemory, &mut Rounds) + Send + Sync + Copy + 'static) {
    let shared_memory = loom::sync::Arc::new(SharedMemory::new(size));
    let others: Vec<_> = (1..size)
        .map(|number| {
            let shared_memory = shared_memory.clone();
            thread::spawn(move || rank(&shared_memory, &mut Rounds::new(number)))
        })
        .collect();
    rank(&shared_memory, &mut Rounds::new(0));
    others.into_iter().for_each(|other| other.join().unwrap());
}

/// One collective after the other, each of one round: all-gather, barrier.
#[test]
fn meetings_follow_each_other() {
    let rank = |shared_memory: &SharedMemory, rounds: &mut Rounds| {
        for round in 0..3 {
            enter(shared_memory, rounds, round);
            rounds.next_round();
        }
    };
    explore("three meetings of two", Some(4), move || ranks(2, rank));
    // Ranks 1 and 2 see each other's slots through the commit of rank 0. They poll once or not at all: three that wait
    // are too much for loom.
    explore("a look at a meeting of three", None, || {
        ranks(3, |shared_memory, rounds| {
            SharedMemory::write(&shared_memory.written, rounds, value(rounds.rank(), 0));
            rounds.publish(shared_memory.counters());
            if rounds.rank() == 0 && rounds.all_published(shared_memory.counters()) {
                rounds.commit(shared_memory.counters());
            }
            if rounds.committed(shared_memory.counters()) {
                read(shared_memory, rounds, 0);
            }
        });
    });
}

/// A collective of several rounds between others: all-reduce of two, broadcast.
#[test]
fn a_collective_may_take_several_rounds() {
    let rank = |shared_memory: &SharedMemory, rounds: &mut Rounds| {
        enter(shared_memory, rounds, 0);
        go_on(shared_memory, rounds, 1);
        go_on(shared_memory, rounds, 2);
        rounds.next_round();
        enter(shared_memory, rounds, 3);
    };
    explore("three rounds, and a meeting", Some(3), move || ranks(2, rank));
}

/// Results are published, and read by all, or by one alone: all-reduce, reduce.
#[test]
fn results_are_read_when_they_are_published() {
    let all = |shared_memory: &SharedMemory, rounds: &mut Rounds| {
        enter(shared_memory, rounds, 0);
        share(shared_memory, rounds, 0, true);
        go_on(shared_memory, rounds, 1);
        share(shared_memory, rounds, 1, true);
        rounds.next_round();
        enter(shared_memory, rounds, 2);
        share(shared_memory, rounds, 2, true);
    };
    explore("results for both", Some(2), move || ranks(2, all));
    let root = |shared_memory: &SharedMemory, rounds: &mut Rounds| {
        for round in 0..3 {
            enter(shared_memory, rounds, round);
            share(shared_memory, rounds, round, rounds.rank() == 1);
            rounds.next_round();
        }
    };
    explore("results for rank 1", Some(2), move || ranks(2, root));
}

/// The model finds out a rank that does not wait.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_rank_that_does_not_wait_is_found() {
    explore("impatience", Some(2), || {
        ranks(2, |shared_memory, rounds| {
            for round in 0..3 {
                SharedMemory::write(&shared_memory.written, rounds, value(rounds.rank(), round));
                rounds.publish(shared_memory.counters());
                if rounds.rank() == 0 {
                    wait(|| rounds.all_published(shared_memory.counters()));
                    read(shared_memory, rounds, round);
                }
                rounds.next_round();
            }
        });
    });
}

/// The mailbox from one rank to another.
struct MailboxMemory {
    posted: Counter,
    taken: Counter,
    entries: [UnsafeCell<u64>; ENTRIES as usize],
}

// SAFETY: loom checks every access to the cells.
unsafe impl Sync for MailboxMemory {}
unsafe impl Send for MailboxMemory {}

impl MailboxMemory {
    fn mailbox(&self) -> Mailbox<'_> {
        Mailbox { posted: &self.posted, taken: &self.taken }
    }
}

/// More messages than entries: each arrives once, in order, and none is overwritten before it is taken. The sender of
/// one that finds no entry waits here.
#[test]
fn messages_come_in_order() {
    explore("mailbox", Some(4), || {
        let entries = std::array::from_fn(|_| UnsafeCell::new(0));
        let memory = loom::sync::Arc::new(MailboxMemory { posted: counter(), taken: counter(), entries });
        let sender = memory.clone();
        let sending = thread::spawn(move || {
            for message in 1..=2 * ENTRIES {
                let mailbox = sender.mailbox();
                wait(|| mailbox.free().is_some());
                let entry = mailbox.free().unwrap() as usize;
                // SAFETY: loom looks.
                sender.entries[entry].with_mut(|entry| unsafe { *entry = message });
                mailbox.post();
            }
        });
        for message in 1..=2 * ENTRIES {
            let mailbox = memory.mailbox();
            wait(|| mailbox.next().is_some());
            let entry = mailbox.next().unwrap() as usize;
            // SAFETY: loom looks.
            assert_eq!(memory.entries[entry].with(|entry| unsafe { *entry }), message);
            mailbox.take();
        }
        sending.join().unwrap();
        assert!(memory.mailbox().next().is_none());
    });
}
