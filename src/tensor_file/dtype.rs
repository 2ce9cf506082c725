//! The names of dtypes in safetensors files.

use burn::tensor::{BoolStore, DType};

/// The dtypes that burn and the format have in common.
const NAMES: [(&str, DType); 13] = [
    ("F64", DType::F64),
    ("F32", DType::F32),
    ("F16", DType::F16),
    ("BF16", DType::BF16),
    ("I64", DType::I64),
    ("I32", DType::I32),
    ("I16", DType::I16),
    ("I8", DType::I8),
    ("U64", DType::U64),
    ("U32", DType::U32),
    ("U16", DType::U16),
    ("U8", DType::U8),
    ("BOOL", DType::Bool(BoolStore::Native)),
];

/// The dtype of this name; `None` if burn has none.
pub(crate) fn dtype_of(name: &str) -> Option<DType> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
}

/// The name of a dtype; `None` if the format has none.
pub(crate) fn name_of(dtype: DType) -> Option<&'static str> {
    NAMES.iter().find(|(_, known)| *known == dtype).map(|(name, _)| *name)
}

/// The bits of an element of a dtype of this name, of those that burn has none for; `None` if the format does not know
/// it.
pub(super) fn bits_of(name: &str) -> Option<usize> {
    if let Some(dtype) = dtype_of(name) {
        return Some(8 * dtype.size());
    }
    Some(match name {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "C64" => 64,
        _ => return None,
    })
}
