//! Moves tensors between layouts.

use burn::tensor::Slice;
use burn_ir::{TensorId, TensorIr};

use super::collectives::CollectiveKind;
use super::logical_tensor::TensorState;
use super::pass::Pass;
use super::report::Collective;
use crate::graph::operation::build;
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

impl Pass<'_> {
    /// The local tensor that holds `id` in the layout `want`, moved there if it is not yet.
    pub(super) fn get(&mut self, id: TensorId, want: Layout) -> TensorIr {
        let degree = self.options.degree;
        let tensor = &self.tensors[&id];
        if let Some(local) = tensor.version(want) {
            return tensor.local(want, local, degree);
        }
        match tensor.state {
            TensorState::Waiting(_) => return self.settle(id, want),
            TensorState::Planned(_) => return self.make(id, want),
            TensorState::Made => {}
        }
        if let Some((op, option)) = self.moved(id, want) {
            let local = self.fresh();
            self.emit_as(op, &option, &[local]);
            if let Some(tensor) = self.tensors.get_mut(&id) {
                tensor.add(want, local);
            }
            return self.tensors[&id].local(want, local, degree);
        }
        let tensor = &self.tensors[&id];
        if tensor.layout() == Partial {
            match (want, self.along_sequence(&tensor.global)) {
                (Sharded(_), _) if self.is_wanted_whole(id) => drop(self.get(id, Replicated)),
                (Replicated, Some(dim)) if !self.is_wanted_whole(id) => drop(self.get(id, Sharded(dim))),
                _ => {}
            }
        }
        let tensor = &self.tensors[&id];
        // Whatever it came as, what there is whole is whole.
        let have = if tensor.version(Replicated).is_some() { Replicated } else { tensor.layout() };
        let from = tensor.version(have).map(|local| tensor.local(have, local, degree));
        let dims = tensor.global.shape.to_vec();
        let local = self.fresh();
        let to = self.tensors[&id].local(want, local, degree);
        let Some(from) = from else { return to };
        match (have, want) {
            (Replicated, Sharded(dim)) => self.take_part(from, to.clone(), dim),
            (Partial, Sharded(dim)) => {
                self.collective(CollectiveKind::ReduceScatter, dims, from, to.clone(), &[dim]);
            }
            (Sharded(join), Sharded(split)) => {
                self.collective(CollectiveKind::AllToAll, dims, from, to.clone(), &[split, join]);
            }
            (Sharded(dim), _) => self.collective(CollectiveKind::AllGather, dims, from, to.clone(), &[dim]),
            _ => self.collective(CollectiveKind::AllReduce, dims, from, to.clone(), &[]),
        }
        if let Some(tensor) = self.tensors.get_mut(&id) {
            tensor.add(want, local);
        }
        to
    }

    pub(super) fn collective(
        &mut self,
        kind: CollectiveKind,
        dims: Vec<usize>,
        from: TensorIr,
        to: TensorIr,
        along: &[usize],
    ) {
        self.operations.push(kind.operation(&self.options.axis, along, from, to));
        let (forward, reader, layer) = (self.forward, self.reader.clone(), self.layer.clone());
        self.report.collectives.push(Collective { kind, dims, forward, reader, layer });
    }

    /// This rank's part of a whole tensor.
    pub(super) fn take_part(&mut self, tensor: TensorIr, out: TensorIr, dim: usize) {
        let (part, rank) = (out.shape[dim], self.options.rank);
        let range = |(place, size): (usize, &usize)| match place == dim {
            true => Slice::new((rank * part) as isize, Some(((rank + 1) * part) as isize), 1),
            false => Slice::new(0, Some(*size as isize), 1),
        };
        let ranges = tensor.shape.as_slice().iter().enumerate().map(range).collect();
        self.operations.push(build::slice(tensor, ranges, out));
    }
}
