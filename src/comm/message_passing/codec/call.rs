//! Encodes calls and dtypes as bytes.

use burn::tensor::DType;

use super::{Reader, Writer};
use crate::comm::{Call, CallShape, Operation, ReduceOp, agreed_names, element};

/// In the place of the number of a dtype.
const NO_DTYPE: u8 = u8::MAX;

impl Writer {
    pub fn dtype(&mut self, dtype: Option<DType>) -> &mut Self {
        self.byte(dtype.and_then(element::number).unwrap_or(NO_DTYPE))
    }

    pub fn reduction(&mut self, op: Option<ReduceOp>) -> &mut Self {
        let factor = match op {
            Some(ReduceOp::PreMulSum(factor)) => factor,
            _ => 0.0,
        };
        self.byte(op.map_or(0, ReduceOp::number)).number(factor.to_bits())
    }

    pub fn call(&mut self, call: &Call) -> &mut Self {
        let (op, root, tag) = match call.operation {
            Operation::AllReduce(op) | Operation::ReduceScatter(op) => (Some(op), 0, 0),
            Operation::Reduce { op, root } => (Some(op), root, 0),
            Operation::Broadcast { root } | Operation::Gather { root } | Operation::Scatter { root } => (None, root, 0),
            Operation::Send { to, tag } => (None, to, tag),
            Operation::Receive { from, tag } => (None, from, tag),
            _ => (None, 0, 0),
        };
        self.byte(call.operation.index() as u8).reduction(op).dtype(call.dtype);
        self.number(root as u64).number(tag).number(call.buffers as u64).number(call.fingerprint);
        self.list(call.shape.dims(), |w, dim| {
            w.number(*dim as u64);
        });
        // Others may not know for what a rank wants to split a group, or what it wants to gather.
        self.text(&call.name_to_tell().unwrap_or_default())
    }
}

impl Reader<'_> {
    pub fn dtype(&mut self) -> Option<Option<DType>> {
        match self.byte()? {
            NO_DTYPE => Some(None),
            number => element::numbered(number).map(Some),
        }
    }

    pub fn reduction(&mut self) -> Option<ReduceOp> {
        let (op, factor) = (self.byte()?, f64::from_bits(self.number()?));
        ReduceOp::numbered(op, factor)
    }

    pub fn call(&mut self) -> Option<Call> {
        let (operation, op, dtype) = (self.byte()?, self.reduction()?, self.dtype()?);
        let (root, tag) = (self.index()?, self.number()?);
        let (buffers, fingerprint) = (self.index()?, self.number()?);
        let dims = self.list(Self::index)?;
        // No computation with these may overflow.
        if dims.len() > 8 || dims.iter().try_fold(16usize, |bytes, dim| bytes.checked_mul((*dim).max(1))).is_none() {
            return None;
        }
        let operation = match *Operation::NAMES.get(operation as usize)? {
            "all_reduce" => Operation::AllReduce(op),
            "reduce_scatter" => Operation::ReduceScatter(op),
            "all_gather" => Operation::AllGather,
            "broadcast" => Operation::Broadcast { root },
            "reduce" => Operation::Reduce { op, root },
            "gather" => Operation::Gather { root },
            "scatter" => Operation::Scatter { root },
            "all_to_all" => Operation::AllToAll,
            "barrier" => Operation::Barrier,
            "split" => Operation::Split,
            "send" => Operation::Send { to: root, tag },
            "recv" => Operation::Receive { from: root, tag },
            _ => return None,
        };
        let name = self.text()?;
        let mut call = Call::new(operation, dtype, CallShape::new(&dims));
        (call.buffers, call.fingerprint) = (buffers, fingerprint);
        if call.agreed_number() == Some(agreed_names::number(&name)) {
            agreed_names::keep(&name);
        }
        Some(call)
    }
}
