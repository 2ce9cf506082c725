//! Tests that no unit test needs a feature for GPUs: the gate builds unit tests without them, once.

use super::read_files;

/// The files that are compiled with a feature for GPUs only, with all that is below them.
fn only_with_features(files: &[(String, String)]) -> Vec<&str> {
    let mut found: Vec<&str> = Vec::new();
    for (path, source) in files {
        let folder = path.strip_suffix("mod.rs").or(path.strip_suffix("lib.rs")).map(str::to_owned);
        let folder = folder.unwrap_or_else(|| format!("{}/", path.trim_end_matches(".rs")));
        let mut lines = source.lines().map(str::trim);
        while let Some(line) = lines.next() {
            let feature = ["cuda", "cubecl", "wgpu"].iter().any(|name| line == format!("#[cfg(feature = \"{name}\")]"));
            let Some(declared) = lines.clone().next().filter(|_| feature) else { continue };
            let Some(module) = declared.split("mod ").nth(1).and_then(|rest| rest.strip_suffix(';')) else { continue };
            let at = [format!("{folder}{module}.rs"), format!("{folder}{module}/")];
            found.extend(
                files.iter().map(|(path, _)| path.as_str()).filter(|path| {
                    at.iter().any(|at| path == at || at.ends_with('/') && path.starts_with(at.as_str()))
                }),
            );
        }
    }
    found
}

#[test]
fn unit_tests_need_no_gpu_feature() {
    let files = read_files("src", ".rs");
    let gated = only_with_features(&files);
    assert!(gated.len() > 20, "the files of NCCL and of CubeCL are found: {gated:?}");
    let tested = files.iter().filter(|(path, source)| {
        let test = source.lines().any(|line| line.trim() == "#[test]");
        let feature = |name| source.contains(&format!("cfg(all(test, feature = \"{name}\"))"));
        test && gated.contains(&path.as_str()) || ["cuda", "cubecl", "wgpu"].into_iter().any(feature)
    });
    let tested: Vec<&str> =
        tested.map(|(path, _)| path.as_str()).filter(|path| !path.starts_with("sources/")).collect();
    assert!(tested.is_empty(), "move these tests to tests/device or tests/nccl, which the gate runs: {tested:?}");
}
