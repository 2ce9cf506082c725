//! The fields of the operations that passes look for, each under one name: burn has a variant for each kind of tensor.

use burn_ir::{
    BaseOperationIr as Base, BatchNormOpIr, BinaryOpIr, CastOpIr, CatOpIr, EmbeddingBackwardOpIr,
    FloatOperationIr as Float, MatmulOpIr, ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr,
    PermuteOpIr, RandomOpIr, ReduceDimOpIr, ScalarOpIr, ShapeOpIr, SliceAssignOpIr, SwapDimsOpIr, TensorId, TensorIr,
    UnaryOpIr,
};

/// `lhs + rhs` of float tensors.
pub(crate) fn sum(op: &OperationIr) -> Option<&BinaryOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::Add(op)) => Some(op),
        _ => None,
    }
}

/// `lhs - rhs` of float tensors.
pub(crate) fn difference(op: &OperationIr) -> Option<&BinaryOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::Sub(op)) => Some(op),
        _ => None,
    }
}

/// `lhs * rhs` of float tensors, element by element.
pub(crate) fn product(op: &OperationIr) -> Option<&BinaryOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::Mul(op)) => Some(op),
        _ => None,
    }
}

/// A float tensor times a number.
pub(crate) fn scaled(op: &OperationIr) -> Option<&ScalarOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::MulScalar(op)) => Some(op),
        _ => None,
    }
}

/// A float tensor plus a number.
pub(crate) fn shifted(op: &OperationIr) -> Option<&ScalarOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::AddScalar(op)) => Some(op),
        _ => None,
    }
}

/// The square root of a float tensor.
pub(crate) fn square_root(op: &OperationIr) -> Option<&UnaryOpIr> {
    match op {
        OperationIr::Float(_, Float::Sqrt(op)) => Some(op),
        _ => None,
    }
}

/// The reciprocal of a float tensor.
pub(crate) fn reciprocal(op: &OperationIr) -> Option<&UnaryOpIr> {
    match op {
        OperationIr::Float(_, Float::Recip(op)) => Some(op),
        _ => None,
    }
}

/// The product of two float matrices, or batches of them.
pub(crate) fn matmul(op: &OperationIr) -> Option<&MatmulOpIr> {
    match op {
        OperationIr::Float(_, Float::Matmul(op)) => Some(op),
        _ => None,
    }
}

/// The mean of a float tensor over one dim.
pub(crate) fn mean_dim(op: &OperationIr) -> Option<&ReduceDimOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::MeanDim(op)) => Some(op),
        _ => None,
    }
}

/// A reshape of a tensor of any kind.
pub(crate) fn reshape(op: &OperationIr) -> Option<&ShapeOpIr> {
    match base(op)? {
        Base::Reshape(op) => Some(op),
        _ => None,
    }
}

/// Two dims of a float tensor swapped.
pub(crate) fn swap_dims(op: &OperationIr) -> Option<&SwapDimsOpIr> {
    match op {
        OperationIr::BaseFloat(Base::SwapDims(op)) => Some(op),
        _ => None,
    }
}

/// The dims of a float tensor in another order.
pub(crate) fn permute(op: &OperationIr) -> Option<&PermuteOpIr> {
    match op {
        OperationIr::BaseFloat(Base::Permute(op)) => Some(op),
        _ => None,
    }
}

/// Float tensors beside each other along a dim.
pub(crate) fn cat(op: &OperationIr) -> Option<&CatOpIr> {
    match op {
        OperationIr::BaseFloat(Base::Cat(op)) => Some(op),
        _ => None,
    }
}

/// A float tensor with a range of it replaced.
pub(crate) fn slice_assign(op: &OperationIr) -> Option<&SliceAssignOpIr> {
    match op {
        OperationIr::BaseFloat(Base::SliceAssign(op)) => Some(op),
        _ => None,
    }
}

/// A float tensor in another dtype.
pub(crate) fn cast(op: &OperationIr) -> Option<&CastOpIr> {
    match op {
        OperationIr::BaseFloat(Base::Cast(op)) => Some(op),
        _ => None,
    }
}

/// The gradient of an embedding's weight.
pub(crate) fn embedding_gradient(op: &OperationIr) -> Option<&EmbeddingBackwardOpIr> {
    match op {
        OperationIr::Module(Module::EmbeddingBackward(op)) => Some(op),
        _ => None,
    }
}

/// burn's batch norm with batch statistics.
pub(crate) fn batch_norm(op: &OperationIr) -> Option<&BatchNormOpIr> {
    match op {
        OperationIr::Module(Module::BatchNorm(op)) => Some(op),
        _ => None,
    }
}

/// Whether an operation makes zeros.
pub(crate) fn is_zeros(op: &OperationIr) -> bool {
    matches!(op, OperationIr::BaseFloat(Base::Zeros(_)) | OperationIr::BaseInt(Base::Zeros(_)))
}

/// Whether an operation makes its output from nothing but scalars that are the same for all elements.
pub(crate) fn is_filled(op: &OperationIr) -> bool {
    match op {
        OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric) => {
            matches!(numeric, Numeric::Full(_))
        }
        op => matches!(base(op), Some(Base::Zeros(_) | Base::Ones(_))),
    }
}

