//! The forms that settings may have in a file. What comes in another form is an error that says which there are.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// What is written as a table, and as nothing else. Serde takes a list for a struct as well: its fields in their order,
/// and if all have defaults, an empty one.
pub(crate) struct Table<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Keys(PhantomData)).map(Self)
    }
}

struct Keys<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Keys<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of keys and values")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
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

/// What is wrong within a table: TOML's errors have the place in lines of its own.
fn in_one_line(problem: &impl fmt::Display) -> String {
    problem.to_string().lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ")
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
        T::deserialize(MapAccessDeserializer::new(map))
            .map_err(|problem| de::Error::custom(format!("{}; the forms are {}", in_one_line(&problem), self.forms)))
    }
}

/// The text of a file; or why there is none. What is not a file may have no end, or wait for somebody who writes.
pub(crate) fn read_text(path: &Path) -> Result<String, String> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() && !found.is_dir() => Err("it is not a file".into()),
        _ => std::fs::read_to_string(path).map_err(|problem| problem.to_string()),
    }
}
