//! Liveness: a program that frees each tensor after its last use, and the memory that it takes.
//!
//! The statuses that burn records are incomplete (a tensor whose last handle dies unread is never freed), and passes
//! change who reads what. So they are worked out anew: operations whose results are not needed are left out, the last
//! reader of a tensor consumes it and may work in place, and results leave the interpreter right after they are made.

use std::collections::{HashMap, HashSet};

use burn_ir::{IrVisitorMut, OperationIr, TensorId, TensorIr, TensorStatus};

use super::fused::{Kernels, fuse, taken};
use super::instruction::{Instruction, Item};
use super::memory_plan::MemoryPlan;
use super::plan_memory::plan_memory;
use super::step::StepGraph;

/// What a step needs of memory beside parameters, inputs and constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The most bytes that are alive at once. Of operations one by one, assuming that views copy; where they are fused,
    /// by the plan of where tensors lie, from the second step on: memory that steps keep is in it.
    pub peak: usize,
    /// Bytes of the tensors that are still alive after the step, results included, assuming that views copy. Memory
    /// that fused steps keep for the next is not in it, unless these tensors lie there.
    pub left_over: usize,
}

impl MemoryEstimate {
    /// The operations as a capture gives them: nothing is freed, since they say nothing about last uses.
    pub fn of_operations(operations: &[OperationIr]) -> Self {
        Self::of(operations.iter().map(MemoryEvent::Run))
    }

    pub(crate) fn of_program(program: &[Instruction]) -> Self {
        let mut alive = Alive::default();
        // A result stays alive with the caller.
        let peak = alive.run(program);
        Self { peak, left_over: alive.bytes() }
    }

    fn of<'a>(steps: impl Iterator<Item = MemoryEvent<'a>>) -> Self {
        let mut alive = Alive::default();
        let peak = steps.map(|step| alive.take(step)).max().unwrap_or(0);
        Self { peak, left_over: alive.bytes() }
    }
}

/// The tensors that are alive while programs run, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Alive {
    tensors: HashMap<TensorId, usize>,
    now: usize,
    /// Whether results leave when they are given.
    gives: bool,
}

impl Alive {
    /// Counts no result from when it is given and not read any more.
    pub(crate) fn giving() -> Self {
        Self { gives: true, ..Self::default() }
    }

    /// How many bytes there are.
    pub(crate) fn bytes(&self) -> usize {
        self.now
    }

    /// Takes in tensors that came from elsewhere.
    pub(crate) fn bind(&mut self, tensors: &[TensorIr]) {
        tensors.iter().for_each(|tensor| self.add(tensor));
    }

    /// Runs a program. Returns the most bytes that there are meanwhile.
    pub(crate) fn run(&mut self, program: &[Instruction]) -> usize {
        let mut peak = self.now;
        for action in program {
            let event = match action {
                Instruction::Run(op) => MemoryEvent::Run(op),
                Instruction::Free(tensor) => MemoryEvent::Free(tensor.id),
                Instruction::Output(tensor) if self.gives && tensor.status == TensorStatus::ReadWrite => {
                    MemoryEvent::Free(tensor.id)
                }
                Instruction::Output(_) => MemoryEvent::Nothing,
            };
            peak = peak.max(self.take(event));
        }
        peak
    }

    fn add(&mut self, tensor: &TensorIr) {
        let bytes = tensor.shape.num_elements() * tensor.dtype.size();
        self.now += bytes;
        self.now -= self.tensors.insert(tensor.id, bytes).unwrap_or(0);
    }

    fn remove(&mut self, id: &TensorId) {
        self.now -= self.tensors.remove(id).unwrap_or(0);
    }

    /// Takes in an event. Returns the most bytes that there are meanwhile.
    fn take(&mut self, event: MemoryEvent<'_>) -> usize {
        match event {
            MemoryEvent::Nothing => self.now,
            MemoryEvent::Free(id) => {
                self.remove(&id);
                self.now
            }
            MemoryEvent::Run(op) => {
                // Their memory goes on as that of results.
                taken(op).for_each(|id| self.remove(&id));
                op.outputs().for_each(|out| self.add(out));
                let peak = self.now;
                let last = op.inputs().filter(|input| input.status == TensorStatus::ReadWrite);
                last.for_each(|input| self.remove(&input.id));
                peak
            }
        }
    }
}

enum MemoryEvent<'a> {
    Run(&'a OperationIr),
    Free(TensorId),
    Nothing,
}

