//! What a run begins with: a model, and the adapters that it is given.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::args::Args;
use crate::common::saving::other_model;
use crate::input::Input;
use crate::lora::LoraConfig;
use crate::model::{Autocast, LlamaConfig};

/// How many pieces of a file are read, and how many bytes of each: enough to tell any training of it.
const PIECES: u64 = 64;
const PIECE: u64 = 16 << 10;

/// A number that is another for another config.
pub fn config_fingerprint(config: &LlamaConfig) -> u64 {
    // What products are computed in may change.
    xxh3_64(format!("{:?}", LlamaConfig { autocast: Autocast::default(), ..*config }).as_bytes())
}

/// A number that is another for other weights or another config, wherever they are. Of a large file pieces are read.
///
/// # Errors
/// The file that cannot be read, in one line.
pub fn fingerprint(dir: &Path, config: &LlamaConfig) -> Result<u64, String> {
    let mut hash = Xxh3::new();
    // What products are computed in may change.
    hash.update(format!("{:?}", LlamaConfig { autocast: Autocast::default(), ..*config }).as_bytes());
    let entries = fs::read_dir(dir).map_err(|why| format!("{}: {why}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|ending| ending == "safetensors"));
    files.sort();
    for file in files {
        add(&file, &mut hash).map_err(|why| format!("{}: {why}", file.display()))?;
    }
    Ok(hash.digest())
}

fn add(file: &Path, hash: &mut Xxh3) -> io::Result<()> {
    let mut file = File::open(file)?;
    let len = file.metadata()?.len();
    hash.update(&len.to_le_bytes());
    let mut bytes = Vec::new();
    if len <= PIECES * PIECE {
        file.read_to_end(&mut bytes)?;
        hash.update(&bytes);
        return Ok(());
    }
    for piece in 0..PIECES {
        file.seek(SeekFrom::Start((len - PIECE) / (PIECES - 1) * piece))?;
        bytes.clear();
        file.by_ref().take(PIECE).read_to_end(&mut bytes)?;
        hash.update(&bytes);
    }
    Ok(())
}

/// What the model of a run is made of. Its checkpoints hold it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MadeOf {
    /// The directory of `--model`, and what is in it.
    model: PathBuf,
    base: u64,
    lora: Option<Adapters>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Adapters {
    rank: usize,
    alpha: f64,
    targets: Vec<String>,
}

impl Adapters {
    fn of(config: &LoraConfig) -> Self {
        let LoraConfig { rank, alpha, mut targets, .. } = config.clone();
        targets.sort();
        targets.dedup();
        Self { rank, alpha, targets }
    }

    /// Whether the scale is the one that goes with the rank if none is given.
    fn by_rank(&self) -> bool {
        self.alpha == 2.0 * self.rank as f64
    }
}

impl MadeOf {
    pub fn of(args: &Args, input: &Input) -> Self {
        Self { model: args.model.clone(), base: input.base, lora: args.lora.as_ref().map(Adapters::of) }
    }

    /// What a run that is resumed from `dir` does not go on with, each in one line: the flags that change the model,
    /// and the model that it is fine-tuned from.
    pub fn compare(&self, was: &Self, dir: &Path) -> Vec<String> {
        let mut changed = Vec::new();
        let mut flag = |name: &str, now: &dyn Display, before: &dyn Display| {
            changed.push((format!("--{name} {now}"), format!("with --{name} {before}")));
        };
        match (&self.lora, &was.lora) {
            (None, None) => {}
            (Some(now), None) => changed.push((format!("--lora {}", now.rank), "without --lora".into())),
            (None, Some(was)) => changed.push(("leaving out --lora".into(), format!("with --lora {}", was.rank))),
            (Some(now), Some(was)) => {
                if now.rank != was.rank {
                    flag("lora", &now.rank, &was.rank);
                }
                if now.alpha != was.alpha && !(now.by_rank() && was.by_rank()) {
                    flag("lora-alpha", &now.alpha, &was.alpha);
                }
                if now.targets != was.targets {
                    flag("lora-targets", &now.targets.join(","), &was.targets.join(","));
                }
            }
        }
        let mut all: Vec<String> = other_model(dir, &changed).into_iter().collect();
        if self.base != was.base {
            all.push(format!(
                "--model {} has other weights or another config than the model of --resume {}, which was {} then",
                self.model.display(),
                dir.display(),
                was.model.display()
            ));
        }
        all
    }
}
