//! Whatever one rank does wrong, every rank returns, soon, and with the same error, which says what happened.
//!
//! Failures that are found at once run with a time-out that is far longer than the limit within which the ranks must be
//! back: nobody may need the time-out to find out.

mod gone;
mod harness;
mod messages;
mod mismatches;
mod parts;
mod time_outs;
mod under_way;
