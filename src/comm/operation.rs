//! The operations of a communicator, and its reductions.

/// How the contributions of the ranks become one value, element by element.
///
/// The same over every transport, for host and device data. Contributions are reduced in rank order, so a result is
/// bit-identical on every rank and from run to run; NCCL has an order of its own, the same on every rank, and the last
/// bit of a sum may differ. `f16` and `bf16` are scaled and reduced in `f32` and rounded once at the end. Integer sums
/// and products wrap on overflow, as in MPI and NCCL. A NaN on any rank makes `Max` and `Min` NaN.
#[derive(Debug, Clone, Copy)]
pub enum ReduceOp {
    /// `x_0 + x_1 + ...`: floats and integers.
    Sum,
    /// `(x_0 + x_1 + ...) / n`: floats only.
    Mean,
    /// The largest: floats, integers; logical or for bools.
    Max,
    /// The smallest: floats, integers; logical and for bools.
    Min,
    /// `x_0 * x_1 * ...`: floats and integers.
    Product,
    /// `f_0 * x_0 + f_1 * x_1 + ...` with a factor of each rank's own: floats only. It is how token-exact averages are
    /// made without a pass of their own over the data (NCCL's `ncclRedOpCreatePreMulSum`).
    PreMulSum(f64),
}

/// Factors are equal bit for bit: an error that tells of a NaN is equal to itself.
impl PartialEq for ReduceOp {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::PreMulSum(one), Self::PreMulSum(other)) => one.to_bits() == other.to_bits(),
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

impl ReduceOp {
    /// The number of the reduction in messages.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Sum => 0,
            Self::Mean => 1,
            Self::Max => 2,
            Self::Min => 3,
            Self::Product => 4,
            Self::PreMulSum(_) => 5,
        }
    }

    /// The reduction of a number; the factor is that of [`PreMulSum`](Self::PreMulSum).
    pub(crate) fn numbered(number: u8, factor: f64) -> Option<Self> {
        Some(match number {
            0 => Self::Sum,
            1 => Self::Mean,
            2 => Self::Max,
            3 => Self::Min,
            4 => Self::Product,
            5 => Self::PreMulSum(factor),
            _ => return None,
        })
    }

    /// Whether both are the same reduction. Ranks may differ in the factor of [`PreMulSum`](Self::PreMulSum).
    pub(crate) fn agrees(self, other: Self) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&other)
    }
}

/// An operation of a communicator, with its arguments.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Operation {
    /// Every rank gets the reduction of all.
    AllReduce(ReduceOp),
    /// Every rank gets its part of the reduction of all.
    ReduceScatter(ReduceOp),
    /// Every rank gets the parts of all, in rank order.
    AllGather,
    /// Every rank gets what the root holds.
    Broadcast {
        /// Rank that holds it.
        root: usize,
    },
    /// The root gets the reduction of all.
    Reduce {
        /// The reduction.
        op: ReduceOp,
        /// Rank that gets it.
        root: usize,
    },
    /// The root gets the parts of all, in rank order.
    Gather {
        /// Rank that gets them.
        root: usize,
    },
    /// Every rank gets its part of what the root holds.
    Scatter {
        /// Rank that holds it.
        root: usize,
    },
    /// Every rank gets part `rank` of every rank, in rank order.
    AllToAll,
    /// No rank continues before all have called it.
    Barrier,
    /// The group is divided into groups.
    Split,
    /// A message leaves.
    Send {
        /// Receiving rank.
        to: usize,
        /// Tag of the message.
        tag: u64,
    },
    /// A message is awaited.
    Receive {
        /// Sending rank.
        from: usize,
        /// Tag of the message.
        tag: u64,
    },
}

impl Operation {
    /// The names of all operations, in the order of [`index`](Self::index).
    pub(crate) const NAMES: [&'static str; 12] = [
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "reduce",
        "gather",
        "scatter",
        "all_to_all",
        "barrier",
        "split",
        "send",
        "recv",
    ];

    #[inline]
    pub(crate) fn index(&self) -> usize {
        match self {
            Self::AllReduce(_) => 0,
            Self::ReduceScatter(_) => 1,
            Self::AllGather => 2,
            Self::Broadcast { .. } => 3,
            Self::Reduce { .. } => 4,
            Self::Gather { .. } => 5,
            Self::Scatter { .. } => 6,
            Self::AllToAll => 7,
            Self::Barrier => 8,
            Self::Split => 9,
            Self::Send { .. } => 10,
            Self::Receive { .. } => 11,
        }
    }

    /// The name of the [`Communicator`](super::Communicator) method that calls it.
    pub fn name(&self) -> &'static str {
        Self::NAMES[self.index()]
    }

    /// Whether the first dims of the ranks' tensors may differ.
    pub(super) fn allows_ragged(&self) -> bool {
        matches!(self, Self::AllGather | Self::Gather { .. } | Self::AllToAll)
    }

    /// Whether both are the same operation, with the same arguments but for factors.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::AllReduce(a), Self::AllReduce(b)) | (Self::ReduceScatter(a), Self::ReduceScatter(b)) => a.agrees(*b),
            (Self::Reduce { op: a, root: r }, Self::Reduce { op: b, root: s }) => a.agrees(*b) && r == s,
            _ => self == other,
        }
    }
}
