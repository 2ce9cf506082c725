//! Names in which `*` stands for any characters.

/// What the `*` of `pattern` stand for if it matches all of `name`: for each as little as can be, and the rest for the last.
pub(super) fn captures<'a>(pattern: &str, name: &'a str) -> Option<Vec<&'a str>> {
    let mut pieces = pattern.split('*');
    let mut rest = name.strip_prefix(pieces.next()?)?;
    let mut found = Vec::new();
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        let end = match pieces.peek() {
            Some(_) => rest.find(piece)?,
            None => rest
                .len()
                .checked_sub(piece.len())
                .filter(|end| rest.ends_with(piece) && rest.is_char_boundary(*end))?,
        };
        found.push(&rest[..end]);
        rest = &rest[end + piece.len()..];
    }
    rest.is_empty().then_some(found)
}

/// How many `*` a pattern has.
pub(super) fn wildcards(pattern: &str) -> usize {
    pattern.matches('*').count()
}

/// The pattern with these in the place of its `*`.
pub(super) fn filled(pattern: &str, captures: &[&str]) -> String {
    let mut captures = captures.iter();
    let mut name = String::new();
    for (place, piece) in pattern.split('*').enumerate() {
        if place > 0 {
            name.push_str(captures.next().copied().unwrap_or_default());
        }
        name.push_str(piece);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::{captures, filled};

    #[test]
    fn what_stands_for_what() {
        let of = captures;
        assert_eq!(of("a.b", "a.b"), Some(vec![]));
        assert_eq!(of("a.b", "a.b.c"), None);
        assert_eq!(of("a.*.w", "a.0.w"), Some(vec!["0"]));
        assert_eq!(of("a.*.b.*.w", "a.0.b.c.b.w"), Some(vec!["0", "c.b"]));
        assert_eq!(of("*", "x.y"), Some(vec!["x.y"]));
        assert_eq!(of("*.w", "w"), None);
        assert_eq!(of("a*a", "a"), None);
        assert_eq!(of("*é", "xé"), Some(vec!["x"]));
        assert_eq!(of("**b", "ab"), Some(vec!["", "a"]));
        assert_eq!(filled("h.*.attn.*", &["3", "w"]), "h.3.attn.w");
    }
}
