//! Text as bytes, and the batches that are drawn from it.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::comm::part;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xxhash_rust::xxh3::xxh3_64;

/// Every byte is a token.
pub const VOCAB: usize = 256;

/// The text that is used when none is named: written for this project.
const OWN: &str = include_str!("text.txt");

/// A text to learn from, of which the last tenth is held out to test what was learned.
pub struct Text {
    bytes: Vec<u8>,
    train: usize,
    seq: usize,
}

impl Text {
    /// Reads a text, or takes the project's own, to learn from in rows of `seq` tokens.
    pub fn load(path: Option<&Path>, seq: usize) -> Result<Self, String> {
        let Some(path) = path else { return Self::new(OWN.into(), seq).map_err(|why| format!("the text {why}")) };
        // Others may have no end, or wait for somebody who writes.
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(format!("cannot read the text {path:?}: it is not a file"));
        }
        let bytes = fs::read(path).map_err(|why| format!("cannot read the text {path:?}: {why}"))?;
        if let Err(why) = std::str::from_utf8(&bytes) {
            return Err(format!("the text {path:?} is not UTF-8: its first bad byte is number {}", why.valid_up_to()));
        }
        Self::new(bytes, seq).map_err(|why| format!("the text {path:?} {why}"))
    }

    fn new(bytes: Vec<u8>, seq: usize) -> Result<Self, String> {
        match bytes.len() {
            0 => return Err("is empty".into()),
            n if n <= seq => {
                return Err(format!("has {n} bytes, fewer than the {} that --seq {seq} needs (one more)", seq + 1));
            }
            _ => {}
        }
        // A text that is too short to hold out even one row is trained on as a whole.
        let tenth = bytes.len() / 10;
        let train = if tenth > seq { bytes.len() - tenth } else { bytes.len() };
        Ok(Self { bytes, train, seq })
    }

    /// How many bytes there are to learn from, and how many are held out.
    pub fn split(&self) -> (usize, usize) {
        (self.train, self.bytes.len() - self.train)
    }

    /// What tells the text from others, wherever it is.
    pub fn fingerprint(&self) -> String {
        format!("{} of xxh3 {:016x}", self.bytes.len(), xxh3_64(&self.bytes))
    }

    /// How many rows there are to learn from that share no target.
    pub fn rows_apart(&self) -> usize {
        (self.train - 1) / self.seq
    }

    /// The rows of `rank`, one of `ranks`, of the global batch number `step`: each row is `seq + 1` bytes.
    ///
    /// The rows of a global batch depend on the seed and the step alone, so that any number of ranks trains on the
    /// same; a rank takes its contiguous part of them, and the parts differ by one row at most.
    pub fn rows(&self, seed: u64, step: usize, batch: usize, rank: usize, ranks: usize) -> Vec<&[u8]> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step as u64);
        let starts: Vec<u64> = (0..batch).map(|_| rng.random_range(0..(self.train - self.seq) as u64)).collect();
        let row = |start: &u64| &self.bytes[*start as usize..][..=self.seq];
        starts[part(batch, ranks, rank)].iter().map(row).collect()
    }

    /// Up to `most` rows of the held-out text, evenly spaced and the same at every call.
    pub fn held_out(&self, most: usize) -> Vec<&[u8]> {
        let text = &self.bytes[self.train..];
        let count = most.min(text.len() / (self.seq + 1));
        (0..count).map(|i| &text[i * text.len() / count..][..=self.seq]).collect()
    }
}

/// Rows of bytes as the tokens that a model sees and the targets that it is to predict, each `[rows, seq]`.
pub fn tensors(rows: &[&[u8]], device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let seq = rows[0].len() - 1;
    let tensor = |part: fn(&[u8]) -> &[u8]| {
        let tokens: Vec<i64> = rows.iter().flat_map(|row| part(row)).map(|&byte| byte.into()).collect();
        Tensor::from_data(TensorData::new(tokens, [rows.len(), seq]), device)
    };
    (tensor(|row| &row[..row.len() - 1]), tensor(|row| &row[1..]))
}
