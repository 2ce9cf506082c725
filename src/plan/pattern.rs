//! Matches patterns of parameter paths.

/// Whether `pattern`, in which `*` stands for any characters, matches all of `path`.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == path };
    let Some(mut path) = path.strip_prefix(first) else { return false };
    let (between, last) = rest.rsplit_once('*').map_or((None, rest), |(between, last)| (Some(between), last));
    // The earliest place for each piece leaves most for the others.
    for piece in between.into_iter().flat_map(|between| between.split('*')) {
        match path.find(piece) {
            Some(place) => path = &path[place + piece.len()..],
            None => return false,
        }
    }
    path.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        for (pattern, path, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("*", "", true),
            ("*.weight", "a.0.weight", true),
            ("*weight", "weight", true),
            ("a*a", "a", false),
            ("a.*.c.*.e", "a.b.c.d.e", true),
            ("a.*.c.*.e", "a.c.e", false),
            ("*mha*weight", "layers.0.mha.query.weight", true),
            ("*mha*weight", "layers.0.mha.query.bias", false),
            ("**b**", "abc", true),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }
}
