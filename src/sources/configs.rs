//! Tests that all configs follow one convention: that of burn's `Config`, which goes into files and comes back.

use super::read_files;

/// The public structs of a source that are called configs, with whether they follow the convention.
fn configs(source: &str) -> Vec<(&str, bool)> {
    let mut found = Vec::new();
    let mut before = "";
    for line in source.lines() {
        let name = line.strip_prefix("pub struct ").and_then(|rest| rest.split([' ', '<', '(', ';']).next());
        if let Some(name) = name.filter(|name| name.ends_with("Config") || name.ends_with("Options")) {
            let derived = before.starts_with("#[derive(Config");
            found.push((name, derived || source.contains(&format!("impl Config for {name} "))));
        }
        before = if line.starts_with("#[serde") { before } else { line };
    }
    found
}

#[test]
fn configs_follow_one_convention() {
    let sources = read_files("src", ".rs");
    let all = sources.iter().flat_map(|(path, source)| configs(source).into_iter().map(move |config| (path, config)));
    let (mut known, mut wrong) = (0, Vec::new());
    for (path, (name, follows)) in all {
        known += 1;
        if !follows {
            wrong.push(format!("{path}: {name}"));
        }
    }
    assert!(known >= 14, "the configs are found: {known}");
    assert!(wrong.is_empty(), "no config as burn's are, with `Config`:\n{}", wrong.join("\n"));
}

#[test]
fn configs_are_found() {
    let source = "#[derive(Config, Debug)]\npub struct AConfig {\n#[derive(Debug)]\npub struct BOptions;\n\
                  #[derive(Debug)]\n#[serde(default)]\npub struct CConfig {\nimpl Config for CConfig {}\nstruct DConfig;";
    assert_eq!(configs(source), [("AConfig", true), ("BOptions", false), ("CConfig", true)]);
}
