//! The numbers on which ranks agree that gather parameters: errors know the names of them.

use std::collections::HashSet;

use crate::comm::agreed_number;

/// Most bytes of a name: longer ones are not kept.
const LONGEST: usize = 48;

/// A number for each group of parameters, which are given by their paths. No two are the same.
pub(super) fn group_numbers<'a>(groups: impl Iterator<Item = Vec<&'a str>>) -> Vec<u64> {
    let mut taken = HashSet::new();
    let number = |paths: Vec<&str>| {
        let number = agreed_number(&name(&paths));
        // Those of a block may be several groups, frozen and trained.
        let number = if taken.contains(&number) { agreed_number(&paths.join(" ")) } else { number };
        taken.insert(number);
        number
    };
    groups.map(number).collect()
}

/// The number of one parameter that is gathered by itself.
pub(super) fn alone(path: &str) -> u64 {
    agreed_number(&format!("`{path}` by itself"))
}

/// What parameters are called together: by what their paths have in common, of a long one by its end.
fn name(paths: &[&str]) -> String {
    let paths: Vec<Vec<&str>> = paths.iter().map(|path| path.split('.').collect()).collect();
    let first = paths.first().map(Vec::as_slice).unwrap_or_default();
    let shared = |depth: &usize| paths.iter().all(|path| path.get(*depth) == first.get(*depth));
    let depth = (0..first.len()).take_while(shared).count();
    let named = |from: usize| {
        let dots = if from > 0 { ".." } else { "" };
        match depth {
            0 => format!("parameters from `{dots}{}` on", first[from..].join(".")),
            _ => format!("parameters of `{dots}{}`", first[from..depth].join(".")),
        }
    };
    let end = if depth == 0 { first.len() } else { depth };
    (0..end).map(named).find(|name| name.len() <= LONGEST).unwrap_or_else(|| named(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_called_by_what_their_paths_share() {
        assert_eq!(name(&["layers.3.up.weight", "layers.3.down.bias"]), "parameters of `layers.3`");
        assert_eq!(name(&["1.weight", "2.weight"]), "parameters from `1.weight` on");
        let long = "a_model_of_many_names.encoder.layers.11";
        let paths = ["weight", "bias"].map(|end| format!("{long}.{end}"));
        assert_eq!(name(&[&paths[0], &paths[1]]), "parameters of `..encoder.layers.11`");
    }

    #[test]
    fn two_groups_of_a_block_have_two_numbers() {
        let groups = [["0.weight", "0.bias"], ["0.scale", "0.shift"], ["1.weight", "1.bias"]];
        let numbers = group_numbers(groups.iter().map(|paths| paths.to_vec()));
        assert_eq!(numbers.iter().collect::<HashSet<_>>().len(), 3);
    }
}
