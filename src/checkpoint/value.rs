//! Values of the user as JSON, floats exactly.

use serde_json::{Map, Value};

/// The key of an object that stands for a float that readers of JSON would round.
const FLOAT: &str = "$float";

/// The value with those floats as texts that would not come back as they are.
pub(super) fn exact(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap_or_default();
            let back = serde_json::from_str::<f64>(&number.to_string());
            if back.is_ok_and(|back| back.to_bits() == float.to_bits()) {
                return Value::Number(number);
            }
            Value::Object(Map::from_iter([(FLOAT.to_owned(), Value::String(format!("{float:?}")))]))
        }
        Value::Array(values) => Value::Array(values.into_iter().map(exact).collect()),
        Value::Object(map) => Value::Object(map.into_iter().map(|(key, value)| (key, exact(value))).collect()),
        other => other,
    }
}

/// The value that [`exact`] was given.
pub(super) fn plain(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let float = match map.get(FLOAT) {
                Some(Value::String(text)) if map.len() == 1 => text.parse::<f64>().ok(),
                _ => None,
            };
            match float.and_then(serde_json::Number::from_f64) {
                Some(number) => Value::Number(number),
                None => Value::Object(map.into_iter().map(|(key, value)| (key, plain(value))).collect()),
            }
        }
        Value::Array(values) => Value::Array(values.into_iter().map(plain).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{exact, plain};

    proptest! {
        #[test]
        fn floats_come_back(bits: u64) {
            let float = f64::from_bits(bits);
            prop_assume!(float.is_finite());
            let text = exact(serde_json::json!({ "a": [float, 1], "b": { "c": null } })).to_string();
            let back = plain(serde_json::from_str(&text).unwrap());
            prop_assert_eq!(back["a"][0].as_f64().unwrap().to_bits(), bits, "{}", text);
            prop_assert_eq!(&back["a"][1], &serde_json::json!(1));
        }
    }
}
