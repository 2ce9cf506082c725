//! The forms that settings may have in a file. What comes in another form is an error that says which there are.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use burn::tensor::FloatDType;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// What is written as a table, and as nothing else. Serde takes a list for a struct as well: its fields in their order,
/// and if all have defaults, an empty one.
pub(crate) struct Table<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        table_as::<T, T, D>(deserializer).map(Self)
    }
}

/// What is made of the keys and values of a table, which may be wrong together: the error has the place of the table.
pub(crate) fn table_as<'de, T, U, D>(deserializer: D) -> Result<U, D::Error>
where
    T: Deserialize<'de>,
    U: TryFrom<T, Error: fmt::Display>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_map(Keys(PhantomData::<(T, U)>))
}

struct Keys<T, U>(PhantomData<(T, U)>);

impl<'de, T: Deserialize<'de>, U: TryFrom<T, Error: fmt::Display>> Visitor<'de> for Keys<T, U> {
    type Value = U;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of keys and values")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<U, A::Error> {
        U::try_from(T::deserialize(MapAccessDeserializer::new(map))?).map_err(de::Error::custom)
    }
}

/// A field that is a table.
pub(crate) fn table<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Table::deserialize(deserializer).map(|Table(value)| value)
}

/// A field that is a table, or is not there.
pub(crate) fn optional_table<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    let table: Option<Table<T>> = Option::deserialize(deserializer)?;
    Ok(table.map(|Table(value)| value))
}

/// A field that is the name of a float dtype, in capitals or not, or is not there.
pub(crate) fn optional_float<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<FloatDType>, D::Error> {
    let Some(name) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    Ok(Some(match name.to_ascii_lowercase().as_str() {
        "bf16" => FloatDType::BF16,
        "f16" => FloatDType::F16,
        "f32" => FloatDType::F32,
        "f64" => FloatDType::F64,
        _ => return Err(de::Error::custom(format!("`{name}` is no float dtype: take `BF16`, `F16`, `F32` or `F64`"))),
    }))
}

/// A field that is a list of tables.
pub(crate) fn tables<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let tables: Vec<Table<T>> = Vec::deserialize(deserializer)?;
    Ok(tables.into_iter().map(|Table(value)| value).collect())
}

/// A field that is a table of tables.
pub(crate) fn tables_by_name<'de, T, D>(deserializer: D) -> Result<BTreeMap<String, T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    let tables: BTreeMap<String, Table<T>> = BTreeMap::deserialize(deserializer)?;
    Ok(tables.into_iter().map(|(name, Table(value))| (name, value)).collect())
}

thread_local! {
    /// Within [`with_forms`] on this thread, the forms of the field whose table was wrong, once there is one. The error
    /// of the table goes on as it is, with the place in the text that it knows: words added to it would take that away.
    static FORMS: Cell<Option<Option<&'static str>>> = const { Cell::new(None) };
}

/// Reads a text. If a table is wrong where a name might be as well, the error also says which forms there are, at the
/// place of what is wrong.
pub(crate) fn with_forms<T, E: fmt::Display>(read: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    FORMS.set(Some(None));
    let read = read();
    let forms = FORMS.take().flatten();
    read.map_err(|problem| {
        // TOML's end with a line.
        let problem = problem.to_string();
        match forms {
            None => problem,
            Some(forms) => format!("{}; the forms are {forms}", problem.trim_end()),
        }
    })
}

/// The error of a table, with the forms that there are.
fn told_of_forms<E: de::Error>(problem: E, forms: &'static str) -> E {
    if FORMS.get().is_some() {
        FORMS.set(Some(Some(forms)));
        return problem;
    }
    // Somebody reads by serde alone. A new error of TOML has the place of the table; JSON looks for its place at the
    // end of the text.
    let text = problem.to_string();
    let (said, place) = text.split_at(text.rfind(" at line ").unwrap_or(text.len()));
    let said: Vec<&str> = said.lines().collect();
    E::custom(format!("{}; the forms are {forms}{place}", said.join(", ")))
}

/// A field that is a name or a table. `forms` says which there are; `named` gives what a name stands for, or why it is
/// none.
pub(crate) fn name_or_table<'de, T, D>(
    deserializer: D,
    forms: &'static str,
    named: fn(&str) -> Result<T, String>,
) -> Result<T, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_any(NameOrTable { forms, named })
}

struct NameOrTable<T> {
    forms: &'static str,
    named: fn(&str) -> Result<T, String>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for NameOrTable<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.forms)
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<T, E> {
        (self.named)(name).map_err(|problem| E::custom(format!("{problem}; it is {}", self.forms)))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map_err(|problem| told_of_forms(problem, self.forms))
    }
}

/// The text of a file; or why there is none. What is not a file may have no end, or wait for somebody who writes.
pub(crate) fn read_text(path: &Path) -> Result<String, String> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() && !found.is_dir() => Err("it is not a file".into()),
        _ => std::fs::read_to_string(path).map_err(|problem| problem.to_string()),
    }
}
