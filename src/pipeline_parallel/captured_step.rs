//! Steps and forward passes captured for one kind of batch, and cut into stages.

use std::collections::HashSet;

use burn::module::ParamId;

use super::graph_stage::GraphStage;
use super::output_join::OutputJoin;
use super::pipeline::Pipeline;
use crate::graph::ForwardGraph;

/// A step for one kind of batch.
pub(super) struct CapturedStep {
    pub pipeline: Pipeline,
    pub stages: Vec<GraphStage>,
    /// The parameters that get a gradient on any rank.
    pub trained: HashSet<ParamId>,
}

/// A forward pass for one kind of batch.
pub(super) struct CapturedForward<O> {
    pub pipeline: Pipeline,
    pub stages: Vec<GraphStage>,
    /// The graph for each size of micro-batch.
    pub graphs: Vec<ForwardGraph<O>>,
    pub sizes: Vec<usize>,
    /// The stage that gives each output.
    pub givers: Vec<usize>,
    /// How each output is put together.
    pub joined: Vec<OutputJoin>,
}
