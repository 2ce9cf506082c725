//! Calls, errors and the words of wardens, out of any bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| burn_parallel::comm::fuzzing::codec(bytes));
