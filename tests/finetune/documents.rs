//! What a line of data becomes, and what of it is trained on.

use crate::data::document::{Document, Kind};
use crate::data::source::Reading;
use crate::directory::{CHATML, Directory};

fn read(line: &str, reading: &Reading) -> Result<Document, String> {
    Document::of_json(line, &reading.tokenizer, reading.template.as_ref())
}

/// The whole text, and the pieces of it that are trained on.
fn trained(line: &str, directory: &Directory) -> (String, Vec<String>) {
    let reading = directory.reading();
    let Document { tokens, trained, .. } = read(line, &reading).unwrap();
    let decode = |tokens: &[u32]| reading.tokenizer.decode(tokens).unwrap();
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let run = trained[at..].iter().take_while(|next| **next == trained[at]).count();
        pieces.extend(trained[at].then(|| decode(&tokens[at..at + run])));
        at += run;
    }
    (decode(&tokens), pieces)
}

#[track_caller]
fn refused(line: &str, directory: &Directory, why: &str) {
    let problem = read(line, &directory.reading()).unwrap_err();
    assert!(problem.contains(why) && problem.lines().count() == 1, "{problem}");
}

#[test]
fn a_text_ends_with_the_end_token_and_is_trained_on() {
    let directory = Directory::new(&[]);
    let reading = directory.reading();
    let document = read(r#"{"text": "Ab", "source": "ignored"}"#, &reading).unwrap();
    assert_eq!(document, Document { tokens: vec![68, 101, 2], trained: vec![true; 3], kind: Kind::Text });
    // The truncation to 4 tokens that the file asks for is not for training.
    assert_eq!(reading.tokenizer.encode("abcdefgh").unwrap().len(), 8);
    assert_eq!((reading.tokenizer.words(), reading.tokenizer.ends()), (259, &[2][..]));
}

#[test]
fn what_the_tokenizer_puts_around_texts_is_kept() {
    let directory = Directory::new(&[]);
    let file = directory.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    json["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<|im_start|>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<|im_start|>": { "id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"] } },
    });
    std::fs::write(&file, json.to_string()).unwrap();
    let document = read(r#"{"prompt": "A", "completion": "b"}"#, &directory.reading()).unwrap();
    assert_eq!((document.tokens, document.trained), (vec![1, 68, 101, 2], vec![false, false, true, true]));
}

