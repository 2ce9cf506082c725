//! What an operation is, whatever the kind of its tensors, with the fields that rules ask for.
//!
//! burn has an operation for each kind of tensor, each dim and each reduction; those that rules treat alike are one
//! form here. Element-wise operations have none: see `class.rs` and `effect.rs`.

use burn_ir::{
    ActivationOperationIr as Activation, AttentionOpIr, BaseOperationIr as Base, CatOpIr, CustomOpIr,
    EmbeddingBackwardOpIr, EmbeddingOpIr, FlipOpIr, FloatOperationIr as Float, GatherOpIr, LayerNormOpIr,
    LinearBiasBackwardOpIr, LinearOpIr, LinearWeightBackwardOpIr, LinearXBackwardOpIr, MatmulOpIr,
    ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr, PermuteOpIr, RepeatDimOpIr, ScatterOpIr,
    SelectAssignOpIr, SelectOpIr, ShapeOpIr, SliceAssignOpIr, SliceOpIr, SwapDimsOpIr, TensorIr,
};

/// An operation.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form<'a> {
    Reshape(&'a ShapeOpIr),
    SwapDims(&'a SwapDimsOpIr),
    Permute(&'a PermuteOpIr),
    Expand(&'a ShapeOpIr),
    Flip(&'a FlipOpIr),
    Slice(&'a SliceOpIr),
    SliceAssign(&'a SliceAssignOpIr),
    RepeatDim(&'a RepeatDimOpIr),
    Cat(&'a CatOpIr),
    Gather(&'a GatherOpIr),
    Select(&'a SelectOpIr),
    Scatter(&'a ScatterOpIr),
    SelectAssign(&'a SelectAssignOpIr),
    Embedding(&'a EmbeddingOpIr),
    EmbeddingBackward(&'a EmbeddingBackwardOpIr),
    /// Makes a tensor from nothing but a scalar.
    Filled(&'a TensorIr),
    Reduction(Reduction<'a>),
    /// Computes each place of its output from all places of its input along one dim.
    AlongDim(AlongDim<'a>),
    /// The product of float matrices.
    Matmul(&'a MatmulOpIr),
    Linear(&'a LinearOpIr),
    LinearXBackward(&'a LinearXBackwardOpIr),
    LinearWeightBackward(&'a LinearWeightBackwardOpIr),
    LinearBiasBackward(&'a LinearBiasBackwardOpIr),
    Convolution(Convolution),
    /// Treats every image, and every channel of it, by itself: pooling, interpolation, unfolding.
    ByChannel,
    /// With statistics that are given.
    BatchNorm,
    LayerNorm(&'a LayerNormOpIr),
    Attention(&'a AttentionOpIr),
    Custom(&'a CustomOpIr),
    Other,
}

/// A sum or the like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reduction<'a> {
    pub(crate) by: ReductionKind,
    pub(crate) input: &'a TensorIr,
    pub(crate) over: ReductionDims<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReductionKind {
    Sum,
    Mean,
    Product,
    Max,
    MaxAbs,
    Min,
    /// Of bools.
    All,
    Any,
}

/// The dims that a reduction is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReductionDims<'a> {
    All,
    One(usize),
    Several(&'a [usize]),
}

impl ReductionDims<'_> {
    /// Whether a dim is one of them.
    pub(crate) fn contains(&self, dim: usize) -> bool {
        match self {
            Self::All => true,
            Self::One(one) => *one == dim,
            Self::Several(several) => several.contains(&dim),
        }
    }
}

/// What works along one dim.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AlongDim<'a> {
    pub(crate) what: AlongDimKind,
    pub(crate) input: &'a TensorIr,
    pub(crate) dim: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AlongDimKind {
    Softmax,
    LogSoftmax,
    Softmin,
    /// The sums up to each place.
    CumulativeSum,
    ArgMax,
    /// Sorts, finds or accumulates otherwise.
    Other,
}

/// A convolution, or a step of its backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Convolution {
    pub(crate) pass: ConvolutionPass,
    pub(crate) transposed: bool,
    pub(crate) groups: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConvolutionPass {
    /// `x, weight[, bias]`.
    Forward {
        bias: bool,
    },
    /// `x, weight, output_grad` to the gradient of one of these.
    InputGradient,
    WeightGradient,
    BiasGradient,
}

impl<'a> Form<'a> {
    pub(crate) fn of(op: &'a OperationIr) -> Self {
        match op {
            OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => base(op),
            OperationIr::NumericFloat(_, op) | OperationIr::NumericInt(_, op) => numeric(op),
            OperationIr::Float(_, Float::Matmul(op)) => Self::Matmul(op),
            OperationIr::Activation(op) => activation(op),
            OperationIr::Module(op) => module(op),
            OperationIr::Custom(op) => Self::Custom(op),
            _ => Self::Other,
        }
    }
}

fn reduction<'a>(by: ReductionKind, input: &'a TensorIr, over: ReductionDims<'a>) -> Form<'a> {
    Form::Reduction(Reduction { by, input, over })
}

fn along(what: AlongDimKind, input: &TensorIr, dim: usize) -> Form<'_> {
    Form::AlongDim(AlongDim { what, input, dim })
}

fn base(op: &Base) -> Form<'_> {
    use ReductionDims::One;
    use ReductionKind::{All, Any};
    match op {
        Base::Reshape(op) => Form::Reshape(op),
        Base::SwapDims(op) => Form::SwapDims(op),
        Base::Permute(op) => Form::Permute(op),
        Base::Expand(op) => Form::Expand(op),
        Base::Flip(op) => Form::Flip(op),
        Base::Slice(op) => Form::Slice(op),
        Base::SliceAssign(op) => Form::SliceAssign(op),
        Base::RepeatDim(op) => Form::RepeatDim(op),
        Base::Cat(op) => Form::Cat(op),
        Base::Gather(op) => Form::Gather(op),
        Base::Select(op) => Form::Select(op),
        Base::Scatter(op) => Form::Scatter(op),
        Base::SelectAssign(op) => Form::SelectAssign(op),
        Base::Zeros(op) | Base::Ones(op) | Base::Empty(op) => Form::Filled(&op.out),
        Base::All(op) => reduction(All, &op.input, ReductionDims::All),
        Base::Any(op) => reduction(Any, &op.input, ReductionDims::All),
        Base::AllDim(op) => reduction(All, &op.input, One(op.axis)),
        Base::AnyDim(op) => reduction(Any, &op.input, One(op.axis)),
        _ => Form::Other,
    }
}

fn numeric(op: &Numeric) -> Form<'_> {
    use ReductionDims::{All, One, Several};
    use ReductionKind::{Max, MaxAbs, Mean, Min, Product, Sum};
    match op {
        Numeric::Full(op) => Form::Filled(&op.out),
        Numeric::Sum(op) => reduction(Sum, &op.input, All),
        Numeric::SumDim(op) => reduction(Sum, &op.input, One(op.axis)),
        Numeric::SumDims(op) => reduction(Sum, &op.input, Several(&op.axes)),
        Numeric::Mean(op) => reduction(Mean, &op.input, All),
        Numeric::MeanDim(op) => reduction(Mean, &op.input, One(op.axis)),
        Numeric::Prod(op) => reduction(Product, &op.input, All),
        Numeric::ProdDim(op) => reduction(Product, &op.input, One(op.axis)),
        Numeric::Max(op) => reduction(Max, &op.input, All),
        Numeric::MaxDim(op) => reduction(Max, &op.input, One(op.axis)),
        Numeric::MaxAbs(op) => reduction(MaxAbs, &op.input, All),
        Numeric::MaxAbsDim(op) => reduction(MaxAbs, &op.input, One(op.axis)),
        Numeric::Min(op) => reduction(Min, &op.input, All),
        Numeric::MinDim(op) => reduction(Min, &op.input, One(op.axis)),
        Numeric::CumSum(op) => along(AlongDimKind::CumulativeSum, &op.input, op.axis),
        Numeric::CumProd(op) | Numeric::CumMin(op) | Numeric::CumMax(op) => {
            along(AlongDimKind::Other, &op.input, op.axis)
        }
        Numeric::ArgMax(op) => along(AlongDimKind::ArgMax, &op.input, op.axis),
        Numeric::ArgMin(op) | Numeric::ArgTopK(op) | Numeric::TopK(op) => {
            along(AlongDimKind::Other, &op.input, op.axis)
        }
        Numeric::Sort(op) | Numeric::ArgSort(op) => along(AlongDimKind::Other, &op.input, op.dim),
        Numeric::SortWithIndices(op) => along(AlongDimKind::Other, &op.input, op.dim),
        Numeric::MaxDimWithIndices(op) | Numeric::MinDimWithIndices(op) => {
            along(AlongDimKind::Other, &op.tensor, op.dim)
        }
        Numeric::TopKWithIndices(op) => along(AlongDimKind::Other, &op.tensor, op.dim),
        _ => Form::Other,
    }
}

fn activation(op: &Activation) -> Form<'_> {
    match op {
        Activation::Softmax(op) => along(AlongDimKind::Softmax, &op.input, op.axis),
        Activation::LogSoftmax(op) => along(AlongDimKind::LogSoftmax, &op.input, op.axis),
        Activation::Softmin(op) => along(AlongDimKind::Softmin, &op.input, op.axis),
        _ => Form::Other,
    }
}

fn module(op: &Module) -> Form<'_> {
    use ConvolutionPass::{BiasGradient, Forward, InputGradient, WeightGradient};
    let convolution = |pass, transposed, groups| Form::Convolution(Convolution { pass, transposed, groups });
    let forward = |bias: &Option<TensorIr>| Forward { bias: bias.is_some() };
    match op {
        Module::Embedding(op) => Form::Embedding(op),
        Module::EmbeddingBackward(op) => Form::EmbeddingBackward(op),
        Module::Linear(op) => Form::Linear(op),
        Module::LinearXBackward(op) => Form::LinearXBackward(op),
        Module::LinearWeightBackward(op) => Form::LinearWeightBackward(op),
        Module::LinearBiasBackward(op) => Form::LinearBiasBackward(op),
        Module::Conv1d(op) => convolution(forward(&op.bias), false, op.options.groups),
        Module::Conv2d(op) => convolution(forward(&op.bias), false, op.options.groups),
        Module::Conv3d(op) => convolution(forward(&op.bias), false, op.options.groups),
        Module::ConvTranspose1d(op) => convolution(forward(&op.bias), true, op.options.groups),
        Module::ConvTranspose2d(op) => convolution(forward(&op.bias), true, op.options.groups),
        Module::ConvTranspose3d(op) => convolution(forward(&op.bias), true, op.options.groups),
        Module::Conv1dXBackward(op) => convolution(InputGradient, false, op.options.groups),
        Module::Conv2dXBackward(op) => convolution(InputGradient, false, op.options.groups),
        Module::Conv3dXBackward(op) => convolution(InputGradient, false, op.options.groups),
        Module::Conv1dWeightBackward(op) => convolution(WeightGradient, false, op.options.groups),
        Module::Conv2dWeightBackward(op) => convolution(WeightGradient, false, op.options.groups),
        Module::Conv3dWeightBackward(op) => convolution(WeightGradient, false, op.options.groups),
        Module::ConvTranspose1dWeightBackward(op) => convolution(WeightGradient, true, op.options.groups),
        Module::ConvTranspose2dWeightBackward(op) => convolution(WeightGradient, true, op.options.groups),
        Module::ConvTranspose3dWeightBackward(op) => convolution(WeightGradient, true, op.options.groups),
        Module::Conv1dBiasBackward(_) | Module::Conv2dBiasBackward(_) | Module::Conv3dBiasBackward(_) => {
            convolution(BiasGradient, false, 1)
        }
        Module::ConvTranspose1dBiasBackward(_)
        | Module::ConvTranspose2dBiasBackward(_)
        | Module::ConvTranspose3dBiasBackward(_) => convolution(BiasGradient, true, 1),
        Module::AvgPool1d(_)
        | Module::AvgPool2d(_)
        | Module::AvgPool1dBackward(_)
        | Module::AvgPool2dBackward(_)
        | Module::AdaptiveAvgPool1d(_)
        | Module::AdaptiveAvgPool2d(_)
        | Module::AdaptiveAvgPool3d(_)
        | Module::AdaptiveAvgPool1dBackward(_)
        | Module::AdaptiveAvgPool2dBackward(_)
        | Module::AdaptiveAvgPool3dBackward(_)
        | Module::MaxPool1d(_)
        | Module::MaxPool2d(_)
        | Module::MaxPool1dWithIndices(_)
        | Module::MaxPool2dWithIndices(_)
        | Module::MaxPool1dWithIndicesBackward(_)
        | Module::MaxPool2dWithIndicesBackward(_)
        | Module::Interpolate(_)
        | Module::InterpolateBackward(_)
        | Module::Unfold4d(_) => Form::ByChannel,
        Module::BatchNorm(_) => Form::BatchNorm,
        Module::LayerNorm(op) => Form::LayerNorm(op),
        Module::Attention(op) => Form::Attention(op),
        _ => Form::Other,
    }
}
