//! What a run is given, looked through before there are ranks: what is wrong with it is the user's to know at once.

use std::iter;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use burn_parallel::hf::{self, Mapping, Weights};
use burn_parallel::params::SliceSource;
use burn_parallel::prelude::*;

use crate::args::{Args, Length};
use crate::base;
use crate::common::given::Given;
use crate::data::set::DataSet;
use crate::data::source::Reading;

/// The output layer of a directory, and what it is if it is tied.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// What a run is given.
pub struct Input {
    pub reading: Arc<Reading>,
    /// How many parameters the model has.
    pub parameters: usize,
    /// The tensors of the directory that the model does not have.
    left: Vec<String>,
    /// What the weights and the config of the directory are, and the config alone.
    pub base: u64,
    config: u64,
    pub data: DataSet,
    pub eval: Option<DataSet>,
    /// The tokens of the prompt.
    pub prompt: Option<Vec<u32>>,
}

impl Input {
    /// Looks through the model's directory and the data.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn open(args: &Args) -> Result<Self, String> {
        let (parameters, left) = weights(args)?;
        let base = base::fingerprint(&args.model, &args.config)?;
        let config = base::config_fingerprint(&args.config);
        let reading = Arc::new(Reading::open(&args.model)?);
        let (words, known) = (reading.tokenizer.words(), args.config.vocab);
        if words > known {
            let dir = args.model.display();
            return Err(format!("{dir}: the tokenizer has {words} tokens, of which the model knows {known}"));
        }
        let open = |path: &Path| DataSet::open(path, args.seq, args.packed, args.seed, reading.clone());
        let data = open(&args.data)?;
        let eval = args.eval.as_deref().map(open).transpose()?;
        let prompt = args.prompt.as_ref().map(|prompt| {
            let tokens = reading.prompt(&prompt.text, data.conversations())?;
            let most = args.config.positions;
            match tokens.len() {
                0 => Err("--generate: the prompt is empty".to_owned()),
                found if found >= most => {
                    Err(format!("--generate: the prompt has {found} tokens, and the model was made for {most}"))
                }
                _ => Ok(tokens),
            }
        });
        let input = Self { data, eval, prompt: prompt.transpose()?, reading, parameters, left, base, config };
        input.check_steps(args)?;
        Ok(input)
    }

    /// What was given, with what was read: each rank reads the files for itself.
    pub fn with_read(&self, given: Given) -> Given {
        let rows = |set: &DataSet| format!("{} of xxh3 {:016x}", set.rows(), set.fingerprint());
        // That of the config is compared first.
        let given = given.with("config.json of --model", format!("xxh3 {:016x}", self.config));
        let given = given.with("weights of --model", format!("xxh3 {:016x}", self.base));
        let given = given.with("rows of --data", rows(&self.data));
        given.with("rows of --eval", self.eval.as_ref().map(rows))
    }

    /// What is wrong with the flags for a run of so many steps as the data gives.
    pub fn check_steps(&self, args: &Args) -> Result<(), String> {
        match (args.warmup, self.steps(args)) {
            (warmup, steps) if warmup > steps => {
                Err(format!("--warmup {warmup} is more than the {steps} steps of the whole run"))
            }
            _ => Ok(()),
        }
    }

    /// The row before which the run ends.
    pub fn end(&self, args: &Args) -> u64 {
        match args.length {
            Length::Steps(_) => u64::MAX,
            Length::Epochs(epochs) => self.data.rows() * epochs as u64,
        }
    }

    /// How many steps the run has.
    pub fn steps(&self, args: &Args) -> usize {
        match args.length {
            Length::Steps(steps) => steps,
            Length::Epochs(_) => self.data.batches(0, self.end(args), args.size),
        }
    }

    /// What the data is, in a line; and in another what of the directory is not read.
    pub fn said(&self) -> String {
        let (data, left) = (&self.data, self.data.left());
        let mut said =
            format!("{} documents, {} tokens in {} rows an epoch", data.documents(), data.tokens(), data.rows());
        if left.cut > 0 {
            said += &format!("; {} longer than a row are cut off", left.cut);
        }
        if left.dropped > 0 {
            said += &format!("; {} without anything to train on are left out", left.dropped);
        }
        if let Some(first) = self.left.first() {
            let (count, more) = (self.left.len(), if self.left.len() == 1 { "" } else { ", .." });
            said += &format!("\nof the weights {count} are not read, which the model does not have: {first}{more}");
        }
        said
    }
}

