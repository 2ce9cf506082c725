//! Routes: which stages send tensors to which.

use std::collections::BTreeSet;

use super::{Direction, schedule_error};
use crate::Error;

/// Tensors that go from one stage to another in every micro-batch. To a later stage they are activations, given by the
/// forward; to an earlier one gradients, given by the backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edge {
    /// The stage that gives them.
    pub from: usize,
    /// The stage that takes them.
    pub to: usize,
    /// How many there are.
    pub tensors: usize,
}

impl Edge {
    /// `tensors` tensors from stage `from` to stage `to`.
    pub fn new(from: usize, to: usize, tensors: usize) -> Self {
        Self { from, to, tensors }
    }

    /// The way that the gradients of these activations go, or the other way round.
    pub fn reversed(self) -> Self {
        Self { from: self.to, to: self.from, tensors: self.tensors }
    }

    /// Which way the tensors travel.
    pub fn direction(&self) -> Direction {
        if self.from < self.to { Direction::Forward } else { Direction::Backward }
    }
}

/// All edges between the stages of a model. They need not be a chain: an edge may skip stages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Routes {
    edges: BTreeSet<Edge>,
    /// The same edges turned, and so in the order of the stages that take.
    by_taker: BTreeSet<Edge>,
}

impl Routes {
    /// The edges given.
    ///
    /// # Errors
    /// [`Error::Schedule`] for an edge from a stage to itself, and for two edges from one stage to the same other one.
    pub fn new(edges: impl IntoIterator<Item = Edge>) -> Result<Self, Error> {
        let mut routes = Self::default();
        for edge in edges {
            let Edge { from, to, .. } = edge;
            if from == to {
                return Err(schedule_error(format!("an edge goes from stage {from} to itself")));
            }
            if of_stage(&routes.edges, from).any(|other| other.to == to) {
                let advice = "all tensors from one stage to another are one edge";
                return Err(schedule_error(format!("there are two edges from stage {from} to stage {to}; {advice}")));
            }
            routes.add(edge);
        }
        Ok(routes)
    }

    /// One tensor from each stage to the next, and its gradient back.
    pub fn chain(stages: usize) -> Self {
        let mut routes = Self::default();
        for stage in 1..stages {
            let edge = Edge::new(stage - 1, stage, 1);
            routes.add(edge);
            routes.add(edge.reversed());
        }
        routes
    }

    fn add(&mut self, edge: Edge) {
        self.edges.insert(edge);
        self.by_taker.insert(edge.reversed());
    }

    /// All edges, in order.
    pub fn edges(&self) -> impl Iterator<Item = Edge> {
        self.edges.iter().copied()
    }

    /// The edges that bring tensors to a stage in one direction, by giving stage.
    pub fn into_stage(&self, stage: usize, direction: Direction) -> impl Iterator<Item = Edge> {
        of_stage(&self.by_taker, stage).map(Edge::reversed).filter(move |edge| edge.direction() == direction)
    }

    /// The edges that take tensors from a stage in one direction, by taking stage.
    pub fn out_of_stage(&self, stage: usize, direction: Direction) -> impl Iterator<Item = Edge> {
        of_stage(&self.edges, stage).filter(move |edge| edge.direction() == direction)
    }
}

/// The edges of a set that begin at a stage.
fn of_stage(edges: &BTreeSet<Edge>, stage: usize) -> impl Iterator<Item = Edge> {
    edges.range(Edge::new(stage, 0, 0)..=Edge::new(stage, usize::MAX, usize::MAX)).copied()
}
