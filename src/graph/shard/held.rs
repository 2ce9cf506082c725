//! What the ranks hold of each logical tensor.

use burn_ir::{TensorId, TensorIr};

use crate::layout::Layout;

/// A logical tensor: its global shape, and the local tensors that hold it, in one or more layouts.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) global: TensorIr,
    /// The layout in which it came to be.
    layout: Layout,
    versions: Vec<(Layout, TensorId)>,
    /// A sum that was not made yet; then there are no versions.
    pub(super) waiting: Option<WaitingSum>,
}

/// A partial and a whole term that are to be added once the partial one is reduced.
#[derive(Debug, Clone)]
pub(super) struct WaitingSum {
    pub(super) partial: TensorIr,
    pub(super) whole: TensorIr,
}

impl Held {
    pub(super) fn new(global: TensorIr, layout: Layout, local: TensorId) -> Self {
        Self { global, layout, versions: vec![(layout, local)], waiting: None }
    }

    pub(super) fn waiting(global: TensorIr, sum: WaitingSum) -> Self {
        Self { global, layout: Layout::Replicated, versions: Vec::new(), waiting: Some(sum) }
    }

    /// The layout that rules should see: what was partial is whole once somebody has had it reduced.
    pub(super) fn layout(&self) -> Layout {
        match self.layout {
            Layout::Partial if self.version(Layout::Replicated).is_some() => Layout::Replicated,
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

    /// The local tensor `id` that holds it in this layout.
    pub(super) fn local(&self, layout: Layout, id: TensorId, degree: usize) -> TensorIr {
        let mut shape = self.global.shape.clone();
        if let Layout::Sharded(dim) = layout {
            shape[dim] /= degree;
        }
        TensorIr::uninit(id, shape, self.global.dtype)
    }
}
