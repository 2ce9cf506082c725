//! Follows which tensors of a step lie in which memory, and for how long.
//!
//! A kernel's result takes the memory of an input that ends there. burn's own operations allocate by themselves, but
//! for those that write over an input that nobody else has, as is known of them. Others, or a collective, may give what
//! they were given: such memory counts as in use until both have ended.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use burn_ir::{OperationIr, ScalarIr, TensorId, TensorIr, TensorStatus};

use super::fused::{FUSED, Kernels, TILED, makes_whole};
use super::instruction::Instruction;
use super::operation::{Class, is_view, passing_bytes, reshape, written_over};
use crate::tensor::{ALIGN, FROM};

/// Memory that tensors lie in.
#[derive(Debug)]
pub(super) struct Buffer {
    /// The tensor that it was made for.
    pub(super) made: TensorId,
    /// Rounded up if they are many.
    pub(super) bytes: usize,
    /// The first and the last instruction that it is there for, if others work in place.
    pub(super) born: usize,
    pub(super) ends: usize,
    /// The last if they do not.
    pub(super) ends_alone: usize,
    /// Whether this crate makes it.
    ours: bool,
    /// Whether it leaves the step, if others work in place and if they do not.
    pub(super) leaves: bool,
    pub(super) leaves_alone: bool,
    /// How many tensors may lie in it.
    tensors: usize,
}

impl Buffer {
    /// Whether its memory stays with the steps.
    pub(super) fn is_kept(&self) -> bool {
        self.ours && self.bytes >= FROM
    }
}

/// A tensor that is there.
#[derive(Debug)]
struct PlacedTensor {
    /// Where it lies if nothing worked in place.
    own: Option<usize>,
    /// Where else it may lie: for all results of an operation one list.
    others: Rc<BTreeSet<usize>>,
    /// Whether its elements lie one after the other, and nothing else with them.
    plain: bool,
    /// Whether they may lie so in another order of its dims.
    reordered: bool,
}

impl PlacedTensor {
    fn buffers(&self) -> impl Iterator<Item = usize> {
        self.own.into_iter().chain(self.others.iter().copied())
    }
}

/// The buffers of a program, and when each of them is there.
#[derive(Debug, Default)]
pub(super) struct BufferLifetimes {
    now: usize,
    pub(super) buffers: Vec<Buffer>,
    tensors: HashMap<TensorId, PlacedTensor>,
    /// Bytes that instructions, by their number, take only while they run.
    pub(super) passing: Vec<(usize, usize)>,
    /// How long all lists of what tensors may lie in are together.
    listed: usize,
}

