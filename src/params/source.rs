//! The trait of stores that parameters are read from, a part at a time.

use std::ops::Range;

use burn::tensor::{DType, TensorData};

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

    /// The elements of a parameter in these ranges, one for each dim. The dtype may be another than the module's; it is
    /// cast.
    ///
    /// # Errors
    /// Whatever goes wrong with the store.
    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error>;

    /// [`read`](Self::read) for a parameter of this dtype. A source that can cast as it reads needs no memory for both.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_as(&mut self, path: &str, ranges: &[Range<usize>], dtype: DType) -> Result<TensorData, Error> {
        let data = self.read(path, ranges)?;
        Ok(if data.dtype() == dtype { data } else { data.convert_dtype(dtype) })
    }

    /// Whether a parameter has no place in the store and keeps the value that it has. By default none does: a parameter
    /// that the store lacks is an error.
    fn keeps(&mut self, _path: &str) -> bool {
        false
    }

    /// The same store once more, for a pipeline that finds out in its first step which parameters several stages share:
    /// each of them reads its own from there. By default there is none, and they are sent instead.
    fn for_later(&self) -> Option<Box<dyn SliceSource + Send>> {
        None
    }
}
