//! A logical tensor of the graph, and the local tensors that the ranks hold of it.

use burn_ir::{OperationIr, TensorId, TensorIr};

use crate::graph::operation::is_zeros;
use crate::layout::Layout;

/// A logical tensor: its global shape, and the local tensors that hold it, in one or more layouts.
#[derive(Debug, Clone)]
pub(super) struct LogicalTensor {
    pub(super) global: TensorIr,
    /// The layout in which it came to be.
    layout: Layout,
    versions: Vec<(Layout, TensorId)>,
    pub(super) state: TensorState,
    /// Whether it is a parameter, or one with its elements moved: not meant to be whole anywhere.
    pub(super) parameter: bool,
    /// The operation that made it, if that only moves elements: another version of its input gives one of this.
    pub(super) moved: Option<Box<OperationIr>>,
}

/// How a tensor comes to be.
#[derive(Debug, Clone)]
pub(super) enum TensorState {
    /// It is there.
    Made,
    /// A sum that was not made yet; then there are no versions.
    Waiting(WaitingSum),
    /// An operation that is run in whatever layout is asked for; whole tensors are enough for it.
    Planned(Box<OperationIr>),
}

/// A partial term and one that is not, local tensors both, that are to be added once the partial one is reduced.
#[derive(Debug, Clone)]
pub(super) struct WaitingSum {
    pub(super) partial: TensorIr,
    pub(super) whole: TensorIr,
    /// How the whole term lies: whole, or split along a dim, as then the sum will be.
    pub(super) layout: Layout,
}

impl LogicalTensor {
    pub(super) fn new(global: TensorIr, layout: Layout, local: TensorId) -> Self {
        Self {
            global,
            layout,
            versions: vec![(layout, local)],
            state: TensorState::Made,
            parameter: false,
            moved: None,
        }
    }

    pub(super) fn parameter(global: TensorIr, layout: Layout) -> Self {
        let local = global.id;
        Self { parameter: true, ..Self::new(global, layout, local) }
    }

    pub(super) fn waiting(global: TensorIr, sum: WaitingSum) -> Self {
        Self::without_versions(global, Layout::Partial, TensorState::Waiting(sum))
    }

    pub(super) fn planned(global: TensorIr, op: OperationIr) -> Self {
        Self::without_versions(global, Layout::Replicated, TensorState::Planned(Box::new(op)))
    }

    fn without_versions(global: TensorIr, layout: Layout, state: TensorState) -> Self {
        Self { global, layout, versions: Vec::new(), state, parameter: false, moved: None }
    }

    /// The layout that rules should see: a partial tensor counts as the layout that it was moved to.
    pub(super) fn layout(&self) -> Layout {
        match self.layout {
            Layout::Partial if self.version(Layout::Replicated).is_some() => Layout::Replicated,
            Layout::Partial => {
                let mut made = self.versions.iter().map(|(layout, _)| *layout);
                made.find(|layout| *layout != Layout::Partial).unwrap_or(Layout::Partial)
            }
            layout => layout,
        }
    }

    pub(super) fn version(&self, layout: Layout) -> Option<TensorId> {
        self.versions.iter().find(|(have, _)| *have == layout).map(|(_, id)| *id)
    }

    pub(super) fn add(&mut self, layout: Layout, local: TensorId) {
        self.versions.push((layout, local));
    }

    /// Adds a version that takes the place of the layout in which the tensor came.
    pub(super) fn prefer(&mut self, layout: Layout, local: TensorId) {
        self.layout = layout;
        self.add(layout, local);
    }

    pub(super) fn elements(&self) -> u64 {
        self.global.shape.num_elements() as u64
    }

    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.state, TensorState::Waiting(_))
    }

    pub(super) fn is_planned(&self) -> bool {
        matches!(self.state, TensorState::Planned(_))
    }

    /// Whether it is planned as nothing but zeros, which are as well the sum of zeros.
    pub(super) fn is_planned_zeros(&self) -> bool {
        let TensorState::Planned(op) = &self.state else { return false };
        is_zeros(op)
    }

    /// The local tensor `id` that holds it in this layout.
    pub(super) fn local(&self, layout: Layout, id: TensorId, degree: usize) -> TensorIr {
        let mut shape = self.global.shape.clone();
        if let Layout::Sharded(dim) = layout {
            shape[dim] /= degree;
        }
        TensorIr::uninit(id, shape, self.global.dtype)
    }
}
