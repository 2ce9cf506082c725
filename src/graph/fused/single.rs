//! Takes apart what burn computes as one operation, so that loops go on through it and attention runs in tiles.

use burn::tensor::{DType, Shape};
use burn_ir::{TensorId, TensorIr};

use super::super::instruction::Item;
use super::super::operation::taken_apart;
use super::tiled::FlatProgram;

/// The program with softmax, norms and attention as single operations, whose tensors are numbered from `next_id`.
pub(super) fn single<const SECTIONS: usize>(
    sections: [Vec<Item>; SECTIONS],
    next_id: &mut u64,
) -> [Vec<Item>; SECTIONS] {
    let mut new = |dims: &[usize], dtype: DType| {
        *next_id += 1;
        TensorIr::uninit(TensorId::new(*next_id - 1), Shape::from(dims.to_vec()), dtype)
    };
    let apart: Vec<Option<Vec<Item>>> = {
        let program = FlatProgram::new(&sections);
        let is_tiled = |query: &TensorIr, key: &TensorIr| program.is_computed(query) && program.is_computed(key);
        let items = program.items.iter().map(|item| match item {
            Item::Run(op) => {
                let operations = taken_apart(op, &mut new, is_tiled)?.into_iter();
                Some(operations.map(|op| Item::Run(Box::new(op))).collect())
            }
            Item::Output(_) => None,
        });
        items.collect()
    };
    let mut apart = apart.into_iter();
    sections.map(|items| {
        let items = items.into_iter().map(|item| apart.next().flatten().unwrap_or_else(|| vec![item]));
        items.flatten().collect()
    })
}
