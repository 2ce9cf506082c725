//! The layers of a model, read from its parameters.

use std::collections::HashSet;

use burn::module::Module;

use crate::layout::Layout;
use crate::params::visit_floats;

/// The structs of a model that hold parameters, in its order. One that several share is the first one's.
pub(super) fn layers<M: Module>(model: &M) -> Vec<Layer> {
    let (mut seen, mut layers) = (HashSet::new(), Vec::<Layer>::new());
    visit_floats(model, &mut |param| {
        let kind = |holder: &str| holder.strip_prefix("Struct:").unwrap_or(holder).to_owned();
        let places = param.module_path().places().iter().map(|(name, holder)| (name.clone(), kind(holder)));
        let mut place: Vec<(String, String)> = places.collect();
        let Some((field, kind)) = place.pop().filter(|_| seen.insert(param.id())) else { return };
        let field = (field, param.dims());
        match layers.last_mut() {
            Some(layer) if layer.place == place => layer.fields.push(field),
            _ => layers.push(Layer { place, kind, fields: vec![field] }),
        }
    });
    layers
}

/// What of a layer is split.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum LinearSplit {
    /// What it gives.
    Columns,
    /// What it takes.
    Rows,
    /// Nothing.
    Whole,
}

/// Parameters in one struct.
pub(super) struct Layer {
    /// Names of the fields that lead to it, and the types of the structs that these are in.
    place: Vec<(String, String)>,
    pub kind: String,
    pub fields: Vec<(String, Vec<usize>)>,
}

impl Layer {
    pub fn path(&self, field: &str) -> String {
        self.place.iter().map(|(name, _)| name.as_str()).chain([field]).collect::<Vec<_>>().join(".")
    }

    pub fn parent(&self) -> &[(String, String)] {
        self.place.split_last().map_or(&[][..], |(_, parent)| parent)
    }

    /// The name of its field, and the type of the struct that it is in.
    pub fn role(&self) -> (&str, &str) {
        self.place.last().map_or(("", ""), |(name, holder)| (name.as_str(), holder.as_str()))
    }

    pub fn weight(&self) -> Option<&[usize]> {
        self.fields.iter().find(|(name, _)| name == "weight").map(|(_, dims)| dims.as_slice())
    }

    /// The dims of the weight that stand for what the layer takes and gives.
    pub fn ends(&self) -> Option<[usize; 2]> {
        match self.kind.as_str() {
            "Linear" | "ConvTranspose1d" | "ConvTranspose2d" | "ConvTranspose3d" => Some([0, 1]),
            "Conv1d" | "Conv2d" | "Conv3d" => Some([1, 0]),
            _ => None,
        }
    }

    /// Whether a dim of this size can be divided over the ranks: evenly, or with an eighth more of padding at most,
    /// which linear layers and embeddings can go on with.
    pub fn divides(&self, size: usize, degree: usize, pads: bool) -> bool {
        let pads = pads && matches!(self.kind.as_str(), "Linear" | "Embedding");
        size > 0 && size.next_multiple_of(degree) - size <= if pads { size / 8 } else { 0 }
    }

    pub fn is_norm(&self) -> bool {
        self.kind.contains("Norm")
    }

    /// Whether it is one of several layers that take the same: query, key and value of an attention, or the two of a
    /// gated feed-forward. As far as the types that burn-nn has and the names that the field uses tell.
    pub fn is_beside(&self, other: &Self) -> bool {
        const TOGETHER: [&[&str]; 9] = [
            &["query", "key", "value"],
            &["q_proj", "k_proj", "v_proj"],
            &["q_lin", "k_lin", "v_lin"],
            &["q", "k", "v"],
            &["wq", "wk", "wv"],
            &["to_q", "to_k", "to_v"],
            &["gate_proj", "up_proj"],
            &["gate", "up"],
            &["wi_0", "wi_1"],
        ];
        let ((name, holder), (before, _)) = (self.role(), other.role());
        let known = match holder {
            "MultiHeadAttention" | "CrossAttention" => ![name, before].contains(&"output"),
            "SwiGlu" => true,
            _ => TOGETHER.iter().any(|names| names.contains(&name) && names.contains(&before)),
        };
        known && self.parent() == other.parent()
    }

    /// Whether what it gives is cut into heads, as far as names tell.
    pub fn gives_heads(&self) -> bool {
        let (name, holder) = self.role();
        let attention = ["MultiHeadAttention", "CrossAttention"].contains(&holder) && name != "output";
        let first = |word: char| name.starts_with(word) || name.ends_with(word);
        let short = name.len() <= 2 || name.contains('_');
        attention
            || ["query", "key", "value"].iter().any(|word| name.contains(word))
            || (short && "qkv".chars().any(first) && !name.contains("up") && !name.contains("down"))
            || name.contains("attn")
            || name.contains("qkv")
    }

    pub fn layout(&self, cut: LinearSplit, field: &str, dims: &[usize], degree: usize) -> Layout {
        let possible = |dim: usize, pads: bool| dims.get(dim).is_some_and(|size| self.divides(*size, degree, pads));
        let along = |dim: usize, pads| if possible(dim, pads) { Layout::Sharded(dim) } else { Layout::Replicated };
        match (self.ends(), self.kind.as_str(), field) {
            (None, ..) if cut == LinearSplit::Whole => Layout::Replicated,
            (Some([takes, gives]), _, "weight") => match cut {
                LinearSplit::Columns => along(gives, true),
                LinearSplit::Rows => along(takes, true),
                LinearSplit::Whole => Layout::Replicated,
            },
            (Some(_), _, _) => {
                if cut == LinearSplit::Columns && dims.len() == 1 {
                    along(0, true)
                } else {
                    Layout::Replicated
                }
            }
            (None, "Embedding", _) => {
                if possible(0, true) {
                    along(0, true)
                } else {
                    along(1, false)
                }
            }
            _ if dims.len() > 1 => {
                (0..dims.len()).rev().find(|dim| possible(*dim, false)).map_or(Layout::Replicated, Layout::Sharded)
            }
            _ => Layout::Replicated,
        }
    }
}
