//! A model directory for a test, gone when the test ends: a tokenizer of bytes, and whatever else is written into it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use crate::data::source::Reading;

/// What SmolLM2 and Qwen write conversations with.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub struct Directory(PathBuf);

impl Directory {
    /// A directory with a tokenizer: three special tokens, then the 256 bytes, then what `merges` make of them.
    pub fn new(merges: &[(&str, &str)]) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("finetune-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let directory = Self(path);
        directory.write("tokenizer.json", tokenizer(merges).as_bytes());
        directory.write(
            "tokenizer_config.json",
            br#"{"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}"#,
        );
        directory
    }

    pub fn with_template(self, template: &str) -> Self {
        self.write("chat_template.jinja", template.as_bytes());
        self
    }

    /// With a tiny model of tests/data, whose words are the tokens.
    pub fn with_model(self, name: &str) -> Self {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf").join(name);
        for name in ["config.json", "model.safetensors"] {
            fs::copy(from.join(name), self.0.join(name)).unwrap();
        }
        self
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    pub fn reading(&self) -> Arc<Reading> {
        Arc::new(Reading::open(&self.0).unwrap())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The character that stands for a byte in byte-level tokenizers.
fn letter(byte: u8) -> char {
    let shown = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let hidden = (0..byte).filter(|byte| !shown(*byte)).count() as u32;
    if shown(byte) { byte.into() } else { char::from_u32(256 + hidden).unwrap() }
}

fn tokenizer(merges: &[(&str, &str)]) -> String {
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let words = special.map(String::from).into_iter().chain((0..=255).map(|byte| letter(byte).to_string()));
    let words = words.chain(merges.iter().map(|(left, right)| format!("{left}{right}")));
    let vocabulary: serde_json::Map<_, _> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let added = special.iter().enumerate().map(|(id, content)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true })
    });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary,
            "merges": merges.iter().map(|(left, right)| format!("{left} {right}")).collect::<Vec<_>>(),
        },
    })
    .to_string()
}
