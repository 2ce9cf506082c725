//! A plan from the types of a model's layers alone.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::{Plan, concise};
use crate::layout::Layout;

impl Plan {
    /// A plan for a model whose step is not known yet, from the types and the order of its layers: attention and
    /// feed-forward of burn-nn as [`megatron`](Self::megatron) has them, other linear layers and convolutions by columns
    /// and rows in turn where one feeds the next, embeddings by rows, recurrent gates by columns, anything else of two dims
    /// or more along its last. What the degree does not divide stays whole, and so do normalisations. Makes no lazy
    /// parameter.
    ///
    /// It is a guess at how layers are connected: right in numbers whatever they are, but
    /// [`suggest_for`](Self::suggest_for), which looks at the step itself and counts what is communicated, finds better ones.
    pub fn suggest<M: Module>(model: &M, degree: usize) -> Self {
        let mut layers = Layers::default();
        model.visit(&mut layers);
        let mut layouts = Vec::new();
        let mut before: Option<(&Layer, Cut)> = None;
        for layer in &layers.layers {
            let cut = layer.cut(before.filter(|(other, _)| other.parent() == layer.parent()), degree);
            for (field, dims) in &layer.fields {
                layouts.push((layer.path(field), layer.layout(cut, field, dims, degree)));
            }
            if layer.is_chained() {
                before = Some((layer, cut));
            }
        }
        concise(&layouts)
    }
}

/// What of a layer is split.
#[derive(Clone, Copy, PartialEq)]
enum Cut {
    /// What it gives.
    Columns,
    /// What it takes.
    Rows,
    /// Nothing.
    Whole,
}

/// Parameters in one struct.
struct Layer {
    /// Names of the fields that lead to it, and the types of the structs that these are in.
    place: Vec<(String, String)>,
    kind: String,
    fields: Vec<(String, Vec<usize>)>,
}

impl Layer {
    fn path(&self, field: &str) -> String {
        self.place.iter().map(|(name, _)| name.as_str()).chain([field]).collect::<Vec<_>>().join(".")
    }

    fn parent(&self) -> &[(String, String)] {
        self.place.split_last().map_or(&[][..], |(_, parent)| parent)
    }

    fn weight(&self) -> Option<&[usize]> {
        self.fields.iter().find(|(name, _)| name == "weight").map(|(_, dims)| dims.as_slice())
    }

    /// The dims of the weight that stand for what the layer takes and gives.
    fn ends(&self) -> Option<[usize; 2]> {
        match self.kind.as_str() {
            "Linear" | "ConvTranspose1d" | "ConvTranspose2d" | "ConvTranspose3d" => Some([0, 1]),
            "Conv1d" | "Conv2d" | "Conv3d" => Some([1, 0]),
            _ => None,
        }
    }

    fn is_chained(&self) -> bool {
        self.ends().is_some()
    }

    fn cut(&self, before: Option<(&Self, Cut)>, degree: usize) -> Cut {
        let (Some([takes, gives]), Some(weight)) = (self.ends(), self.weight()) else { return Cut::Whole };
        let possible = |dim: usize| weight.get(dim).is_some_and(|size| size.is_multiple_of(degree));
        let (name, holder) = self.place.last().map_or(("", ""), |(name, holder)| (name.as_str(), holder.as_str()));
        let fed = before.is_some_and(|(other, cut)| {
            let gave = other.ends().zip(other.weight()).and_then(|([_, gives], weight)| weight.get(gives).copied());
            cut == Cut::Columns && gave == weight.get(takes).copied()
        });
        let rows = match (holder, name) {
            ("MultiHeadAttention" | "CrossAttention", name) => name == "output",
            ("PositionWiseFeedForward", name) => name == "linear_outer",
            ("SwiGlu" | "GateController", _) => false,
            _ => fed,
        };
        match (rows, possible(takes), possible(gives)) {
            (true, true, _) | (false, true, false) => Cut::Rows,
            (_, _, true) => Cut::Columns,
            _ => Cut::Whole,
        }
    }

    fn layout(&self, cut: Cut, field: &str, dims: &[usize], degree: usize) -> Layout {
        let possible = |dim: usize| dims.get(dim).is_some_and(|size| size.is_multiple_of(degree));
        let along = |dim: usize| if possible(dim) { Layout::Sharded(dim) } else { Layout::Replicated };
        match (self.ends(), self.kind.as_str(), field) {
            (Some([takes, gives]), _, "weight") => match cut {
                Cut::Columns => along(gives),
                Cut::Rows => along(takes),
                Cut::Whole => Layout::Replicated,
            },
            (Some(_), _, _) => {
                if cut == Cut::Columns && dims.len() == 1 {
                    along(0)
                } else {
                    Layout::Replicated
                }
            }
            (None, "Embedding", _) => {
                if possible(0) {
                    along(0)
                } else {
                    along(1)
                }
            }
            _ if dims.len() > 1 => (0..dims.len()).rev().find(|dim| possible(*dim)).map_or(Layout::Replicated, along),
            _ => Layout::Replicated,
        }
    }
}

#[derive(Default)]
struct Layers {
    layers: Vec<Layer>,
    path: Vec<(String, String)>,
}

impl ModuleVisitor for Layers {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(((field, kind), place)) = self.path.split_last() else { return };
        let dims = param.lazy_shape().to_vec();
        match self.layers.last_mut() {
            Some(layer) if layer.place == place => layer.fields.push((field.clone(), dims)),
            _ => {
                let fields = vec![(field.clone(), dims)];
                self.layers.push(Layer { place: place.to_vec(), kind: kind.clone(), fields });
            }
        }
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        let kind = container.strip_prefix("Struct:").unwrap_or(container);
        self.path.push((name.into(), kind.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}
