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
mod option;
mod reduce;
mod shape;

use burn_ir::{BaseOperationIr, OperationIr, TensorId, TensorIr};

use crate::layout::Layout;

pub(crate) use creation::creates;
pub(super) use index::looked_up;
pub(crate) use option::{LocalOperation, ShardingOption, of_kind};
pub(super) use shape::{take_all, whole};

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
