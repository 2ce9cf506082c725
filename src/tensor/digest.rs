//! A hash of what a tensor holds.

use xxhash_rust::xxh3::xxh3_64;

use super::PlainTensor;
use crate::Error;

impl PlainTensor {
    /// A hash of dims, dtype and elements. Reads the tensor back from a device.
    ///
    /// # Errors
    /// [`Error::Graph`] if it cannot be read.
    pub(crate) fn digest(self) -> Result<u64, Error> {
        let head = format!("{:?} {:?}", self.dtype(), self.shape());
        let data = self.packed()?.into_data()?;
        Ok(xxh3_64(head.as_bytes()).rotate_left(1) ^ xxh3_64(data.as_bytes()))
    }
}
