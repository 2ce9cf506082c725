//! What each operation can do with split inputs, in files by kind.
//!
//! A rule is a pure function from an operation, in its global shapes, to the [`ShardingOption`]s under which every rank can run
//! it on local tensors and get its share of the result. It knows neither what lies where nor what a move costs: the
//! [pass](super) chooses. [`realise`] then says what the ranks run for it.

mod collective;
mod convolution;
mod creation;
mod elementwise;
mod index;
mod matmul;
mod module;
mod reduce;
mod shape;

use burn::tensor::{DType, Shape};
use burn_ir::{BaseOperationIr, NumericOperationIr, OperationIr, TensorId, TensorIr};

use super::collectives::CollectiveKind;
pub(crate) use crate::graph::step::only_moves;
use crate::layout::Layout;

pub(crate) use elementwise::is_elementwise;
pub(super) use index::looked_up;
pub(super) use shape::{take_all, whole};

/// One way to run an operation: given inputs in these layouts, in the order of [`OperationIr::inputs`], the local
/// operation gives all its outputs in that layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShardingOption {
    pub(crate) inputs: Vec<Layout>,
    pub(crate) output: Layout,
    pub(crate) how: LocalOperation,
}

/// What the local operation is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LocalOperation {
    /// The operation as it is, on local tensors.
    Locally,
    /// The operation, divided by the number of ranks: a mean of which each rank has an equal share.
    Averaged,
    /// The operation with indices counted from the beginning of this rank's part of a dim. What lies outside reads or adds
    /// zeros.
    Indexed {
        /// The dim that is indexed and split.
        dim: usize,
    },
    /// The operation, then a collective that reduces what the ranks got.
    Reduced(CollectiveKind),
}

impl ShardingOption {
    fn new<const N: usize>(inputs: [Layout; N], output: Layout) -> Self {
        Self::of(inputs.into(), output)
    }

    fn of(inputs: Vec<Layout>, output: Layout) -> Self {
        Self { inputs, output, how: LocalOperation::Locally }
    }

    fn done(self, how: LocalOperation) -> Self {
        Self { how, ..self }
    }

    /// All inputs whole, and so the outputs: right for every operation that draws no random numbers.
    pub(crate) fn replicated(op: &OperationIr) -> Self {
        Self::of(op.inputs().map(|_| Layout::Replicated).collect(), Layout::Replicated)
    }
}

/// The sharding options of an operation beside the replicated one; none for an operation without a rule.
pub(crate) fn sharding_options(op: &OperationIr, degree: usize) -> Vec<ShardingOption> {
    let mut found = match op {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base {
            BaseOperationIr::Gather(_)
            | BaseOperationIr::Scatter(_)
            | BaseOperationIr::Select(_)
            | BaseOperationIr::SelectAssign(_) => index::base(base),
            _ => [shape::base(base, degree), reduce::base(base), creation::base(base)].concat(),
        },
        OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric) => {
            [reduce::numeric(numeric), creation::numeric(numeric)].concat()
        }
        OperationIr::Float(_, float) => matmul::float(float),
        OperationIr::Module(module) => {
            [matmul::module(module), index::module(module), convolution::module(module), module::sharding_options(op)]
                .concat()
        }
        OperationIr::Activation(activation) => reduce::activation(activation),
        OperationIr::Custom(_) => [collective::sharding_options(op), creation::random(op), index::looks(op)].concat(),
        _ => Vec::new(),
    };
    found.extend(elementwise::sharding_options(op));
    found.retain(|option| fits(op, option, degree));
    found
}

/// Whether the degree divides what the option splits, and no tensor is wanted in two layouts at once.
fn fits(op: &OperationIr, option: &ShardingOption, degree: usize) -> bool {
    let divides = |tensor: &TensorIr, layout: Layout| match layout {
        Layout::Sharded(dim) => dim < tensor.shape.num_dims() && tensor.shape[dim].is_multiple_of(degree),
        _ => true,
    };
    let inputs: Vec<(&TensorIr, Layout)> = op.inputs().zip(option.inputs.iter().copied()).collect();
    let agree = |(tensor, layout): &(&TensorIr, Layout)| inputs.iter().all(|(t, l)| t.id != tensor.id || l == layout);
    inputs.iter().all(|input| divides(input.0, input.1) && agree(input))
        && op.outputs().all(|out| divides(out, option.output))
}

/// Rewrites an operation as several that have rules of their own, given the layouts that its inputs are in.
pub(crate) fn lower(
    op: &OperationIr,
    layouts: &[Layout],
    fresh: &mut dyn FnMut() -> TensorId,
) -> Option<Vec<OperationIr>> {
    match op {
        OperationIr::Module(module) => {
            matmul::lower(module, layouts, fresh).or_else(|| convolution::lower(module, layouts, fresh))
        }
        _ => None,
    }
}

/// What a rank runs for an operation whose tensors are local already.
pub(crate) fn realise(
    mut op: OperationIr,
    option: &ShardingOption,
    degree: usize,
    rank: usize,
    fresh: &mut dyn FnMut() -> TensorId,
) -> Vec<OperationIr> {
    match option.how {
        LocalOperation::Averaged => return reduce::averaged(op, degree, fresh),
        LocalOperation::Indexed { dim } => return index::from_part(op, dim, rank, fresh),
        LocalOperation::Locally | LocalOperation::Reduced(_) => {}
    }
    if let Layout::Sharded(dim) = option.output {
        match &mut op {
            OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => {
                shape::take_all(base, dim);
            }
            OperationIr::Custom(_) => creation::draw_part(&mut op, dim, rank),
            _ => {}
        }
    }
    vec![op]
}

/// The operation on tensors of this dtype.
pub(crate) fn of_kind(dtype: DType, op: BaseOperationIr) -> OperationIr {
    if dtype.is_float() {
        OperationIr::BaseFloat(op)
    } else if dtype.is_bool() {
        OperationIr::BaseBool(op)
    } else {
        OperationIr::BaseInt(op)
    }
}

/// Whether it is the sum of two float tensors, and of which.
pub(crate) fn as_sum(op: &OperationIr) -> Option<(&TensorIr, &TensorIr, &TensorIr)> {
    match op {
        OperationIr::NumericFloat(_, NumericOperationIr::Add(op)) => Some((&op.lhs, &op.rhs, &op.out)),
        _ => None,
    }
}

/// A sharding option for every dim of a shape for which `of` has one.
fn each_dim(shape: &Shape, of: impl FnMut(usize) -> Option<ShardingOption>) -> Vec<ShardingOption> {
    (0..shape.num_dims()).filter_map(of).collect()
}
