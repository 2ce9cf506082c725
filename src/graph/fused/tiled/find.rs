//! Finds attention in a program: a product, what its elements go through, and the products that these end in.
//!
//! All that can be reached from a product `[.., rows, columns]` through element-wise operations and reductions over the
//! last dim is one [`Web`](super::web::Web), forward and backward together, if it ends in products everywhere: then
//! nobody needs its tensors in memory. It is cut into [`phases`](super::phases): what depends on a product that the web
//! ends in comes after it. Each phase is one operation, which makes what it reads of earlier ones again.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};

use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorId};

use super::super::super::instruction::Item;
use super::Tiled;
use super::flat_program::FlatProgram;
use super::phases::Phase;

/// The program with attention as one operation for each phase; what these do is added to `all`.
pub(in super::super) fn tiled<const SECTIONS: usize>(
    sections: [Vec<Item>; SECTIONS],
    all: &mut Vec<Tiled>,
) -> [Vec<Item>; SECTIONS] {
    let mut program = FlatProgram::new(&sections);
    let mut replaced: HashSet<usize> = HashSet::new();
    let mut added: HashMap<usize, Vec<Item>> = HashMap::new();
    let mut fills: BTreeSet<usize> = BTreeSet::new();
    // What all phases read.
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
        let Some(phases) = program.phases(&web) else { continue };
        let is_there =
            |phase: &Phase| phase.views.iter().all(|view| moved.get(view).is_none_or(|before| *before <= phase.before));
        if !phases.iter().all(is_there) {
            continue;
        }
        for Phase { before, views, tiles, op } in phases {
            for view in views {
                if let Entry::Vacant(entry) = moved.entry(view) {
                    entry.insert(before);
                    if let Some(op) = program.op(view) {
                        program.moved(op.inputs(), before);
                        added.entry(before).or_default().push(Item::Run(Box::new(op.clone())));
                    }
                    replaced.insert(view);
                }
            }
            program.placed.extend(op.outputs.iter().map(|out| (out.id, before)));
            program.moved(&op.inputs, before);
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
