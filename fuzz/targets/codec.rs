//! Fuzzes the codec: calls, errors and control messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| burn_parallel::comm::fuzzing::codec(bytes));
