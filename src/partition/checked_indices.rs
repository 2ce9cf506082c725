//! Checks indices where a partition reads or writes a split dim by them.

use burn_ir::TensorIr;

use super::indices::check_below;
use super::pass::Pass;

impl Pass<'_> {
    /// The indices, which are an error if one of them is not below this number.
    pub(super) fn within(&mut self, indices: TensorIr, below: usize) -> TensorIr {
        let key = (indices.id, below);
        if let Some(known) = self.within.get(&key) {
            return known.clone();
        }
        let out = TensorIr { id: self.fresh(), ..indices.clone() };
        self.operations.push(check_below(&self.options.axis, indices, out.clone(), below));
        self.within.insert(key, out.clone());
        out
    }
}
