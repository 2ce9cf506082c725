//! Nonsense in a flag, a directory or a line of data: exit code 2 and one line.

use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::directory::Directory;
use crate::program::{command, finetune, prepared, prepared_with};

#[track_caller]
fn refused(directory: &Directory, flags: &[&str], what: &str) {
    let data: &[&str] = if flags.contains(&"--data") { &[] } else { &["--data", "in:data.jsonl"] };
    let seq: &[&str] = if flags.contains(&"--seq") { &[] } else { &["--seq", "64"] };
    let output = finetune(directory, &[data, seq, flags].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{flags:?}");
    assert_eq!(stderr.lines().count(), 1, "{flags:?}: {stderr}");
    assert!(stderr.starts_with("finetune: ") && stderr.contains(what), "{flags:?}: {stderr}");
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    let directory = prepared();
    for flag in
        ["--dp", "--batch", "--batch-tokens", "--micro-batch", "--seq", "--steps", "--epochs", "--lora", "--keep"]
    {
        refused(&directory, &["--save", "in:save", "--data", "in:data.jsonl", flag, "0"], "at least 1");
        refused(&directory, &["--save", "in:save", "--data", "in:data.jsonl", flag, "many"], "whole number");
    }
    for (flags, what) in [
        (&["--data", "in:data.jsonl", "--model", "x"][..], "--model"),
        (&["--warmup", "-1"], "at least 0"),
        (&["--lr", "2"], "greater than 0 and at most 1"),
        (&["--weight-decay", "2"], "from 0 to 1"),
        (&["--temperature", "-1", "--generate", "a"], "0 or more"),
        (&["--scheduler", "none"], "possible values: constant, linear, cosine"),
        (&["--zero", "4"], "0, 1, 2 or 3"),
        (&["--engine", "fast"], "possible values: auto, eager, captured"),
        (
            &["--engine", "eager", "--tp", "2"],
            "--engine eager runs the model's own forward, and --tp 2 needs captured steps",
        ),
        (
            &["--engine", "eager", "--pp", "2"],
            "--engine eager runs the model's own forward, and --pp 2 needs captured steps",
        ),
        (&["--engine", "eager", "--strategy", "in:nowhere.toml"], "--strategy"),
        (&["--steps", "3", "--epochs", "2"], "--epochs"),
        (&["--batch", "3", "--batch-tokens", "200"], "--batch"),
        (&["--eval-every", "3"], "--eval-every needs --eval <FILE>, which is not given"),
        (&["--save-every", "3"], "--save"),
        (&["--lora-targets", "q_proj"], "--lora"),
        (&["--lora", "2", "--lora-targets", "q_proj,embed"], "`embed` is no projection"),
        (
            &["--dp", "3", "--batch", "2"],
            "--batch 2 is smaller than --dp 3: every replica needs a row of each batch, give --batch 3",
        ),
        (&["--batch-tokens", "100", "--dp", "2"], "--batch-tokens 100 is less than a row of --seq 64"),
        (&["--dp", "2", "--batch", "4", "--micro-batch", "3"], "--micro-batch 3 is more than the 2 rows of a replica"),
        (
            &["--data", "in:data.jsonl", "--seq", "257"],
            "--seq 257 is more than the 256 tokens that the model was made for",
        ),
        (&["--ranks", "3", "--tp", "2"], "--tp 2 does not divide --ranks 3"),
        (&["--strategy", "in:nowhere.toml"], "nowhere.toml"),
        (&["--generate", &"a ".repeat(200)], "and the model was made for 256"),
        (&["--json", "/nowhere/at/all.json"], "cannot write --json"),
        (&["--eval", "in:eval.jsonl", "--json", "in:eval.jsonl"], "eval.jsonl\" would overwrite the text"),
        (&["--resume", "in:nowhere"], "nowhere: there is no checkpoint"),
        (&["--resume", "in:data.jsonl"], "data.jsonl: it is not a directory"),
        (&["--save", "in:data.jsonl"], "data.jsonl: it is not a directory"),
        (&["--save", "in:data.jsonl/below"], "--save"),
        (&["--warmup", "11", "--steps", "10"], "--warmup 11 is more than the 10 steps"),
        (&["--tp", "5"], "--tp 5: "),
        (&["--transport", "nccl"], "--transport nccl"),
        (&["--dtype", "f16"], "possible values: f32, bf16"),
        (&["--batch", "some"], "or `auto`"),
        (
            &["--batch", "1000000", "--seq", "256", "--engine", "eager"],
            "--seq 256: the attention of 1000000 rows at once takes",
        ),
        (&["--batch", "auto", "--micro-batch", "2"], "leave --micro-batch out"),
        (&["--batch", "auto", "--launch", "processes"], "give --launch threads"),
        (&["--batch", "auto", "--batch-tokens", "200"], "--batch"),
        (&["--batch", "4", "--grow-batch", "3", "--steps", "2"], "--grow-batch 3 is smaller than --batch 4"),
        (&["--grow-batch", "16"], "give --steps"),
        (&["--grow-batch", "16", "--batch-tokens", "200"], "--grow-batch"),
        (&["--grow-batch", "16", "--steps", "2", "--batch", "4"], "give --dp 2, or a --batch of several --micro-batch"),
        (&["--grow-batch", "16", "--steps", "2", "--pp", "2"], "--pp 2 has one gradient a step, and measures no noise"),
        (&["--restarts", "1", "--save", "in:new", "--resume", "in:new"], "--restarts is for --launch processes"),
        (&["--restarts", "1"], "--resume"),
        (&["--dp", "2", "--min-ranks", "1"], "give --restarts"),
        (&["--colour"], "--colour"),
        (&["--schedule", "gpipe"], "--schedule gpipe is for pipelines: give --pp"),
        (&["--pp", "64"], "--pp 64 with schedule 1f1b makes 64 stages, more than the 10 blocks of a model of 4 layers"),
    ] {
        refused(&directory, flags, what);
    }
    directory.write("strategy.toml", b"pp = 2\n[pipeline]\nmicro_batches = 100\n");
    let many = ["--strategy", "in:strategy.toml", "--batch", "8"];
    refused(&directory, &many, "`pipeline.micro_batches = 100` is more than the 8 rows");
    directory.write("strategy.toml", b"tp = 5\n[tensor]\nplan = 'hugging_face'\n");
    refused(&directory, &["--strategy", "in:strategy.toml"], "`tp = 5` of --strategy: ");
    fs::create_dir_all(directory.path().join("old/model")).unwrap();
    let of_nobody = "old: there is a model already, and no checkpoint of its run: give another directory";
    refused(&directory, &["--save", "in:old"], of_nobody);
    refused(&directory, &["--save", "in:old", "--resume", "in:old"], of_nobody);
    let one = |run: &str| directory.path().join(run).join("checkpoints/step-000000003");
    // What is only called like a checkpoint is none.
    fs::create_dir_all(one("old")).unwrap();
    refused(&directory, &["--save", "in:old"], of_nobody);
    fs::write(one("old").join("checkpoint.json"), "").unwrap();
    refused(&directory, &["--save", "in:old"], "there are checkpoints already: give --resume");
    fs::create_dir_all(one("begun")).unwrap();
    refused(&directory, &["--resume", "in:begun"], "begun: there is no checkpoint");
    refused(&directory, &["--resume", "in:begun/checkpoints"], "begun/checkpoints: there is no checkpoint");
    fs::write(one("begun").join("checkpoint.json"), "").unwrap();
    let begun = directory.path().join("begun");
    let said = format!("give --resume {} --resume-step 3", begun.display());
    refused(&directory, &["--resume", "in:begun/checkpoints/step-000000003"], &said);
    let said = format!("begun/checkpoints: it is where a run has its checkpoints: give --resume {}", begun.display());
    refused(&directory, &["--resume", "in:begun/checkpoints"], &said);
}

/// What the model or the replicas say to a file comes when ranks have started.
#[test]
fn a_strategy_that_does_not_suit_the_model_is_refused() {
    let directory = prepared();
    for (text, what) in [
        ("pp = 2\n[pipeline]\nmicro_batches = 2\ncut = { before = ['nowhere.*'] }\n", "pattern `nowhere.*` of the cut"),
        (
            "dp = 2\n[data]\nsharding = 'optimizer'\nsharding_ranks = 3\n",
            "set `sharding_ranks` to a number that divides 2",
        ),
        ("dp = 2\n[data]\nbucket_bytes = 0\n", "`bucket_bytes` is 0"),
        ("pp = 2\n[pipeline]\nmicro_batches = 2\nwhole_inputs = ['9']\n", "the step has no input `9` to give whole"),
    ] {
        directory.write("strategy.toml", text.as_bytes());
        let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "4", "--strategy", "in:strategy.toml"];
        for more in [&[][..], &["--dry-run"]] {
            let output = finetune(&directory, &[&flags[..], more].concat());
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{text}: {stderr}");
            // What the data is was told before.
            let last = stderr.lines().last().unwrap();
            assert!(output.stdout.is_empty(), "{text}");
            assert!(last.starts_with("finetune: ") && last.contains(what), "{text}: {stderr}");
        }
    }
}

