//! Implements `Module` for a pipelined model by delegating to this rank's part.

use std::fmt;

use burn::module::Module;

use super::Pipelined;
use crate::delegate::module_of_field;

impl<M: fmt::Debug> fmt::Debug for Pipelined<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipelined").field("local", &self.local).field("group", &self.group).finish()
    }
}

module_of_field!(Pipelined<M: Module>, local, refuse_at_once);
