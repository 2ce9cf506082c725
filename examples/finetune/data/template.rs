//! Chat templates: what a model was taught a conversation to look like.

use std::fs;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context, filters};
use serde_json::Value as Json;

use super::tokenizer::{Tokenizer, one_line, read_json};

/// The Jinja template of a directory, rendered as Python's `transformers` does.
pub struct ChatTemplate {
    environment: Environment<'static>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or the template in `tokenizer_config.json`: none if there is neither.
    pub fn open(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>, String> {
        let file = dir.join("chat_template.jinja");
        let (path, source) = match fs::read_to_string(&file) {
            Ok(source) => (file, source),
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => {
                let path = dir.join("tokenizer_config.json");
                let Some(config) = read_json(&path)? else { return Ok(None) };
                match config.get("chat_template").and_then(of_config) {
                    Some(source) => (path, source.to_owned()),
                    None => return Ok(None),
                }
            }
            Err(why) => return Err(format!("{}: {why}", file.display())),
        };
        Self::new(&source, tokenizer).map(Some).map_err(|why| format!("{}: {why}", path.display()))
    }

    /// A template from its text.
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|why| why.to_string())?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let raise = |why: String| -> Result<Value, Error> { Err(Error::new(ErrorKind::InvalidOperation, why)) };
        environment.add_function("raise_exception", raise);
        environment.add_filter("tojson", tojson);
        // Marks in some templates what is trained on, for Python; here rendered prefixes say it.
        let source = unmarked(source);
        environment.add_template_owned(NAME, source).map_err(said)?;
        for (name, text) in tokenizer.named() {
            environment.add_global(name.clone(), text.clone());
        }
        Ok(Self { environment })
    }

    /// A conversation as text; with `prompt`, followed by what an answer begins with.
    pub fn render(&self, messages: &[Json], prompt: bool) -> Result<String, String> {
        let template = self.environment.get_template(NAME).map_err(said)?;
        let messages = Value::from(Serde(messages));
        let context = context! { messages, add_generation_prompt => prompt };
        template.render(context).map_err(said)
    }
}

/// The template in a `tokenizer_config.json`: a text, or several with names.
fn of_config(value: &Json) -> Option<&str> {
    let named = |list: &'_ Json| {
        let default =
            list.as_array()?.iter().position(|one| one.get("name").and_then(Json::as_str) == Some("default"))?;
        Some(default)
    };
    match value.as_str() {
        Some(text) => Some(text),
        None => value.get(named(value)?)?.get("template")?.as_str(),
    }
}

/// The template without the tags `generation`, which only `transformers` knows: blocks that always hold in their place.
fn unmarked(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}") else { break };
        let tag = &rest[at..at + length + 2];
        out.push_str(&rest[..at]);
        match tag[2..tag.len() - 2].trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[at + length + 2..];
    }
    out + rest
}

/// As `json.dumps` with `ensure_ascii=False`: minijinja's own would escape what is special in HTML.
fn tojson(value: &Value, indent: Option<Value>, args: Kwargs) -> Result<Value, Error> {
    let text = filters::tojson(value, indent, args)?.to_string();
    let plain = [("\\u003c", "<"), ("\\u003e", ">"), ("\\u0026", "&"), ("\\u0027", "'")];
    Ok(plain.iter().fold(text, |text, (escaped, plain)| text.replace(escaped, plain)).into())
}

/// What went wrong, with the line of the template.
fn said(why: Error) -> String {
    let what = why.detail().map_or_else(|| why.kind().to_string(), str::to_owned);
    match why.line() {
        Some(line) => format!("the chat template, line {line}: {}", one_line(&what)),
        None => format!("the chat template: {}", one_line(&what)),
    }
}
