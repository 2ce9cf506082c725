//! Communicators of threads: what they compute, what they say when they fail, and the moves between layouts; and how
//! ranks are started and arranged, as threads and as processes.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/transport_suite/mod.rs"]
mod transport_suite;

mod channel_transport;
mod collectives;
mod failures;
mod launch;
mod layout;
mod limits;
mod local;
