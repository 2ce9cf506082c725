//! Registers the custom operations of a partitioned graph over the communicator of its axis.

use super::collectives::CollectiveKind;
use super::{indices, overlap, products};
use crate::comm::Communicator;
use crate::graph::CustomOps;

/// Registers what a graph needs that was [partitioned](super::partition) over the axis of this name, over the `group`
/// of its ranks: collectives, what looks at indices, [fused products](super::fuse_products), and both [taken
/// apart](super::overlap).
pub fn register_collectives(ops: &mut CustomOps, axis: &str, group: &Communicator) {
    for kind in CollectiveKind::ALL {
        let comm = group.clone();
        ops.register(&format!("{axis}.{}", kind.name()), move |op, inputs| kind.run(op, inputs, &comm));
    }
    indices::register(ops, axis);
    products::register(ops, axis, group);
    overlap::register(ops, axis, group);
}
