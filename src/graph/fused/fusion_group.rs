//! Finds the groups of operations that become one kernel each.
//!
//! Operations come one after the other. One that can be fused joins the open groups whose results it reads, if they run
//! over the same dims; groups that it so connects become one. A group is closed, and takes its place in the program,
//! when something that is not in it reads one of its results. So open groups never depend on each other, and no
//! operation comes before one whose result it reads. Operations of this crate, collectives above all, close all groups:
//! what a pass has put between the start and the end of a collective stays there.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::super::instruction::Item;
use super::grouped_products::are_grouped_products;
use super::product_sums::is_product_sum;
use super::work::{Work, is_wide};

/// Beyond this many operations a kernel gains nothing, and its values leave the caches.
pub(super) const MOST: usize = 96;

/// After so many operations that do not join it a group is closed, so that what it reads does not stay for long.
pub(super) const LONGEST: usize = 32;

/// What a kernel runs over.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Space {
    /// All dims but the last.
    rows: Vec<usize>,
    /// The last dim; none if only numbers for whole rows are known so far.
    columns: Option<usize>,
    wide: bool,
    /// Whether all tensors have all rows or none, so that these may be under other dims.
    flat: bool,
}

impl Space {
    fn of(op: &OperationIr) -> Option<Self> {
        let (work, out) = Work::of(op)?;
        let over = work.over(out);
        let (last, rows) = over.shape.as_slice().split_last()?;
        let number: usize = rows.iter().product();
        let is_flat = |tensor: &TensorIr| {
            let own: usize = tensor.shape.iter().rev().skip(1).product();
            own == number || own == 1
        };
        let flat = op.inputs().chain([out]).all(is_flat);
        let columns = Some(*last).filter(|last| *last != 1);
        Some(Self { rows: rows.to_vec(), columns, wide: is_wide(op), flat })
    }

    fn merged(&self, other: &Self) -> Option<Self> {
        let columns = match (self.columns, other.columns) {
            (Some(a), Some(b)) if a != b => return None,
            (a, b) => a.or(b),
        };
        if self.wide != other.wide {
            return None;
        }
        let flat = self.flat && other.flat;
        let as_many = || self.rows.iter().product::<usize>() == other.rows.iter().product::<usize>();
        match self.rows == other.rows {
            true => Some(Self { columns, flat, ..self.clone() }),
            false if other.flat && as_many() => Some(Self { columns, flat, ..self.clone() }),
            false if self.flat && as_many() => Some(Self { columns, flat, ..other.clone() }),
            false => None,
        }
    }
}

/// A group of operations in the order of the program.
#[derive(Debug)]
pub(super) struct FusionGroup {
    space: Space,
    /// By place in the program.
    pub(super) operations: BTreeMap<usize, Box<OperationIr>>,
    /// Sums over all rows, which are there only at the end.
    late: HashSet<TensorId>,
    /// What its operations read that is as large as what it runs over.
    shared: HashSet<TensorId>,
}

impl FusionGroup {
    /// The dims that the kernel runs over.
    pub(super) fn dims(&self) -> Vec<usize> {
        self.space.rows.iter().copied().chain([self.space.columns.unwrap_or(1)]).collect()
    }

    /// The first tensor that it makes.
    fn first(&self) -> Option<TensorId> {
        self.operations.values().flat_map(|op| op.outputs()).map(|out| out.id).next()
    }

    /// Whether one loop takes less than the operations one by one.
    pub(super) fn is_worth_it(&self) -> bool {
        let works = || self.operations.values().filter_map(|op| Work::of(op)).map(|(work, _)| work);
        let real = |work: &Work<'_>| !matches!(work, Work::Fill(_) | Work::AddRows(_) | Work::Reshape(_));
        // burn goes through what it broadcasts element by element, and into new memory.
        let spreads = |work: Work<'_>| matches!(work, Work::Binary(_, a, b) if a.shape != b.shape);
        works().any(|work| work.is_dear() || spreads(work)) || works().filter(real).count() > 1
    }
}

/// What a program consists of once its groups are found.
pub(super) enum Grouped {
    Item(Item),
    Group(FusionGroup),
}

#[derive(Default)]
struct Grouping {
    open: BTreeMap<usize, FusionGroup>,
    maker: HashMap<TensorId, usize>,
    found: Vec<Grouped>,
    next: usize,
}

