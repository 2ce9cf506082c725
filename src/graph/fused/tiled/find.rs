//! Finds attention in a program: a product, what its elements go through, and the products that these end in.
//!
//! All that can be reached from a product `[.., rows, columns]` through element-wise operations and reductions over the
//! last dim is one [`Web`], forward and backward together, if it ends in products everywhere: then nobody needs its
//! tensors in memory. It is cut into stages: what depends on a product that the web ends in comes after it. Each stage
//! is one operation, which makes what it reads of earlier ones again.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn::tensor::DType;
use burn_ir::{CustomOpIr, MatmulOpIr, OperationIr, ScalarIr, TensorId, TensorIr};

use super::super::super::instruction::Item;
use super::super::super::operation::{Class, matmul, permute, reshape, swap_dims};
use super::super::group::MOST;
use super::super::lower::lower;
use super::super::work::{Work, is_wide};
use super::{Entering, Input, Leaving, Narrowing, TILED, Tiled};

/// What an operation is in a web.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// A product that the loop reads.
    Enters,
    Loops,
    /// Rows and columns swapped, for a product.
    Turns,
    /// A product with what the loop gives.
    Leaves,
}

/// Operations by their places in the program.
#[derive(Debug, Default)]
struct Web {
    dims: Vec<usize>,
    /// Whether all of it is computed in `f64`, else nothing.
    wide: bool,
    roles: BTreeMap<usize, Role>,
    /// Operations that make the same number everywhere, which each stage does for itself.
    fills: BTreeSet<usize>,
}

/// What becomes of a stage.
struct Stage {
    /// What it comes before.
    before: usize,
    /// Views that it reads and that are made later on, which come before it too.
    views: BTreeSet<usize>,
    tiles: Tiled,
    op: CustomOpIr,
}

/// A program, its sections one after the other.
struct Program<'a> {
    items: Vec<&'a Item>,
    /// Where sections begin.
    sections: Vec<usize>,
    makers: HashMap<TensorId, usize>,
    readers: HashMap<TensorId, Vec<usize>>,
    /// Products that leave, and what they come before now.
    placed: HashMap<TensorId, usize>,
}

/// The program with attention as one operation for each stage; what these do is added to `all`.
pub(in super::super) fn tiled<const SECTIONS: usize>(
    sections: [Vec<Item>; SECTIONS],
    all: &mut Vec<Tiled>,
) -> [Vec<Item>; SECTIONS] {
    let mut program = Program::new(&sections);
    let mut replaced: HashSet<usize> = HashSet::new();
    let mut added: HashMap<usize, Vec<Item>> = HashMap::new();
    let mut fills: BTreeSet<usize> = BTreeSet::new();
    // What all stages read.
    let mut read: HashSet<TensorId> = HashSet::new();
    // Views by place, and what they come before now.
    let mut moved: HashMap<usize, usize> = HashMap::new();
    for place in 0..program.items.len() {
        if replaced.contains(&place) {
            continue;
        }
        let Some(web) = program.web(place).filter(|web| web.roles.keys().all(|place| !replaced.contains(place))) else {
            continue;
        };
        let Some(stages) = program.stages(&web) else { continue };
        let is_there =
            |stage: &Stage| stage.views.iter().all(|view| moved.get(view).is_none_or(|before| *before <= stage.before));
        if !stages.iter().all(is_there) {
            continue;
        }
        for Stage { before, views, tiles, op } in stages {
            for view in views {
                if let Entry::Vacant(entry) = moved.entry(view) {
                    entry.insert(before);
                    let op = program.op(view).cloned().map(|op| Item::Run(Box::new(op)));
                    added.entry(before).or_default().extend(op);
                    replaced.insert(view);
                }
            }
            program.placed.extend(op.outputs.iter().map(|out| (out.id, before)));
            read.extend(op.inputs.iter().map(|input| input.id));
            let scalars = vec![ScalarIr::UInt(all.len() as u64)];
            added
                .entry(before)
                .or_default()
                .push(Item::Run(Box::new(OperationIr::Custom(CustomOpIr { scalars, ..op }))));
            all.push(tiles);
        }
        replaced.extend(web.roles.keys());
        fills.extend(web.fills);
    }
    // Views that have moved still run.
    let runs = |place: &usize| moved.contains_key(place) || !replaced.contains(place);
    let is_read = |fill: &usize| {
        let mut outputs = program.op(*fill).into_iter().flat_map(|op| op.outputs());
        outputs.any(|out| read.contains(&out.id) || program.readers(out.id).iter().any(runs))
    };
    fills.retain(|fill| !is_read(fill));
    replaced.extend(fills);
    let mut place = 0;
    sections.map(|items| {
        let mut rest = Vec::with_capacity(items.len());
        for item in items {
            rest.extend(added.remove(&place).into_iter().flatten());
            if !replaced.contains(&place) {
                rest.push(item);
            }
            place += 1;
        }
        rest
    })
}

