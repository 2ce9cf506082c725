//! Makes a kernel of a group of operations.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;

use burn::tensor::DType;
use burn_ir::{OperationIr, TensorId, TensorIr};

use super::kernel::{BlockOp, Extent, Kernel, Output, Value, homes};
use super::loops::{Binary, RowReduction, Unary};
use super::simplify::simplified;
use super::work::{Work, is_wide};

/// The kernel of `operations`, which run over `dims`, with its inputs and results; `wanted` are the tensors that others
/// read.
///
/// None if a tensor is not of a form that a kernel reads.
pub(super) fn lower(
    operations: &[OperationIr],
    dims: &[usize],
    wanted: &HashSet<TensorId>,
) -> Option<(Kernel, Vec<TensorIr>, Vec<TensorIr>)> {
    let mut lowering = Lowering { dims, ..Lowering::default() };
    let mut results: Vec<TensorIr> = Vec::new();
    for op in operations {
        let (work, out) = Work::of(op)?;
        lowering.wide |= is_wide(op);
        let is_wanted = wanted.contains(&out.id);
        if let Work::AddRows(x) = work {
            let x = lowering.read(x)?;
            let x = lowering.spread(x, Extent::Full);
            lowering.code.push(BlockOp::AddRows { sums: lowering.outputs.len(), x });
            lowering.output(None, out, Extent::Full);
            results.push(out.clone());
            continue;
        }
        let value = lowering.work(&work, out)?;
        lowering.values.insert(out.id, value);
        if is_wanted {
            let extent = lowering.read_as(out)?.0;
            lowering.output(Some(value), out, extent);
            results.push(out.clone());
        }
    }
    let Lowering { wide, values, inputs, views, mut extents, known, code, outputs, .. } = lowering;
    let code = simplified(code, &mut extents, &known, &outputs);
    let at: Vec<Value> = inputs.iter().map(|input| values[&input.id]).collect();
    let read = at.iter().map(|value| extents[*value]).collect();
    let (homes, registers) = homes(&extents, &at, &code, &outputs);
    let dims = dims.to_vec();
    let kernel = Kernel { dims, wide, inputs: read, views, extents, homes, registers, code, outputs };
    Some((kernel, inputs, results))
}

#[derive(Default)]
struct Lowering<'a> {
    dims: &'a [usize],
    wide: bool,
    values: HashMap<TensorId, Value>,
    inputs: Vec<TensorIr>,
    views: Vec<Vec<usize>>,
    extents: Vec<Extent>,
    /// Values that are the same number everywhere.
    known: HashMap<Value, f64>,
    /// What values are rounded to as they are made. Later on nothing changes a value: others may share it.
    rounded: HashMap<Value, DType>,
    code: Vec<BlockOp>,
    outputs: Vec<Output>,
}