/// The tensor, the indices and the dim of an operation that adds values to a float tensor at indices.
pub(crate) fn writes_at(op: &OperationIr) -> Option<(&TensorIr, &TensorIr, usize)> {
    match op {
        OperationIr::BaseFloat(Base::Scatter(op)) => Some((&op.tensor, &op.indices, op.dim)),
        OperationIr::BaseFloat(Base::SelectAssign(op)) => Some((&op.tensor, &op.indices, op.dim)),
        _ => None,
    }
}

/// The same of an operation that reads there.
pub(crate) fn reads_at(op: &OperationIr) -> Option<(&TensorIr, &TensorIr, usize)> {
    match op {
        OperationIr::BaseFloat(Base::Gather(op)) => Some((&op.tensor, &op.indices, op.dim)),
        OperationIr::BaseFloat(Base::Select(op)) => Some((&op.tensor, &op.indices, op.dim)),
        _ => None,
    }
}

/// A product of matrices, also as a linear layer without bias or as its gradient to the input: the factors, whether the
/// second is transposed before, and the output.
pub(crate) fn plain_product(op: &OperationIr) -> Option<(&TensorIr, &TensorIr, bool, &TensorIr)> {
    match op {
        OperationIr::Float(_, Float::Matmul(op)) => Some((&op.lhs, &op.rhs, false, &op.out)),
        OperationIr::Module(Module::Linear(op)) if op.bias.is_none() => Some((&op.x, &op.weight, false, &op.out)),
        OperationIr::Module(Module::LinearXBackward(op)) => Some((&op.output_grad, &op.weight, true, &op.out)),
        _ => None,
    }
}

/// The sum of a float tensor over one dim.
pub(crate) fn sum_dim(op: &OperationIr) -> Option<&ReduceDimOpIr> {
    match op {
        OperationIr::NumericFloat(_, Numeric::SumDim(op)) => Some(op),
        _ => None,
    }
}

/// Whether an operation takes a range of a float tensor, or casts it.
pub(crate) fn slices_or_casts(op: &OperationIr) -> bool {
    matches!(op, OperationIr::BaseFloat(Base::Slice(_) | Base::Cast(_)))
}

/// What an operation draws, if it draws random numbers.
pub(crate) fn drawn(op: &OperationIr) -> Option<&RandomOpIr> {
    match op {
        OperationIr::Float(_, Float::Random(random))
        | OperationIr::NumericFloat(_, Numeric::IntRandom(random))
        | OperationIr::NumericInt(_, Numeric::IntRandom(random)) => Some(random),
        _ => None,
    }
}

/// Whether an operation combines the elements along the last dim of its input: a sum, a mean, a maximum, a layer norm.
pub(crate) fn reduces_last(op: &OperationIr) -> bool {
    match op {
        OperationIr::NumericFloat(_, Numeric::SumDim(op) | Numeric::MeanDim(op) | Numeric::MaxDim(op)) => {
            op.axis + 1 == op.input.shape.num_dims()
        }
        OperationIr::Module(Module::LayerNorm(_)) => true,
        _ => false,
    }
}

/// The sum of all that it adds, or the mean: of a float or an int tensor, over all dims or over one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SumOrMean<'a> {
    Sum(&'a TensorIr),
    Mean(&'a TensorIr),
}

/// What an operation sums or averages.
pub(crate) fn sum_or_mean(op: &OperationIr) -> Option<SumOrMean<'_>> {
    match op {
        OperationIr::NumericFloat(_, numeric) => match numeric {
            Numeric::Sum(op) => Some(SumOrMean::Sum(&op.input)),
            Numeric::SumDim(op) => Some(SumOrMean::Sum(&op.input)),
            Numeric::Mean(op) => Some(SumOrMean::Mean(&op.input)),
            Numeric::MeanDim(op) => Some(SumOrMean::Mean(&op.input)),
            _ => None,
        },
        OperationIr::NumericInt(_, Numeric::Sum(op)) => Some(SumOrMean::Sum(&op.input)),
        OperationIr::NumericInt(_, Numeric::SumDim(op)) => Some(SumOrMean::Sum(&op.input)),
        _ => None,
    }
}

/// A step that multiplies by a number or moves elements, so that it may as well come after a sum: its input, and the
/// step in words, the same for steps that do the same.
pub(crate) fn linear_step(op: &OperationIr) -> Option<(TensorId, String)> {
    match op {
        OperationIr::BaseFloat(Base::Reshape(op)) | OperationIr::BaseInt(Base::Reshape(op)) => {
            Some((op.input.id, format!("reshape {:?}", op.out.shape)))
        }
        OperationIr::BaseFloat(Base::Cast(op)) if op.input.dtype.is_float() => {
            Some((op.input.id, format!("cast {:?}", op.out.dtype)))
        }
        OperationIr::NumericFloat(_, Numeric::Neg(op)) => Some((op.input.id, "neg".to_owned())),
        OperationIr::NumericFloat(_, Numeric::MulScalar(op)) => Some((op.lhs.id, format!("times {:?}", op.rhs))),
        OperationIr::NumericFloat(_, Numeric::DivScalar(op)) => Some((op.lhs.id, format!("over {:?}", op.rhs))),
        _ => None,
    }
}

fn base(op: &OperationIr) -> Option<&Base> {
    match op {
        OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => Some(op),
        _ => None,
    }
}
