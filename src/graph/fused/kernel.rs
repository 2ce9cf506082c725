//! A fused kernel as data: instructions over values that are as large as a block.

use burn::tensor::DType;
use burn_ir::ScalarIr;

use super::loops::{Binary, RowReduction, Unary};

/// How many elements of a value there are in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Extent {
    /// One for all rows.
    One,
    /// One for each row.
    Row,
    /// One for each place.
    Full,
}

/// A value by its number.
pub(super) type Value = usize;

/// One instruction: an operation on values, a block of each.
#[derive(Debug, Clone)]
pub(super) enum BlockOp {
    Fill {
        out: Value,
        with: f64,
    },
    Unary {
        op: Unary,
        out: Value,
        x: Value,
    },
    Binary {
        op: Binary,
        out: Value,
        a: Value,
        b: Value,
    },
    Choose {
        out: Value,
        mask: Value,
        a: Value,
        b: Value,
    },
    /// The same with more elements.
    Spread {
        out: Value,
        x: Value,
    },
    Reduce {
        op: RowReduction,
        out: Value,
        x: Value,
    },
    /// Of each row the first place of a number that is in it, or of one that is no number.
    PlaceOf {
        out: Value,
        x: Value,
        of: Value,
    },
    /// Of each row the element at an index.
    Pick {
        out: Value,
        x: Value,
        index: Value,
    },
    /// The first, with a number of each row added at an index.
    AddAt {
        out: Value,
        x: Value,
        index: Value,
        add: Value,
    },
    /// Adds the rows to sums that are a result.
    AddRows {
        sums: usize,
        x: Value,
    },
    /// Rounds a value to what a dtype of 16 bits holds, right behind what makes it.
    Round {
        x: Value,
        to: DType,
    },
    /// Tells whether a number is not above another.
    Expect {
        x: Value,
        above: f64,
    },
}

impl BlockOp {
    pub(super) fn reads(&self) -> impl Iterator<Item = Value> {
        let read = match *self {
            Self::Fill { .. } => [None; 3],
            Self::Unary { x, .. } | Self::Spread { x, .. } | Self::Reduce { x, .. } => [Some(x), None, None],
            Self::AddRows { x, .. } | Self::Round { x, .. } | Self::Expect { x, .. } => [Some(x), None, None],
            Self::Binary { a, b, .. } => [Some(a), Some(b), None],
            Self::Pick { x, index, .. } => [Some(x), Some(index), None],
            Self::PlaceOf { x, of, .. } => [Some(x), Some(of), None],
            Self::AddAt { x, index, add, .. } => [Some(x), Some(index), Some(add)],
            Self::Choose { mask, a, b, .. } => [Some(mask), Some(a), Some(b)],
        };
        read.into_iter().flatten()
    }

    pub(super) fn writes(&self) -> Option<Value> {
        match *self {
            Self::Fill { out, .. } | Self::Unary { out, .. } | Self::Binary { out, .. } => Some(out),
            Self::Choose { out, .. } | Self::Spread { out, .. } | Self::Reduce { out, .. } => Some(out),
            Self::Pick { out, .. } | Self::PlaceOf { out, .. } | Self::AddAt { out, .. } => Some(out),
            Self::AddRows { .. } | Self::Round { .. } | Self::Expect { .. } => None,
        }
    }
}

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// In an input of the kernel, or in a register of its own if that has to be gathered.
    Input(usize),
    /// In a result, or in a register of its own if that is of another form.
    Result(usize),
    /// In a register that several values take one after the other.
    Register(usize),
}

/// What becomes of a value, or of sums of rows.
#[derive(Debug, Clone)]
pub(super) struct Output {
    /// None for sums over all rows.
    pub(super) value: Option<Value>,
    pub(super) dims: Vec<usize>,
    pub(super) dtype: DType,
    /// How many elements there are in a block.
    pub(super) extent: Extent,
}

/// What one loop over the elements of a group of operations does.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What it runs over; the last dim is that of the rows' elements.
    pub(super) dims: Vec<usize>,
    /// Whether it computes in `f64`, else in `f32`.
    pub(super) wide: bool,
    /// How much of each input there is in a block, and under which dims it is read.
    pub(super) inputs: Vec<Extent>,
    pub(super) views: Vec<Vec<usize>>,
    pub(super) extents: Vec<Extent>,
    pub(super) homes: Vec<Home>,
    /// How many registers there are beside those of inputs and results.
    pub(super) registers: usize,
    pub(super) code: Vec<BlockOp>,
    pub(super) outputs: Vec<Output>,
}

