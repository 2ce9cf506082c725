//! The tensors that a capture names, in the capture's own ids.

use std::collections::{HashMap, HashSet};

use burn::module::ParamId;
use burn_ir::TensorId;

use super::edges::EdgeTensor;
use super::module::Inventory;

/// What the closure of a capture leaves behind, in the capture's own tensor ids.
#[derive(Default)]
pub(crate) struct Recording {
    pub(crate) inventory: Inventory,
    /// Tensor of every parameter and running statistic.
    pub(crate) params: HashMap<ParamId, TensorId>,
    pub(crate) running: HashSet<ParamId>,
    pub(crate) gradients: HashMap<ParamId, TensorId>,
    pub(crate) inputs: Vec<EdgeTensor>,
    pub(crate) outputs: Vec<EdgeTensor>,
    /// None if this is a forward alone.
    pub(crate) loss: Option<EdgeTensor>,
    pub(crate) weight: Option<EdgeTensor>,
    /// An operation that stands between forward and backward.
    pub(crate) marker: Option<TensorId>,
}
