//! The transport suite on threads of this process.

use crate::transport_suite::{self, over_threads};

#[test]
fn the_suite() {
    for size in 1..=4 {
        let counts = over_threads::run(size, |factory| transport_suite::run(&factory, &|_| ()));
        assert_eq!(counts, vec![Some(if size == 1 { 13 } else { 21 }); size]);
    }
}
