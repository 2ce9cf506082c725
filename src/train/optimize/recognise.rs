//! Recognises an optimizer that was checked before.

use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::Tensor;
use burn_pack::Reader;

use crate::graph::{CheckedOptimizers, StateLayout, Witness};
use crate::tensor::PlainTensor;

/// An optimizer that is about to step.
pub(in crate::train) struct Met {
    checked: CheckedOptimizers,
    /// Whether it was recognised.
    pub known: bool,
    witness: Option<Witness>,
}

impl Met {
    pub fn new(optim: &ModuleOptimizer, checked: &CheckedOptimizers) -> Self {
        let known = checked.is_known(address(optim), |witness| layout(optim, witness));
        Self { checked: checked.clone(), known, witness: None }
    }

    /// Chooses by what it is recognised the next time, if it is new: it is to update `model` by these gradients.
    pub fn with_witness<M: Module>(self, model: &M, grads: &GradientsParams) -> Self {
        if self.known {
            return self;
        }
        let mut smallest = Smallest { grads, found: None };
        model.visit(&mut smallest);
        Self { witness: smallest.found.map(|(_, witness)| witness), ..self }
    }

    /// Remembers it after its step.
    pub fn remember(self, optim: &ModuleOptimizer) {
        if let Some(witness) = self.witness {
            let layout = layout(optim, witness.id);
            self.checked.remember(address(optim), witness, layout);
        }
    }
}

pub(super) fn address(optim: &ModuleOptimizer) -> usize {
    std::ptr::from_ref(optim).addr()
}

/// The layout of an optimizer's state of a parameter; empty if it has none.
fn layout(optim: &ModuleOptimizer, witness: ParamId) -> StateLayout {
    // burn writes out the state of all parameters at once. A new group makes it forget the others, of a copy that
    // shares the tensors.
    let others = ParamGroup::all().exclude(ParamGroup::from_ids(vec![witness]));
    let record = optim.clone().with_group(others, SgdConfig::new().build(), None).to_record();
    let Some(reader) = record.into_bytes().ok().and_then(|bytes| Reader::from_bytes(bytes).ok()) else {
        return StateLayout::new();
    };
    let mut layout: StateLayout = reader.scalars().keys().map(|name| (name.clone(), Vec::new())).collect();
    for tensor in reader.into_tensors().into_iter().flatten() {
        if let Ok((name, _, shape, ..)) = tensor.into_parts() {
            layout.push((name, shape.to_vec()));
        }
    }
    layout.sort();
    layout
}

/// Finds the smallest parameter that has a gradient.
struct Smallest<'a> {
    grads: &'a GradientsParams,
    found: Option<(usize, Witness)>,
}

impl ModuleVisitor for Smallest<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.grads.get::<D>(param.id) else { return };
        let elements = gradient.shape().num_elements();
        if self.found.as_ref().is_none_or(|(least, _)| elements < *least) {
            let on_host = PlainTensor::from(gradient).on_flex();
            self.found = Some((elements, Witness { id: param.id, on_host }));
        }
    }
}
