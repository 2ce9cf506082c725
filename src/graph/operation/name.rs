//! What an operation is called in messages and listings.

use burn_ir::OperationIr;

/// Short name of an operation, as in `operation NumericFloat.MeanDim`.
pub(crate) fn op_name(op: &OperationIr) -> String {
    if let OperationIr::Custom(op) = op {
        return format!("custom operation `{}`", op.id);
    }
    // burn's own names, as its `Debug` writes them: `NumericFloat(F32, MeanDim(ReduceDimOpIr { ..`. Nothing decides by
    // them.
    let text = format!("{op:?}");
    let mut words = text.split('(');
    let group = words.next().unwrap_or_default();
    let name = words.next().and_then(|word| word.rsplit(", ").next()).unwrap_or_default();
    format!("operation {group}.{name}")
}
