//! The report of a cut: parameters, cost and memory of each stage, and what crosses between them.

use std::fmt;

/// The tensors that cross from one stage to another for every micro-batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// The stage that sends.
    pub from: usize,
    /// The stage that receives.
    pub to: usize,
    /// Dims of each tensor.
    pub tensors: Vec<Vec<usize>>,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// One stage of a cut.
#[derive(Clone, Debug, PartialEq)]
pub struct StageShare {
    /// Parameters and running statistics that it holds.
    pub params: usize,
    /// Their bytes.
    pub param_bytes: u64,
    /// Its part of the counted cost of all stages, forward and backward.
    pub cost: f64,
    /// Bytes that it keeps of a micro-batch between its forward and its backward pass, beside parameters and inputs.
    pub saved_bytes: u64,
}

/// What a cut gives to each stage, and what crosses between them.
#[derive(Clone, Debug, PartialEq)]
pub struct CutReport {
    /// The stages in order.
    pub stages: Vec<StageShare>,
    /// What crosses: to later stages in the forward pass, to earlier ones in the backward pass.
    pub crossings: Vec<Crossing>,
    /// The parameters that several stages hold, each with those stages.
    pub tied: Vec<(String, Vec<usize>)>,
}

impl CutReport {
    /// Bytes that cross for one micro-batch, in the forward and in the backward pass.
    pub fn bytes(&self) -> [u64; 2] {
        let of = |forward| self.crossings.iter().filter(|c| (c.from < c.to) == forward).map(|c| c.bytes).sum();
        [of(true), of(false)]
    }
}

impl fmt::Display for CutReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (stage, share) in self.stages.iter().enumerate() {
            let StageShare { params, param_bytes, cost, saved_bytes } = share;
            let cost = 100.0 * cost;
            writeln!(
                f,
                "stage {stage}: {params} parameters of {param_bytes} bytes, {cost:.1} % of the cost, keeps {saved_bytes} \
                 bytes a micro-batch"
            )?;
        }
        for Crossing { from, to, tensors, bytes } in &self.crossings {
            writeln!(f, "{from} -> {to}: {bytes} bytes a micro-batch in {} tensors {tensors:?}", tensors.len())?;
        }
        for (path, stages) in &self.tied {
            writeln!(f, "`{path}` is on stages {stages:?}")?;
        }
        Ok(())
    }
}
