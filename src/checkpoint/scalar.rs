//! Numbers of optimizers and schedulers in JSON, exactly.

use burn_pack::Scalar;
use serde::{Deserialize, Serialize};

/// A number as burn keeps it. Floats are decimal texts of as many digits as they need: readers of JSON round otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum StoredScalar {
    Int(i64),
    Uint(u64),
    Float(String),
    Bool(bool),
}

impl From<Scalar> for StoredScalar {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Int(number) => Self::Int(number),
            Scalar::UInt(number) => Self::Uint(number),
            Scalar::Float(number) => Self::Float(format!("{number:?}")),
            Scalar::Bool(value) => Self::Bool(value),
        }
    }
}

impl StoredScalar {
    /// The number for burn; `None` if the text of a float is none.
    pub(super) fn read(&self) -> Option<Scalar> {
        Some(match self {
            Self::Int(number) => Scalar::Int(*number),
            Self::Uint(number) => Scalar::UInt(*number),
            Self::Float(text) => Scalar::Float(text.parse().ok()?),
            Self::Bool(value) => Scalar::Bool(*value),
        })
    }
}

#[cfg(test)]
mod tests {
    use burn_pack::Scalar;

    use super::StoredScalar;

    #[test]
    fn every_number_comes_back() {
        for number in [0.1, -0.0, 1e-310, f64::MAX, 0.30000000000000004, f64::INFINITY] {
            let text = serde_json::to_string(&StoredScalar::from(Scalar::Float(number))).unwrap();
            let read: StoredScalar = serde_json::from_str(&text).unwrap();
            assert!(matches!(read.read(), Some(Scalar::Float(same)) if same.to_bits() == number.to_bits()), "{text}");
        }
        assert_eq!(StoredScalar::Float("x".into()).read(), None);
    }
}
