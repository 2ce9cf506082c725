//! Fuzzes a TCP connection whose other end sends anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| burn_parallel::comm::fuzzing::frames(bytes));
