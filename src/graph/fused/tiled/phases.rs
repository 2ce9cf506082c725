//! The phases of a web: what depends on a product that the web ends in comes after it. Each is one operation.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn::tensor::DType;
use burn_ir::{CustomOpIr, MatmulOpIr, TensorId, TensorIr};

use super::super::super::operation::{Class, matmul, permute, reshape, swap_dims};
use super::super::fusion_group::MOST;
use super::super::lower::lower;
use super::flat_program::FlatProgram;
use super::web::{Role, Web};
use super::{Entering, Input, Leaving, Narrowing, TILED, Tiled};

/// What becomes of a phase.
pub(super) struct Phase {
    /// What it comes before.
    pub(super) before: usize,
    /// Views that it reads and that are made later on, which come before it too.
    pub(super) views: BTreeSet<usize>,
    pub(super) tiles: Tiled,
    pub(super) op: CustomOpIr,
}

impl FlatProgram<'_> {
    /// An operation for each phase, and what it comes before; none if one of them has no place in the program.
    pub(super) fn phases(&self, web: &Web) -> Option<Vec<Phase>> {
        let (first, last) = (*web.roles.first_key_value()?.0, *web.roles.last_key_value()?.0);
        let mut after: HashMap<TensorId, usize> = HashMap::new();
        let mut leaving: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for place in first..=last {
            let Some(op) = self.op(place) else { continue };
            let read = op.inputs().filter_map(|input| after.get(&input.id)).copied();
            let mut phase = read.max().unwrap_or(0);
            if web.roles.get(&place) == Some(&Role::Leaves) {
                leaving.entry(phase).or_default().push(place);
                phase += 1;
            }
            if phase > 0 {
                after.extend(op.outputs().map(|out| (out.id, phase)));
            }
        }
        let (mut phases, mut placed) = (Vec::new(), self.placed.clone());
        for leaving in leaving.into_values() {
            let phase = self.phase(web, &leaving, &placed)?;
            placed.extend(phase.op.outputs.iter().map(|out| (out.id, phase.before)));
            phases.push(phase);
        }
        Some(phases)
    }

    fn phase(&self, web: &Web, leaving: &[usize], placed: &HashMap<TensorId, usize>) -> Option<Phase> {
        // What it is made of, from the ends.
        let mut needed: BTreeSet<usize> = leaving.iter().copied().collect();
        let mut wanted: Vec<usize> = leaving.to_vec();
        let mut given: Vec<&TensorIr> = Vec::new();
        while let Some(place) = wanted.pop() {
            // Products read fills as they do all else.
            let loops = web.roles.get(&place) == Some(&Role::Loops);
            for input in self.op(place)?.inputs() {
                match self.makers.get(&input.id) {
                    Some(maker) if self.is_of(web, input) || loops && web.fills.contains(maker) => {
                        if needed.insert(*maker) {
                            wanted.push(*maker);
                        }
                    }
                    _ => given.push(input),
                }
            }
        }
        let (first, last) = (*leaving.first()?, *leaving.last()?);
        let outputs: Vec<TensorIr> =
            leaving.iter().filter_map(|place| Some(matmul(self.op(*place)?)?.out.clone())).collect();
        let readers = outputs.iter().flat_map(|out| self.readers(out.id)).copied();
        let before = readers.min().map_or(last, |reader| reader.min(last));
        let mut views = BTreeSet::new();
        let made = given.iter().all(|input| self.is_made(input, before, placed, &mut views));
        if !made || self.section(first) != self.section(last) || self.section(before) != self.section(last) {
            return None;
        }
        // Another phase, or a view, that has come forward may read a product before this would make it.
        if outputs.iter().any(|out| self.read_before.get(&out.id).is_some_and(|read| *read <= before)) {
            return None;
        }
        let (tiles, inputs) = self.tiles(web, &needed, leaving)?;
        let op = CustomOpIr { id: TILED.into(), inputs, outputs, scalars: Vec::new() };
        Some(Phase { before, views, tiles, op })
    }

    /// Whether a tensor is made before a place in the program, or can be by views that are made later: these are added.
    fn is_made(
        &self,
        tensor: &TensorIr,
        before: usize,
        placed: &HashMap<TensorId, usize>,
        views: &mut BTreeSet<usize>,
    ) -> bool {
        if let Some(other) = placed.get(&tensor.id) {
            return *other <= before;
        }
        let Some((maker, op)) = self.maker(tensor).filter(|(maker, _)| *maker >= before) else { return true };
        let moves = Class::of(op) == Class::View && self.section(maker) == self.section(before);
        moves && op.inputs().all(|input| self.is_made(input, before, placed, views)) && {
            views.insert(maker);
            true
        }
    }

    /// What an operation does, and its inputs.
    fn tiles(&self, web: &Web, needed: &BTreeSet<usize>, leaving: &[usize]) -> Option<(Tiled, Vec<TensorIr>)> {
        let mut inputs: Vec<TensorIr> = Vec::new();
        let mut input = |tensor: &TensorIr| {
            inputs.iter().position(|input| input.id == tensor.id).unwrap_or_else(|| {
                inputs.push(tensor.clone());
                inputs.len() - 1
            })
        };
        let (mut loops, mut entering, mut products) = (Vec::new(), Vec::new(), Vec::new());
        for place in needed {
            let op = self.op(*place)?;
            match web.roles.get(place) {
                Some(Role::Enters) => {
                    let MatmulOpIr { lhs, rhs, out } = matmul(op)?;
                    entering.push(Entering { left: input(lhs), right: input(rhs), dtype: out.dtype });
                    products.push(out.id);
                }
                Some(Role::Loops) | None => loops.push(op.clone()),
                Some(Role::Turns | Role::Leaves) => {}
            }
        }
        let mut factors = Vec::new();
        for place in leaving {
            let MatmulOpIr { lhs, rhs, out } = matmul(self.op(*place)?)?;
            let is_left = self.is_of(web, lhs);
            let (own, other) = if is_left { (lhs, rhs) } else { (rhs, lhs) };
            let (maker, op) = self.maker(own)?;
            let is_turned = web.roles.get(&maker) == Some(&Role::Turns);
            let own = if is_turned { swap_dims(op)?.input.id } else { own.id };
            factors.push((own, is_turned, is_left, input(other), out));
        }
        let wanted: HashSet<TensorId> = factors.iter().map(|(own, ..)| *own).collect();
        let (mut kernel, read, results) = lower(&loops, &web.dims, &wanted)?;
        if kernel.code.len() > 2 * MOST {
            return None;
        }
        // Tiles have the elements that the kernel computes with; what they are rounded to is among its instructions.
        let native = if kernel.wide { DType::F64 } else { DType::F32 };
        kernel.outputs.iter_mut().for_each(|output| output.dtype = native);
        let read = read.iter().map(|tensor| match products.iter().position(|product| *product == tensor.id) {
            Some(product) => Input::Product(product),
            None => Input::Given(input(tensor)),
        });
        let read = read.collect();
        let leaving = factors.into_iter().map(|(own, is_turned, is_left, other, out)| {
            let result = results.iter().position(|result| result.id == own)?;
            let (dims, order, dtype) = (out.shape.to_vec(), self.order(out), out.dtype);
            Some(Leaving { result, is_turned, is_left, other, dims, order, dtype })
        });
        let leaving = leaving.collect::<Option<Vec<_>>>()?;
        let narrowing = Narrowing::of(&mut kernel);
        Some((Tiled { kernel, inputs: read, entering, leaving, narrowing }, inputs))
    }

    /// The dims of a tensor in the order in which it is read next, if that wants it without gaps.
    fn order(&self, tensor: &TensorIr) -> Vec<usize> {
        let plain: Vec<usize> = (0..tensor.shape.num_dims()).collect();
        let (mut order, mut tensor) = (plain.clone(), tensor.id);
        loop {
            let [reader] = self.readers(tensor) else { return plain };
            let Some(op) = self.op(*reader) else { return plain };
            if let Some(swap) = swap_dims(op) {
                order.swap(swap.dim1, swap.dim2);
                tensor = swap.out.id;
            } else if let Some(permute) = permute(op) {
                order = permute.axes.iter().map(|dim| order[*dim]).collect();
                tensor = permute.out.id;
            } else {
                return if reshape(op).is_some() { order } else { plain };
            }
        }
    }
}
