//! How many columns of a tile count for something, by the mask.
//!
//! Where a mask is true, scores become a number that is far below all others, so that their weights are 0, and so are
//! the gradients. If a whole range of columns is masked for all rows of a tile, nothing of it need be computed: the
//! sums of a row lack terms that are 0, its maximum is among the columns that stay. One of several masks is enough.
//! That this is so follows from the instructions of the kernel, but for one thing: that a row has a score that is far
//! enough above the number of the mask. The kernel tells if one has not ([`BlockOp::Expect`]), as a row that is
//! masked from end to end, and then the tile is computed with all its columns.
//!
//! What is not computed is not seen either: a value that is no number, at a place that is masked for all rows of its
//! tile, does not reach the results, which it would by a product with 0.

use std::collections::HashMap;
use std::ops::Range;

use burn::tensor::DType;

use super::super::block::Source;
use super::super::kernel::{BlockOp, Extent, Kernel, Value, homes};
use super::super::loops::{Binary, RowReduction, Unary};
use super::super::work::rounded;

/// The difference from which on an exponential is 0, in `f32` and what is computed in it, and in `f64`.
const UNDER: [f64; 2] = [110.0, 750.0];
/// Columns of a mask that are looked at together.
const MANY: usize = 64;

/// Masks that say how many columns count: no more than any of them leaves.
#[derive(Debug, Clone)]
pub(super) struct Narrowing {
    /// Inputs of the kernel.
    pub(super) masks: Vec<usize>,
}

/// What is known of a value at the columns that are left out.
#[derive(Debug, Clone, Copy, PartialEq)]
enum LeftOut {
    Unknown,
    Zero,
    /// The number of the mask, as it is now.
    Filled(f64),
    /// So far below 0 that its exponential is 0.
    Under,
    /// A number for each row, the same with these columns and without.
    Same,
    /// The maximum of what is filled with a number, far above that.
    Top(f64),
    /// Whether such a maximum is that number, or one below.
    False,
    /// Where such a maximum is: not among these columns.
    Elsewhere,
}

impl Narrowing {
    /// The masks of a kernel, which from then on tells of rows that need all columns.
    ///
    /// None if no mask is enough to tell what counts.
    pub(super) fn of(kernel: &mut Kernel) -> Option<Self> {
        let inputs: Vec<Value> = (0..kernel.inputs.len()).map(|input| kernel.value_of(input)).collect();
        let mut masks: Vec<usize> = Vec::new();
        let mut expected: Vec<(usize, Value, f64)> = Vec::new();
        for instruction in &kernel.code {
            let BlockOp::Binary { op: Binary::MaskFill(_), b, .. } = *instruction else { continue };
            let Some(mask) = inputs.iter().position(|value| *value == b) else { continue };
            if masks.contains(&mask) {
                continue;
            }
            if let Some(tops) = tops(kernel, b) {
                masks.push(mask);
                let new = tops.into_iter().filter(|top| !expected.contains(top)).collect::<Vec<_>>();
                expected.extend(new);
            }
        }
        if masks.is_empty() {
            return None;
        }
        expected.sort_by_key(|(place, ..)| *place);
        for (place, x, fill) in expected.into_iter().rev() {
            let above = fill + under(kernel);
            kernel.code.insert(place + 1, BlockOp::Expect { x, above });
        }
        let (homes, registers) = homes(&kernel.extents, &inputs, &kernel.code, &kernel.outputs);
        (kernel.homes, kernel.registers) = (homes, registers);
        Some(Self { masks })
    }

    /// How many columns some of the rows need, of a mask with these strides in memory.
    ///
    /// # Safety
    /// The mask is of bools, and has the rows.
    pub(super) unsafe fn columns(source: &Source, batch: isize, rows: Range<usize>, columns: usize) -> usize {
        let [.., of_row, of_column] = *source.strides else { return columns };
        let mut needed = 1;
        for row in rows.rev() {
            // SAFETY: as the caller says.
            let row = unsafe { source.base.offset(source.offset + batch + row as isize * of_row) };
            // SAFETY: the same.
            let is_masked = |column: usize| unsafe { *row.offset(column as isize * of_column) != 0 };
            let mut end = columns;
            if of_column == 1 {
                // SAFETY: the same; they lie one after the other.
                let row = unsafe { std::slice::from_raw_parts(row, columns) };
                // Many at a time, without a branch for each.
                while end >= needed + MANY && row[end - MANY..end].iter().fold(true, |all, mask| all & (*mask != 0)) {
                    end -= MANY;
                }
            }
            while end > needed && is_masked(end - 1) {
                end -= 1;
            }
            needed = end;
            if of_row == 0 || needed == columns {
                break;
            }
        }
        needed
    }
}