impl Kernel {
    /// Whether a result may be written over an input that has its dims and its dtype: block by block, after what is
    /// there was read. What is a result as it came is read after other results were written.
    pub(super) fn may_take(&self, output: usize, input: usize) -> bool {
        let native = if self.wide { DType::F64 } else { DType::F32 };
        let given = |output: &Output| output.value.is_some_and(|value| self.homes[value] == Home::Input(input));
        let fits = |output: &Output| output.value.is_some() && output.extent == Extent::Full && output.dtype == native;
        self.outputs.get(output).is_some_and(fits)
            && self.inputs.get(input) == Some(&Extent::Full)
            && !self.outputs.iter().any(given)
    }

    /// Whether a result is written while it is computed, if it lies one element after the other in the elements that
    /// are computed with.
    pub(super) fn writes_at_once(&self, place: usize) -> bool {
        let value = self.outputs[place].value;
        value.is_some_and(|value| self.homes[value] == Home::Result(place) && self.extents[value] == Extent::Full)
    }

    /// The value that an input is.
    pub(super) fn value_of(&self, input: usize) -> Value {
        let of = self.homes.iter().position(|home| *home == Home::Input(input));
        of.expect("each input is a value")
    }

    /// Where values are in the scratch memory, if the largest has `most` elements, and how many it has room for.
    pub(super) fn places(&self, most: usize) -> (Vec<usize>, usize) {
        let (inputs, results) = (self.registers, self.registers + self.inputs.len());
        let place = |home: &Home| match home {
            Home::Register(register) => register * most,
            Home::Input(input) => (inputs + input) * most,
            Home::Result(result) => (results + result) * most,
        };
        (self.homes.iter().map(place).collect(), (results + self.outputs.len()) * most)
    }

    /// Whether a row may be cut into several blocks.
    pub(super) fn cuts_rows(&self) -> bool {
        use BlockOp::{AddAt, AddRows, Pick, PlaceOf, Reduce};
        let is_of_rows = |code: &BlockOp| {
            matches!(code, Reduce { .. } | AddRows { .. } | PlaceOf { .. } | Pick { .. } | AddAt { .. })
        };
        !self.code.iter().any(is_of_rows) && self.outputs.iter().all(|output| output.extent == Extent::Full)
    }
}

/// Gives every value a home: registers are taken again after the last use.
pub(super) fn homes(extents: &[Extent], inputs: &[Value], code: &[BlockOp], outputs: &[Output]) -> (Vec<Home>, usize) {
    let mut homes: Vec<Option<Home>> = vec![None; extents.len()];
    for (input, value) in inputs.iter().enumerate() {
        homes[*value] = Some(Home::Input(input));
    }
    for (place, output) in outputs.iter().enumerate() {
        if let Some(value) = output.value {
            homes[value].get_or_insert(Home::Result(place));
        }
    }
    let mut last = vec![0; extents.len()];
    for (place, instruction) in code.iter().enumerate() {
        instruction.reads().chain(instruction.writes()).for_each(|value| last[value] = place);
    }
    let (mut free, mut registers) = (Vec::new(), 0);
    for (place, instruction) in code.iter().enumerate() {
        // A result never has the register of what it is computed from: a loop reads and writes apart.
        if let Some(out) = instruction.writes() {
            homes[out].get_or_insert_with(|| {
                Home::Register(free.pop().unwrap_or_else(|| {
                    registers += 1;
                    registers - 1
                }))
            });
        }
        let mut ended: Vec<Value> = instruction.reads().chain(instruction.writes()).collect();
        ended.sort_unstable();
        ended.dedup();
        for value in ended.into_iter().filter(|value| last[*value] == place) {
            if let Some(Home::Register(register)) = homes[value] {
                free.push(register);
            }
        }
    }
    // What nothing makes or reads has no need of a home of its own.
    (homes.into_iter().map(|home| home.unwrap_or(Home::Register(0))).collect(), registers.max(1))
}

/// The number of the kernel that an operation with these scalars runs.
pub(super) fn number(scalars: &[ScalarIr]) -> Option<usize> {
    match scalars.first() {
        Some(ScalarIr::UInt(number)) => Some(*number as usize),
        _ => None,
    }
}
