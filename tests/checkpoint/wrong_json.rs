//! JSON in which one thing is wrong, at any place. The fuzzer of checkpoints (`fuzz/targets/checkpoint.rs`) has this
//! file too.

use std::ops::Range;

/// What may be in the place of a value: every kind, the ends of ranges, and what is no JSON.
pub const OTHERS: [&str; 27] = [
    "null",
    "true",
    "0",
    "1",
    "-1",
    "1.5",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    r#""""#,
    r#""x""#,
    r#""\u0000""#,
    r#""\ud800""#,
    "[]",
    "{}",
    "[null]",
    "[[0,1]]",
    r#"{"x":1}"#,
    r#"{"uint":1}"#,
    r#"{"int":-1}"#,
    r#"{"bool":true}"#,
    r#"{"float":"nan"}"#,
    r#"{"float":"x"}"#,
    r#"{"uint":1,"int":1}"#,
    "nul",
    r#""x"#,
];
/// What else may happen to it.
pub const REST: usize = 7;

/// A value of a text, and where its entry in a list or object begins: with its key, if it has one.
struct Place {
    entry: usize,
    value: Range<usize>,
}

/// The text with one thing wrong, chosen by any numbers: `place` says of which of its values, and `what` what. `None`
/// if it has no values.
pub fn wrong(text: &[u8], place: usize, what: usize) -> Option<Vec<u8>> {
    let places = places(text);
    let Place { entry, value } = places.get(place % places.len().max(1))?;
    let put = |range: Range<usize>, with: &[u8]| [&text[..range.start], with, &text[range.end..]].concat();
    let (what, which) = (what % (OTHERS.len() + REST), what / (OTHERS.len() + REST));
    if let Some(other) = OTHERS.get(what) {
        return Some(put(value.clone(), other.as_bytes()));
    }
    let whole = &text[*entry..value.end];
    Some(match what - OTHERS.len() {
        0 => text[..value.start].to_vec(),
        1 => text[..value.end - 1].to_vec(),
        // It is gone,
        2 if text.get(value.end) == Some(&b',') => put(*entry..value.end + 1, b""),
        2 => put(entry.saturating_sub(1)..value.end, b""),
        // there twice,
        3 => put(value.end..value.end, &[b",", whole].concat()),
        // has another key or is another value of the text,
        4 if *entry < value.start => put(*entry..value.start, br#""x":"#),
        4 | 5 => put(value.clone(), &text[places[which % places.len()].value.clone()]),
        // or has another byte.
        _ => {
            let at = value.start + which % value.len();
            put(at..at + 1, &[text[at] ^ 1 << (which % 8)])
        }
    })
}

/// The values of a text that is JSON as far as it goes.
fn places(text: &[u8]) -> Vec<Place> {
    let (mut places, mut open, mut key, mut at) = (Vec::new(), Vec::new(), None, 0);
    while let Some(byte) = text.get(at) {
        let end = at + token(&text[at..]);
        let mut add = |value| places.push(Place { entry: key.take().unwrap_or(at), value });
        match byte {
            b'{' | b'[' => {
                add(at..end);
                open.push(places.len() - 1);
            }
            b'}' | b']' => open.pop().into_iter().for_each(|of: usize| places[of].value.end = end),
            b'"' if text.get(end) == Some(&b':') => key = Some(at),
            b':' | b',' => {}
            _ => add(at..end),
        }
        at = end;
    }
    places
}

/// How many bytes the token has with which a text begins; one at least.
fn token(text: &[u8]) -> usize {
    match text[0] {
        b'"' => {
            let mut escaped = false;
            let end = text[1..].iter().position(|byte| {
                let ends = *byte == b'"' && !escaped;
                escaped = *byte == b'\\' && !escaped;
                ends
            });
            end.map_or(text.len(), |end| end + 2)
        }
        byte if b"{}[]:,".contains(&byte) => 1,
        _ => text.iter().position(|byte| b"{}[]:,\"".contains(byte)).unwrap_or(text.len()),
    }
}