/// The maxima that have to be far above what masks fill in, with where they are made, if columns at which `mask` is
/// true count for nothing; none if they do.
fn tops(kernel: &Kernel, mask: Value) -> Option<Vec<(usize, Value, f64)>> {
    let native = if kernel.wide { DType::F64 } else { DType::F32 };
    let under = under(kernel);
    let mut states: Vec<LeftOut> = kernel.extents.iter().map(|extent| state_of(*extent)).collect();
    let mut tops = Vec::new();
    let mut numbers: HashMap<Value, f64> = HashMap::new();
    // What values are rounded to already, so that rounding them again changes nothing.
    let mut exact: HashMap<Value, DType> = HashMap::new();
    for (place, instruction) in kernel.code.iter().enumerate() {
        match *instruction {
            BlockOp::Unary { op, out, x } => states[out] = unary(op, states[x], kernel.extents[out]),
            BlockOp::Binary { op, out, a, b } => {
                if let (Binary::MaskFill(value), Some(to)) = (op, exact.get(&a).copied())
                    && rounded(value, to) == value
                {
                    exact.insert(out, to);
                }
                states[out] = match op {
                    Binary::MaskFill(value) if b == mask => filled(rounded(value, native)),
                    Binary::MaskFill(_) if states[b] == LeftOut::False => states[a],
                    // Of another mask: with the same number, or raising what is too low.
                    Binary::MaskFill(value) if states[a] == LeftOut::Filled(rounded(value, native)) => states[a],
                    Binary::MaskFill(value) if is_far_above(states[a], rounded(value, native), under) => states[a],
                    Binary::Equal if is_below(states[a], numbers.get(&b)) => LeftOut::False,
                    _ => binary(op, states[a], states[b], kernel.extents[out]),
                };
            }
            BlockOp::Reduce { op, out, x } => {
                states[out] = match (op, states[x]) {
                    (RowReduction::Sum, LeftOut::Zero) => LeftOut::Same,
                    (RowReduction::Max, LeftOut::Filled(fill)) => {
                        tops.push((place, out, fill));
                        LeftOut::Top(fill)
                    }
                    _ => return None,
                };
            }
            BlockOp::PlaceOf { out, x, of } => {
                states[out] = match (states[x], states[of]) {
                    (LeftOut::Filled(fill), LeftOut::Top(top)) if fill == top => LeftOut::Elsewhere,
                    _ => return None,
                };
            }
            BlockOp::AddAt { out, x, index, .. } if states[index] == LeftOut::Elsewhere => {
                states[out] = match numbers.get(&x) {
                    Some(0.0) => LeftOut::Zero,
                    _ if kernel.extents[x] == Extent::Full => states[x],
                    _ => LeftOut::Unknown,
                };
            }
            BlockOp::AddRows { .. } | BlockOp::Pick { .. } | BlockOp::AddAt { .. } => return None,
            BlockOp::Fill { out, with } => {
                numbers.insert(out, with);
            }
            BlockOp::Choose { .. } | BlockOp::Spread { .. } => {}
            BlockOp::Round { x, to } if exact.insert(x, to) == Some(to) => {}
            BlockOp::Round { x, to } => {
                // A maximum that is rounded as it is made is looked at behind that.
                let of_top = tops.last().is_some_and(|(top, out, _)| (*top + 1, *out) == (place, x));
                states[x] = match states[x] {
                    LeftOut::Filled(fill) => filled(rounded(fill, to)),
                    LeftOut::Top(fill) if !(of_top && fill == rounded(fill, to)) => LeftOut::Same,
                    state => state,
                };
            }
            BlockOp::Expect { .. } => {}
        }
    }
    // A maximum is looked at as it is used: rounded.
    let rounds =
        |place: usize, top: Value| matches!(kernel.code.get(place + 1), Some(BlockOp::Round { x, .. }) if *x == top);
    let tops = tops.into_iter().map(|(place, x, fill)| (place + usize::from(rounds(place, x)), x, fill)).collect();
    let is_zero = |value: Option<Value>| value.is_some_and(|value| states[value] == LeftOut::Zero);
    kernel.outputs.iter().all(|output| is_zero(output.value)).then_some(tops)
}

