//! The tokenizer of a Hugging Face directory.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// Text to tokens and back, as `tokenizer.json` of a model says.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What a document begins with.
    before: Vec<u32>,
    /// What a document ends with.
    after: Vec<u32>,
    /// The tokens after which a generated text ends.
    ends: Vec<u32>,
    /// Special tokens by the names that chat templates give them, as `bos_token`.
    named: Vec<(String, String)>,
}

impl Tokenizer {
    /// Reads the tokenizer of a directory: `tokenizer.json`, and from `tokenizer_config.json`, `generation_config.json`
    /// and `config.json` what begins and ends a text.
    pub fn open(dir: &Path) -> Result<Self, String> {
        let file = dir.join("tokenizer.json");
        let mut inner = tokenizers::Tokenizer::from_file(&file)
            .map_err(|why| format!("{}: {}", file.display(), one_line(&why.to_string())))?;
        // Rows are cut and padded here, where what is trained on is known.
        inner.with_truncation(None).map_err(|why| format!("{}: {why}", file.display()))?;
        inner.with_padding(None);

        let configs: Vec<Value> = ["tokenizer_config.json", "generation_config.json", "config.json"]
            .iter()
            .filter_map(|name| read_json(&dir.join(name)).transpose())
            .collect::<Result<_, _>>()?;
        let ids = |key: &str| configs.iter().find_map(|config| numbers(config.get(key)?)).unwrap_or_default();
        let mut named = Vec::new();
        for name in ["bos", "eos", "unk", "pad"] {
            let key = format!("{name}_token");
            let text = configs.iter().find_map(|config| text_of(config.get(&key)?));
            let by_id = || ids(&format!("{key}_id")).first().and_then(|id| inner.id_to_token(*id));
            named.extend(text.or_else(by_id).map(|text| (key, text)));
        }
        let id = |key: &str| named.iter().find(|(name, _)| name == key).and_then(|(_, text)| inner.token_to_id(text));
        let mut ends: Vec<u32> = id("eos_token").into_iter().chain(ids("eos_token_id")).collect();
        ends.dedup();

        let mut tokenizer = Self { inner, before: Vec::new(), after: Vec::new(), ends, named };
        // What the tokenizer puts around every text.
        let (bare, whole) = (tokenizer.encode("a")?, tokenizer.ids("a", true)?);
        if let Some(at) = whole.windows(bare.len().max(1)).position(|part| part == bare) {
            tokenizer.before = whole[..at].to_vec();
            tokenizer.after = whole[at + bare.len()..].to_vec();
        }
        if tokenizer.after.is_empty() {
            tokenizer.after.extend(tokenizer.ends.first());
        }
        Ok(tokenizer)
    }

    /// The tokens of a text, with nothing around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.ids(text, false)
    }

    /// The tokens of the beginning of a document.
    pub fn beginning(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut ids = self.before.clone();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// The tokens of a whole document: what the model knows as a beginning and an end around it.
    pub fn document(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut ids = self.beginning(text)?;
        ids.extend(&self.after);
        Ok(ids)
    }

    /// The text of tokens, with the special ones in it.
    pub fn decode(&self, ids: &[u32]) -> Result<String, String> {
        self.inner.decode(ids, false).map_err(|why| one_line(&why.to_string()))
    }

    /// The tokens after which a generated text ends.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// How many different tokens there are.
    pub fn words(&self) -> usize {
        let added = self.inner.get_added_tokens_decoder().keys().max().map_or(0, |id| *id as usize + 1);
        added.max(self.inner.get_vocab_size(true))
    }

    /// Special tokens by the names that chat templates give them.
    pub fn named(&self) -> &[(String, String)] {
        &self.named
    }

    fn ids(&self, text: &str, around: bool) -> Result<Vec<u32>, String> {
        let encoding = self.inner.encode_fast(text, around).map_err(|why| one_line(&why.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// A JSON file of a directory, if it is there.
pub fn read_json(path: &Path) -> Result<Option<Value>, String> {
    let wrong = |why: String| format!("{}: {why}", path.display());
    match fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|why| wrong(why.to_string())),
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(why) => Err(wrong(why.to_string())),
    }
}

/// What libraries say over several lines, in one.
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A special token is a text, or an object that has one.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// An id, or several.
fn numbers(value: &Value) -> Option<Vec<u32>> {
    let number = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(all) => all.iter().map(number).collect(),
        one => number(one).map(|id| vec![id]),
    }
}