impl Lowering<'_> {
    fn value(&mut self, extent: Extent) -> Value {
        self.extents.push(extent);
        self.extents.len() - 1
    }

    fn output(&mut self, value: Option<Value>, out: &TensorIr, extent: Extent) {
        self.outputs.push(Output { value, dims: out.shape.to_vec(), dtype: out.dtype, extent });
    }

    /// How much of a tensor there is in a block, and the dims under which it is read; none if it cannot be broadcast to
    /// what the kernel runs over.
    fn read_as(&self, tensor: &TensorIr) -> Option<(Extent, Vec<usize>)> {
        let of: &[usize] = &tensor.shape;
        let broadcast = |(size, whole): (&usize, &usize)| size == whole || *size == 1;
        let (columns, rows) = self.dims.split_last()?;
        let view = if of.len() == self.dims.len() && of.iter().zip(self.dims).all(broadcast) {
            of.to_vec()
        } else {
            // All rows one after the other, or none.
            let (own_columns, own_rows) = of.split_last()?;
            let (number, all) = (own_rows.iter().product::<usize>(), rows.iter().product::<usize>());
            if !(number == all || number == 1) || !(own_columns == columns || *own_columns == 1) {
                return None;
            }
            let rows = rows.iter().map(|size| if number == all { *size } else { 1 });
            rows.chain([*own_columns]).collect()
        };
        let extent = match view.iter().all(|size| *size == 1) {
            true if self.dims.iter().any(|size| *size != 1) => Extent::One,
            _ if view.last() == Some(&1) && *columns != 1 => Extent::Row,
            _ => Extent::Full,
        };
        Some((extent, view))
    }

    fn read(&mut self, tensor: &TensorIr) -> Option<Value> {
        if let Some(value) = self.values.get(&tensor.id) {
            return Some(*value);
        }
        let (extent, view) = self.read_as(tensor)?;
        let value = self.value(extent);
        self.values.insert(tensor.id, value);
        self.inputs.push(tensor.clone());
        self.views.push(view);
        Some(value)
    }

    fn spread(&mut self, x: Value, extent: Extent) -> Value {
        if self.extents[x] == extent {
            return x;
        }
        let out = self.value(extent);
        self.code.push(BlockOp::Spread { out, x });
        out
    }

    fn work(&mut self, work: &Work<'_>, out: &TensorIr) -> Option<Value> {
        let to = of_16_bits(out.dtype);
        Some(match *work {
            Work::Fill(with) => self.fill(with),
            Work::Reshape(x) => self.read(x)?,
            Work::Unary(Unary::Copy, x) => {
                let value = self.read(x)?;
                // A float in a larger dtype is what it was.
                if x.dtype == out.dtype || to.is_none() {
                    return Some(value);
                }
                self.unary(Unary::Copy, value, to)
            }
            Work::Unary(op, x) => {
                let x = self.read(x)?;
                self.unary(op, x, to)
            }
            Work::Scalar(op, x, number) => {
                let x = self.read(x)?;
                if number == 1.0 && matches!(op, Binary::Mul | Binary::Div) {
                    return Some(x);
                }
                let number = self.fill(number);
                self.binary(op, x, number, to)
            }
            Work::Binary(op, a, b) => {
                let (a, b) = (self.read(a)?, self.read(b)?);
                match op {
                    Binary::Mul if self.known.get(&a) == Some(&1.0) => b,
                    Binary::Mul if self.known.get(&b) == Some(&1.0) => a,
                    _ => self.binary(op, a, b, to),
                }
            }
            Work::Choose(mask, a, b) => {
                let [mask, a, b] = [self.read(mask)?, self.read(a)?, self.read(b)?];
                let extent = [mask, a, b].map(|value| self.extents[value]).into_iter().max()?;
                let [mask, a, b] = [mask, a, b].map(|value| self.spread(value, extent));
                let out = self.value(extent);
                self.make(BlockOp::Choose { out, mask, a, b }, out, to)
            }
            Work::Reduce(op, x) => {
                let x = self.read(x)?;
                let x = self.spread(x, Extent::Full);
                self.reduce(op, x, to)
            }
            Work::PlaceOfMax(tensor) => {
                let x = self.read(tensor)?;
                let x = self.spread(x, Extent::Full);
                let of = self.reduce(RowReduction::Max, x, of_16_bits(tensor.dtype));
                let out = self.value(Extent::Row);
                self.make(BlockOp::PlaceOf { out, x, of }, out, None)
            }
            Work::Pick(x, index) => {
                let (x, index) = (self.read(x)?, self.read(index)?);
                let x = self.spread(x, Extent::Full);
                let index = self.spread(index, Extent::Row);
                let out = self.value(Extent::Row);
                self.make(BlockOp::Pick { out, x, index }, out, to)
            }
            Work::AddAt(x, index, add) => {
                let [x, index, add] = [self.read(x)?, self.read(index)?, self.read(add)?];
                let [index, add] = [index, add].map(|value| self.spread(value, Extent::Row));
                let out = self.value(Extent::Full);
                self.make(BlockOp::AddAt { out, x, index, add }, out, to)
            }
            Work::AddRows(_) => return None,
        })
    }

    fn fill(&mut self, with: f64) -> Value {
        if let Some((out, _)) = self.known.iter().find(|(_, known)| known.to_bits() == with.to_bits()) {
            return *out;
        }
        let out = self.value(Extent::One);
        self.known.insert(out, with);
        self.code.push(BlockOp::Fill { out, with });
        out
    }

    fn unary(&mut self, op: Unary, x: Value, to: Option<DType>) -> Value {
        let same = |done: &BlockOp| match *done {
            BlockOp::Unary { op: other, out, x: of } => (of == x && alike(other, op)).then_some(out),
            _ => None,
        };
        self.made(same, to).unwrap_or_else(|| {
            let out = self.value(self.extents[x]);
            self.make(BlockOp::Unary { op, out, x }, out, to)
        })
    }

    fn binary(&mut self, op: Binary, a: Value, b: Value, to: Option<DType>) -> Value {
        let same = |done: &BlockOp| match *done {
            BlockOp::Binary { op: other, out, a: left, b: right } => {
                ((left, right) == (a, b) && alike(other, op)).then_some(out)
            }
            _ => None,
        };
        self.made(same, to).unwrap_or_else(|| {
            let out = self.value(self.extents[a].max(self.extents[b]));
            self.make(BlockOp::Binary { op, out, a, b }, out, to)
        })
    }

    fn reduce(&mut self, op: RowReduction, x: Value, to: Option<DType>) -> Value {
        let same = |done: &BlockOp| match *done {
            BlockOp::Reduce { op: other, out, x: of } => (of == x && other == op).then_some(out),
            _ => None,
        };
        self.made(same, to).unwrap_or_else(|| {
            let out = self.value(Extent::Row);
            self.make(BlockOp::Reduce { op, out, x }, out, to)
        })
    }

    /// What an instruction that is the same has made, rounded to the same: backward passes do again what was done
    /// forward.
    fn made(&self, same: impl Fn(&BlockOp) -> Option<Value>, to: Option<DType>) -> Option<Value> {
        self.code.iter().filter_map(same).find(|made| self.rounded.get(made).copied() == to)
    }

    /// A new value, and what it is rounded to.
    fn make(&mut self, instruction: BlockOp, out: Value, to: Option<DType>) -> Value {
        self.code.push(instruction);
        if let Some(to) = to {
            self.rounded.insert(out, to);
            self.code.push(BlockOp::Round { x: out, to });
        }
        out
    }
}

/// What a value is rounded to: a dtype of 16 bits.
fn of_16_bits(dtype: DType) -> Option<DType> {
    matches!(dtype, DType::F16 | DType::BF16).then_some(dtype)
}

/// Whether two instructions are one. Zeros of two signs are equal, but not alike.
fn alike<O: PartialEq + Debug>(a: O, b: O) -> bool {
    a == b && format!("{a:?}") == format!("{b:?}")
}
