//! Describes one rank's call of an operation: what is logged, compared between ranks, counted and printed.

use std::fmt;

use burn::tensor::DType;

use super::Operation;
#[cfg(feature = "cubecl")]
use super::ReduceOp;
use super::{StepPart, agreed_names, element};

/// The shape of a rank's contribution, without an allocation: up to eight dims, the rest folded into the last. Where
/// there are more, a call carries a hash of them as well.
///
/// Operations that divide a tensor into parts divide its first dim; everything behind it is one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallShape {
    rank: u8,
    dims: [usize; Self::MAX],
}

impl CallShape {
    pub(crate) const MAX: usize = 8;

    /// The shape of a tensor with these dims.
    #[inline]
    pub fn new(shape: &[usize]) -> Self {
        let mut dims = [1; Self::MAX];
        for (place, &dim) in shape.iter().enumerate() {
            if place < Self::MAX {
                dims[place] = dim;
            } else {
                dims[Self::MAX - 1] *= dim;
            }
        }
        Self { rank: shape.len().min(Self::MAX) as u8, dims }
    }

    /// A hash of the dims behind the first, where there are more than a shape holds; else 0. It leaves out the two
    /// highest bits.
    pub(crate) fn folded_hash(shape: &[usize]) -> u64 {
        let Some(folded) = shape.get(Self::MAX - 1..).filter(|folded| folded.len() > 1) else { return 0 };
        let add = |hash: u64, dim: &usize| (hash ^ *dim as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        folded.iter().fold(folded.len() as u64, add).max(4) >> 2
    }

    /// The shape of a plain buffer.
    #[inline]
    pub fn flat(len: usize) -> Self {
        Self::new(&[len])
    }

    /// The dims.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// Size of the first dim (1 for a scalar).
    pub fn rows(&self) -> usize {
        self.dims[0]
    }

    /// Elements in a row.
    pub fn width(&self) -> usize {
        self.dims[1..].iter().product()
    }

    /// The dims with another first one.
    pub(crate) fn with_rows(&self, rows: usize) -> Vec<usize> {
        let mut dims = self.dims().to_vec();
        if let Some(first) = dims.first_mut() {
            *first = rows;
        }
        dims
    }

    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// One rank's call of an operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Call {
    /// The operation with its arguments.
    pub operation: Operation,
    /// Element type of the contribution; `None` if the rank contributes nothing and takes any dtype.
    pub dtype: Option<DType>,
    /// Shape of the contribution.
    pub shape: CallShape,
    /// Separate buffers that the call reduces together; 1 unless coalesced.
    pub buffers: usize,
    /// A hash of the lengths of those buffers, so that coalesced calls of one total that are divided differently do not
    /// match. For calls of one buffer, any other number that the ranks must agree on.
    pub(crate) fingerprint: u64,
}

impl Call {
    /// The call of an operation on one buffer; `dtype` and `shape` are those of the contribution.
    #[inline]
    pub fn new(operation: Operation, dtype: Option<DType>, shape: CallShape) -> Self {
        Self { operation, dtype, shape, buffers: 1, fingerprint: 0 }
    }

    /// A call on device data: it does not match a call on host data.
    #[cfg(feature = "cubecl")]
    pub(crate) fn on_device(operation: Operation, dtype: DType, shape: CallShape) -> Self {
        Self { fingerprint: Self::ON_DEVICE, ..Self::new(operation, Some(dtype), shape) }
    }

    /// A call that reduces several device buffers together, in place. `fingerprint` is the hash of their lengths.
    #[cfg(feature = "cubecl")]
    pub(crate) fn coalesced_on_device(
        op: ReduceOp,
        dtype: DType,
        elements: usize,
        buffers: usize,
        fingerprint: u64,
    ) -> Self {
        let call = Self::on_device(Operation::AllReduce(op), dtype, CallShape::flat(elements));
        Self { buffers, fingerprint: if buffers == 1 { Self::ON_DEVICE } else { !fingerprint }, ..call }
    }

    /// The highest bit of `fingerprint` says that the data is on a device.
    const ON_DEVICE: u64 = 1 << 63;

    /// The same call with a number that all ranks must agree on. For calls of one buffer.
    pub(crate) fn agreeing(self, number: u64) -> Self {
        debug_assert!(self.buffers == 1 && number < Self::ON_DEVICE);
        Self { fingerprint: self.fingerprint | number, ..self }
    }

    /// A call that splits a group for a purpose of this name, which is the same on all ranks.
    pub fn split(name: &str) -> Self {
        Self::new(Operation::Split, None, CallShape::flat(0)).agreeing(agreed_names::keep(name))
    }

