//! Chooses the sharding option that moves the least.

use burn_ir::{OperationIr, TensorId, TensorIr};

use super::pass::Pass;
use super::report::Fallback;
use super::rules::{LocalOperation, ShardingOption, sharding_options};
use crate::graph::operation::{matmul, only_moves, op_name};
use crate::layout::Layout::{self, Partial, Replicated, Sharded};

// What a move costs for each element of the logical tensor, next to the others. To gather is to give up a split, and
// with it to compute and to hold everything on every rank; a parameter is split in order to be whole nowhere.
const GATHER_PARAMETER: u64 = 400;
const GATHER: u64 = 40;
const REDUCE: u64 = 20;
const SCATTER: u64 = 10;
const EXCHANGE: u64 = 5;
const STILL_PARTIAL: u64 = 1;

/// How many linear operations on it is found out what becomes of a partial tensor.
const LOOK_AHEAD: usize = 6;

impl Pass<'_> {
    pub(super) fn choose(&mut self, op: &OperationIr, layouts: &[Layout]) -> ShardingOption {
        let whole = ShardingOption::replicated(op);
        if self.options.sequence_dim.is_none() && layouts.iter().all(|layout| *layout == Replicated) {
            return self.part_of_product(op).unwrap_or(whole);
        }
        let inputs: Vec<TensorId> = op.inputs().map(|input| input.id).collect();
        let mut best: Option<((u64, bool), ShardingOption)> = None;
        let found = sharding_options(op, self.options.degree);
        // Elements that are moved in a way that no part of them can follow: what comes of it shows only further on.
        let torn = only_moves(op)
            && layouts.iter().all(|have| matches!(have, Sharded(_)))
            && !inputs.iter().all(|id| self.tensors[id].parameter)
            && !found.iter().any(|option| option.inputs == layouts);
        let split = found.into_iter().filter(|option| {
            // Only what goes on with a layout that is there: nothing is split for its own sake, but along the sequence.
            option.inputs.iter().zip(layouts).any(|(want, have)| want == have && *want != Replicated)
                || self.follows_sequence(op, layouts, option)
                || (torn && option.output != Partial)
        });
        for option in split.chain([whole.clone()]) {
            let Some(cost) = self.option_cost(op, &inputs, &option) else { continue };
            let cost = if torn { cost + self.cost_to_readers(op, option.output) } else { cost };
            let aside = op.outputs().any(|out| self.along_sequence(out).map(Sharded) != Some(option.output));
            if best.as_ref().is_none_or(|(least, _)| (cost, aside) < *least) {
                best = Some(((cost, aside), option));
            }
        }
        let option = best.map_or(whole, |(_, option)| option);
        let gathers = inputs.iter().zip(layouts).zip(&option.inputs).any(|((id, have), want)| {
            matches!(have, Sharded(_))
                && *want == Replicated
                && self.tensors[id].version(Replicated).is_none()
                && self.moved(*id, Replicated).is_none()
        });
        if option.output == Replicated && gathers {
            let dims = op.outputs().next().map(|out| out.shape.to_vec()).unwrap_or_default();
            let (forward, layer) = (self.forward, self.layer.clone());
            self.report.fallbacks.push(Fallback { operation: op_name(op), dims, forward, layer });
        }
        option
    }

    /// A product of which nothing but a part is wanted, as the gradient of a split parameter is, is made in that part.
    fn part_of_product(&self, op: &OperationIr) -> Option<ShardingOption> {
        let product = matmul(op)?;
        let is_read = self.readers.get(&product.out.id).is_some_and(|readers| !readers.is_empty());
        let mut wanted = self.wanted.get(&product.out.id)?.iter();
        let (Some(part @ Sharded(_)), None, false) = (wanted.next(), wanted.next(), is_read) else { return None };
        let makes = |option: &ShardingOption| option.output == *part && option.how == LocalOperation::Locally;
        sharding_options(op, self.options.degree).into_iter().find(makes)
    }

    /// Whether sequence parallelism asks for a sharding option: it makes an activation that is split along the
    /// sequence, in the forward pass, or turns a partial one into that.
    fn follows_sequence(&self, op: &OperationIr, layouts: &[Layout], option: &ShardingOption) -> bool {
        let follows =
            |tensor: &TensorIr, layout: Layout| self.along_sequence(tensor).is_some_and(|dim| layout == Sharded(dim));
        let enters = self.forward
            && option.how == LocalOperation::Locally
            && op.outputs().all(|out| follows(out, option.output));
        enters
            || op
                .inputs()
                .zip(layouts)
                .zip(&option.inputs)
                .any(|((input, have), want)| *have == Partial && follows(input, *want))
    }

    /// The dim along which sequence parallelism has a tensor split, if it is an activation.
    pub(super) fn along_sequence(&self, tensor: &TensorIr) -> Option<usize> {
        let dim = self.options.sequence_dim.filter(|dim| *dim < 2 && tensor.shape.num_dims() == 3)?;
        (tensor.dtype.is_float() && tensor.shape[dim].is_multiple_of(self.options.degree)).then_some(dim)
    }

    fn option_cost(&self, op: &OperationIr, inputs: &[TensorId], option: &ShardingOption) -> Option<u64> {
        let outputs: u64 = op.outputs().map(|out| out.shape.num_elements() as u64).sum();
        let mut cost = match (option.output, &option.how) {
            (Partial, _) => STILL_PARTIAL * outputs.max(1),
            (_, LocalOperation::Reduced(_)) => REDUCE * outputs.max(1),
            _ => 0,
        };
        for (place, (id, want)) in inputs.iter().zip(&option.inputs).enumerate() {
            let more = self.cost(*id, *want)?;
            if !inputs[..place].contains(id) {
                cost += more;
            }
        }
        Some(cost)
    }

    /// What it costs those that read what an operation makes, if it comes in this layout: whether it is worth while to
    /// gather a tensor that is moved, or to split it in another way, shows only then.
    fn cost_to_readers(&self, op: &OperationIr, layout: Layout) -> u64 {
        let Some(out) = op.outputs().next().filter(|_| layout != Partial) else { return 0 };
        let of_reader = |reader: &usize| {
            let op = &self.source[*reader];
            let of_input = |(input, want): (&TensorIr, &Layout)| match (input.id == out.id, layout, *want) {
                (true, _, Partial) => None,
                (true, Sharded(_), Replicated) => Some(GATHER * out.shape.num_elements() as u64),
                (true, Sharded(from), Sharded(to)) if from != to => Some(EXCHANGE * out.shape.num_elements() as u64),
                (true, ..) => Some(0),
                _ if self.tensors.contains_key(&input.id) => self.cost(input.id, *want),
                _ => Some(0),
            };
            let still = |option: &ShardingOption| match option.output {
                Partial => SCATTER * op.outputs().map(|out| out.shape.num_elements() as u64).sum::<u64>(),
                _ => 0,
            };
            let of = |option: &ShardingOption| {
                let moved: Option<u64> = op.inputs().zip(&option.inputs).map(of_input).sum();
                Some(moved? + still(option))
            };
            sharding_options(op, self.options.degree)
                .iter()
                .chain([&ShardingOption::replicated(op)])
                .filter_map(of)
                .min()
        };
        self.readers.get(&out.id).into_iter().flatten().filter_map(of_reader).sum()
    }

    /// What it costs to have a tensor in a layout; `None` if it should not be.
    fn cost(&self, id: TensorId, want: Layout) -> Option<u64> {
        let tensor = &self.tensors[&id];
        let each = match (tensor.layout(), want) {
            (_, Partial) if tensor.is_planned_zeros() => 0,
            (Partial, Partial) if tensor.is_waiting() || self.is_reduced_anyway(id) => return None,
            (Partial, Partial) => 0,
            (_, Partial) => return None,
            (_, want) if tensor.version(want).is_some() || self.moved(id, want).is_some() => 0,
            (Replicated, _) => 0,
            (Partial, Sharded(_)) if self.is_wanted_whole(id) => 0,
            (Partial, Replicated) => REDUCE,
            (Partial, Sharded(_)) => SCATTER,
            (Sharded(_), _) if tensor.version(Replicated).is_some() => 0,
            (Sharded(_), _) if tensor.parameter => GATHER_PARAMETER,
            (Sharded(_), Replicated) => GATHER,
            (Sharded(_), Sharded(_)) => EXCHANGE,
        };
        Some(each * tensor.elements())
    }

    /// How to make `id` in a layout from the version of another tensor that it is a view of.
    pub(super) fn moved(&self, id: TensorId, want: Layout) -> Option<(OperationIr, ShardingOption)> {
        let op = self.tensors[&id].moved.as_deref()?;
        let input = op.inputs().next()?.id;
        let there = |option: &ShardingOption| {
            let from = option.inputs.first().copied().unwrap_or(Replicated);
            option.output == want
                && from != Partial
                && (self.tensors[&input].version(from).is_some() || self.moved(input, from).is_some())
        };
        let found = sharding_options(op, self.options.degree)
            .into_iter()
            .chain([ShardingOption::replicated(op)])
            .find(there)?;
        Some((op.clone(), found))
    }

    pub(super) fn is_wanted_whole(&self, id: TensorId) -> bool {
        self.wanted.get(&id).is_some_and(|layouts| layouts.contains(&Replicated))
    }

    /// Whether some reader, or the result, cannot take a partial tensor as it is, so that the sum is made in any case;
    /// or it would be made of several things that are computed from the tensor, or of something larger.
    pub(super) fn is_reduced_anyway(&self, id: TensorId) -> bool {
        self.is_reduced_within(id, LOOK_AHEAD)
    }

    fn is_reduced_within(&self, id: TensorId, steps: usize) -> bool {
        let readers = self.readers.get(&id).map_or(&[][..], Vec::as_slice);
        self.is_wanted_whole(id)
            || readers.iter().any(|reader| {
                let op = &self.source[*reader];
                let place = op.inputs().position(|input| input.id == id);
                let takes = |s: &ShardingOption| place.and_then(|place| s.inputs.get(place)) == Some(&Partial);
                if !sharding_options(op, self.options.degree).iter().any(takes) {
                    return true;
                }
                let size = op.inputs().find(|input| input.id == id).map_or(0, |input| input.shape.num_elements());
                let grows = |out: &TensorIr| out.shape.num_elements() > size;
                op.outputs().any(|out| {
                    steps > 0 && (readers.len() > 1 || grows(out)) && self.is_reduced_within(out.id, steps - 1)
                })
            })
    }
}
