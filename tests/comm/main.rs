//! Communicators of threads: what they compute, what they say when they fail, and the moves between layouts.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/transport_suite/mod.rs"]
mod transport_suite;

mod channel_transport;
mod collectives;
mod failures;
mod layout;
mod limits;
mod local;
