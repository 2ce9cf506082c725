//! What a run is given, looked through before there are ranks: what is wrong with it is the user's to know at once.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use burn_parallel::hf::{self, Mapping};

use crate::args::{Args, Length};
use crate::base;
use crate::data::set::DataSet;
use crate::data::source::Reading;

/// What a run is given.
pub struct Input {
    pub reading: Arc<Reading>,
    /// How many parameters the model has.
    pub parameters: usize,
    /// The tensors of the directory that the model does not have.
    left: Vec<String>,
    /// What the weights and the config of the directory are.
    pub base: u64,
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
        let input = Self { data, eval, prompt: prompt.transpose()?, reading, parameters, left, base };
        match (args.warmup, input.steps(args)) {
            (warmup, steps) if warmup > steps => {
                Err(format!("--warmup {warmup} is more than the {steps} steps of the whole run"))
            }
            _ => Ok(input),
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
/// that its config describes. Counts them, and gives the names of those that are left over. Nothing of them is read.
fn weights(args: &Args) -> Result<(usize, Vec<String>), String> {
    let dir = args.model.display();
    let wrong = |why: String| format!("{dir}: {}", why.replace('\n', " "));
    let weights = hf::open(&args.model).map_err(|why| wrong(why.to_string()))?;
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
