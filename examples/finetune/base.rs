//! What a run begins with: a model, and the adapters that it is given.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::args::Args;
use crate::input::Input;
use crate::lora::LoraConfig;
use crate::model::{Autocast, LlamaConfig};

/// How many pieces of a file are read, and how many bytes of each: enough to tell any training of it.
const PIECES: u64 = 64;
const PIECE: u64 = 16 << 10;

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
}

impl MadeOf {
    pub fn of(args: &Args, input: &Input) -> Self {
        Self { model: args.model.clone(), base: input.base, lora: args.lora.as_ref().map(Adapters::of) }
    }

    /// Demands that a run which is resumed from `dir` goes on with the same.
    ///
    /// # Errors
    /// The flags that change the model, in one line.
    pub fn compare(&self, was: &Self, dir: &Path) -> Result<(), String> {
        let dir = dir.display();
        let (now, before) = match (&self.lora, &was.lora) {
            (None, None) => Default::default(),
            (Some(now), None) => (format!("--lora {}", now.rank), "without --lora".into()),
            (None, Some(was)) => ("leaving out --lora".into(), format!("with --lora {}", was.rank)),
            (Some(now), Some(was)) if now.rank != was.rank => {
                (format!("--lora {}", now.rank), format!("with --lora {}", was.rank))
            }
            (Some(now), Some(was)) if now.alpha != was.alpha => {
                (format!("--lora-alpha {}", now.alpha), format!("with --lora-alpha {}", was.alpha))
            }
            (Some(now), Some(was)) if now.targets != was.targets => {
                let flag = |adapters: &Adapters| format!("--lora-targets {}", adapters.targets.join(","));
                (flag(now), format!("with {}", flag(was)))
            }
            _ => Default::default(),
        };
        if !now.is_empty() {
            return Err(format!("{now} makes another model than --resume {dir}, which was saved {before}"));
        }
        if self.base != was.base {
            return Err(format!(
                "--model {} has other weights or another config than the model of --resume {dir}, which was {} then",
                self.model.display(),
                was.model.display()
            ));
        }
        Ok(())
    }
}
