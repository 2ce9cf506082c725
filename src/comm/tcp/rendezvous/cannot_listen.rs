//! Why a rank cannot listen.

use std::io;

use super::{rendezvous_error, wrongly_given};
use crate::Error;
use crate::comm::tcp::descriptors;

/// What is wrong, and `advice` if that is with the address that the rank was given.
pub(in crate::comm::tcp) fn cannot_listen((what, problem): (&str, &io::Error), advice: &str) -> Error {
    match descriptors::exhausted(problem) {
        Some(why) => rendezvous_error(format!("{what}: {why}")),
        None => wrongly_given(format!("{what}: {problem}; {advice}")),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_is_not_what_was_given() {
        let says = |number| cannot_listen(("rank 0", &io::Error::from_raw_os_error(number)), "give another address");
        let said = says(libc::EADDRNOTAVAIL);
        assert!(matches!(said, Error::InvalidArgument { .. }) && said.to_string().contains("give another"), "{said}");
        let said = says(libc::EMFILE);
        assert!(matches!(said, Error::Transport { .. }) && said.to_string().contains("ulimit -n"), "{said}");
    }
}
