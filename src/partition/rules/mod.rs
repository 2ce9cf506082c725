//! What each operation can do with split inputs, in files by kind.
//!
//! A rule is a pure function from an operation, in its global shapes, to the [`ShardingOption`]s under which every rank
//! can run it on local tensors and get its share of the result. It knows neither what lies where nor what a move costs:
//! the [pass](super) chooses. [`realise`] then says what the ranks run for it.

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

use burn_ir::{OperationIr, TensorId, TensorIr};

use crate::graph::operation::Form;
use crate::layout::Layout;

pub(crate) use creation::creates;
pub(super) use index::looked_up;
pub(crate) use option::{LocalOperation, ShardingOption};
pub(super) use shape::{take_all, whole};

/// The sharding options of an operation beside the replicated one; none for an operation without a rule.
pub(crate) fn sharding_options(op: &OperationIr, degree: usize) -> Vec<ShardingOption> {
    let form = Form::of(op);
    let mut found = match form {
        Form::Reshape(_)
        | Form::SwapDims(_)
        | Form::Permute(_)
        | Form::Expand(_)
        | Form::Flip(_)
        | Form::Slice(_)
        | Form::SliceAssign(_)
        | Form::RepeatDim(_)
        | Form::Cat(_) => shape::sharding_options(form, degree),
        Form::Gather(_)
        | Form::Select(_)
        | Form::Scatter(_)
        | Form::SelectAssign(_)
        | Form::Embedding(_)
        | Form::EmbeddingBackward(_) => index::sharding_options(form),
        Form::Filled(out) => creation::anywhere(out),
        Form::Reduction(reduction) => reduce::reduction(reduction),
        Form::AlongDim(along) => reduce::along_dim(along),
        Form::Matmul(op) => matmul::matmul(op),
        Form::Linear(_) | Form::LinearXBackward(_) | Form::LinearWeightBackward(_) | Form::LinearBiasBackward(_) => {
            matmul::linear(form)
        }
        Form::Convolution(convolution) => convolution::sharding_options(convolution),
        Form::ByChannel | Form::BatchNorm | Form::LayerNorm(_) | Form::Attention(_) => module::sharding_options(op),
        Form::Custom(_) => [collective::sharding_options(op), creation::random(op), index::looks(form)].concat(),
        Form::Other => Vec::new(),
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
    match Form::of(op) {
        Form::Linear(linear) => matmul::lower(linear, layouts, fresh),
        Form::Convolution(_) => convolution::lower(op, layouts, fresh),
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
        shape::take_all(&mut op, dim);
        creation::draw_part(&mut op, dim, rank);
    }
    vec![op]
}
