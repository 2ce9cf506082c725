//! What a partition put into a graph.

use std::fmt;

use super::collectives::CollectiveKind;
use super::products::{FusedProduct, ProductKind};
use crate::graph::origin::at;

/// One collective of a partitioned graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collective {
    /// What it does.
    pub kind: CollectiveKind,
    /// Dims of the logical tensor.
    pub dims: Vec<usize>,
    /// Whether it belongs to the forward pass.
    pub forward: bool,
    /// The operation that needed it, or `result`.
    pub reader: String,
    /// The path of the layer of the model that this belongs to: the one that holds the parameter that it reads, or from
    /// which the latest came of what it reads. Empty before the first layer.
    pub layer: String,
}

/// An operation that had split inputs but no rule to run on them: they were gathered, and it runs whole on every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// The operation.
    pub operation: String,
    /// Dims of its first output.
    pub dims: Vec<usize>,
    /// Whether it belongs to the forward pass.
    pub forward: bool,
    /// The path of the layer, as of a [`Collective`].
    pub layer: String,
}

/// What a [`partition`](super::partition) put in over one axis, and what it could not split.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardReport {
    /// Name of the axis.
    pub axis: String,
    /// The collectives in order, the same on every rank.
    pub collectives: Vec<Collective>,
    /// The operations that run whole although some of their inputs were split.
    pub fallbacks: Vec<Fallback>,
    /// The products that run together with one of these collectives, if [`fuse_products`](super::fuse_products) has
    /// run.
    pub products: Vec<FusedProduct>,
}

impl ShardReport {
    /// How many fused products of a kind there are in the forward and in the backward pass.
    pub fn fused(&self, kind: ProductKind) -> [usize; 2] {
        let of = |forward| self.products.iter().filter(|p| p.kind == kind && p.forward == forward).count();
        [of(true), of(false)]
    }

    /// How many collectives of a kind there are in the forward and in the backward pass.
    pub fn count(&self, kind: CollectiveKind) -> [usize; 2] {
        let of = |forward| self.collectives.iter().filter(|c| c.kind == kind && c.forward == forward).count();
        [of(true), of(false)]
    }
}

impl fmt::Display for ShardReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Collective { kind, dims, forward, reader, layer } in &self.collectives {
            let pass = if *forward { "forward" } else { "backward" };
            let reader = at(reader.clone(), layer);
            writeln!(f, "{pass:8} {}.{} {dims:?} for {reader}", self.axis, kind.name())?;
        }
        for product in &self.products {
            writeln!(f, "{product}")?;
        }
        for Fallback { operation, dims, forward, layer } in &self.fallbacks {
            let pass = if *forward { "forward" } else { "backward" };
            writeln!(f, "{pass:8} whole on every rank: {} {dims:?}", at(operation.clone(), layer))?;
        }
        Ok(())
    }
}
