//! Tests that a name of a type means one thing: of two types of one name a reader takes one for the other.

use std::collections::BTreeMap;

use super::read_files;

/// What is one thing in two forms: with and without a platform or feature, of each transport, of host and device, of
/// columns and rows, of both kinds of directories that are saved; or an alias with a parameter given.
const TWINS: [&str; 10] = [
    "Address",
    "CallDescriptor",
    "CubeKind",
    "Descriptors",
    "Group",
    "PlannedTensor",
    "ProductResult",
    "Session",
    "SharedMapping",
    "Terms",
];
/// What makes a trait one that others cannot implement is called so everywhere, and stays in its module.
const CONVENTION: &str = "Sealed";

/// The types that a source defines outside of functions and other items.
fn defined(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| {
        let line = match line.strip_prefix("pub(") {
            Some(within) => within.split_once(") ")?.1,
            None => line.strip_prefix("pub ").unwrap_or(line),
        };
        let (kind, rest) = line.strip_prefix("unsafe ").unwrap_or(line).split_once(' ')?;
        let is_type = ["struct", "enum", "trait", "union", "type"].contains(&kind);
        rest.split(|c: char| !c.is_alphanumeric()).next().filter(|_| is_type)
    })
}

#[test]
fn types_have_names_of_their_own() {
    let of_tests = |path: &str| ["tests", "simulation", "fuzzing", "sources"].iter().any(|name| path.contains(name));
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, source) in read_files("src", ".rs").into_iter().filter(|(path, _)| !of_tests(path)) {
        for name in defined(&source).filter(|name| *name != CONVENTION && !TWINS.contains(name)) {
            places.entry(name.to_owned()).or_default().push(path.clone());
        }
    }
    let twice: Vec<String> = places
        .iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(name, places)| format!("{name}: {}", places.join(", ")))
        .collect();
    assert!(twice.is_empty(), "types of one name:\n{}", twice.join("\n"));
}

#[test]
fn definitions_are_found() {
    let source = "pub(in crate::comm) struct One<T>(T);\nenum Two {\n    Three,\n}\nuse a::Four;\n\
                  pub unsafe trait Five: Six {\npub fn seven() {\n    struct Eight;\n}\ntype Nine = One<u8>;\nimpl Two {";
    assert_eq!(defined(source).collect::<Vec<_>>(), ["One", "Two", "Five", "Nine"]);
}
