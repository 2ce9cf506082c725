//! Values of the user as JSON, floats exactly.

mod stored;
mod written;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::stored::StoredJson;
use self::written::{Exact, FLOAT};

/// Lists and objects are read 127 deep within each other, of which the index takes two, and a float may take one.
const DEEPEST: usize = 124;

/// What a checkpoint has of a value, from which [`from_json`] makes the value again.
///
/// # Errors
/// If it does not: it is found out when nothing is lost yet.
pub(super) fn to_json<T: Serialize + DeserializeOwned>(value: &T) -> Result<Value, String> {
    // What there is without floats that look like something else.
    check(&serde_json::to_value(value).map_err(|why| why.to_string())?, 0)?;
    let json = value.serialize(Exact(serde_json::value::Serializer)).map_err(|why| why.to_string())?;
    from_json::<T>(json.clone()).map_err(|why| format!("it would not come back: {why}"))?;
    Ok(json)
}

/// # Errors
/// If it is not what `T` takes for it.
pub(super) fn from_json<T: DeserializeOwned>(json: Value) -> Result<T, serde_json::Error> {
    T::deserialize(StoredJson(json))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde::Deserialize;
    use serde_json::json;

    use super::{Serialize, from_json, to_json};

    /// What a value is after it was saved and restored, as Rust shows it.
    fn comes_back<T: Serialize + serde::de::DeserializeOwned + std::fmt::Debug>(value: &T) -> String {
        let text = to_json(value).unwrap().to_string();
        format!("{:?}", from_json::<T>(serde_json::from_str(&text).unwrap()).unwrap())
    }

    proptest! {
        #[test]
        fn floats_come_back(bits: u64) {
            let float = f64::from_bits(bits);
            let text = to_json(&(float, 1, [Some(float as f32)])).unwrap().to_string();
            let back: (f64, u8, [Option<f32>; 1]) = from_json(serde_json::from_str(&text).unwrap()).unwrap();
            prop_assert!(back.0.to_bits() == bits || back.0.is_nan() && float.is_nan(), "{}", text);
            let narrow = back.2[0].unwrap();
            prop_assert!(narrow.to_bits() == (float as f32).to_bits() || narrow.is_nan() && float.is_nan(), "{}", text);
        }
    }

    #[derive(Debug, Clone, Serialize, Deserialize)]
    struct Wrapped(f64);

    #[derive(Debug, Clone, Serialize, Deserialize)]
    enum Shape {
        Unit,
        Newtype(f64),
        Tuple(f64, Option<f64>),
        Struct { loss: f64, list: Vec<f32> },
    }

    #[derive(Debug, Clone, Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Tagged {
        One { loss: f64 },
    }

    #[derive(Debug, Clone, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Untagged {
        Number(f64),
        List(Vec<f64>),
    }

    #[derive(Debug, Clone, Serialize, Deserialize)]
    struct All {
        best_loss: f64,
        wrapped: Wrapped,
        shapes: Vec<Shape>,
        by_step: BTreeMap<u64, f64>,
        by_flag: BTreeMap<bool, Option<Box<All>>>,
        tagged: Tagged,
        untagged: (Untagged, Untagged),
        nothing: ((), Option<u8>, char, String, i64),
        #[serde(flatten)]
        more: BTreeMap<String, f64>,
    }

    /// NaN and infinities, wherever in a value.
    #[test]
    fn what_json_has_no_number_for_comes_back() {
        for float in [0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let all = All {
                best_loss: float,
                wrapped: Wrapped(float),
                shapes: vec![
                    Shape::Unit,
                    Shape::Newtype(float),
                    Shape::Tuple(1.0, Some(float)),
                    Shape::Struct { loss: float, list: vec![float as f32, 2.0] },
                ],
                by_step: BTreeMap::from([(7, float)]),
                by_flag: BTreeMap::from([(true, None)]),
                tagged: Tagged::One { loss: float },
                untagged: (Untagged::Number(float), Untagged::List(vec![float])),
                nothing: ((), None, 'c', "NaN".into(), i64::MIN),
                more: BTreeMap::from([("more".into(), float)]),
            };
            let outer = All { by_flag: BTreeMap::from([(false, Some(Box::new(all.clone())))]), ..all };
            assert_eq!(comes_back(&outer), format!("{outer:?}"));
        }
        assert_eq!(to_json(&[0.5, f64::NAN]).unwrap(), json!([0.5, { "$float": "NaN" }]));
        assert_eq!(to_json(&f64::NEG_INFINITY).unwrap(), json!({ "$float": "-inf" }));
        // What is none is none.
        assert!(from_json::<f64>(json!({ "$float": "much" })).is_err());
        assert!(from_json::<u64>(json!({ "$float": "NaN" })).is_err());
    }

    /// A value of JSON itself is what it was.
    #[test]
    fn json_comes_back() {
        for json in [json!({ "a": [1, -2, 0.5, null, true, "x", {}], "b": { "c": {} } }), json!([]), json!(null)] {
            assert_eq!(from_json::<serde_json::Value>(to_json(&json).unwrap()).unwrap(), json);
        }
    }
}