/// Makes sure that the model can be split as it is to be, and that the weights in the directory are those of the model
/// that its config describes. Counts them, and gives the names of those that are left over. Reads none but those of an
/// output layer that is to be the embedding.
fn weights(args: &Args) -> Result<(usize, Vec<String>), String> {
    let dir = args.model.display();
    let wrong = |why: String| format!("{dir}: {}", why.replace('\n', " "));
    let mut weights = hf::open(&args.model).map_err(|why| wrong(why.to_string()))?;
    let model = args.config.init(&Device::flex());
    if args.axes.tp > 1 {
        let split = args.strategy.tensor.plan.table(&model, args.axes.tp);
        let said = args.axes.said("tp", args.axes.tp);
        split.map_err(|why| format!("{said}: {}", why.to_string().replace('\n', " ")))?;
    }
    let compared = hf::compare(&model, &weights, &Mapping::llama()).map_err(|why| wrong(why.to_string()))?;
    if let Some(unfit) = compared.unfit.first() {
        return Err(wrong(format!("{} does not fit {}: {}", unfit.tensors.join(", "), unfit.path, unfit.problem)));
    }
    if let Some((path, hint)) = compared.missing.first() {
        let hint = if hint.is_empty() { String::new() } else { format!(": {hint}") };
        return Err(wrong(format!("there is nothing for {path}{hint}")));
    }
    check_head(&mut weights, args.config.tied).map_err(wrong)?;
    // Other tensors may be left, as tables that are computed here; a layer is part of the model.
    let beyond = |name: &str| {
        let number = name.split_once("layers.").and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
        number.is_some_and(|number| number >= args.config.layers)
    };
    if let Some(name) = compared.left.iter().find(|name| beyond(name)) {
        let layers = args.config.layers;
        return Err(wrong(format!("config.json has `num_hidden_layers` {layers}, and the weights have more: {name}")));
    }
    Ok((compared.matched.iter().map(|found| found.dims.iter().product::<usize>()).sum(), compared.left))
}

/// Makes sure that the output layer is what the config says: a layer of its own, or the embedding once more.
fn check_head(weights: &mut Weights, tied: bool) -> Result<(), String> {
    match (tied, weights.tensor_dims(HEAD).is_some()) {
        (false, false) => Err(format!(
            "config.json has `tie_word_embeddings` false, or not at all, and the weights have no {HEAD}: set it to true if the embedding is the output layer"
        )),
        (true, true) if !equal(weights, HEAD, EMBEDDING).map_err(|why| why.to_string())? => Err(format!(
            "config.json has `tie_word_embeddings` true, and the weights have a {HEAD} that is not {EMBEDDING}: set it to false to train both"
        )),
        _ => Ok(()),
    }
}

/// Whether two tensors, most of them matrices, are equal. Reads some rows at a time, up to where they differ.
fn equal(weights: &mut Weights, one: &str, other: &str) -> Result<bool, Error> {
    const ELEMENTS: usize = 1 << 20;
    let dims = weights.tensor_dims(one).map_or(Vec::new(), <[usize]>::to_vec);
    if weights.tensor_dims(other) != Some(&dims) || weights.tensor_dtype(one) != weights.tensor_dtype(other) {
        return Ok(false);
    }
    let [rows, rest @ ..] = &dims[..] else { return Ok(false) };
    let at_once = (ELEMENTS / rest.iter().product::<usize>().max(1)).max(1);
    for from in (0..*rows).step_by(at_once) {
        let ranges: Vec<_> =
            iter::once(from..(from + at_once).min(*rows)).chain(rest.iter().map(|size| 0..*size)).collect();
        if weights.read(one, &ranges)?.as_bytes() != weights.read(other, &ranges)?.as_bytes() {
            return Ok(false);
        }
    }
    Ok(true)
}
