//! Assigns parameters to stages.

use serde::{Deserialize, Serialize};

use super::balance::balanced;
use super::cost::operation_cost;
use crate::Error;
use crate::graph::StepGraph;
use crate::plan::{compress_paths, matches};

/// How a model is cut into stages: the stage of each parameter, from which that of every operation follows.
///
/// Patterns are those of a [`Plan`](crate::plan::Plan): paths in which `*` stands for any characters. Parameters are
/// given to stages in the order in which the model uses them; several that are used side by side may go anyhow. A
/// parameter that is used in several places belongs to the stage of the first; the other stages that use it hold it
/// too.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// So that the slowest stage is as fast as possible, by the [counted cost](operation_cost) of all operations,
    /// forward and backward, with what is sent and received. Embedding and head count like everything else.
    #[default]
    Balanced,
    /// As [`Balanced`](Self::Balanced), by costs that were measured: of each operation of the captured step, in any
    /// unit. [`Pipelined::measure`](crate::pipeline_parallel::Pipelined::measure) measures them. What is sent and
    /// received counts nothing.
    Measured(Vec<f64>),
    /// The patterns of each stage; a parameter belongs to the first stage of which one matches.
    Patterns(Vec<Vec<String>>),
    /// The pattern of the first parameter of each stage but the first, in the order of the module's fields.
    Before(Vec<String>),
    /// The path and the stage of every parameter.
    Listed(Vec<(String, usize)>),
}

impl Cut {
    /// [`Patterns`](Self::Patterns), from anything like strings.
    pub fn patterns<S: Into<String>>(stages: impl IntoIterator<Item = impl IntoIterator<Item = S>>) -> Self {
        Self::Patterns(stages.into_iter().map(|patterns| patterns.into_iter().map(Into::into).collect()).collect())
    }

    /// [`Before`](Self::Before), from anything like strings.
    pub fn before<S: Into<String>>(patterns: impl IntoIterator<Item = S>) -> Self {
        Self::Before(patterns.into_iter().map(Into::into).collect())
    }

    /// [`Listed`](Self::Listed), from anything like strings.
    pub fn listed<S: Into<String>>(stages: impl IntoIterator<Item = (S, usize)>) -> Self {
        Self::Listed(stages.into_iter().map(|(path, stage)| (path.into(), stage)).collect())
    }

    /// The stage of each parameter at these paths, if that can be said without a captured step.
    ///
    /// # Errors
    /// [`Error::Plan`] if patterns or list are not for `stages` stages, a pattern matches nothing or only what another
    /// has matched, a listed path does not exist, or a parameter is given to no stage.
    pub fn by_path(&self, paths: &[&str], stages: usize) -> Result<Option<Vec<usize>>, Error> {
        match self {
            Self::Balanced | Self::Measured(_) => Ok((stages == 1).then(|| vec![0; paths.len()])),
            Self::Patterns(patterns) => by_patterns(patterns, paths, stages).map(Some),
            Self::Before(patterns) => by_boundaries(patterns, paths, stages).map(Some),
            Self::Listed(list) => by_list(list, paths, stages).map(Some),
        }
    }

    /// The stage of each parameter of a captured step.
    ///
    /// # Errors
    /// [`Error::Plan`] as [`by_path`](Self::by_path), or if the measured costs are not those of this step.
    pub fn homes(&self, graph: &StepGraph, stages: usize) -> Result<Vec<usize>, Error> {
        let paths: Vec<&str> = graph.params.iter().map(|param| param.path.as_str()).collect();
        if let Some(homes) = self.by_path(&paths, stages)? {
            return Ok(homes);
        }
        match self {
            Self::Measured(costs) if costs.len() != graph.operations.len() => {
                let (operations, costs) = (graph.operations.len(), costs.len());
                wrong(format!("there are measured costs of {costs} operations, but the step has {operations}"))
            }
            Self::Measured(costs) if costs.iter().any(|cost| !(cost.is_finite() && *cost >= 0.0)) => {
                wrong("measured costs must be finite and not negative: `Pipelined::measure` gives such".into())
            }
            Self::Measured(costs) => balanced(graph, stages, |op| costs[op], false),
            _ => balanced(graph, stages, |op| operation_cost(&graph.operations[op]) as f64, true),
        }
    }
}

fn wrong<T>(problem: String) -> Result<T, Error> {
    Err(Error::Plan { problem })
}

fn unmatched(pattern: &str, paths: &[&str]) -> String {
    let paths = compress_paths(paths.iter().copied());
    format!("pattern `{pattern}` of the cut matches none of the parameters {paths}; `*` stands for any characters")
}

fn by_patterns(patterns: &[Vec<String>], paths: &[&str], stages: usize) -> Result<Vec<usize>, Error> {
    if patterns.len() != stages {
        return wrong(format!(
            "there are patterns for {} pipeline stages, but the pipeline has {stages}: give one list of patterns a stage",
            patterns.len()
        ));
    }
    let stage = |path: &str| patterns.iter().position(|patterns| patterns.iter().any(|pattern| matches(pattern, path)));
    for pattern in patterns.iter().flatten() {
        if !paths.iter().any(|path| matches(pattern, path)) {
            return wrong(unmatched(pattern, paths));
        }
    }
    let homes = paths.iter().map(|path| match stage(path) {
        Some(stage) => Ok(stage),
        None => wrong(format!("no pattern of the cut gives parameter `{path}` to a stage: end with `*`")),
    });
    homes.collect()
}

fn by_boundaries(patterns: &[String], paths: &[&str], stages: usize) -> Result<Vec<usize>, Error> {
    if patterns.len() + 1 != stages {
        return wrong(format!(
            "a pipeline of {stages} stages has {} boundaries, but {} patterns say before which parameter to cut",
            stages - 1,
            patterns.len()
        ));
    }
    let mut starts = Vec::with_capacity(patterns.len());
    for pattern in patterns {
        let Some(start) = paths.iter().position(|path| matches(pattern, path)) else {
            return wrong(unmatched(pattern, paths));
        };
        if let Some(before) = starts.last().filter(|before| start <= **before) {
            return wrong(format!(
                "pattern `{pattern}` cuts before `{}`, which does not come after `{}`, where the stage before begins",
                paths[start], paths[*before]
            ));
        }
        starts.push(start);
    }
    Ok((0..paths.len()).map(|place| starts.iter().filter(|start| **start <= place).count()).collect())
}

fn by_list(list: &[(String, usize)], paths: &[&str], stages: usize) -> Result<Vec<usize>, Error> {
    if let Some((path, _)) = list.iter().find(|(path, _)| !paths.contains(&path.as_str())) {
        return wrong(format!("the cut lists a parameter `{path}`, which is none of {paths:?}"));
    }
    let homes = paths.iter().map(|path| match list.iter().find(|(listed, _)| listed == path) {
        Some((_, stage)) if *stage < stages => Ok(*stage),
        Some((_, stage)) => wrong(format!("the cut lists `{path}` for stage {stage}, but there are {stages} stages")),
        None => wrong(format!("the cut does not list parameter `{path}`")),
    });
    homes.collect()
}