#[test]
fn a_completion_is_trained_on_and_its_prompt_is_not() {
    let directory = Directory::new(&[]);
    let (whole, pieces) = trained(r#"{"prompt": "2 + 2 =", "completion": " 4"}"#, &directory);
    assert_eq!((whole.as_str(), pieces), ("2 + 2 = 4<|im_end|>", vec![" 4<|im_end|>".to_owned()]));
}

/// " 4" is one token of the whole, and none of the prompt: what follows a prompt that ends with a space was never seen.
#[test]
fn a_token_over_the_end_of_the_prompt_is_refused() {
    let directory = Directory::new(&[("Ġ", "4")]);
    refused(r#"{"prompt": "2 + 2 = ", "completion": "4"}"#, &directory, "the last token of `prompt` runs into");
    let (_, pieces) = trained(r#"{"prompt": "2 + 2 =", "completion": " 4"}"#, &directory);
    assert_eq!(pieces, [" 4<|im_end|>"]);
}

#[test]
fn of_a_conversation_what_the_assistant_says_is_trained_on() {
    let directory = Directory::new(&[("<", "|")]).with_template(CHATML);
    let line = r#"{"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello <b>! "},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"}
    ]}"#;
    let (whole, pieces) = trained(line, &directory);
    assert_eq!(
        whole,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello <b>!<|im_end|>\n\
         <|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long<|im_end|>\n"
    );
    assert_eq!(pieces, ["Hello <b>!<|im_end|>\n", "So long<|im_end|>\n"]);
}

/// In a form of Python's only, with whitespace control, methods of strings and a tag that only `transformers` knows.
#[test]
fn templates_of_transformers_are_rendered() {
    let template = "
        {%- for message in messages %}
            {%- if message.role == 'user' %}
                {{- bos_token ~ '[INST] ' ~ message.content.strip().upper() ~ ' [/INST]' }}
            {%- elif message.get('role') == 'assistant' %}
                {%- generation %}
                    {{- ' ' ~ message.content ~ eos_token }}
                {%- endgeneration %}
            {%- else %}
                {{- raise_exception('roles are user and assistant, not ' + message.role) }}
            {%- endif %}
        {%- endfor %}";
    let directory = Directory::new(&[]).with_template(template);
    let line = r#"{"messages": [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "Yes."}]}"#;
    let (whole, pieces) = trained(line, &directory);
    assert_eq!(whole, "<|im_start|>[INST] HI [/INST] Yes.<|im_end|>");
    assert_eq!(pieces, [" Yes.<|im_end|>"]);
    let line = r#"{"messages": [{"role": "tool", "content": ""}, {"role": "assistant", "content": ""}]}"#;
    refused(line, &directory, "roles are user and assistant, not tool");
}

#[test]
fn values_are_written_as_python_writes_them() {
    let template = "{% for message in messages %}{{ message.call | tojson }}{% endfor %}";
    let directory = Directory::new(&[]).with_template(template);
    let reading = directory.reading();
    let messages = serde_json::json!([{ "role": "user", "call": { "a": ["<b> & 'c'", 1, null] } }]);
    let text = reading.template.as_ref().unwrap().render(messages.as_array().unwrap(), false).unwrap();
    assert_eq!(text, r#"{"a": ["<b> & 'c'", 1, null]}"#);
}

/// As templates do that drop what a model has thought in earlier turns.
#[test]
fn a_template_that_changes_what_came_before_is_refused() {
    let template = "{% for message in messages %}{{ message.role }}: {% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}..{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let directory = Directory::new(&[]).with_template(template);
    let turn = r#"{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}"#;
    let (_, pieces) = trained(&format!(r#"{{"messages": [{turn}]}}"#), &directory);
    assert_eq!(pieces, ["b\n"]);
    let line = format!(r#"{{"messages": [{turn}, {turn}]}}"#);
    refused(&line, &directory, "renders what comes before message 3 differently");
}

#[test]
fn lines_that_are_no_documents_are_refused() {
    let directory = Directory::new(&[]);
    for (line, why) in [
        (r#"{"text": "#, "is not JSON"),
        ("[", "is not JSON: EOF while parsing a list, column 1: give JSON Lines, one document a line"),
        (r#"["text"]"#, "is not a JSON object: give JSON Lines, one document a line"),
        (r#"{"txt": "a"}"#, "has no `text`, no `prompt` with `completion`, and no `messages`"),
        (r#"{"text": 1}"#, "`text` is not a text"),
        (r#"{"prompt": "a"}"#, "has no `completion`"),
        (r#"{"completion": "a"}"#, "has no `prompt`"),
        (r#"{"prompt": ["a"], "completion": "b"}"#, "`prompt` is not a text"),
        (r#"{"text": "a", "messages": []}"#, "has `text` and `messages`"),
        (r#"{"messages": []}"#, "the model has no chat template"),
    ] {
        refused(line, &directory, why);
    }
    let directory = directory.with_template(CHATML);
    for (line, why) in [
        (r#"{"messages": {}}"#, "`messages` is not a list"),
        (r#"{"messages": []}"#, "has no message of the `assistant`"),
        (r#"{"messages": [{"content": "a"}]}"#, "message 1 has no `role`"),
        (r#"{"messages": ["a"]}"#, "message 1 has no `role`"),
        (r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}"#, "message 2 has no `content`"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "has no message of the `assistant`"),
    ] {
        refused(line, &directory, why);
    }
}

#[test]
fn a_directory_that_is_none_is_refused_in_one_line() {
    let directory = Directory::new(&[]);
    let refused = |name: &str, bytes: &[u8], why: &str| {
        let file = directory.write(name, bytes);
        let problem = Reading::open(directory.path()).err().unwrap();
        assert!(problem.contains(name) && problem.contains(why) && problem.lines().count() == 1, "{problem}");
        std::fs::remove_file(file).unwrap();
    };
    refused("tokenizer_config.json", b"{", "EOF");
    refused("chat_template.jinja", b"\n{% for %}", "line 2");
    refused("tokenizer_config.json", br#"{"chat_template": [{"name": "default", "template": "{{"}]}"#, "line 1");
    refused("tokenizer.json", b"{}", "tokenizer.json");
    let problem = Reading::open(directory.path()).err().unwrap();
    assert!(problem.contains("tokenizer.json") && problem.lines().count() == 1, "{problem}");
}
