//! Tests that burn's operations are matched on in few files of one room, since each version of burn has more of them.

use super::read_files;

/// The variants that any file may name: what a pass has put in itself, and what begins and ends tensors.
const OWN: [&str; 3] = ["Custom", "Drop", "Init"];

/// The variants of burn's operations that a source names.
fn variants(source: &str) -> Vec<&str> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let named = code.flat_map(|line| {
        line.match_indices("OperationIr::").filter_map(|(at, path)| {
            let whole = line[..at].chars().next_back().is_none_or(|before| !before.is_alphanumeric());
            line[at + path.len()..].split(|c: char| !c.is_alphanumeric()).next().filter(|_| whole)
        })
    });
    named.filter(|name| name.starts_with(char::is_uppercase) && !OWN.contains(name)).collect()
}

#[test]
fn operations_are_matched_on_in_one_room() {
    let elsewhere = |path: &str| {
        let known = path.starts_with("graph/operation/") || path == "graph/fused/work.rs";
        !known && !path.starts_with("sources/")
    };
    let files = read_files("src", ".rs").into_iter().filter(|(path, _)| elsewhere(path));
    let found: Vec<String> = files
        .flat_map(|(path, source)| {
            variants(&source).into_iter().map(|name| format!("{path}: {name}")).collect::<Vec<_>>()
        })
        .collect();
    assert!(found.is_empty(), "a question to the table in graph/operation/ does it:\n{}", found.join("\n"));
}

#[test]
fn variants_are_found() {
    let source = "match op { OperationIr::Float(_, op) => op, OperationIr::Custom(op) => op, other => other.inputs() }\n\
                  InitOperationIr::Create; // OperationIr::Bool\n// OperationIr::Int\nOperationIr::Init(init)";
    assert_eq!(variants(source), ["Float", "Bool"]);
}
