//! The transport suite on threads of this process.

mod transport_suite;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use burn_parallel::comm::Communicator;
use burn_parallel::comm::local::{self, WorldConfig};

use crate::transport_suite::Engine;

/// Worlds by their number; each rank takes its place in each.
type Worlds = Arc<Mutex<HashMap<usize, Vec<Option<Communicator>>>>>;

struct Local {
    rank: usize,
    size: usize,
    made: Mutex<usize>,
    worlds: Worlds,
}

impl Engine for Local {
    fn world(&self, timeout: Duration) -> Communicator {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let config = || WorldConfig::from_env().unwrap().with_timeout(timeout);
        let new = || local::world(self.size, config()).unwrap().into_iter().map(Some).collect();
        self.worlds.lock().unwrap().entry(*made).or_insert_with(new)[self.rank].take().unwrap()
    }
}

#[test]
fn the_suite() {
    for size in 1..=4 {
        let worlds = Worlds::default();
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let engine = Local { rank, size, made: Mutex::new(0), worlds: worlds.clone() };
                thread::spawn(move || transport_suite::run(&engine, &|_| ()))
            })
            .collect();
        let counts: Vec<usize> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert_eq!(counts, vec![if size == 1 { 11 } else { 19 }; size]);
    }
}