impl<'a> Program<'a> {
    fn new(sections: &'a [Vec<Item>]) -> Self {
        let items: Vec<&Item> = sections.iter().flatten().collect();
        let ends = sections.iter().scan(0, |end, items| {
            *end += items.len();
            Some(*end)
        });
        let (mut makers, mut readers) = (HashMap::new(), HashMap::<TensorId, Vec<usize>>::new());
        for (place, item) in items.iter().enumerate() {
            match item {
                Item::Run(op) => {
                    makers.extend(op.outputs().map(|out| (out.id, place)));
                    op.inputs().for_each(|input| readers.entry(input.id).or_default().push(place));
                }
                Item::Output(tensor) => readers.entry(tensor.id).or_default().push(place),
            }
        }
        Self { items: items.clone(), sections: ends.collect(), makers, readers, placed: HashMap::new() }
    }

    fn op(&self, place: usize) -> Option<&'a OperationIr> {
        match self.items.get(place)? {
            Item::Run(op) => Some(op),
            Item::Output(_) => None,
        }
    }

    fn maker(&self, tensor: &TensorIr) -> Option<(usize, &'a OperationIr)> {
        let place = *self.makers.get(&tensor.id)?;
        Some((place, self.op(place)?))
    }

    fn readers(&self, tensor: TensorId) -> &[usize] {
        self.readers.get(&tensor).map_or(&[], Vec::as_slice)
    }

    /// The section that a place is in.
    fn section(&self, place: usize) -> usize {
        self.sections.partition_point(|end| *end <= place)
    }

    /// Whether the step makes a tensor of its inputs: a weight is none, however it is turned.
    fn is_computed(&self, tensor: &TensorIr) -> bool {
        self.maker(tensor).is_some_and(|(_, op)| match Class::of(op) {
            Class::View | Class::Slice | Class::Cast => op.inputs().all(|input| self.is_computed(input)),
            _ => true,
        })
    }

    /// What can be reached from a product; none if that is not all of attention.
    fn web(&self, first: usize) -> Option<Web> {
        let MatmulOpIr { lhs, rhs, out } = matmul(self.op(first)?)?;
        let known = matches!(out.dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16);
        let fits = known && out.shape.num_dims() >= 3 && out.shape.num_elements() > 0;
        if !(fits && self.is_computed(lhs) && self.is_computed(rhs)) {
            return None;
        }
        let mut web = Web { dims: out.shape.to_vec(), wide: out.dtype == DType::F64, ..Web::default() };
        web.roles.insert(first, Role::Enters);
        let mut reached = vec![out];
        let mut reduces = false;
        while let Some(tensor) = reached.pop() {
            let is_turned = self.role(&web, tensor) == Some(Role::Turns);
            for place in self.readers(tensor.id) {
                let op = self.op(*place)?;
                if web.roles.contains_key(place) {
                    continue;
                }
                let role = web.role_of(op, tensor, is_turned)?;
                if web.roles.insert(*place, role).is_none() && web.roles.len() > 4 * MOST {
                    return None;
                }
                if role == Role::Leaves {
                    continue;
                }
                reached.extend(op.outputs());
                reduces |= matches!(Work::of(op), Some((Work::Reduce(..), _)));
                for input in op.inputs() {
                    let Some((maker, op)) = self.maker(input).filter(|(maker, _)| !web.roles.contains_key(maker))
                    else {
                        continue;
                    };
                    if matches!(Work::of(op), Some((Work::Fill(_), _))) {
                        web.fills.insert(maker);
                    } else if matmul(op).is_some() && is_wide(op) == web.wide && *input.shape.as_slice() == *web.dims {
                        web.roles.insert(maker, Role::Enters);
                        reached.push(input);
                    }
                }
            }
        }
        // A product that enters is of none of its tensors, one that leaves of one.
        let is_one_of_its = |place: usize, op: &OperationIr| {
            let factors = op.inputs().filter(|input| self.is_of(&web, input)).count();
            match web.roles[&place] {
                Role::Enters => factors == 0,
                Role::Leaves => factors == 1,
                Role::Loops | Role::Turns => true,
            }
        };
        let mut members = web.roles.keys().filter_map(|place| Some((*place, self.op(*place)?)));
        (reduces && members.all(|(place, op)| is_one_of_its(place, op))).then_some(web)
    }

    fn role(&self, web: &Web, tensor: &TensorIr) -> Option<Role> {
        web.roles.get(self.makers.get(&tensor.id)?).copied()
    }

    /// Whether a tensor is one of those that are never whole in memory.
    fn is_of(&self, web: &Web, tensor: &TensorIr) -> bool {
        self.role(web, tensor).is_some_and(|role| role != Role::Leaves)
    }

    /// An operation for each stage, and what it comes before; none if one of them has no place in the program.
    fn stages(&self, web: &Web) -> Option<Vec<Stage>> {
        let (first, last) = (*web.roles.first_key_value()?.0, *web.roles.last_key_value()?.0);
        let mut after: HashMap<TensorId, usize> = HashMap::new();
        let mut leaving: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for place in first..=last {
            let Some(op) = self.op(place) else { continue };
            let read = op.inputs().filter_map(|input| after.get(&input.id)).copied();
            let mut stage = read.max().unwrap_or(0);
            if web.roles.get(&place) == Some(&Role::Leaves) {
                leaving.entry(stage).or_default().push(place);
                stage += 1;
            }
            if stage > 0 {
                after.extend(op.outputs().map(|out| (out.id, stage)));
            }
        }
        let (mut stages, mut placed) = (Vec::new(), self.placed.clone());
        for leaving in leaving.into_values() {
            let stage = self.stage(web, &leaving, &placed)?;
            placed.extend(stage.op.outputs.iter().map(|out| (out.id, stage.before)));
            stages.push(stage);
        }
        Some(stages)
    }

    fn stage(&self, web: &Web, leaving: &[usize], placed: &HashMap<TensorId, usize>) -> Option<Stage> {
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
        let (tiles, inputs) = self.tiles(web, &needed, leaving)?;
        let op = CustomOpIr { id: TILED.into(), inputs, outputs, scalars: Vec::new() };
        Some(Stage { before, views, tiles, op })
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

impl Web {
    /// What an operation is that reads one of its tensors; none if it does not belong there.
    fn role_of(&self, op: &OperationIr, tensor: &TensorIr, is_turned: bool) -> Option<Role> {
        let [batch @ .., rows, columns] = &self.dims[..] else { return None };
        // A mask may come of scores in another dtype, which are a web of their own.
        if is_wide(op) != self.wide {
            return None;
        }
        if let Some(product) = matmul(op) {
            let dims: &[usize] = &product.out.shape;
            let of: &[usize] = &tensor.shape;
            let is_whole = if is_turned { of.ends_with(&[*columns, *rows]) } else { *of == *self.dims };
            let same = dims.len() == self.dims.len() && dims.starts_with(batch) && product.out.dtype == tensor.dtype;
            return (is_whole && same && product.lhs.id != product.rhs.id).then_some(Role::Leaves);
        }
        if is_turned {
            return None;
        }
        if let Some(swap) = swap_dims(op) {
            let last = self.dims.len() - 1;
            let turns = (swap.dim1.min(swap.dim2), swap.dim1.max(swap.dim2)) == (last - 1, last);
            return (turns && *swap.input.shape.as_slice() == *self.dims).then_some(Role::Turns);
        }
        let (work, out) = Work::of(op)?;
        let fits = |tensor: &TensorIr| {
            let dims: &[usize] = &tensor.shape;
            *dims == *self.dims || dims.split_last() == Some((&1, &self.dims[..self.dims.len() - 1]))
        };
        (fits(work.over(out)) && fits(out) && !matches!(work, Work::AddRows(_) | Work::Fill(_))).then_some(Role::Loops)
    }
}
