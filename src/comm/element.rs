//! The element types that travel.

use burn::tensor::{BoolStore, DType, bf16, f16};

/// A plain element type of buffers: `f64`, `f32`, `f16`, `bf16`, the integers from 8 to 64 bits, and `bool`.
///
/// Sealed: the set is what every engine can carry.
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

/// A number for each dtype that travels, and one for all others.
pub(crate) fn number(dtype: DType) -> u64 {
    match dtype {
        DType::F64 => 0,
        DType::F32 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
        DType::I64 => 4,
        DType::I32 => 5,
        DType::I16 => 6,
        DType::I8 => 7,
        DType::U64 => 8,
        DType::U32 => 9,
        DType::U16 => 10,
        DType::U8 => 11,
        DType::Bool(BoolStore::Native) => 12,
        DType::Bool(BoolStore::U8) => 13,
        _ => 14,
    }
}

/// Runs `$body` with `$T` bound to the type that *stores* elements of `$dtype` (bools are stored as `u8`), or evaluates
/// `$otherwise` for types that do not travel (quantized ones, packed bools).
macro_rules! with_storage_type {
    ($dtype:expr, $T:ident => $body:expr, otherwise $otherwise:expr) => {{
        use burn::tensor::{BoolStore, DType, bf16, f16};
        match $dtype {
            DType::F64 => {
                type $T = f64;
                $body
            }
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            DType::I64 => {
                type $T = i64;
                $body
            }
            DType::I32 => {
                type $T = i32;
                $body
            }
            DType::I16 => {
                type $T = i16;
                $body
            }
            DType::I8 => {
                type $T = i8;
                $body
            }
            DType::U64 => {
                type $T = u64;
                $body
            }
            DType::U32 => {
                type $T = u32;
                $body
            }
            DType::U16 => {
                type $T = u16;
                $body
            }
            DType::U8 | DType::Bool(BoolStore::Native | BoolStore::U8) => {
                type $T = u8;
                $body
            }
            _ => $otherwise,
        }
    }};
}
pub(crate) use with_storage_type;
