//! The one table of burn's operations: what each of them does to the elements of its inputs.
//!
//! It names every variant, so an operation that a new version of burn adds does not compile before it has a row here.

use burn_ir::{
    ActivationOperationIr as Activation, BaseOperationIr as Base, BoolOperationIr as Bool, FloatOperationIr as Float,
    IntOperationIr as Int, ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr,
};

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The same elements under other dims: no element need be copied.
    View,
    /// A range of the elements: a view too.
    Slice,
    /// The same elements in an order that only a copy can give.
    Reorder,
    /// Elements of several tensors put together, repeated, or written into a copy of another.
    Assemble,
    /// The same values in another dtype, element by element.
    Cast,
    /// Each element of the output from the elements at its place, with broadcasting.
    Elementwise,
    /// Element by element, and the operation of sums is the sum of the operations.
    Linear,
    /// Elements from nothing but scalars.
    Creation,
    /// Random elements.
    Random,
    /// Sums, means, extrema and the like, over all dims or over some.
    Reduction,
    /// What orders the elements along a dim, or accumulates over them: each output depends on many inputs.
    Scan,
    /// Reads or writes at places which another tensor tells.
    Index,
    /// A product of matrices, a convolution, or attention.
    Product,
    /// What else burn computes as one operation: norms, softmax, pooling, interpolation.
    Fused,
    /// An operation of this crate, by its id.
    Custom,
    /// No computation: a tensor that is there, or is not needed any more.
    Bookkeeping,
}

impl Class {
    /// What an operation does.
    pub(crate) fn of(op: &OperationIr) -> Self {
        match op {
            OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => base(op),
            OperationIr::NumericFloat(_, op) => numeric(op),
            OperationIr::NumericInt(_, op) => match numeric(op) {
                // Ints overflow: only what never leaves them is linear.
                Self::Linear if !matches!(op, Numeric::Add(_) | Numeric::Sub(_) | Numeric::Neg(_)) => Self::Elementwise,
                class => class,
            },
            OperationIr::Float(_, op) => float(op),
            OperationIr::Int(op) => int(op),
            OperationIr::Bool(op) => bool(op),
            OperationIr::Activation(op) => activation(op),
            OperationIr::Module(op) => module(op),
            OperationIr::Custom(_) => Self::Custom,
            OperationIr::Init(_) | OperationIr::Drop(_) | OperationIr::Distributed(_) => Self::Bookkeeping,
        }
    }
}

/// Whether an operation only looks at a tensor in another way.
pub(crate) fn is_view(op: &OperationIr) -> bool {
    matches!(Class::of(op), Class::View | Class::Slice)
}

/// Whether it moves the elements of its only input, a float tensor, without reading or adding them.
pub(crate) fn only_moves(op: &OperationIr) -> bool {
    matches!(op, OperationIr::BaseFloat(_)) && matches!(Class::of(op), Class::View | Class::Reorder)
}

/// Whether each element of the output is computed from the elements at its place, and nothing else.
pub(crate) fn is_elementwise(op: &OperationIr) -> bool {
    matches!(Class::of(op), Class::Elementwise | Class::Linear | Class::Cast)
}

/// Whether the operation of sums is the sum of the operations, element by element.
pub(crate) fn is_linear(op: &OperationIr) -> bool {
    Class::of(op) == Class::Linear
}

/// Whether it costs less to run an operation once more than to send what it gives.
pub(crate) fn is_cheap(op: &OperationIr) -> bool {
    !matches!(op, OperationIr::Module(_)) && !matches!(Class::of(op), Class::Product | Class::Custom | Class::Random)
}

