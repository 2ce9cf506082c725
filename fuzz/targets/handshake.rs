//! Fuzzes both sides of the rendezvous handshake.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| burn_parallel::comm::fuzzing::handshake(bytes));
