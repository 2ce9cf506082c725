//! Many paths in few words, for messages.

/// The paths, of which those that differ in numbers only are one: `layers.{0-31}.norm.gamma`.
pub(crate) fn families<'a>(paths: impl IntoIterator<Item = &'a str>) -> String {
    let number = |name: &str| name.parse::<usize>().ok();
    let mut families: Vec<(Vec<&str>, Vec<(usize, usize)>)> = Vec::new();
    for path in paths {
        let names: Vec<&str> = path.split('.').collect();
        let of_it = |(known, _): &&mut (Vec<&str>, _)| {
            let alike = |(a, b): (&&str, &&str)| a == b || number(a).is_some() && number(b).is_some();
            known.len() == names.len() && known.iter().zip(&names).all(alike)
        };
        let numbers = names.iter().map(|name| number(name).unwrap_or(0));
        match families.iter_mut().find(of_it) {
            Some((_, ranges)) => {
                ranges.iter_mut().zip(numbers).for_each(|(range, n)| *range = (range.0.min(n), range.1.max(n)));
            }
            None => {
                let ranges = numbers.map(|n| (n, n)).collect();
                families.push((names, ranges));
            }
        }
    }
    let shown = families.iter().map(|(names, ranges)| {
        let names = names.iter().zip(ranges).map(|(name, (low, high))| match low == high {
            true => (*name).to_owned(),
            false => format!("{{{low}-{high}}}"),
        });
        format!("`{}`", names.collect::<Vec<_>>().join("."))
    });
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::families;

    #[test]
    fn layers_are_named_once() {
        let paths =
            ["words.weight", "layers.0.up.weight", "layers.0.up.bias", "layers.1.up.weight", "layers.1.up.bias"];
        assert_eq!(families(paths), "`words.weight`, `layers.{0-1}.up.weight`, `layers.{0-1}.up.bias`");
        assert_eq!(families(["experts.3.w", "w"]), "`experts.3.w`, `w`");
    }
}