fn base(op: &Base) -> Class {
    match op {
        Base::Reshape(_) | Base::SwapDims(_) | Base::Permute(_) | Base::Expand(_) => Class::View,
        Base::Slice(_) => Class::Slice,
        Base::Flip(_) => Class::Reorder,
        Base::Unfold(_) | Base::SliceAssign(_) | Base::RepeatDim(_) | Base::Cat(_) => Class::Assemble,
        Base::Select(_)
        | Base::SelectAssign(_)
        | Base::Gather(_)
        | Base::Scatter(_)
        | Base::GatherNd(_)
        | Base::ScatterNd(_) => Class::Index,
        Base::MaskWhere(_)
        | Base::MaskFill(_)
        | Base::Equal(_)
        | Base::EqualElem(_)
        | Base::NotEqual(_)
        | Base::NotEqualElem(_) => Class::Elementwise,
        Base::Cast(_) => Class::Cast,
        Base::Empty(_) | Base::Ones(_) | Base::Zeros(_) => Class::Creation,
        Base::All(_) | Base::Any(_) | Base::AllDim(_) | Base::AnyDim(_) => Class::Reduction,
    }
}

fn numeric(op: &Numeric) -> Class {
    match op {
        Numeric::Add(_) | Numeric::Sub(_) | Numeric::Neg(_) | Numeric::MulScalar(_) | Numeric::DivScalar(_) => {
            Class::Linear
        }
        Numeric::AddScalar(_)
        | Numeric::SubScalar(_)
        | Numeric::Div(_)
        | Numeric::Rem(_)
        | Numeric::RemScalar(_)
        | Numeric::Mul(_)
        | Numeric::Abs(_)
        | Numeric::Greater(_)
        | Numeric::GreaterElem(_)
        | Numeric::GreaterEqual(_)
        | Numeric::GreaterEqualElem(_)
        | Numeric::Lower(_)
        | Numeric::LowerElem(_)
        | Numeric::LowerEqual(_)
        | Numeric::LowerEqualElem(_)
        | Numeric::Clamp(_)
        | Numeric::ClampMin(_)
        | Numeric::ClampMax(_)
        | Numeric::Powi(_)
        | Numeric::PowiScalar(_)
        | Numeric::Sign(_) => Class::Elementwise,
        Numeric::Full(_) => Class::Creation,
        Numeric::IntRandom(_) => Class::Random,
        Numeric::Mean(_)
        | Numeric::MeanDim(_)
        | Numeric::Sum(_)
        | Numeric::SumDim(_)
        | Numeric::SumDims(_)
        | Numeric::Prod(_)
        | Numeric::ProdDim(_)
        | Numeric::Max(_)
        | Numeric::MaxDim(_)
        | Numeric::MaxDimWithIndices(_)
        | Numeric::MaxAbs(_)
        | Numeric::MaxAbsDim(_)
        | Numeric::Min(_)
        | Numeric::MinDim(_)
        | Numeric::MinDimWithIndices(_)
        | Numeric::ArgMax(_)
        | Numeric::ArgMin(_) => Class::Reduction,
        Numeric::ArgTopK(_)
        | Numeric::TopK(_)
        | Numeric::TopKWithIndices(_)
        | Numeric::CumSum(_)
        | Numeric::CumProd(_)
        | Numeric::CumMin(_)
        | Numeric::CumMax(_)
        | Numeric::Sort(_)
        | Numeric::SortWithIndices(_)
        | Numeric::ArgSort(_) => Class::Scan,
        Numeric::Pad(_) => Class::Assemble,
    }
}

fn float(op: &Float) -> Class {
    match op {
        Float::Matmul(_) => Class::Product,
        Float::Random(_) => Class::Random,
        Float::IntoInt(_) => Class::Cast,
        Float::Cross(_) | Float::Quantize(_) | Float::Dequantize(_) | Float::GridSample2d(_) => Class::Fused,
        Float::Exp(_)
        | Float::Log(_)
        | Float::Log1p(_)
        | Float::Erf(_)
        | Float::PowfScalar(_)
        | Float::Sqrt(_)
        | Float::Cos(_)
        | Float::Cosh(_)
        | Float::Sin(_)
        | Float::Sinh(_)
        | Float::Tan(_)
        | Float::Tanh(_)
        | Float::ArcCos(_)
        | Float::ArcCosh(_)
        | Float::ArcSin(_)
        | Float::ArcSinh(_)
        | Float::ArcTan(_)
        | Float::ArcTanh(_)
        | Float::ArcTan2(_)
        | Float::Round(_)
        | Float::Floor(_)
        | Float::Ceil(_)
        | Float::Trunc(_)
        | Float::Recip(_)
        | Float::IsNan(_)
        | Float::IsInf(_)
        | Float::Powf(_)
        | Float::Hypot(_) => Class::Elementwise,
    }
}