/// What a step runs.
pub(crate) struct Program {
    pub(crate) instructions: Vec<Instruction>,
    /// The kernels that it runs, and where they write, if groups of its operations are fused.
    pub(crate) fused: Option<(Kernels, MemoryPlan)>,
}

/// The program of a graph, with groups of its operations fused or without.
pub(crate) fn program(graph: &StepGraph, fusion: bool) -> Program {
    let results: HashSet<TensorId> = graph.results().map(|t| t.id).collect();
    let keep: HashSet<TensorId> = graph.constants.keys().copied().collect();
    let operations = without_dead(&graph.operations, &results);
    let made: HashSet<TensorId> = operations.iter().flat_map(|op| op.outputs().map(|t| t.id)).collect();
    // A result may be a parameter, an input or a constant as it came.
    let mut items: Vec<Item> =
        graph.results().filter(|t| !made.contains(&t.id)).map(|t| Item::Output(t.clone())).collect();
    for op in operations {
        let given: Vec<TensorIr> = op.outputs().filter(|out| results.contains(&out.id)).cloned().collect();
        items.push(Item::Run(Box::new(op)));
        items.extend(given.into_iter().map(Item::Output));
    }
    if !fusion {
        let [instructions] = with_lifetimes([items], &keep);
        return Program { instructions, fused: None };
    }
    let (sections, kernels) = fuse([items]);
    let mut sections = with_lifetimes(sections, &keep);
    let plan = plan_memory(&mut sections, &kernels);
    let [instructions] = sections;
    Program { instructions, fused: Some((kernels, plan)) }
}

/// Works out the lifetimes of a program in sections, which run one after the other with other programs in between.
///
/// A result is given once in each section. What is in `keep` stays for ever.
pub(crate) fn with_lifetimes<const SECTIONS: usize>(
    sections: [Vec<Item>; SECTIONS],
    keep: &HashSet<TensorId>,
) -> [Vec<Instruction>; SECTIONS] {
    let mut last_reader: HashMap<TensorId, usize> = HashMap::new();
    for (index, item) in sections.iter().flatten().enumerate() {
        match item {
            Item::Run(op) => last_reader.extend(op.inputs().map(|input| (input.id, index))),
            Item::Output(tensor) => drop(last_reader.insert(tensor.id, index)),
        }
    }
    let mut index = 0;
    sections.map(|items| {
        let mut program = Vec::with_capacity(items.len() * 2);
        let mut given = HashSet::new();
        for item in items {
            let ends = |id: &TensorId| last_reader.get(id) == Some(&index) && !keep.contains(id);
            match item {
                Item::Run(op) => run(op, ends, |id| last_reader.contains_key(id), &mut program),
                Item::Output(tensor) => {
                    if given.insert(tensor.id) {
                        let status = if ends(&tensor.id) { TensorStatus::ReadWrite } else { TensorStatus::ReadOnly };
                        program.push(Instruction::Output(TensorIr { status, ..tensor }));
                    } else if ends(&tensor.id) {
                        program.push(Instruction::Free(tensor));
                    }
                }
            }
            index += 1;
        }
        program
    })
}

/// Adds an operation, and frees what it was the last to read and what is not read at all.
fn run(
    mut op: Box<OperationIr>,
    ends: impl Fn(&TensorId) -> bool,
    is_read: impl Fn(&TensorId) -> bool,
    program: &mut Vec<Instruction>,
) {
    let mut count: HashMap<TensorId, usize> = HashMap::new();
    for input in op.inputs() {
        *count.entry(input.id).or_default() += 1;
    }
    // The interpreter fetches inputs one by one: a consuming first fetch would leave nothing for the second.
    let consumed = count.iter().filter(|(id, n)| **n == 1 && ends(id)).map(|(id, _)| *id).collect();
    let freed: Vec<TensorIr> = {
        let mut seen = HashSet::new();
        let twice = op.inputs().filter(|t| count[&t.id] > 1 && ends(&t.id) && seen.insert(t.id));
        twice.cloned().collect()
    };
    let outputs: Vec<TensorIr> = op.outputs().cloned().collect();
    op.visit_mut(&mut SetStatus { outputs: outputs.iter().map(|t| t.id).collect(), consumed });
    program.push(Instruction::Run(op));
    program.extend(freed.into_iter().map(Instruction::Free));
    program.extend(outputs.into_iter().filter(|out| !is_read(&out.id)).map(Instruction::Free));
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