    /// The name of the number that the ranks must agree on, as far as that is known: what a group is split for, what is
    /// gathered, or which part of a step it is.
    pub(crate) fn agreed_name(&self) -> Option<String> {
        agreed_names::name(self.named_number()?)
    }

    /// That name, if other ranks may not know it.
    pub(crate) fn name_to_tell(&self) -> Option<String> {
        agreed_names::kept(self.named_number().filter(|number| !StepPart::is_number(*number))?)
    }

    /// The number of the part of a step that it says that it belongs to.
    pub(crate) fn step_part(&self) -> Option<u64> {
        self.named_number().filter(|number| StepPart::is_number(*number))
    }

    fn named_number(&self) -> Option<u64> {
        self.agreed_number().filter(|_| self.buffers == 1)
    }

    /// That number, but for calls of several buffers; none if it is 0.
    pub(crate) fn agreed_number(&self) -> Option<u64> {
        Some(self.fingerprint & !Self::ON_DEVICE).filter(|number| *number != 0)
    }

    /// Whether the data stays on its device.
    pub(crate) fn is_on_device(&self) -> bool {
        self.fingerprint >= Self::ON_DEVICE
    }

    /// Whether the calls of two ranks at the same position of their sequences match.
    pub fn agrees(&self, other: &Self) -> bool {
        if !self.operation.agrees(&other.operation) {
            return false;
        }
        let same_dtype = match (self.dtype, other.dtype) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let same_shape = match self.operation {
            Operation::Scatter { .. } => true,
            operation if operation.allows_ragged() => {
                self.shape.rank == other.shape.rank && self.shape.dims[1..] == other.shape.dims[1..]
            }
            _ => self.shape == other.shape,
        };
        same_dtype && same_shape && self.buffers == other.buffers && self.fingerprint == other.fingerprint
    }
}

impl Call {
    /// A hash of an operation in place, factors apart. Equal calls have equal hashes; calls whose elements differ in
    /// size always have different ones. Not 0.
    pub(crate) fn digest(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325;
        let mut add = |word: u64| hash = u64::wrapping_mul(hash ^ word, 0x9e37_79b9_7f4a_7c15).rotate_left(29);
        let (op, root) = match self.operation {
            Operation::AllReduce(op) => (Some(op), 0),
            Operation::Reduce { op, root } => (Some(op), root),
            Operation::Broadcast { root } => (None, root),
            // The others do not work in place.
            _ => (None, 0),
        };
        let dims = self.shape.dims();
        let dtype = self.dtype.map_or(0, |dtype| element::number(dtype).map_or(1, |number| 2 + u64::from(number)));
        let op = op.map_or(0, |op| 1 + u64::from(op.number()));
        // What is small goes into one word: each round of the hash waits for the one before.
        let small = [self.operation.index() as u64, op, dtype, dims.len() as u64];
        add(small.into_iter().fold(0, |word, number| word << 8 | number));
        add((self.buffers as u64).rotate_left(32) ^ root as u64);
        add(self.fingerprint);
        dims.iter().for_each(|dim| add(*dim as u64));
        hash << 8 | (1 + self.dtype.map_or(0, |dtype| dtype.size() as u64))
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation.name())?;
        let name = self.agreed_name();
        if let (Operation::Split, Some(name)) = (self.operation, &name) {
            return write!(f, "({name})");
        }
        match self.operation {
            Operation::AllReduce(op) | Operation::ReduceScatter(op) => write!(f, "({op:?})")?,
            Operation::Reduce { op, root } => write!(f, "({op:?}, root {root})")?,
            Operation::Broadcast { root } | Operation::Gather { root } | Operation::Scatter { root } => {
                write!(f, "(root {root})")?
            }
            Operation::Send { to, tag } => write!(f, "(to {to}, tag {tag})")?,
            Operation::Receive { from, tag } => write!(f, "(from {from}, tag {tag})")?,
            _ => {}
        }
        if let Some(dtype) = self.dtype {
            write!(f, " of {dtype:?} {:?}", self.shape.dims())?;
        }
        if self.is_on_device() {
            f.write_str(" on its device")?;
        }
        // Calls that differ in their fingerprint alone must not look alike.
        match (self.buffers, self.fingerprint & !Self::ON_DEVICE) {
            (1, 0) => Ok(()),
            (1, number) if self.operation == Operation::Split => write!(f, " by a name of hash {number:016x}"),
            (1, number) => match name {
                Some(name) => write!(f, " ({name})"),
                None => write!(f, " (agreed number {number})"),
            },
            (buffers, fingerprint) => write!(f, " in {buffers} buffers (lengths {:04x})", fingerprint >> 47),
        }
    }
}
