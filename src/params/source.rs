//! The trait of stores that parameters are read from, a part at a time.

use std::ops::Range;

use burn::tensor::TensorData;

use crate::Error;

/// A store of whole parameters that is asked for parts of them only, so that no rank reads or holds more than its own.
///
/// Parameters go by their paths in the module and have the dims that they have there in memory.
pub trait SliceSource {
    /// The dims of the whole parameter; `None` if there is none of this path.
    ///
    /// # Errors
    /// Whatever goes wrong with the store.
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error>;

    /// The elements of a parameter in these ranges, one for each dim. The dtype may be another than the module's; it is cast.
    ///
    /// # Errors
    /// Whatever goes wrong with the store.
    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error>;
}
