//! From operations to a program that frees each tensor at its last use.
//!
//! The statuses that burn records are incomplete (a tensor whose last handle dies unread is never freed), and passes
//! change who reads what. So they are worked out anew: operations whose results nobody needs are left out, the last
//! reader of a tensor consumes it and may work in place, and results leave the interpreter right after they are made.

use std::collections::{HashMap, HashSet};

use burn_ir::{IrVisitorMut, OperationIr, TensorId, TensorIr, TensorStatus};

use super::step::StepGraph;

/// One action of a program.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    Run(Box<OperationIr>),
    /// The tensor has had its last reader, which could not consume it itself.
    Free(TensorIr),
    /// A result is ready. If nothing reads it later it is moved out, else shared.
    Give(TensorIr),
}

/// What a step needs of memory beside parameters, inputs and constants, assuming that views copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The most bytes that are alive at once.
    pub peak: usize,
    /// Bytes still alive after the step, results included.
    pub left_over: usize,
}

impl MemoryEstimate {
    /// The operations as a capture gives them: nothing is freed, since they say nothing about last uses.
    pub fn of_operations(operations: &[OperationIr]) -> Self {
        Self::of(operations.iter().map(Step::Run))
    }

    pub(crate) fn of_program(program: &[Action]) -> Self {
        Self::of(program.iter().map(|action| match action {
            Action::Run(op) => Step::Run(op),
            Action::Free(tensor) => Step::Free(tensor.id),
            // A result stays alive with whoever took it.
            Action::Give(_) => Step::Nothing,
        }))
    }

    fn of<'a>(steps: impl Iterator<Item = Step<'a>>) -> Self {
        let mut alive: HashMap<TensorId, usize> = HashMap::new();
        let (mut now, mut peak) = (0, 0);
        for step in steps {
            match step {
                Step::Nothing => {}
                Step::Free(id) => now -= alive.remove(&id).unwrap_or(0),
                Step::Run(op) => {
                    for out in op.outputs() {
                        let bytes = out.shape.num_elements() * out.dtype.size();
                        now += bytes;
                        now -= alive.insert(out.id, bytes).unwrap_or(0);
                    }
                    peak = peak.max(now);
                    for input in op.inputs().filter(|input| input.status == TensorStatus::ReadWrite) {
                        now -= alive.remove(&input.id).unwrap_or(0);
                    }
                }
            }
        }
        Self { peak, left_over: now }
    }
}

enum Step<'a> {
    Run(&'a OperationIr),
    Free(TensorId),
    Nothing,
}

/// The program of a graph.
pub(crate) fn program(graph: &StepGraph) -> Vec<Action> {
    let results: HashSet<TensorId> = graph.results().map(|t| t.id).collect();
    let keep: HashSet<TensorId> = graph.constants.keys().copied().collect();
    let operations = without_dead(&graph.operations, &results);
    let made: HashSet<TensorId> = operations.iter().flat_map(|op| op.outputs().map(|t| t.id)).collect();

    let mut last_reader: HashMap<TensorId, usize> = HashMap::new();
    for (index, op) in operations.iter().enumerate() {
        for input in op.inputs() {
            last_reader.insert(input.id, index);
        }
    }

    let mut program = Vec::with_capacity(operations.len() * 2);
    let mut given = HashSet::new();
    let mut give = |program: &mut Vec<Action>, tensor: &TensorIr, moved: bool| {
        if given.insert(tensor.id) {
            let status = if moved { TensorStatus::ReadWrite } else { TensorStatus::ReadOnly };
            program.push(Action::Give(TensorIr { status, ..tensor.clone() }));
        }
    };
    // A result may be a parameter, an input or a constant as it came.
    for tensor in graph.results().filter(|t| !made.contains(&t.id)) {
        give(&mut program, tensor, !last_reader.contains_key(&tensor.id) && !keep.contains(&tensor.id));
    }
    for (index, mut op) in operations.into_iter().enumerate() {
        let mut count: HashMap<TensorId, usize> = HashMap::new();
        for input in op.inputs() {
            *count.entry(input.id).or_default() += 1;
        }
        let ends = |id: &TensorId| last_reader.get(id) == Some(&index) && !keep.contains(id);
        // The interpreter fetches inputs one by one: a consuming first fetch would leave nothing for the second.
        let consumed = count.iter().filter(|(id, n)| **n == 1 && ends(id)).map(|(id, _)| *id).collect();
        let freed: Vec<TensorIr> = {
            let mut seen = HashSet::new();
            let twice = op.inputs().filter(|t| count[&t.id] > 1 && ends(&t.id) && seen.insert(t.id));
            twice.cloned().collect()
        };
        let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
        op.visit_mut(&mut SetStatus { outputs: outputs.iter().map(|t| t.id).collect(), consumed });
        program.push(Action::Run(Box::new(op)));
        program.extend(freed.into_iter().map(Action::Free));
        for out in outputs {
            let read_later = last_reader.contains_key(&out.id);
            if results.contains(&out.id) {
                give(&mut program, &out, !read_later);
            } else if !read_later {
                program.push(Action::Free(out));
            }
        }
    }
    program
}

/// The operations that the results depend on.
pub(crate) fn without_dead(operations: &[OperationIr], results: &HashSet<TensorId>) -> Vec<OperationIr> {
    let mut needed = results.clone();
    let mut alive: Vec<OperationIr> = Vec::new();
    for op in operations.iter().rev() {
        if op.outputs().any(|out| needed.contains(&out.id)) {
            needed.extend(op.inputs().map(|input| input.id));
            alive.push(op.clone());
        }
    }
    alive.reverse();
    alive
}

struct SetStatus {
    outputs: HashSet<TensorId>,
    consumed: HashSet<TensorId>,
}

impl IrVisitorMut for SetStatus {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.status = if self.outputs.contains(&tensor.id) {
            TensorStatus::NotInit
        } else if self.consumed.contains(&tensor.id) {
            TensorStatus::ReadWrite
        } else {
            TensorStatus::ReadOnly
        };
    }
}
