//! Panics that become errors. burn has no other way to say what is wrong in many places; what it says goes into an
//! error there, and to print it before that as well would only confuse.
//!
//! The hook of the process is wrapped once, and then asks the thread that panics. It hides nothing that happens on
//! another thread, or outside [`catch_quietly`], or for a reason that no error tells of: the place where the user's
//! code has panicked, say. Nor anything where `RUST_BACKTRACE` asks for the places.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;
use std::thread;

use crate::comm::panic_message;

/// Whether an error is made of a panic, by its words.
type IsQuiet = fn(&str) -> bool;

thread_local! {
    /// Which panics of this thread an error is made of.
    static QUIET: Cell<Option<IsQuiet>> = const { Cell::new(None) };
}

/// Runs something whose panics the caller makes errors of. Those of which `is_quiet` holds, by their words,
/// are not printed.
///
/// # Errors
/// The panic.
pub(crate) fn catch_quietly<T>(is_quiet: IsQuiet, run: impl FnOnce() -> T) -> thread::Result<T> {
    /// Puts back what was there.
    struct Restore(Option<IsQuiet>);
    impl Drop for Restore {
        fn drop(&mut self) {
            QUIET.set(self.0);
        }
    }
    wrap_hook();
    let _restore = Restore(QUIET.replace(Some(is_quiet)));
    catch_unwind(AssertUnwindSafe(run))
}

fn wrap_hook() {
    static ONCE: Once = Once::new();
    // Not while this thread unwinds, where hooks cannot be set.
    if thread::panicking() {
        return;
    }
    ONCE.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            let is_quiet = QUIET.try_with(Cell::get).ok().flatten();
            let traced = || std::env::var_os("RUST_BACKTRACE").is_some_and(|asked| asked != "0");
            if !is_quiet.is_some_and(|is_quiet| is_quiet(&panic_message(info.payload()))) || traced() {
                usual(info);
            }
        }));
    });
}