/// How far below a maximum an exponential is 0.
fn under(kernel: &Kernel) -> f64 {
    UNDER[usize::from(kernel.wide)]
}

/// Of what is as large as a kernel nothing is known; the rest is one number for each row.
fn state_of(extent: Extent) -> LeftOut {
    match extent {
        Extent::Full => LeftOut::Unknown,
        Extent::One | Extent::Row => LeftOut::Same,
    }
}

/// Whether a number is below what is known to be a maximum.
fn is_below(top: LeftOut, number: Option<&f64>) -> bool {
    matches!((top, number), (LeftOut::Top(fill), Some(number)) if *number <= fill)
}

/// Whether a number is as far above what is masked as a maximum is known to be.
fn is_far_above(top: LeftOut, number: f64, under: f64) -> bool {
    matches!(top, LeftOut::Top(fill) if number > fill + under)
}

fn filled(value: f64) -> LeftOut {
    if value == 0.0 { LeftOut::Zero } else { LeftOut::Filled(value) }
}

fn unary(op: Unary, x: LeftOut, extent: Extent) -> LeftOut {
    match (op, x) {
        (Unary::Copy, x) => x,
        (Unary::Neg | Unary::Abs | Unary::Square | Unary::Sqrt | Unary::Relu, LeftOut::Zero) => LeftOut::Zero,
        (Unary::Exp, LeftOut::Under) => LeftOut::Zero,
        // One that is raised is further above.
        (Unary::ClampMin(_), LeftOut::Top(fill)) => LeftOut::Top(fill),
        _ => state_of(extent),
    }
}

fn binary(op: Binary, a: LeftOut, b: LeftOut, extent: Extent) -> LeftOut {
    match (op, a, b) {
        (Binary::MaskFill(0.0), LeftOut::Zero, _) => LeftOut::Zero,
        (Binary::Sub, LeftOut::Filled(fill), LeftOut::Top(of)) if fill == of => LeftOut::Under,
        (Binary::Add | Binary::Sub, LeftOut::Zero, LeftOut::Zero) => LeftOut::Zero,
        // But for what is no number, or becomes none here.
        (Binary::Add, LeftOut::Filled(f64::NEG_INFINITY), _) => a,
        (Binary::Mul, LeftOut::Zero, _) | (Binary::Mul, _, LeftOut::Zero) => LeftOut::Zero,
        (Binary::Div, LeftOut::Zero, LeftOut::Same | LeftOut::Top(_)) => LeftOut::Zero,
        _ => state_of(extent),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::BoolStore;

    use super::*;

    fn columns(mask: &[u8], strides: [isize; 2], rows: Range<usize>, columns: usize) -> usize {
        let source = Source {
            base: mask.as_ptr(),
            dtype: DType::Bool(BoolStore::Native),
            direct: false,
            offset: 0,
            strides: strides.to_vec(),
            still: false,
        };
        // SAFETY: the mask has these rows and columns.
        unsafe { Narrowing::columns(&source, 0, rows, columns) }
    }

    #[test]
    fn columns_end_with_the_last_that_a_row_sees() {
        let size = 200;
        let causal: Vec<u8> = (0..size * size).map(|place| u8::from(place % size > place / size)).collect();
        for rows in [0..1, 0..32, 5..9, 63..65, 100..164, 168..200] {
            assert_eq!(columns(&causal, [200, 1], rows.clone(), size), rows.end);
        }
        // The same mask the other way round leaves the last column to all rows but none.
        assert_eq!(columns(&causal, [1, 200], 3..7, size), size);
        // One row for all, and none that sees anything.
        let pad: Vec<u8> = (0..size).map(|column| u8::from(column >= 130)).collect();
        assert_eq!(columns(&pad, [0, 1], 0..32, size), 130);
        assert_eq!(columns(&[1; 200], [0, 1], 0..32, size), 1);
        assert_eq!(columns(&[0; 200], [0, 1], 0..32, size), size);
    }
}