fn int(op: &Int) -> Class {
    match op {
        Int::Matmul(_) => Class::Product,
        Int::IntoFloat(_) => Class::Cast,
        Int::BitwiseAnd(_)
        | Int::BitwiseAndScalar(_)
        | Int::BitwiseOr(_)
        | Int::BitwiseOrScalar(_)
        | Int::BitwiseXor(_)
        | Int::BitwiseXorScalar(_)
        | Int::BitwiseNot(_)
        | Int::BitwiseLeftShift(_)
        | Int::BitwiseLeftShiftScalar(_)
        | Int::BitwiseRightShift(_)
        | Int::BitwiseRightShiftScalar(_) => Class::Elementwise,
    }
}

fn bool(op: &Bool) -> Class {
    match op {
        Bool::IntoFloat(_) | Bool::IntoInt(_) => Class::Cast,
        Bool::Not(_) | Bool::And(_) | Bool::Or(_) | Bool::Xor(_) => Class::Elementwise,
    }
}

fn activation(op: &Activation) -> Class {
    match op {
        Activation::Relu(_)
        | Activation::ReluBackward(_)
        | Activation::LeakyRelu(_)
        | Activation::Gelu(_)
        | Activation::GeluBackward(_)
        | Activation::Sigmoid(_)
        | Activation::SigmoidBackward(_)
        | Activation::HardSigmoid(_)
        | Activation::LogSigmoid(_)
        | Activation::LogSigmoidBackward(_) => Class::Elementwise,
        Activation::PRelu(_) | Activation::Softmax(_) | Activation::LogSoftmax(_) | Activation::Softmin(_) => {
            Class::Fused
        }
    }
}

fn module(op: &Module) -> Class {
    match op {
        Module::Linear(_)
        | Module::LinearXBackward(_)
        | Module::LinearWeightBackward(_)
        | Module::Conv1d(_)
        | Module::Conv1dXBackward(_)
        | Module::Conv1dWeightBackward(_)
        | Module::Conv2d(_)
        | Module::Conv2dXBackward(_)
        | Module::Conv2dWeightBackward(_)
        | Module::Conv3d(_)
        | Module::Conv3dXBackward(_)
        | Module::Conv3dWeightBackward(_)
        | Module::DeformableConv2d(_)
        | Module::DeformableConv2dBackward(_)
        | Module::ConvTranspose1d(_)
        | Module::ConvTranspose1dWeightBackward(_)
        | Module::ConvTranspose2d(_)
        | Module::ConvTranspose2dWeightBackward(_)
        | Module::ConvTranspose3d(_)
        | Module::ConvTranspose3dWeightBackward(_)
        | Module::Attention(_) => Class::Product,
        Module::LinearBiasBackward(_)
        | Module::Conv1dBiasBackward(_)
        | Module::Conv2dBiasBackward(_)
        | Module::Conv3dBiasBackward(_)
        | Module::ConvTranspose1dBiasBackward(_)
        | Module::ConvTranspose2dBiasBackward(_)
        | Module::ConvTranspose3dBiasBackward(_) => Class::Reduction,
        Module::Embedding(_) | Module::EmbeddingBackward(_) => Class::Index,
        Module::Unfold4d(_) => Class::Assemble,
        Module::BatchNorm(_)
        | Module::AvgPool1d(_)
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
        | Module::MaxPool1dWithIndices(_)
        | Module::MaxPool1dWithIndicesBackward(_)
        | Module::MaxPool2d(_)
        | Module::MaxPool2dWithIndices(_)
        | Module::MaxPool2dWithIndicesBackward(_)
        | Module::Interpolate(_)
        | Module::InterpolateBackward(_)
        | Module::CtcLoss(_)
        | Module::CtcLossBackward(_)
        | Module::LayerNorm(_) => Class::Fused,
    }
}