/// The program with its groups, each where it has to run at the latest.
pub(super) fn grouped(items: Vec<Item>) -> Vec<Grouped> {
    let mut grouping = Grouping::default();
    for (place, item) in items.into_iter().enumerate() {
        grouping.take(place, item);
    }
    grouping.close_all();
    grouping.found
}

impl Grouping {
    fn take(&mut self, place: usize, item: Item) {
        let old =
            |group: &FusionGroup| group.operations.last_key_value().is_none_or(|(last, _)| last + LONGEST < place);
        let old: Vec<TensorId> = self.open.values().filter(|group| old(group)).filter_map(FusionGroup::first).collect();
        old.into_iter().for_each(|made| self.close_maker(made));
        match item {
            Item::Run(op) => match Space::of(&op) {
                Some(space) => self.join(place, op, &space),
                None => {
                    match *op {
                        OperationIr::Custom(_) if !is_product_sum(&op) && !are_grouped_products(&op) => {
                            self.close_all()
                        }
                        _ => op.inputs().for_each(|input| self.close_maker(input.id)),
                    }
                    self.found.push(Grouped::Item(Item::Run(op)));
                }
            },
            Item::Output(tensor) => {
                self.close_maker(tensor.id);
                self.found.push(Grouped::Item(Item::Output(tensor)));
            }
        }
    }

    fn close_all(&mut self) {
        while let Some((_, group)) = self.open.pop_first() {
            self.found.push(Grouped::Group(group));
        }
        self.maker.clear();
    }

    fn close_maker(&mut self, tensor: TensorId) {
        if let Some(group) = self.maker.get(&tensor).and_then(|group| self.open.remove(group)) {
            for out in group.operations.values().flat_map(|op| op.outputs()) {
                self.maker.remove(&out.id);
            }
            self.found.push(Grouped::Group(group));
        }
    }

    fn join(&mut self, place: usize, op: Box<OperationIr>, space: &Space) {
        let mut space = space.clone();
        let mut joined: Vec<usize> = Vec::new();
        for input in op.inputs() {
            let Some(maker) = self.maker.get(&input.id).copied() else { continue };
            if joined.contains(&maker) && !self.open[&maker].late.contains(&input.id) {
                continue;
            }
            let group = &self.open[&maker];
            let merged = group.space.merged(&space).filter(|_| {
                let size: usize = joined.iter().map(|other| self.open[other].operations.len()).sum();
                !group.late.contains(&input.id) && size + group.operations.len() < MOST
            });
            match merged {
                Some(merged) => {
                    space = merged;
                    joined.push(maker);
                }
                None => {
                    joined.retain(|other| *other != maker);
                    self.close_maker(input.id);
                }
            }
        }
        if joined.is_empty() && matches!(Work::of(&op), Some((Work::Reshape(_), _))) {
            self.found.push(Grouped::Item(Item::Run(op)));
            return;
        }
        // Of no group it reads a result of, but perhaps the same as one.
        if joined.is_empty() {
            let read: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
            let beside = self.open.iter().find_map(|(number, group)| {
                let shares = read.iter().any(|input| group.shared.contains(input));
                let merged = group.space.merged(&space).filter(|_| shares && group.operations.len() < MOST)?;
                Some((*number, merged))
            });
            if let Some((number, merged)) = beside {
                space = merged;
                joined.push(number);
            }
        }
        let number = joined.first().copied().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
        let mut group = FusionGroup {
            space: space.clone(),
            operations: BTreeMap::new(),
            late: HashSet::new(),
            shared: HashSet::new(),
        };
        for other in joined {
            if let Some(other) = self.open.remove(&other) {
                group.operations.extend(other.operations);
                group.late.extend(other.late);
                group.shared.extend(other.shared);
            }
        }
        let size = space.rows.iter().product::<usize>() * space.columns.unwrap_or(1);
        group.shared.extend(op.inputs().filter(|input| input.shape.num_elements() == size).map(|input| input.id));
        if let Some((Work::AddRows(_), out)) = Work::of(&op) {
            group.late.insert(out.id);
        }
        group.operations.insert(place, op);
        for out in group.operations.values().flat_map(|op| op.outputs()) {
            self.maker.insert(out.id, number);
        }
        self.open.insert(number, group);
    }
}
