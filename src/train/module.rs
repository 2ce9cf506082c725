//! Replicas are modules as their engine is.

use std::fmt;

use super::{GraphEngine, Replicas};
use crate::delegate::module_of_field;

impl<E: fmt::Debug> fmt::Debug for Replicas<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicas").field("engine", &self.engine).field("group", self.reducer.data()).finish()
    }
}

module_of_field!(Replicas<E: GraphEngine>, engine);
