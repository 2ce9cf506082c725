//! The rendezvous of ranks that a launcher has started.

use std::time::Duration;

use super::ProcessInfo;
use crate::Error;
use crate::comm::tcp::Rendezvous;

/// What ranks show each other when they meet over TCP.
pub(super) const SECRET: &str = "BURN_PARALLEL_SECRET";

impl Rendezvous {
    /// The meeting point that the launcher has named: `MASTER_ADDR` and `MASTER_PORT`, with the secret of the variable
    /// `BURN_PARALLEL_SECRET`, whatever bytes it is. Without that variable there is no secret: strays are kept out, but
    /// no attacker.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the launcher has named none.
    pub fn at(info: &ProcessInfo, timeout: Duration) -> Result<Self, Error> {
        let Some((address, port)) = &info.master else {
            let problem = "MASTER_ADDR and MASTER_PORT are not set: the ranks do not know where to meet; set them to an \
                           address of rank 0's machine and a free port there, alike on all ranks";
            return Err(Error::invalid("rendezvous", problem));
        };
        let secret = std::env::var_os(SECRET).unwrap_or_default();
        Ok(Self::new(info.rank, info.size, address, *port, secret.as_encoded_bytes(), timeout))
    }
}
