//! Both sides of a meeting, with somebody on the other side who says anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| burn_parallel::comm::fuzzing::handshake(bytes));
