//! Ports at which the ranks of a test meet.
#![allow(dead_code, reason = "each test binary uses the part that it needs")]

use std::net::TcpListener;
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};

/// Ports of one process.
const EACH: u16 = 100;

/// A port at which nobody listens and that no other test takes: those of this process, in turn. They are below those
/// that the system gives to connections, and to listeners that ask for any port: such a port, once free again, may be
/// given to somebody else before the ranks use it.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (process::id() % 200) as u16 * EACH;
    // Two processes that share ports begin at different ones.
    let offset = (process::id() / 200 * 7 % u32::from(EACH)) as u16;
    let mut ports = (0..EACH).map(|_| first + (offset + NEXT.fetch_add(1, Ordering::Relaxed) % EACH) % EACH);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a port that nobody listens at")
}
