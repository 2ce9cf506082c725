//! Models of the board on which processes meet, checked by loom over every interleaving and every permitted reordering.
//!
//! The counters are compiled here against `sync`, made of loom's primitives, so what is checked is the text that runs. Sides
//! and letters are loom's `UnsafeCell`s, which know who looked when: that nobody reads what is still being written, and nobody
//! writes what is still being read, is for loom to find.
#![allow(dead_code, reason = "the files are used here in part")]

#[path = "../../src/comm/wired/board/letters.rs"]
mod letters;
#[path = "../../src/comm/wired/board/rounds.rs"]
mod rounds;

/// Loom's primitives under the names of `src/comm/wired/board/sync.rs`.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
}

use loom::cell::UnsafeCell;
use loom::thread;

use letters::{Letters, PLACES};
use rounds::{Counters, Line, Rounds};
use sync::AtomicU64;

use crate::explore::explore;

fn line() -> Line {
    Line::new(AtomicU64::new(0))
}

/// A board: what each rank lays out on either side, and what comes out of the first part of a round.
struct Board {
    word: Line,
    shown: Vec<Line>,
    laid: Vec<[UnsafeCell<u64>; 2]>,
    results: Vec<[UnsafeCell<u64>; 2]>,
}

// SAFETY: loom checks every access to the cells.
unsafe impl Sync for Board {}
unsafe impl Send for Board {}

impl Board {
    fn new(size: usize) -> Self {
        let cells = || (0..size).map(|_| [UnsafeCell::new(0), UnsafeCell::new(0)]).collect();
        Self { word: line(), shown: (0..size).map(|_| line()).collect(), laid: cells(), results: cells() }
    }

    fn counters(&self) -> Counters<'_> {
        Counters { word: &self.word, shown: &self.shown }
    }

    fn write(cells: &[[UnsafeCell<u64>; 2]], rounds: &Rounds, value: u64) {
        // SAFETY: loom looks.
        cells[rounds.rank()][rounds.side()].with_mut(|place| unsafe { *place = value });
    }

    fn sum(cells: &[[UnsafeCell<u64>; 2]], rounds: &Rounds) -> u64 {
        // SAFETY: loom looks.
        cells.iter().map(|sides| sides[rounds.side()].with(|place| unsafe { *place })).sum()
    }
}

fn wait(mut ready: impl FnMut() -> bool) {
    while !ready() {
        thread::yield_now();
    }
}

/// What a rank lays out in a round.
fn value(rank: usize, round: u64) -> u64 {
    10 * round + rank as u64 + 1
}

/// A rank comes to a collective: it lays out, shows, waits for the decider's word, and reads what all have laid out.
fn meet(board: &Board, rounds: &mut Rounds, round: u64) {
    Board::write(&board.laid, rounds, value(rounds.rank(), round));
    rounds.show(board.counters());
    if rounds.rank() == 0 {
        wait(|| rounds.all_shown(board.counters()));
        rounds.commit(board.counters());
    } else {
        wait(|| rounds.committed(board.counters()));
    }
    read(board, rounds, round);
}

fn read(board: &Board, rounds: &Rounds, round: u64) {
    let expected: u64 = (0..board.shown.len()).map(|rank| value(rank, round)).sum();
    assert_eq!(Board::sum(&board.laid, rounds), expected);
}

/// A further round of a collective that all have come to.
fn go_on(board: &Board, rounds: &mut Rounds, round: u64) {
    rounds.turn_over();
    Board::write(&board.laid, rounds, value(rounds.rank(), round));
    rounds.show(board.counters());
    wait(|| rounds.all_shown(board.counters()));
    read(board, rounds, round);
}

/// The second part of a round: each shows what came out, and the `readers` read it.
fn share(board: &Board, rounds: &mut Rounds, round: u64, reads: bool) {
    Board::write(&board.results, rounds, value(rounds.rank(), round));
    rounds.show(board.counters());
    if reads {
        wait(|| rounds.all_shown(board.counters()));
        let expected: u64 = (0..board.shown.len()).map(|rank| value(rank, round)).sum();
        assert_eq!(Board::sum(&board.results, rounds), expected);
    }
}

fn ranks(size: usize, rank: impl Fn(&Board, &mut Rounds) + Send + Sync + Copy + 'static) {
    let board = loom::sync::Arc::new(Board::new(size));
    let others: Vec<_> = (1..size)
        .map(|number| {
            let board = board.clone();
            thread::spawn(move || rank(&board, &mut Rounds::new(number)))
        })
        .collect();
    rank(&board, &mut Rounds::new(0));
    others.into_iter().for_each(|other| other.join().unwrap());
}

