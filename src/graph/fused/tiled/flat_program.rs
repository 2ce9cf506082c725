//! A program as [`tiled`](super::find::tiled) looks at it: who makes and who reads each tensor.

use std::collections::HashMap;

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::super::super::instruction::Item;
use super::super::super::operation::Class;

/// A program as one list of items, its sections one after the other.
pub(in super::super) struct FlatProgram<'a> {
    pub(in super::super) items: Vec<&'a Item>,
    /// Where sections begin.
    pub(super) sections: Vec<usize>,
    pub(super) makers: HashMap<TensorId, usize>,
    pub(super) readers: HashMap<TensorId, Vec<usize>>,
    /// Products that leave, and what they come before now.
    pub(super) placed: HashMap<TensorId, usize>,
    /// What operations read that have got another place: what the first of them comes before now.
    pub(super) read_before: HashMap<TensorId, usize>,
}

impl<'a> FlatProgram<'a> {
    pub(in super::super) fn new(sections: &'a [Vec<Item>]) -> Self {
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
        let sections = ends.collect();
        Self { items: items.clone(), sections, makers, readers, placed: HashMap::new(), read_before: HashMap::new() }
    }

    pub(super) fn op(&self, place: usize) -> Option<&'a OperationIr> {
        match self.items.get(place)? {
            Item::Run(op) => Some(op),
            Item::Output(_) => None,
        }
    }

    pub(super) fn maker(&self, tensor: &TensorIr) -> Option<(usize, &'a OperationIr)> {
        let place = *self.makers.get(&tensor.id)?;
        Some((place, self.op(place)?))
    }

    pub(super) fn readers(&self, tensor: TensorId) -> &[usize] {
        self.readers.get(&tensor).map_or(&[], Vec::as_slice)
    }

    /// Notes that an operation comes before a place now.
    pub(super) fn moved<'b>(&mut self, inputs: impl IntoIterator<Item = &'b TensorIr>, before: usize) {
        for input in inputs {
            let first = self.read_before.entry(input.id).or_insert(before);
            *first = before.min(*first);
        }
    }

    /// The section that a place is in.
    pub(super) fn section(&self, place: usize) -> usize {
        self.sections.partition_point(|end| *end <= place)
    }

    /// Whether the step makes a tensor of its inputs: a weight is none, however it is turned.
    pub(in super::super) fn is_computed(&self, tensor: &TensorIr) -> bool {
        self.maker(tensor).is_some_and(|(_, op)| match Class::of(op) {
            Class::View | Class::Slice | Class::Cast => op.inputs().all(|input| self.is_computed(input)),
            _ => true,
        })
    }
}