impl BufferLifetimes {
    /// Of the instructions of a program, in order. Kernels are told whose memory they take.
    pub(super) fn of<'a>(program: impl IntoIterator<Item = &'a mut Instruction>, kernels: &Kernels) -> Self {
        let mut lifetimes = Self::default();
        for instruction in program {
            lifetimes.take(instruction, kernels);
            lifetimes.now += 1;
        }
        lifetimes
    }

    fn take(&mut self, instruction: &mut Instruction, kernels: &Kernels) {
        match instruction {
            Instruction::Run(op) => {
                op.inputs().for_each(|input| self.touch(input.id));
                match takes_of(op, |output, input| kernels.may_take(op, output, input) && self.ends_here(op, input)) {
                    Some(takes) => {
                        self.run_kernel(op, &takes);
                        set_takes(op, &takes);
                    }
                    None => self.run(op),
                }
                op.inputs().filter(|input| ends(input)).for_each(|input| self.forget(input.id));
            }
            Instruction::Free(tensor) => {
                self.touch(tensor.id);
                self.forget(tensor.id);
            }
            Instruction::Output(tensor) => {
                self.touch(tensor.id);
                if let Some(known) = self.tensors.get(&tensor.id) {
                    known.buffers().for_each(|buffer| self.buffers[buffer].leaves = true);
                    known.own.into_iter().for_each(|buffer| self.buffers[buffer].leaves_alone = true);
                }
                if ends(tensor) {
                    self.forget(tensor.id);
                }
            }
        }
    }

    /// Notes that a tensor is there still.
    fn touch(&mut self, id: TensorId) {
        if let Some(known) = self.tensors.get(&id) {
            known.buffers().for_each(|buffer| self.buffers[buffer].ends = self.now);
            known.own.into_iter().for_each(|buffer| self.buffers[buffer].ends_alone = self.now);
        }
    }

    fn forget(&mut self, id: TensorId) {
        if let Some(known) = self.tensors.remove(&id) {
            known.buffers().for_each(|buffer| self.buffers[buffer].tensors -= 1);
        }
    }

    /// A new tensor in memory of its own, and perhaps in that of others; `ours` says who makes it.
    fn make(&mut self, out: &TensorIr, ours: bool, others: Rc<BTreeSet<usize>>, plain: bool) {
        let bytes = match bytes_of(out) {
            large if large >= FROM => large.next_multiple_of(ALIGN),
            small => small,
        };
        let (made, now) = (out.id, self.now);
        let (leaves, leaves_alone) = (false, false);
        self.buffers.push(Buffer {
            made,
            bytes,
            born: now,
            ends: now,
            ends_alone: now,
            ours,
            leaves,
            leaves_alone,
            tensors: 0,
        });
        self.add(out, PlacedTensor { own: Some(self.buffers.len() - 1), others, plain, reordered: false });
    }

    /// A new tensor in the memory of an input.
    fn take_memory(&mut self, out: &TensorIr, input: &TensorIr, plain: bool, reordered: bool) {
        let known = self.tensors.get(&input.id);
        let (own, others) = known.map(|known| (known.own, known.others.clone())).unwrap_or_default();
        self.add(out, PlacedTensor { own, others, plain, reordered });
    }

    fn add(&mut self, out: &TensorIr, known: PlacedTensor) {
        known.buffers().for_each(|buffer| self.buffers[buffer].tensors += 1);
        self.tensors.insert(out.id, known);
        self.touch(out.id);
    }

    /// Whether the memory of an input has nothing else in it, and no use after this operation.
    fn ends_here(&self, op: &OperationIr, input: usize) -> bool {
        let Some(input) = op.inputs().nth(input).filter(|input| ends(input)) else { return false };
        let alone = |buffer: usize| self.buffers[buffer].tensors == 1;
        self.tensors.get(&input.id).is_some_and(|known| known.plain && known.buffers().all(alone))
    }

    /// The input that burn writes a result over.
    fn written_over<'a>(&self, op: &'a OperationIr, out: &TensorIr) -> Option<&'a TensorIr> {
        let fits = |(place, input): &(usize, &TensorIr)| {
            input.shape == out.shape && input.dtype == out.dtype && self.ends_here(op, *place)
        };
        op.inputs().enumerate().take(written_over(op)).find(fits).map(|(_, input)| input)
    }

    fn run_kernel(&mut self, op: &OperationIr, takes: &[Option<usize>]) {
        for (out, take) in op.outputs().zip(takes) {
            match take.and_then(|input| op.inputs().nth(input)) {
                Some(input) => self.take_memory(out, input, true, false),
                None => self.make(out, true, Rc::default(), true),
            }
        }
    }

    fn run(&mut self, op: &OperationIr) {
        if makes_whole(op) {
            return op.outputs().for_each(|out| self.make(out, true, Rc::default(), true));
        }
        let first = op.inputs().next();
        if let (true, Some(input)) = (is_view(op), first) {
            let known = self.tensors.get(&input.id);
            let [plain, reordered] = known.map_or([false; 2], |known| [known.plain, known.reordered]);
            let reshaped = reshape(op).is_some();
            for out in op.outputs() {
                match plain || reordered || !reshaped || only_units(input, out) {
                    true => self.take_memory(out, input, plain && reshaped, reordered),
                    // What does not lie in order is copied.
                    false => self.make(out, false, Rc::default(), true),
                }
            }
            return;
        }
        if matches!(op, OperationIr::Custom(op) if op.id == TILED) {
            // They lie as the operation behind wants them.
            for out in op.outputs() {
                self.make(out, true, Rc::default(), false);
                self.tensors.entry(out.id).and_modify(|known| known.reordered = true);
            }
            return;
        }
        self.passing.extend(Some((self.now, passing_bytes(op))).filter(|(_, bytes)| *bytes > 0));
        let custom = Class::of(op) == Class::Custom;
        // What it gives may be what it was given, of the same size if it is burn's: one list for all that may.
        let mut lists: HashMap<Option<usize>, Rc<BTreeSet<usize>>> = HashMap::new();
        for out in op.outputs() {
            if let Some(input) = self.written_over(op, out) {
                self.take_memory(out, input, true, false);
                continue;
            }
            let of_size = (!custom).then(|| bytes_of(out));
            let others = lists.entry(of_size).or_insert_with(|| self.ending(op, of_size)).clone();
            self.make(out, false, others, true);
        }
    }

    /// The memory of all inputs that end with an operation, of some size.
    fn ending(&mut self, op: &OperationIr, of_size: Option<usize>) -> Rc<BTreeSet<usize>> {
        let mut all = BTreeSet::new();
        let mut seen: HashSet<*const BTreeSet<usize>> = HashSet::new();
        for input in op.inputs().filter(|input| ends(input) && of_size.is_none_or(|bytes| bytes_of(input) == bytes)) {
            let Some(known) = self.tensors.get(&input.id) else { continue };
            all.extend(known.own);
            if seen.insert(Rc::as_ptr(&known.others)) {
                all.extend(known.others.iter().copied());
            }
        }
        self.listed += all.len();
        Rc::new(all)
    }
}

