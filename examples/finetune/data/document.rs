//! A line of data as tokens, and which of them are trained on.

use serde_json::Value;

use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;

/// What to give in place of a document that is spread over lines, or of a list of documents.
const LINES: &str = "give JSON Lines, one document a line";

/// Tokens that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub tokens: Vec<u32>,
    /// For each token, whether the model learns to give it.
    pub trained: Vec<bool>,
    pub kind: Kind,
}

/// What a document is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// A prompt with its completion.
    Completion,
    Conversation,
}

impl Kind {
    /// Whether a document that is longer than a row is divided among rows; else it is cut off, since its parts make no
    /// sense alone.
    pub fn divisible(self) -> bool {
        self == Self::Text
    }
}

impl Document {
    /// A text, all of which is trained on.
    pub fn text(tokens: Vec<u32>) -> Self {
        Self { trained: vec![true; tokens.len()], tokens, kind: Kind::Text }
    }

    /// A line of JSON Lines: `{"text": ..}`, `{"prompt": .., "completion": ..}` or `{"messages": [..]}`.
    pub fn of_json(line: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|why| not_json(&why))?;
        let Some(fields) = value.as_object() else { return Err(format!("is not a JSON object: {LINES}")) };
        let text = |key: &str| match fields.get(key) {
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(_) => Err(format!("`{key}` is not a text")),
            None => Err(format!("has no `{key}`")),
        };
        let kinds = ["text", "prompt", "completion", "messages"];
        let found: Vec<&str> = kinds.into_iter().filter(|key| fields.contains_key(*key)).collect();
        match found[..] {
            ["text"] => Ok(Self::text(tokenizer.document(text("text")?)?)),
            ["prompt" | "completion", ..] if !found.contains(&"messages") => {
                completion(text("prompt")?, text("completion")?, tokenizer)
            }
            ["messages"] => match fields.get("messages").and_then(Value::as_array) {
                Some(messages) => conversation(messages, tokenizer, template),
                None => Err("`messages` is not a list".into()),
            },
            [] => Err("has no `text`, no `prompt` with `completion`, and no `messages`".into()),
            _ => Err(format!("has `{}`: one kind of document a line", found.join("` and `"))),
        }
    }
}

/// What is wrong with a line. The parser counts lines too, from where it begins.
fn not_json(why: &serde_json::Error) -> String {
    let (said, place) = (why.to_string(), format!(" at line {} column {}", why.line(), why.column()));
    let hint = if why.is_eof() { format!(": {LINES}") } else { String::new() };
    format!("is not JSON: {}, column {}{hint}", said.strip_suffix(&place).unwrap_or(&said), why.column())
}

/// A completion is trained on, its prompt is not.
fn completion(prompt: &str, completion: &str, tokenizer: &Tokenizer) -> Result<Document, String> {
    let tokens = tokenizer.document(&format!("{prompt}{completion}"))?;
    let asked = prefix(&tokenizer.beginning(prompt)?, &tokens).ok_or(
        "the last token of `prompt` runs into `completion`: let the completion begin with the space between them, or the prompt end with a line break",
    )?;
    let trained = (0..tokens.len()).map(|at| at >= asked).collect();
    Ok(Document { tokens, trained, kind: Kind::Completion })
}

/// What the assistant says is trained on: of each of its turns, what the rendered conversation has after the prompt for
/// it.
fn conversation(
    messages: &[Value],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Document, String> {
    let template = template
        .ok_or("has `messages`, and the model has no chat template: put a chat_template.jinja into its directory")?;
    for (number, message) in messages.iter().enumerate() {
        if message.get("role").and_then(Value::as_str).is_none() {
            return Err(format!("message {} has no `role`", number + 1));
        }
        // A call of a tool needs no words.
        if message["content"].is_null() && message["tool_calls"].is_null() {
            return Err(format!("message {} has no `content`", number + 1));
        }
    }
    let answers = |message: &Value| message.get("role").and_then(Value::as_str) == Some("assistant");
    let whole = template.render(messages, false)?;
    let tokens = tokenizer.encode(&whole)?;
    let place = |number: usize, text: &str| {
        let before = if whole.starts_with(text) { prefix(&tokenizer.encode(text)?, &tokens) } else { None };
        before.ok_or_else(|| {
            format!(
                "the chat template renders what comes before message {} differently when later messages follow: what is trained on can't be found",
                number + 1
            )
        })
    };
    let mut trained = vec![false; tokens.len()];
    for (number, _) in messages.iter().enumerate().filter(|(_, message)| answers(message)) {
        let begins = place(number, &template.render(&messages[..number], true)?)?;
        let ends = match number + 1 == messages.len() {
            true => tokens.len(),
            false => place(number + 1, &template.render(&messages[..=number], false)?)?,
        };
        trained[begins..ends].fill(true);
    }
    if !trained.contains(&true) {
        return Err("has no message of the `assistant`: nothing is trained on".into());
    }
    Ok(Document { tokens, trained, kind: Kind::Conversation })
}

/// How many tokens `part` has, if `whole` begins with it.
fn prefix(part: &[u32], whole: &[u32]) -> Option<usize> {
    whole.starts_with(part).then_some(part.len())
}
