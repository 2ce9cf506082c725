//! The element types of buffers, and dispatch on a dtype.

use burn::tensor::{BoolStore, DType, bf16, f16};

/// A plain element type of buffers: `f64`, `f32`, `f16`, `bf16`, the integers from 8 to 64 bits, and `bool`.
///
/// Sealed: the set is what every transport supports.
pub trait Element: Copy + Default + Send + Sync + sealed::Sealed + burn::tensor::Element + 'static {
    /// The runtime tag of this type.
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($rust:ty => $dtype:expr),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = $dtype;
        }
    )*};
}

elements! {
    f64 => DType::F64, f32 => DType::F32, f16 => DType::F16, bf16 => DType::BF16,
    i64 => DType::I64, i32 => DType::I32, i16 => DType::I16, i8 => DType::I8,
    u64 => DType::U64, u32 => DType::U32, u16 => DType::U16, u8 => DType::U8,
    bool => DType::Bool(BoolStore::Native),
}

/// Conversions between the supported dtypes and their numbers in messages.
macro_rules! numbers {
    ($($number:literal => $variant:ident $(($store:ident))?),* $(,)?) => {
        /// The number of a dtype, if it is supported.
        pub(crate) fn number(dtype: DType) -> Option<u8> {
            match dtype {
                $(DType::$variant $((BoolStore::$store))? => Some($number),)*
                _ => None,
            }
        }

        /// The dtype of a number.
        pub(crate) fn numbered(number: u8) -> Option<DType> {
            match number {
                $($number => Some(DType::$variant $((BoolStore::$store))?),)*
                _ => None,
            }
        }
    };
}

numbers! {
    0 => F64, 1 => F32, 2 => F16, 3 => BF16,
    4 => I64, 5 => I32, 6 => I16, 7 => I8,
    8 => U64, 9 => U32, 10 => U16, 11 => U8,
    12 => Bool(Native), 13 => Bool(U8),
}

/// Runs `$body` with `$T` bound to the type beside the pattern that `$dtype` matches, or evaluates `$otherwise`.
macro_rules! with_type {
    ($dtype:expr, $T:ident => $body:expr, otherwise $otherwise:expr, $($pattern:pat => $type:ty),+ $(,)?) => {{
        use burn::tensor::DType;
        match $dtype {
            $($pattern => {
                type $T = $type;
                $body
            })+
            _ => $otherwise,
        }
    }};
}
pub(crate) use with_type;

/// Runs `$body` with `$T` bound to the type of the floats of `$dtype`, or evaluates `$otherwise` for what is no plain
/// float.
macro_rules! with_float_type {
    ($dtype:expr, $T:ident => $body:expr, otherwise $otherwise:expr) => {
        $crate::comm::element::with_type!($dtype, $T => $body, otherwise $otherwise,
            DType::F64 => f64,
            DType::F32 => f32,
            DType::F16 => burn::tensor::f16,
            DType::BF16 => burn::tensor::bf16,
        )
    };
}
pub(crate) use with_float_type;

/// Runs `$body` with `$T` bound to the type that *stores* elements of `$dtype` (bools are stored as `u8`), or evaluates
/// `$otherwise` for unsupported dtypes (quantized ones, packed bools).
macro_rules! with_storage_type {
    ($dtype:expr, $T:ident => $body:expr, otherwise $otherwise:expr) => {
        $crate::comm::element::with_type!($dtype, $T => $body, otherwise $otherwise,
            DType::F64 => f64,
            DType::F32 => f32,
            DType::F16 => burn::tensor::f16,
            DType::BF16 => burn::tensor::bf16,
            DType::I64 => i64,
            DType::I32 => i32,
            DType::I16 => i16,
            DType::I8 => i8,
            DType::U64 => u64,
            DType::U32 => u32,
            DType::U16 => u16,
            DType::U8
            | DType::Bool(burn::tensor::BoolStore::Native | burn::tensor::BoolStore::U8) => u8,
        )
    };
}
pub(crate) use with_storage_type;
