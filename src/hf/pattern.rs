//! Names that patterns give.

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
    use super::filled;

    #[test]
    fn names_of_patterns() {
        assert_eq!(filled("h.*.attn.*", &["3", "w"]), "h.3.attn.w");
        assert_eq!(filled("h", &[]), "h");
        assert_eq!(filled("*", &["a.b"]), "a.b");
    }
}
