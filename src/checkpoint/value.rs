//! Values of the user as JSON, floats exactly.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::finite;

/// The key of an object that stands for a float that readers of JSON would round.
const FLOAT: &str = "$float";

/// Lists and objects are read 127 deep within each other, of which the index takes two, and a float may take one.
const DEEPEST: usize = 124;

/// What a checkpoint has of a value, from which [`from_json`] makes the value again.
///
/// # Errors
/// If it does not: it is found out when nothing is lost yet.
pub(super) fn to_json<T: Serialize + DeserializeOwned>(value: &T) -> Result<Value, String> {
    finite::check(value).map_err(|why| why.to_string())?;
    let json = serde_json::to_value(value).map_err(|why| why.to_string())?;
    check(&json, 0)?;
    let json = exact(json);
    from_json::<T>(json.clone()).map_err(|why| format!("it would not come back: {why}"))?;
    Ok(json)
}

/// # Errors
/// If it is not what `T` takes for it.
pub(super) fn from_json<T: DeserializeOwned>(json: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(plain(json))
}

/// Demands that a value is not too deep, and has nothing that would be taken for a float.
fn check(json: &Value, depth: usize) -> Result<(), String> {
    let within: Vec<&Value> = match json {
        Value::Array(values) => values.iter().collect(),
        Value::Object(map) if map.len() == 1 && map.contains_key(FLOAT) => {
            return Err(format!("an object with the only key `{FLOAT}` stands for a float"));
        }
        Value::Object(map) => map.values().collect(),
        _ => return Ok(()),
    };
    if depth >= DEEPEST {
        return Err(format!("it has more than {DEEPEST} lists and objects within each other"));
    }
    within.into_iter().try_for_each(|value| check(value, depth + 1))
}

/// The value with those floats as texts that would not come back as they are.
fn exact(value: Value) -> Value {
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
fn plain(value: Value) -> Value {
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
