//! One rule of a mapping.

use std::fmt;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::pattern::{filled, wildcards};
use crate::forms::table_as;
use crate::plan::captures;

/// Which tensors of a file are which parameters of a model, and how one is made of the other.
///
/// Names are patterns in which `*` stands for any characters, the same on both sides. Usually one tensor is one
/// parameter. If there are several names on one side, these are parts of the one on the other: consecutive ranges along
/// one of its dims.
///
/// In TOML or JSON:
///
/// ```
/// # use burn_parallel::hf::Mapping;
/// let mapping = Mapping::from_toml(r#"
///     [[rule]]
///     file = "model.layers.*.mlp.gate_up_proj.weight"
///     model = ["layers.*.gate.weight", "layers.*.up.weight"]
///     transposed = true
/// "#)?;
/// # Ok::<(), burn_parallel::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Rule {
    pub(super) file: Names,
    pub(super) model: Names,
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) transposed: bool,
    /// Of the side with one name.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) dim: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) shares: Vec<usize>,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub(super) groups: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pairs: Option<usize>,
}

/// A rule as it is written, before it is known whether it can fit a model.
struct WrittenRule(Rule);

impl<'de> Deserialize<'de> for WrittenRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By its fields, and so are rules written: what serde has made of it, as `remote` says.
        Rule::deserialize(deserializer).map(Self)
    }
}

impl TryFrom<WrittenRule> for Rule {
    type Error = String;

    fn try_from(WrittenRule(rule): WrittenRule) -> Result<Self, String> {
        rule.check().map(|()| rule)
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        table_as::<WrittenRule, Self, D>(deserializer)
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

/// One name or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Names {
    /// One.
    One(String),
    /// Several, in order.
    Several(Vec<String>),
}

impl Names {
    pub(super) fn all(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NamesVisitor)
    }
}

struct NamesVisitor;

impl<'de> Visitor<'de> for NamesVisitor {
    type Value = Names;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name or a list of names")
    }

    fn visit_str<E>(self, name: &str) -> Result<Names, E> {
        Ok(name.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, names: A) -> Result<Names, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(names)).map(Names::Several)
    }
}

impl From<&str> for Names {
    fn from(name: &str) -> Self {
        Self::One(name.into())
    }
}

impl From<String> for Names {
    fn from(name: String) -> Self {
        Self::One(name)
    }
}

impl<const N: usize> From<[&str; N]> for Names {
    fn from(names: [&str; N]) -> Self {
        Self::Several(names.map(Into::into).into())
    }
}

impl From<Vec<String>> for Names {
    fn from(names: Vec<String>) -> Self {
        Self::Several(names)
    }
}

/// The names of a rule with something in the place of their `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filled {
    pub(super) files: Vec<String>,
    pub(super) models: Vec<String>,
}

impl Rule {
    /// The tensor or tensors `file` are the parameter or parameters `model`, element by element.
    pub fn new(file: impl Into<Names>, model: impl Into<Names>) -> Self {
        let (file, model) = (file.into(), model.into());
        Self { file, model, transposed: false, dim: 0, shares: Vec::new(), groups: 1, pairs: None }
    }

    /// The last two dims are swapped, as in the weights of `torch.nn.Linear`, `[out, in]`, of which burn's are `[in,
    /// out]`. Tensors of one dim, as biases, stay as they are: one rule serves for both.
    pub fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// Parts lie one behind the other along this dim of the tensor or parameter that has one name; 0 if this is not
    /// said.
    pub fn along(self, dim: usize) -> Self {
        Self { dim, ..self }
    }

    /// Parts are as large, relative to each other, as these numbers, one for each; equal if this is not said. The
    /// query, key and value of 32 heads and 8 key/value heads: `[32, 8, 8]`, or `[4, 1, 1]`.
    pub fn shares(self, shares: impl Into<Vec<usize>>) -> Self {
        Self { shares: shares.into(), ..self }
    }

    /// Parts alternate so many times: first a piece of each part, then the next of each. The `query_key_value` of
    /// GPT-NeoX has the query, key and value of one head side by side: as many groups as heads.
    pub fn groups(self, groups: usize) -> Self {
        Self { groups, ..self }
    }

    /// The rows of the file's dim 0 belong to heads of `size`. What a rotary embedding turns together is `size / 2`
    /// apart there, as in Hugging Face's Llama, and next to each other in the model, as burn's
    /// [`RotaryEncoding`](burn::nn::RotaryEncoding) has it: for the weights and biases of query and key.
    pub fn rotary_pairs(self, size: usize) -> Self {
        Self { pairs: Some(size), ..self }
    }

    /// What is wrong with the rule, whatever the model.
    pub(super) fn check(&self) -> Result<(), String> {
        let (files, models) = (self.file.all(), self.model.all());
        let of =
            |problem: &str| Err(format!("rule of `{}` and `{}`: {problem}", files.join("`, `"), models.join("`, `")));
        if files.is_empty() || models.is_empty() {
            return of("a side has no names");
        }
        if files.len() > 1 && models.len() > 1 {
            return of("one side must have one name, of which those on the other are parts");
        }
        let stars = wildcards(&files[0]);
        if files.iter().chain(models).any(|name| wildcards(name) != stars) {
            return of("all names must have the same number of `*`");
        }
        let parts = files.len().max(models.len());
        if !self.shares.is_empty() && (self.shares.len() != parts || self.shares.contains(&0)) {
            return of(&format!("there are {parts} parts, so there must be {parts} shares, none of them 0"));
        }
        if self.shares.iter().try_fold(0usize, |sum, share| sum.checked_add(*share)).is_none() {
            return of("the shares are too large");
        }
        if self.groups == 0 || (self.groups > 1 && parts == 1) {
            return of("groups are for several parts, and there is at least one");
        }
        match self.pairs {
            Some(_) if parts > 1 => of("rotary pairs need a rule of one name on each side"),
            Some(size) if size == 0 || size % 2 != 0 => of("rotary pairs need heads of an even size"),
            _ => Ok(()),
        }
    }

    /// The names of the rule if `path` is one of its parameters, and which.
    pub(super) fn of_model(&self, path: &str) -> Option<(Filled, usize)> {
        self.model.all().iter().enumerate().find_map(|(place, pattern)| {
            let found = captures(pattern, path)?;
            let fill = |names: &Names| names.all().iter().map(|name| filled(name, &found)).collect();
            Some((Filled { files: fill(&self.file), models: fill(&self.model) }, place))
        })
    }

    /// How large the parts are relative to each other.
    pub(super) fn share_of_parts(&self) -> Vec<usize> {
        match self.shares.is_empty() {
            true => vec![1; self.file.all().len().max(self.model.all().len())],
            false => self.shares.clone(),
        }
    }
}

fn one() -> usize {
    1
}

fn is_one(number: &usize) -> bool {
    *number == 1
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

fn is_false(value: &bool) -> bool {
    !value
}
