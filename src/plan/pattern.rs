//! Matches patterns of parameter paths.

/// Whether `pattern`, in which `*` stands for any characters, matches all of `path`.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    captures(pattern, path).is_some()
}

/// What the `*` of `pattern` stand for if it matches all of `path`: for each as little as can be, and the rest for the
/// last.
pub(crate) fn captures<'a>(pattern: &str, path: &'a str) -> Option<Vec<&'a str>> {
    let mut pieces = pattern.split('*');
    let mut rest = path.strip_prefix(pieces.next()?)?;
    let mut found = Vec::new();
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        // The earliest place for each piece leaves most for the others.
        let end = match pieces.peek() {
            Some(_) => rest.find(piece)?,
            None => rest.strip_suffix(piece)?.len(),
        };
        found.push(&rest[..end]);
        rest = &rest[end + piece.len()..];
    }
    rest.is_empty().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::{captures, matches};

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

    #[test]
    fn what_stands_for_what() {
        assert_eq!(captures("a.b", "a.b"), Some(vec![]));
        assert_eq!(captures("a.*.w", "a.0.w"), Some(vec!["0"]));
        assert_eq!(captures("a.*.b.*.w", "a.0.b.c.b.w"), Some(vec!["0", "c.b"]));
        assert_eq!(captures("*", "x.y"), Some(vec!["x.y"]));
        assert_eq!(captures("*.w", "w"), None);
        assert_eq!(captures("*é", "xé"), Some(vec!["x"]));
        assert_eq!(captures("**b", "ab"), Some(vec!["", "a"]));
    }
}