/// One collective after the other, each of one round: all-gather, barrier.
#[test]
fn meetings_follow_each_other() {
    let rank = |board: &Board, rounds: &mut Rounds| {
        for round in 0..3 {
            meet(board, rounds, round);
            rounds.turn_over();
        }
    };
    explore("three meetings of two", Some(4), move || ranks(2, rank));
    // Ranks 1 and 2 see each other's sides by the word of rank 0. A look or none, for three that wait are too much for loom.
    explore("a look at a meeting of three", None, || {
        ranks(3, |board, rounds| {
            Board::write(&board.laid, rounds, value(rounds.rank(), 0));
            rounds.show(board.counters());
            if rounds.rank() == 0 && rounds.all_shown(board.counters()) {
                rounds.commit(board.counters());
            }
            if rounds.committed(board.counters()) {
                read(board, rounds, 0);
            }
        });
    });
}

/// A collective of several rounds between others: all-reduce of two, broadcast.
#[test]
fn a_collective_may_take_several_rounds() {
    let rank = |board: &Board, rounds: &mut Rounds| {
        meet(board, rounds, 0);
        go_on(board, rounds, 1);
        go_on(board, rounds, 2);
        rounds.turn_over();
        meet(board, rounds, 3);
    };
    explore("three rounds, and a meeting", Some(3), move || ranks(2, rank));
}

/// Results are shown, and read by all, or by one alone: all-reduce, reduce.
#[test]
fn results_are_read_when_they_are_shown() {
    let all = |board: &Board, rounds: &mut Rounds| {
        meet(board, rounds, 0);
        share(board, rounds, 0, true);
        go_on(board, rounds, 1);
        share(board, rounds, 1, true);
        rounds.turn_over();
        meet(board, rounds, 2);
        share(board, rounds, 2, true);
    };
    explore("results for both", Some(2), move || ranks(2, all));
    let root = |board: &Board, rounds: &mut Rounds| {
        for round in 0..3 {
            meet(board, rounds, round);
            share(board, rounds, round, rounds.rank() == 1);
            rounds.turn_over();
        }
    };
    explore("results for rank 1", Some(2), move || ranks(2, root));
}

/// The model finds out a rank that does not wait.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_rank_that_does_not_wait_is_found() {
    explore("impatience", Some(2), || {
        ranks(2, |board, rounds| {
            for round in 0..3 {
                Board::write(&board.laid, rounds, value(rounds.rank(), round));
                rounds.show(board.counters());
                if rounds.rank() == 0 {
                    wait(|| rounds.all_shown(board.counters()));
                    read(board, rounds, round);
                }
                rounds.turn_over();
            }
        });
    });
}

/// The places for letters from one rank to another.
struct Desk {
    posted: Line,
    taken: Line,
    places: [UnsafeCell<u64>; PLACES as usize],
}

// SAFETY: loom checks every access to the cells.
unsafe impl Sync for Desk {}
unsafe impl Send for Desk {}

impl Desk {
    fn letters(&self) -> Letters<'_> {
        Letters { posted: &self.posted, taken: &self.taken }
    }
}

/// More letters than there are places: each comes once, in order, and none is written over before it is taken. One that finds
/// no place goes another way.
#[test]
fn letters_come_in_order() {
    explore("letters", Some(4), || {
        let places = std::array::from_fn(|_| UnsafeCell::new(0));
        let desk = loom::sync::Arc::new(Desk { posted: line(), taken: line(), places });
        let sender = desk.clone();
        let sending = thread::spawn(move || {
            for letter in 1..=2 * PLACES {
                let letters = sender.letters();
                wait(|| letters.free().is_some());
                let place = letters.free().unwrap() as usize;
                // SAFETY: loom looks.
                sender.places[place].with_mut(|place| unsafe { *place = letter });
                letters.post();
            }
        });
        for letter in 1..=2 * PLACES {
            let letters = desk.letters();
            wait(|| letters.next().is_some());
            let place = letters.next().unwrap() as usize;
            // SAFETY: loom looks.
            assert_eq!(desk.places[place].with(|place| unsafe { *place }), letter);
            letters.take();
        }
        sending.join().unwrap();
        assert!(desk.letters().next().is_none());
    });
}
