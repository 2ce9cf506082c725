//! Which tensors of a directory are which parameters of a model.

use serde::{Deserialize, Serialize};

use super::rule::{Filled, Names, Rule};
use crate::Error;
use crate::plan::captures;

/// The names and layouts of a directory's tensors in terms of a model's parameters: [rules](Rule), of which the first
/// that fits counts.
///
/// When a model is loaded, a rule whose tensors are not there is passed over: so a head that is tied in one directory
/// and not in another takes two rules. When it is saved, the first rule of each parameter counts.
///
/// ```
/// use burn_parallel::hf::{Mapping, Rule};
///
/// let mapping = Mapping::new()
///     .rule(Rule::new("model.embed_tokens.weight", "embedding.weight"))
///     .rule(Rule::new("model.layers.*.self_attn.q_proj.weight", "layers.*.attention.query.weight").transposed())
///     .rule(Rule::new("model.layers.*.input_layernorm.weight", "layers.*.norm.gamma"))
///     .keep("*.attention.mask"); // has no counterpart in the directory
/// let text = mapping.to_toml()?;
/// assert_eq!(Mapping::from_toml(&text)?, mapping);
/// # Ok::<(), burn_parallel::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    keep: Vec<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    keep_rest: bool,
    #[serde(default, rename = "rule")]
    pub(super) rules: Vec<Rule>,
}

impl Mapping {
    /// A mapping without rules: nothing fits.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every name is that of its parameter.
    pub fn identity() -> Self {
        Self::new().rule(Rule::new("*", "*"))
    }

    /// Adds a rule behind those that there are.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Adds the rules of another mapping behind those that there are.
    pub fn then(mut self, other: Self) -> Self {
        self.rules.extend(other.rules);
        self.keep.extend(other.keep);
        self.keep_rest |= other.keep_rest;
        self
    }

    /// Parameters whose paths fit this pattern have no counterpart: they keep their values when the model is loaded,
    /// and are not saved.
    pub fn keep(mut self, pattern: impl Into<String>) -> Self {
        self.keep.push(pattern.into());
        self
    }

    /// Parameters that no rule fits have no counterpart either.
    pub fn keep_rest(self) -> Self {
        Self { keep_rest: true, ..self }
    }

    /// Puts something in front of the paths of all parameters, as when the model is a field of another.
    pub fn within(mut self, field: &str) -> Self {
        let prefixed = |name: &mut String| *name = format!("{field}.{name}");
        for rule in &mut self.rules {
            match &mut rule.model {
                Names::One(name) => prefixed(name),
                Names::Several(names) => names.iter_mut().for_each(prefixed),
            }
        }
        self.keep.iter_mut().for_each(prefixed);
        self
    }

    /// Reads a mapping from TOML.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that says what is wrong, and where.
    pub fn from_toml(text: &str) -> Result<Self, Error> {
        let mapping: Self = toml::from_str(text).map_err(|why| wrong(why.to_string()))?;
        mapping.check().map(|()| mapping)
    }

    /// The mapping as TOML.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it cannot be written.
    pub fn to_toml(&self) -> Result<String, Error> {
        toml::to_string(self).map_err(|why| wrong(why.to_string()))
    }

    /// # Errors
    /// [`Error::InvalidArgument`] if a rule can fit no model.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.rules.iter().try_for_each(Rule::check).map_err(wrong)
    }

    /// Whether a parameter has no counterpart.
    pub(super) fn keeps(&self, path: &str) -> bool {
        let said = self.keep.iter().any(|pattern| captures(pattern, path).is_some());
        said || (self.keep_rest && self.of_model(path).next().is_none())
    }

    /// The rules that fit a parameter, with the names that they give, and which of them is the parameter's.
    pub(super) fn of_model<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a Rule, Filled, usize)> {
        self.rules.iter().filter_map(move |rule| rule.of_model(path).map(|(filled, place)| (rule, filled, place)))
    }
}

fn wrong(problem: String) -> Error {
    Error::invalid("Mapping", problem)
}

#[cfg(test)]
mod tests {
    use super::Mapping;
    use crate::hf::rule::Rule;

    #[test]
    fn rules_that_fit_nothing() {
        let says = |rule: Rule, words: &str| {
            let said = Mapping::new().rule(rule).check().unwrap_err().to_string();
            assert!(said.contains(words), "`{words}` is missing in: {said}");
        };
        says(Rule::new("a.*", "b"), "the same number of `*`");
        says(Rule::new(["a", "b"], ["c", "d"]), "one side must have one name");
        says(Rule::new("a", [] as [&str; 0]), "a side has no names");
        says(Rule::new("a", ["b", "c"]).shares([1, 2, 3]), "2 shares");
        says(Rule::new("a", ["b", "c"]).shares([1, 0]), "none of them 0");
        says(Rule::new("a", ["b", "c"]).groups(0), "groups");
        says(Rule::new("a", "b").groups(2), "groups");
        says(Rule::new("a", "b").rotary_pairs(3), "an even size");
        says(Rule::new("a", ["b", "c"]).rotary_pairs(4), "one name on each side");
    }

    #[test]
    fn text() {
        let mapping = Mapping::new()
            .rule(Rule::new("q.*", "a.*").transposed().rotary_pairs(8))
            .rule(Rule::new("qkv", ["q", "k", "v"]).along(1).shares([4, 1, 1]).groups(2))
            .keep("mask");
        assert_eq!(Mapping::from_toml(&mapping.to_toml().unwrap()).unwrap(), mapping);
        let said = Mapping::from_toml("[[rule]]\nfile = 'a.*'\nmodel = 'b'").unwrap_err().to_string();
        assert!(said.contains("rule of `a.*` and `b`"), "{said}");
        assert!(Mapping::from_toml("[[rule]]\nfile = 'a'\nmodel = 'b'\nfold = 1").is_err());
        let json = serde_json::to_string(&mapping).unwrap();
        assert_eq!(serde_json::from_str::<Mapping>(&json).unwrap(), mapping);
        assert_eq!(Mapping::identity().within("x").rules[0], Rule::new("*", "x.*"));
    }

    /// By serde alone, as when a mapping is part of a larger file, the words are those of `from_toml`, and the place.
    #[test]
    fn wrong_rules_are_told_wherever_they_are_read() {
        for (rule, words) in [
            (r#"{"file": "a.*", "model": "b"}"#, "rule of `a.*` and `b`: all names must have the same number of `*`"),
            (r#"{"file": [], "model": "b"}"#, "a side has no names"),
            (r#"{"file": 3, "model": "b"}"#, "integer `3`, expected a name or a list of names"),
            (r#"{"file": ["a", {}], "model": "b"}"#, "expected a string"),
            (r#"{"file": "a", "model": "b", "fold": 1}"#, "unknown field `fold`"),
            (r#"["a", "b"]"#, "expected a table of keys and values"),
        ] {
            let said = serde_json::from_str::<Mapping>(&format!("{{\n\"rule\": [{rule}]}}")).unwrap_err().to_string();
            assert!(said.contains(words) && said.contains("line 2"), "{said}");
            let toml = format!("keep = []\nrule = [{}]", rule.replace(": ", " = "));
            for said in [
                toml::from_str::<Mapping>(&toml).unwrap_err().to_string(),
                Mapping::from_toml(&toml).unwrap_err().to_string(),
            ] {
                assert!(said.contains(words) && said.contains("line 2"), "{said}");
            }
        }
    }
}