/// Whether an operation is the last to see a tensor.
fn ends(tensor: &TensorIr) -> bool {
    tensor.status == TensorStatus::ReadWrite
}

fn bytes_of(tensor: &TensorIr) -> usize {
    tensor.shape.num_elements() * tensor.dtype.size()
}

/// Whether only dims of 1 come or go.
fn only_units(a: &TensorIr, b: &TensorIr) -> bool {
    let others = |tensor: &TensorIr| tensor.shape.iter().copied().filter(|size| *size != 1).collect::<Vec<_>>();
    others(a) == others(b)
}

/// The input whose memory each result of a kernel takes, where `may` lets it; none if it is no kernel.
fn takes_of(op: &OperationIr, may: impl Fn(usize, usize) -> bool) -> Option<Vec<Option<usize>>> {
    let OperationIr::Custom(custom) = op else { return None };
    if custom.id != FUSED {
        return None;
    }
    let mut free: Vec<usize> = (0..custom.inputs.len()).collect();
    let take = |(output, out): (usize, &TensorIr)| {
        // Loops read a tensor under other dims as well.
        let fits =
            |input: &TensorIr| input.dtype == out.dtype && input.shape.num_elements() == out.shape.num_elements();
        let at = free.iter().position(|input| fits(&custom.inputs[*input]) && may(output, *input))?;
        Some(free.remove(at))
    };
    Some(custom.outputs.iter().enumerate().map(take).collect())
}

/// Writes behind the number of a kernel, for each result, the input that it takes, counted from 1, or 0.
fn set_takes(op: &mut OperationIr, takes: &[Option<usize>]) {
    if let OperationIr::Custom(op) = op {
        op.scalars.truncate(1);
        op.scalars.extend(takes.iter().map(|input| ScalarIr::UInt(input.map_or(0, |input| input as u64 + 1))));
    }
}

#[cfg(test)]
mod tests {
    use burn::prelude::*;
    use burn::tensor::{DType, Shape};
    use burn_ir::CustomOpIr;

    use super::super::capture_step;
    use super::super::liveness::{Program, program};
    use super::*;

    /// Nothing grows with the paths from one tensor to another, or with the square of what an operation reads.
    #[test]
    fn lists_of_memory_stay_short() {
        let device = Device::flex().autodiff();
        let model = burn::nn::LinearConfig::new(8, 8).init(&device);
        let x = Tensor::<2>::ones([8, 8], &device);
        let graph = capture_step(&model, x, |model: &burn::nn::Linear, x| {
            (0..40).fold(model.forward(x), |x, _| x.clone() + x.transpose()).mean()
        });
        let Program { mut instructions, fused } = program(&graph.unwrap(), true);
        let lifetimes = BufferLifetimes::of(&mut instructions, &fused.unwrap().0);
        assert!(lifetimes.listed < 100 * 100 / 2, "{}", lifetimes.listed);

        let many = 300;
        let tensor = |number: usize| {
            let shape = Shape::from([64]);
            TensorIr {
                status: TensorStatus::ReadWrite,
                ..TensorIr::uninit(TensorId::new(number as u64), shape, DType::F32)
            }
        };
        let tensors = |from: usize| (from..from + many).map(tensor).collect::<Vec<_>>();
        let run = |id: &str, inputs, outputs| {
            let op = CustomOpIr { id: id.into(), inputs, outputs, scalars: Vec::new() };
            Instruction::Run(Box::new(OperationIr::Custom(op)))
        };
        let mut bucket: Vec<Instruction> = (0..many).map(|number| run("made", vec![], vec![tensor(number)])).collect();
        bucket.push(run("start", tensors(0), tensors(many)));
        bucket.push(run("wait", tensors(many), tensors(2 * many)));
        let lifetimes = BufferLifetimes::of(&mut bucket, &Kernels::default());
        assert!(lifetimes.listed <= 4 * many, "{}", lifetimes.listed);
    }
}