/// A run goes on with the model that it began with, or the flag is named that makes another.
#[test]
fn flags_that_make_another_model_than_the_checkpoint_are_refused() {
    let directory = prepared();
    let run =
        ["--data", "in:data.jsonl", "--seq", "64", "--batch", "2", "--lora-targets", "q_proj,v_proj", "--lora", "2"];
    let output = finetune(&directory, &[&run[..], &["--steps", "1", "--save", "in:saved"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let resume = |flags: &[&str], code: i32, what: &str| {
        let seq: &[&str] = if flags.contains(&"--seq") { &[] } else { &["--seq", "64"] };
        let flags = [&["--data", "in:data.jsonl", "--batch", "2", "--resume", "in:saved"][..], seq, flags].concat();
        let output = finetune(&directory, &[&flags[..], &["--steps", "2"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {stderr}");
        let last = stderr.lines().last().unwrap();
        assert!(last.contains(what) && last.len() < 300, "{flags:?}: {stderr}");
    };
    let targets = ["--lora-targets", "v_proj,q_proj"];
    for (flags, what) in [
        (&["--lora", "2", "--lora-alpha", "9"][..], "--lora-alpha 9 makes another model than --resume"),
        (&["--lora", "4"], "saved with --lora 2"),
    ] {
        resume(&[&targets[..], flags].concat(), 2, what);
    }
    resume(&[], 2, "leaving out --lora makes another model");
    // All of it at once.
    resume(
        &["--lora", "4", "--lora-targets", "k_proj"],
        2,
        "--lora 4 and --lora-targets k_proj make another model than",
    );
    resume(&[&targets[..], &["--seq", "32", "--lora", "4"]].concat(), 2, "--lora 2; --resume");
    resume(&["--lora", "2", "--lora-targets", "k_proj"], 2, "saved with --lora-targets q_proj,v_proj");
    let file = directory.path().join("model.safetensors");
    let mut weights = fs::read(&file).unwrap();
    let (original, place) = (weights.clone(), weights.len() - 4);
    weights[place] ^= 1;
    fs::write(&file, weights).unwrap();
    resume(&[&targets[..], &["--lora", "2"]].concat(), 2, "has other weights or another config than");
    fs::write(&file, original).unwrap();
    resume(&[&targets[..], &["--lora", "2"]].concat(), 0, "step 2");
}

/// What goes wrong on the way is no nonsense: exit code 1.
#[test]
fn ranks_that_fail_end_the_run_with_code_1() {
    let directory = prepared();
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "2", "--steps", "1", "--dp", "2"];
    let output = command(&directory, &flags).env("BURN_PARALLEL_TIMEOUT_S", "0.000001").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty() && stderr.contains("finetune: time-out"), "{stderr}");
}

#[test]
fn data_that_makes_no_sense_is_refused_with_its_line() {
    let directory = prepared();
    directory.write("bad.jsonl", b"{\"text\": \"a\"}\n{\"text\": 3}\n");
    refused(&directory, &["--data", "in:bad.jsonl"], "bad.jsonl:2: `text` is not a text");
    refused(&directory, &["--eval", "in:bad.jsonl"], "bad.jsonl:2: `text` is not a text");
    refused(&directory, &["--data", "in:nowhere.txt"], "nowhere.txt");
    let good: &[u8] = b"\xef\xbb\xbf{\"text\": \"a\"}\r\n\r\n";
    for (bad, what) in [
        (&b"{\"text\": \"b\"\r\n"[..], "ends.jsonl:3: is not JSON: EOF while parsing an object, column 12"),
        (b"{\"text\": \"\xe9\"}\n", "ends.jsonl:3: is not UTF-8: its byte 11 is the first bad one"),
    ] {
        directory.write("ends.jsonl", &[good, bad].concat());
        refused(&directory, &["--data", "in:ends.jsonl"], what);
    }
    let endless = directory.write("endless.jsonl", good);
    fs::OpenOptions::new().append(true).open(endless).unwrap().set_len(65 << 20).unwrap();
    refused(&directory, &["--data", "in:endless.jsonl"], "endless.jsonl:3: has more than 67108864 bytes");
    fs::remove_file(directory.path().join("chat_template.jinja")).unwrap();
    refused(&directory, &[], ": has `messages`, and the model has no chat template");
}

/// Training goes by the config: a head of its own that is there would be lost, one that is not there drawn.
#[test]
fn a_head_that_is_not_as_the_config_says_is_refused() {
    let directory = prepared_with("qwen2_tied");
    let (config, weights) = (directory.path().join("config.json"), directory.path().join("model.safetensors"));
    let (said, bytes) = (fs::read_to_string(&config).unwrap(), fs::read(&weights).unwrap());
    let untied = said.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(untied, said);
    directory.write("config.json", untied.as_bytes());
    refused(
        &directory,
        &[],
        "`tie_word_embeddings` false, or not at all, and the weights have no lm_head.weight: set it",
    );
    directory.write("config.json", said.as_bytes());

    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    let with_head = |head: &[u8]| {
        let head = TensorView::new(embedding.dtype(), embedding.shape().to_vec(), head).unwrap();
        let all = tensors.tensors().into_iter().chain([("lm_head.weight".into(), head)]);
        directory.write("model.safetensors", &safetensors::serialize(all, None).unwrap());
    };
    let mut other = embedding.data().to_vec();
    *other.last_mut().unwrap() ^= 1;
    with_head(&other);
    let what =
        "`tie_word_embeddings` true, and the weights have a lm_head.weight that is not model.embed_tokens.weight";
    refused(&directory, &[], what);
    // What is there twice is read once.
    with_head(embedding.data());
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--dry-run"];
    let output = finetune(&directory, &flags);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_directory_that_makes_no_sense_is_refused() {
    let directory = prepared();
    let config = fs::read_to_string(directory.path().join("config.json")).unwrap();
    let with = |from: &str, to: &str, what: &str| {
        let changed = config.replace(from, to);
        assert_ne!(changed, config);
        directory.write("config.json", changed.as_bytes());
        refused(&directory, &[], what);
    };
    with("{\n", "\n", "config.json");
    with("\"llama\"", "\"mamba\"", "mamba");
    with("\"vocab_size\": 512", "\"vocab_size\": 500", "does not fit");
    with("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5", "there is nothing for model.layers.4");
    with("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3", "the weights have more: model.layers.3.");
    directory.write("config.json", config.as_bytes());
    let tokenizer = directory.path().join("tokenizer.json");
    let letters: Vec<String> = ('a'..='t').map(String::from).collect();
    let pairs: Vec<(&str, &str)> = letters.iter().flat_map(|a| letters.iter().map(move |b| (&**a, &**b))).collect();
    fs::copy(Directory::new(&pairs).path().join("tokenizer.json"), &tokenizer).unwrap();
    refused(&directory, &[], "the tokenizer has 659 tokens, of which the model knows 512");
    fs::write(&tokenizer, "{}").unwrap();
    refused(&directory, &[], "tokenizer.json");
    fs::write(directory.path().join("model.safetensors"), "no tensors").unwrap();
    refused(&directory, &[], "model.safetensors");
    fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    refused(&directory, &[], "finetune-");
}
