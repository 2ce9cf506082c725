//! The operation that checks the indices with which a split dim is read or written.
//!
//! One device panics at a token beyond the vocabulary. Of ranks that hold parts of it each would take the token for one
//! of another rank, and read zeros. On the host the largest and the smallest index are looked for in every step; on
//! other devices, from which indices have to be read back, in the first step and every 64th after it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorIr};

use crate::Error;
use crate::graph::{CustomOps, graph_error};
use crate::lock::lock;
use crate::tensor::PlainTensor;

/// What the id of the operation ends in, behind the name of the axis.
const INDICES_BELOW: &str = "indices_below";
/// Where indices are not on the host, how many steps one look is for.
const STEPS: u64 = 64;

/// The operation that gives the indices as they are, and is an error if one of them is not below this number.
pub(super) fn check_below(axis: &str, indices: TensorIr, out: TensorIr, below: usize) -> OperationIr {
    let id = format!("{axis}.{INDICES_BELOW}");
    // By convention the last scalar does not count in the fingerprint.
    let scalars = vec![ScalarIr::UInt(below as u64), ScalarIr::UInt(0)];
    OperationIr::Custom(CustomOpIr { id, inputs: vec![indices], outputs: vec![out], scalars })
}

/// Whether an operation looks at indices over any axis, and gives them as they are.
pub(super) fn looks_at_indices(op: &CustomOpIr) -> bool {
    op.id.rsplit_once('.').is_some_and(|(_, name)| name == INDICES_BELOW)
}

/// Registers the operation for the axis of this name.
pub(super) fn register(ops: &mut CustomOps, axis: &str) {
    let looks: Arc<Mutex<HashMap<u64, u64>>> = Arc::default();
    let name = axis.to_owned();
    ops.register(&format!("{axis}.{INDICES_BELOW}"), move |op, inputs| {
        let [indices] = inputs.as_slice() else {
            return Err(graph_error(format!("custom operation `{}` takes one input, not {}", op.id, inputs.len())));
        };
        let below = op.scalars.first().map_or(0, |below| below.elem::<u64>());
        let out = op.outputs.first().map_or(0, |out| out.id.value());
        let due = indices.on_flex() || {
            let mut looks = lock(&looks);
            let before = looks.entry(out).or_default();
            *before += 1;
            (*before - 1).is_multiple_of(STEPS)
        };
        if due {
            check(indices, below, &name)?;
        }
        Ok(inputs)
    });
}

fn check(indices: &PlainTensor, below: u64, axis: &str) -> Result<(), Error> {
    let dims = indices.shape().to_vec();
    let data = indices.clone().into_data()?;
    let beyond = |index: &i64| u64::try_from(*index).map_or(true, |index| index >= below);
    match data.iter::<i64>().enumerate().find(|(_, index)| beyond(index)) {
        None => Ok(()),
        Some((mut rest, index)) => {
            let mut place = vec![0; dims.len()];
            for (place, size) in place.iter_mut().zip(&dims).rev() {
                (*place, rest) = (rest % size, rest / size);
            }
            Err(graph_error(format!(
                "index {index} at {place:?} of indices of dims {dims:?} is outside of a dim of size {below}, which is split over \
                 axis `{axis}`: a token beyond the vocabulary, or a label that is to be masked before it is looked up? One \
                 device panics there"
            )))
        }
    }
}
